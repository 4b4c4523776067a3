"""Transformers whose layers name their mechanisms."""

from attnx.models.config import Layer, ModelConfig, StackConfig
from attnx.models.generate import generate
from attnx.models.transformer import ModelOutput, Transformer, build

__all__ = ['Layer', 'ModelConfig', 'ModelOutput', 'StackConfig', 'Transformer', 'build', 'generate']
