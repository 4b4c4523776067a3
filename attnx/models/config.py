"""The model's config, and the expansion of its layer pattern."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import catalog
from attnx import config as config_lib
from attnx.dispatch import nearest
from attnx.nn import mlp as mlp_lib
from attnx.nn.layers import NORMS
from attnx.spec import Dims, Spec

KINDS = ('decoder', 'encoder', 'encoder_decoder')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16, 'float64': jnp.float64}
REMAT = ('none', 'full', 'dots')


class Layer(NamedTuple):
    """What mixes tokens in one layer: a name, its spec and its config; and its MLP, where it is not the model's."""

    name: str
    spec: Spec
    config: Any
    mlp: mlp_lib.Config | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Which mechanism at which layer."""

    num_layers: int = 6
    pattern: tuple = ('gqa',)  # names of `mixers` or of mechanisms, repeated to num_layers
    overrides: Any = None  # single layers that differ: {17: 'a'}
    mlp_overrides: Any = None  # single layers whose MLP differs from model.mlp: {1: {'kind': 'moe', 'experts': 16}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(StackConfig):
    """A transformer whose layers name their token mixers."""

    kind: str = 'decoder'  # decoder, encoder, encoder_decoder
    vocab_size: int = 0  # tokens; 0: the task's
    input_dim: int = 0  # width of continuous inputs [B, T, input_dim] in place of tokens; 0: tokens
    num_classes: int = 0  # > 0: mean over tokens, then a classifier, in place of the language-model head
    width: int = 256  # M
    max_length: int = 0  # longest sequence of training; 0: the data's length
    mixers: dict = dataclasses.field(default_factory=dict)  # name -> {'kind': mechanism, …its Config}
    cross: str = 'cross_attention'  # encoder_decoder: the mixer that reads the encoder's output
    encoder: StackConfig = dataclasses.field(default_factory=StackConfig)  # encoder_decoder: the encoder's layers
    output: str = 'vocabulary'  # what logits are of: vocabulary; pointer: an encoder_decoder's source (OAT: 2407.13335)
    grid: int = 0  # pointer: rows and columns in which objects may lie
    mlp: mlp_lib.Config = dataclasses.field(default_factory=mlp_lib.Config)  # of every block
    conv_taps: int = 0  # a depthwise causal convolution of this many tokens before every mixer; 0: none (decoders only)
    norm: str = 'rmsnorm'  # rmsnorm, layernorm
    norm_position: str = 'pre'  # pre: x + f(norm x); post: norm(x + f(x))
    positions: str = 'none'  # added to the embeddings: none, learned, sinusoidal
    fixed: str = ''  # a sequence beside each row, see models/fixed.py: 'noise', or a text, whose bytes are repeated; '': none
    tie_embeddings: bool | None = None  # logits through the token embedding; None: where a model has both
    logit_softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: off
    dropout: float = 0.0  # of embeddings, mixer and MLP outputs, in training
    remat: str = 'none'  # recompute in the backward pass: none, dots (all but projections' products and ops), full
    unroll: int = 1  # repeats of the pattern that one turn of the loop over them holds; 0: all, no loop (slower to compile)
    dtype: str = 'float32'  # of the computation; parameters are float32
    impl: str = 'auto'  # implementation of every op, see attnx.dispatch

    def __post_init__(self):
        choices = {'kind': KINDS, 'norm': tuple(NORMS), 'norm_position': ('pre', 'post'), 'remat': REMAT}
        choices |= {'output': ('vocabulary', 'pointer')}
        choices |= {'dtype': tuple(DTYPES), 'positions': ('none', 'learned', 'sinusoidal')}
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f'unknown {key} {getattr(self, key)!r}; {nearest(getattr(self, key), valid)}')
        if self.width < 1 or self.num_layers < 1:
            raise ValueError(f'width {self.width} and num_layers {self.num_layers} must be positive')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout {self.dropout} is not in [0, 1)')
        if min(self.num_classes, self.vocab_size, self.input_dim, self.max_length, self.unroll, self.logit_softcap) < 0:
            raise ValueError('num_classes, vocab_size, input_dim, max_length, unroll and logit_softcap must not be negative')
        if self.conv_taps < 0 or (self.conv_taps and self.kind != 'decoder'):
            raise ValueError(f'conv_taps {self.conv_taps} must be at least 0, and 0 but for a decoder; kind is {self.kind!r}')
        if self.kind != 'encoder_decoder' and (self.encoder != StackConfig() or self.cross != 'cross_attention'):
            raise ValueError(f'encoder and cross belong to kind encoder_decoder; kind is {self.kind!r}')
        pointer = self.output == 'pointer'
        others = {'kind': 'encoder_decoder', 'positions': 'none', 'logit_softcap': 0.0, 'input_dim': 0, 'num_classes': 0}
        if pointer and (wrong := [name for name, value in others.items() if getattr(self, name) != value]):
            raise ValueError(f'output pointer needs {wrong[0]} {others[wrong[0]]!r}; given {getattr(self, wrong[0])!r}')
        if self.grid < 0 or pointer != (self.grid > 0) or (pointer and self.tie_embeddings is not None):
            raise ValueError(
                f'grid {self.grid} is of output pointer, which needs it, and has no embedding to tie: output is '
                f'{self.output!r}, tie_embeddings {self.tie_embeddings}'
            )
        if self.vocab_size and self.input_dim and self.num_classes:
            raise ValueError(f'a classifier of continuous inputs has no vocabulary; vocab_size is {self.vocab_size}')
        if self.tie_embeddings and not self.tied:
            raise ValueError('tie_embeddings: a classifier or a model of continuous inputs has no embedding to read logits by')
        if self.fixed and (self.kind == 'encoder_decoder' or self.input_dim):
            raise ValueError(f'fixed is a sequence of tokens in one stack; kind is {self.kind!r}, input_dim {self.input_dim}')
        if self.vocab_size and self.fixed != 'noise' and (high := max(self.fixed.encode(), default=0)) >= self.vocab_size:
            raise ValueError(f'fixed: its bytes are tokens, one is {high}; the vocabulary is 0…{self.vocab_size - 1}')
        used = {*self.pattern, *config_lib.as_dict(self.overrides, 'overrides').values()}
        if self.kind == 'encoder_decoder':
            used |= {self.cross, *self.encoder.pattern, *config_lib.as_dict(self.encoder.overrides, 'overrides').values()}
        for name, given in self.mixers.items():
            given = config_lib.as_dict(given, f'mixers.{name}')
            if name not in used and (fields := [k for k, v in given.items() if k != 'kind' and v is not None]):
                raise ValueError(
                    f'mixers.{name} sets {", ".join(fields)}, but no layer is a {name!r}; layers are {", ".join(sorted(used))}'
                )

    @property
    def tied(self) -> bool:
        """Whether logits go through the token embedding."""
        return self.tie_embeddings is not False and not self.num_classes and not self.input_dim

    def dims(self, *, causal: bool, num_layers: int) -> Dims:
        return Dims(
            width=self.width,
            causal=causal,
            num_layers=num_layers,
            max_length=self.max_length or 2048,
            dtype=DTYPES[self.dtype],
        )

    def layers(self) -> tuple[Layer, ...]:
        """The mixer of every layer of the decoder (or of an encoder-only model)."""
        found = self._expand(self, 'model')
        if self.fixed and not any('fixed' in layer.spec.reads(layer.config) for layer in found):
            raise ValueError(f'fixed={self.fixed!r}, but no layer reads it; static_queries with source fixed does')
        return found

    def encoder_layers(self) -> tuple[Layer, ...]:
        return self._expand(self.encoder, 'model.encoder')

    def check(self, length: int, build: Callable[[Callable], Any] | None = None) -> None:
        """Builds each of the mixers abstractly: raises the ValueError of what none of them can be.

        length: tokens of a row of the data. build: how to call what builds a mixer of `rngs`, if not so.
        """
        build = build or (lambda made: jax.eval_shape(lambda: made(rngs=nnx.Rngs(0))))
        both, dims = self.kind == 'encoder_decoder', dataclasses.replace(self, max_length=self.max_length or length).dims
        groups = [(self.layers(), self.kind != 'encoder')]
        groups += [(self.encoder_layers(), False), ((self.mixer(self.cross),), True)] if both else []
        for layers, causal in groups:
            of_layers = dims(causal=causal, num_layers=len(layers))
            for layer in {layer.name: layer for layer in layers}.values():
                try:
                    build(functools.partial(layer.spec.build, layer.config, of_layers))
                except ValueError as error:
                    raise ValueError(f'config.model: mixer {layer.name!r}: {error}') from None

    def check_packing(self, documents: int = 1) -> None:
        """Raises ValueError if a layer can't keep the documents of a packed row apart, at most `documents` of them."""
        encoder = self.encoder_layers() if self.kind == 'encoder_decoder' else ()
        for index, layer in enumerate((*self.layers(), *encoder)):
            most = 1 if (layer.mlp or self.mlp).looks_ahead else layer.spec.documents(layer.config)
            if most is not None and most < documents:
                raise ValueError(
                    f'layer {index} ({layer.name}) keeps {most} documents of a packed row apart, the data pack up to '
                    f"{documents}; give it as many, or one document a row: data.task.packing = 'off'"
                )
            if 'packing' in layer.spec.limits:
                raise ValueError(
                    f'layer {index} ({layer.name}) can not serve packed documents: {layer.spec.limits["packing"]}; '
                    "give it one document a row: data.task.packing = 'off'"
                )

    def side_inputs(self):
        """Yields (what reads it, name, dtype and shape as in `Spec.inputs`) of every side input."""
        if self.output == 'pointer':
            yield 'output pointer', 'places', 'int32 B T 3'
        encoder = self.encoder_layers() if self.kind == 'encoder_decoder' else ()
        for index, layer in enumerate((*self.layers(), *encoder)):
            of_mlp = {'task': 'int32 B T'} if (layer.mlp or self.mlp).tasks > 1 else {}
            for name, kind in {**layer.spec.inputs, **of_mlp}.items():
                yield f'layer {index} ({layer.name})', name, kind

    def check_inputs(self, given) -> None:
        """Raises ValueError if a layer needs a side input that is not among the names `given`."""
        known = {*given, *(() if self.input_dim else ('tokens',))}
        for reader, name, kind in self.side_inputs():
            if name not in known and not kind.endswith('?'):
                raise ValueError(
                    f'{reader} needs the side input {name!r} ({kind}), which the data does not have; it has: '
                    f'{", ".join(sorted(known)) or "none"}'
                )

    def _expand(self, stack: StackConfig, path: str) -> tuple[Layer, ...]:
        if isinstance(stack.pattern, str):
            raise ValueError(f"{path}.pattern = {stack.pattern!r}: expected a tuple of names, such as ('gla', 'gqa')")
        if not stack.pattern:
            raise ValueError(f'{path}.pattern is empty; give at least one name of model.mixers or of a mechanism')
        names = [stack.pattern[i % len(stack.pattern)] for i in range(stack.num_layers)]
        for layer, name in self._single(stack, path, 'overrides').items():
            names[layer] = name
        layers = [self.mixer(name) for name in names]
        for layer, given in self._single(stack, path, 'mlp_overrides').items():
            where = f'{path}.mlp_overrides[{layer}]'
            given = config_lib.as_dict(given, where)
            same = given.get('kind', self.mlp.kind) == self.mlp.kind  # another kind begins with its own defaults
            given = (config_lib.to_dict(self.mlp) if same else {}) | given
            layers[layer] = layers[layer]._replace(mlp=config_lib.build(mlp_lib.Config, given, where))
        layers, both = tuple(layers), self.kind == 'encoder' or stack is not self
        if not both and (ahead := [i for i, layer in enumerate(layers) if (layer.mlp or self.mlp).looks_ahead]):
            raise ValueError(f'{path}: the experts of layer {ahead[0]} look ahead (order, router): encoders alone have such')
        _check_shared(layers, len(stack.pattern), path, {'embedding', 'fixed'} if self.fixed else {'embedding'})
        return layers

    def _single(self, stack: StackConfig, path: str, name: str) -> dict:
        """The entries of `overrides` or `mlp_overrides`, which name single layers."""
        found = config_lib.as_dict(getattr(stack, name), f'{path}.{name}')
        for layer in found:
            if not isinstance(layer, int) or not 0 <= layer < stack.num_layers:
                raise ValueError(f'{path}.{name}: layer {layer!r} is not an integer in [0, {stack.num_layers})')
        return found

    def mixer(self, name: str) -> Layer:
        """The mixer called `name`: an entry of `mixers`, or a mechanism with its default config."""
        mixers = {name: config_lib.as_dict(given, f'config.model.mixers.{name}') for name, given in self.mixers.items()}
        kind, given = catalog.resolve(name, mixers)
        spec = catalog.get(kind)
        return Layer(name, spec, config_lib.build(spec.config, given, f'config.model.mixers.{name}'))


def units(layers: tuple[Layer, ...], period: int) -> list[tuple[tuple[Layer, ...], int]]:
    """Cuts layers into (unit, repeats): equal neighbouring periods are one stack; an override ends one and begins another."""
    chunks = [layers[i : i + period] for i in range(0, len(layers), period)]
    found: list[tuple[tuple[Layer, ...], int]] = []
    for chunk in chunks:
        if found and found[-1][0] == chunk:
            found[-1] = (chunk, found[-1][1] + 1)
        else:
            found.append((chunk, 1))
    return found


def _check_shared(layers: tuple[Layer, ...], period: int, path: str, known: set[str]) -> None:
    """Raises ValueError if a layer reads what no earlier layer that it sees publishes."""
    index = 0
    for unit, repeats in units(layers, period):
        inside = set(known)
        for layer in unit:
            if missing := [name for name in layer.spec.reads(layer.config) if name not in inside]:
                raise ValueError(
                    f'{path}: layer {index} ({layer.name}) reads {missing[0]!r}, which no earlier layer of the same repeat '
                    f'of the pattern publishes; published before it: {", ".join(sorted(inside))}'
                )
            inside |= set(layer.spec.publishes(layer.config))
            index += 1
        index += (repeats - 1) * len(unit)
        known = inside if repeats == 1 else known
