"""The contract that every mechanism meets.

A mechanism is a file `attnx/mechanisms/<family>/<name>.py` with a `Config`, a `Mixer` and one `SPEC`. It mixes tokens:
`[B, T, M] -> [B, T, M]`. State is an explicit pytree that the mechanism owns: training passes none; prefill and decode are
the same call with T > 1 or T = 1, and prefill plus steps equals the full pass.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dims:
    """What a model tells every mechanism when it is built. Static."""

    width: int  # model width M
    causal: bool = True  # token t reads tokens <= t only
    num_layers: int = 1  # depth of the stack, for constants that depend on it
    max_length: int = 2048  # the longest sequence of training, for what is tied to a length
    dtype: Any = jnp.float32  # of the computation; states, softmax and norms are float32 inside
    param_dtype: Any = jnp.float32  # of the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a mechanism sees beside its input, at call time. All fields are optional."""

    positions: jax.Array | None = None  # int32 [B, T]: position inside the document; None: 0, 1, … after the state
    segment_ids: jax.Array | None = None  # int32 [B, T]: document number, 0 = padding; None: one document, no padding
    memory: jax.Array | None = None  # [B, S, M]: a second sequence, for mechanisms that read one
    memory_mask: jax.Array | None = None  # bool [B, S]: True where memory is real
    key: jax.Array | None = None  # PRNG key for dropout; None: deterministic
    layer: int | jax.Array = 0  # index of this layer, 0-based; traced inside a scanned stack
    impl: str = dataclasses.field(default='auto', metadata={'static': True})  # implementation of the ops, see dispatch


# What every mechanism is tested for (tests/test_contract.py). A law is skipped only through `Spec.limits`, with a reason.
LAWS = {
    'shapes': '[B, T, M] -> [B, T, M] in the dtype of the computation, float32 and bfloat16',
    'finite': 'outputs and gradients are finite, a fully masked row included, where the output is that of no tokens',
    'jit': 'jit equals eager',
    'remat': 'recomputation equals storing, gradients included',
    'deterministic': 'a second run is bit-equal',
    'causal': 'causal mechanisms read no later token, by gradient and by perturbation; others do read later ones',
    'packing': 'documents of one row do not see each other, states and convolution windows included',
    'padding': 'the side on which a row is padded does not matter',
    'batch': 'rows of a batch are independent',
    'decode': 'prefill and steps equal the full pass, for any split, documents included',
    'state': 'a step keeps structure, shapes and dtypes of the state',
    'axes': 'every parameter has as many legal logical axes as dimensions, stacked ones too',
    'sharding': 'eight devices equal one, forward and gradients, documents included, under every preset',
    'context': 'a sequence cut over devices equals the whole one, likewise',
    'bfloat16': 'bfloat16 is within tolerance of float32',
    'config': 'the config round-trips, every field is commented, unknown keys are refused by name',
    'golden': 'the parameter tree is the recorded one',
    'scale': 'builds abstractly at 1B scale',
    'learning': 'every parameter gets a gradient, and a step along it lowers the loss',
    'documented': 'the docstring has equation, paper, departures and cost',
}


class Output(NamedTuple):
    y: jax.Array  # [B, T, M]
    state: Any = None  # the successor of the state that was passed; None if none was
    aux: Mapping[str, jax.Array] = MappingProxyType({})  # scalars; names ending in '_loss' are added to the training loss


class Mixer(nnx.Module):
    """Base class of mechanisms."""

    def __init__(self, config, dims: Dims, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """The state before the first token, with room for `capacity` tokens. None where nothing can be decoded."""
        return None

    def __call__(self, x: jax.Array, ctx: Context, state: Any = None) -> Output:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One per mechanism file, last in it. `catalog` reads `paper`, `ops`, `state`, `causal` and `limits` without importing."""

    module: type[Mixer]
    config: type
    paper: str  # arXiv id, or a full citation where there is none
    example: Any  # a tiny Config: width 32 must build it
    ops: tuple[str, ...] = ()  # ops of attnx.ops whose implementations it uses
    state: str = 'none'  # what decoding keeps: kv, window, latent, matrix, vector, memory, none
    causal: str = 'both'  # 'both', 'causal' or 'bidirectional': which Dims.causal it accepts
    needs: tuple[str, ...] = ()  # of 'memory', 'fixed_length'
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law or ability -> why it does not hold
    flops: Callable[[Any, Dims, int], float] = lambda config, dims, length: 0.0
    # ^ (config, dims, T) -> forward FLOPs a token of the mixing itself, beyond the 2 per parameter of the projections

    def build(self, config, dims: Dims, *, rngs: nnx.Rngs) -> Mixer:
        """Builds the mixer.

        Raises:
          ValueError: the mechanism can't serve `dims.causal`, or `config` is of another mechanism.
        """
        if not isinstance(config, self.config):
            raise ValueError(f'{self.module.__name__} takes {self.config.__qualname__}, was given {type(config)}')
        if self.causal != 'both' and dims.causal != (self.causal == 'causal'):
            asked = 'causal' if dims.causal else 'bidirectional'
            raise ValueError(f'{self.module.__name__} is {self.causal} only and can not serve a {asked} model')
        return self.module(config, dims, rngs=rngs)
