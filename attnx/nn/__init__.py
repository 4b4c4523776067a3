"""Flax layers that mechanisms and models share."""

from attnx.nn.layers import (
    NORMS,
    LayerNorm,
    Linear,
    RMSNorm,
    ShortConv,
    dropout,
    l2_normalize,
    merge_heads,
    rms_normalize,
    split_heads,
)
from attnx.nn.mlp import MLP
from attnx.nn.params import flat_axes, from_flat, normal, param, stack, to_flat
from attnx.nn.state import Cache, Keys, Recurrent, attend_to, positions

__all__ = [
    'MLP', 'NORMS', 'Cache', 'Keys', 'LayerNorm', 'Linear', 'RMSNorm', 'Recurrent', 'ShortConv', 'attend_to', 'dropout',
    'flat_axes', 'from_flat', 'l2_normalize', 'merge_heads', 'normal', 'param', 'positions', 'rms_normalize',
    'split_heads', 'stack', 'to_flat',
]  # fmt: skip
