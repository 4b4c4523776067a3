"""The model's config, and the expansion of its layer pattern."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

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
    """What mixes tokens in one layer: a name, its spec and its config."""

    name: str
    spec: Spec
    config: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Which mechanism at which layer."""

    num_layers: int = 6
    pattern: tuple = ('gqa',)  # names of `mixers` or of mechanisms, repeated to num_layers
    overrides: Any = None  # single layers that differ: {17: 'a'}


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
    mlp: mlp_lib.Config = dataclasses.field(default_factory=mlp_lib.Config)  # of every block
    norm: str = 'rmsnorm'  # rmsnorm, layernorm
    norm_position: str = 'pre'  # pre: x + f(norm x); post: norm(x + f(x))
    positions: str = 'none'  # added to the embeddings: none, learned, sinusoidal
    tie_embeddings: bool = True  # logits through the token embedding
    logit_softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: off
    dropout: float = 0.0  # of embeddings, mixer and MLP outputs, in training
    remat: str = 'none'  # recompute in the backward pass: none, dots (keep matrix products), full
    dtype: str = 'float32'  # of the computation; parameters are float32
    impl: str = 'auto'  # implementation of every op, see attnx.dispatch

    def __post_init__(self):
        choices = {'kind': KINDS, 'norm': tuple(NORMS), 'norm_position': ('pre', 'post'), 'remat': REMAT}
        choices |= {'dtype': tuple(DTYPES), 'positions': ('none', 'learned', 'sinusoidal')}
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f'unknown {key} {getattr(self, key)!r}; {nearest(getattr(self, key), valid)}')
        if self.width < 1 or self.num_layers < 1:
            raise ValueError(f'width {self.width} and num_layers {self.num_layers} must be positive')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout {self.dropout} is not in [0, 1)')
        if min(self.num_classes, self.vocab_size, self.input_dim, self.max_length) < 0:
            raise ValueError('num_classes, vocab_size, input_dim and max_length must not be negative')
        if self.kind != 'encoder_decoder' and (self.encoder != StackConfig() or self.cross != 'cross_attention'):
            raise ValueError(f'encoder and cross belong to kind encoder_decoder; kind is {self.kind!r}')

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
        return self._expand(self, 'model')

    def encoder_layers(self) -> tuple[Layer, ...]:
        return self._expand(self.encoder, 'model.encoder')

    def check_packing(self) -> None:
        """Raises ValueError if a layer can't keep the documents of a packed row apart."""
        encoder = self.encoder_layers() if self.kind == 'encoder_decoder' else ()
        for index, layer in enumerate((*self.layers(), *encoder)):
            if 'packing' in layer.spec.limits:
                raise ValueError(
                    f'layer {index} ({layer.name}) can not serve packed documents: {layer.spec.limits["packing"]}; '
                    "give it one document a row: data.task.packing = 'off'"
                )

    def check_inputs(self, given) -> None:
        """Raises ValueError if a layer needs a side input that is not among the names `given`."""
        encoder = self.encoder_layers() if self.kind == 'encoder_decoder' else ()
        known = {*given, *(() if self.input_dim else ('tokens',))}
        for index, layer in enumerate((*self.layers(), *encoder)):
            for name, shape in layer.spec.inputs.items():
                if name not in known and not shape.endswith('?'):
                    raise ValueError(
                        f'layer {index} ({layer.name}) needs the side input {name!r} ({shape}), which the data does not '
                        f'have; it has: {", ".join(sorted(known)) or "none"}'
                    )

    def _expand(self, stack: StackConfig, path: str) -> tuple[Layer, ...]:
        if not stack.pattern:
            raise ValueError(f'{path}.pattern is empty; give at least one name of model.mixers or of a mechanism')
        names = [stack.pattern[i % len(stack.pattern)] for i in range(stack.num_layers)]
        for layer, name in config_lib.as_dict(stack.overrides, f'{path}.overrides').items():
            if not isinstance(layer, int) or not 0 <= layer < stack.num_layers:
                raise ValueError(f'{path}.overrides: layer {layer!r} is not an integer in [0, {stack.num_layers})')
            names[layer] = name
        layers = tuple(self.mixer(name) for name in names)
        _check_shared(layers, len(stack.pattern), path)
        return layers

    def mixer(self, name: str) -> Layer:
        """The mixer called `name`: an entry of `mixers`, or a mechanism with its default config."""
        if name in self.mixers:
            given = config_lib.as_dict(self.mixers[name], f'config.model.mixers.{name}')
            if 'kind' not in given:
                raise ValueError(f"config.model.mixers.{name} has no 'kind'; valid: {', '.join(catalog.scan())}")
            kind = given.pop('kind')
        else:
            kind, given = name, {}
            if kind not in catalog.scan():
                raise ValueError(
                    f'pattern names {name!r}, which is neither in model.mixers nor a mechanism; '
                    + nearest(name, [*self.mixers, *catalog.scan()])
                )
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


def _check_shared(layers: tuple[Layer, ...], period: int, path: str) -> None:
    """Raises ValueError if a layer reads what no earlier layer that it sees publishes."""
    known, index = {'embedding'}, 0
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
