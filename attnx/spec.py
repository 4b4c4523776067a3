"""The contract that every mechanism meets.

A mechanism is a file `attnx/mechanisms/<family>/<name>.py` with a `Config`, a `Mixer` and one `SPEC`. It mixes tokens:
`[B, T, M] -> [B, T, M]`. State is an explicit pytree that the mechanism owns: training passes none; prefill and decode are
the same call with T > 1 or T = 1, and prefill plus steps equals the full pass.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict


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
    step: jax.Array | None = None  # int32 []: number of the training step, for what alternates; None outside training
    inputs: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # side inputs by name, see Spec.inputs
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what earlier layers published in this pass
    # ^ the model publishes 'embedding' [B, T, M], the input of its first layer, and may publish 'fixed', see models/fixed.py
    impl: str = dataclasses.field(default='auto', metadata={'static': True})  # implementation of the ops, see dispatch

    def side(self, name: str) -> jax.Array:
        """The side input `name`.

        Raises:
          ValueError: it was not given; names those that were.
        """
        return _find(self.inputs, name, 'side input', "give it to the model: inputs={'" + name + "': …}")

    def published(self, name: str) -> Any:
        """What an earlier layer published as `name`.

        Raises:
          ValueError: none did; names what there is.
        """
        return _find(self.shared, name, 'published value', 'put a layer that publishes it before this one')


def side_input(kind: str, batch: int, length: int) -> jax.ShapeDtypeStruct:
    """What `Spec.inputs` declares: 'int32 B T', 'float32 B T 2' or 'int32 B T ?' -> shape and dtype."""
    dtype, *letters = kind.removesuffix('?').split()
    return jax.ShapeDtypeStruct([{'B': batch, 'T': length}.get(c) or int(c) for c in letters], jnp.dtype(dtype))


def _find(given: Mapping[str, Any], name: str, what: str, remedy: str) -> Any:
    if name not in given:
        raise ValueError(f'no {what} {name!r} (there is: {", ".join(sorted(given)) or "none"}); {remedy}')
    return given[name]


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
    'effective': 'every field of the config changes what the mechanism does, or is refused',
    'golden': 'the parameter tree is the recorded one',
    'scale': 'builds abstractly at 1B scale',
    'learning': 'every parameter gets a gradient, and a step along it lowers the loss',
    'documented': 'the docstring has equation, paper, departures and cost',
}


class Output(NamedTuple):
    """What a mechanism returns; a pytree."""

    y: jax.Array  # [B, T, M]
    state: Any = None  # the successor of the state that was passed; None if none was
    aux: Mapping[str, jax.Array] = FrozenDict({})  # scalars; names ending in '_loss' are added to the training loss
    shared: Mapping[str, Any] = FrozenDict({})  # published to later layers of this pass, by name


class Mixer(nnx.Module):
    """Base class of mechanisms."""

    def __init__(self, config, dims: Dims, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """The state before the first token, with room for `capacity` tokens.

        None where nothing can be decoded; () where nothing of its own is kept, as in a layer that reads another's keys.
        """
        return None

    def __call__(self, x: jax.Array, ctx: Context, state: Any = None) -> Output:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One per mechanism file, last in it. `catalog` reads what is literal here without importing: paper, ops, state, causal,
    needs, inputs, limits."""

    module: type[Mixer]
    config: type
    paper: str  # arXiv id, or a full citation where there is none
    example: Any  # a tiny Config: width 32 must build it; a tuple of them: layers one after another, for what is shared
    ops: tuple[str, ...] = ()  # ops of attnx.ops whose implementations it uses
    state: str = 'none'  # what decoding keeps: kv, window, latent, matrix, vector, memory, empty; none: it can't
    causal: str = 'both'  # 'both', 'causal' or 'bidirectional': which Dims.causal it accepts
    needs: tuple[str, ...] = ()  # of 'memory', 'fixed_length'
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # ^ side input -> dtype and shape: 'int32 B T'; 'int32 B T ?' may be absent, for some configs
    publishes: Callable[[Any], tuple[str, ...]] = lambda config: ()  # config -> names of Output.shared
    reads: Callable[[Any], tuple[str, ...]] = lambda config: ()  # config -> names it takes from Context.shared
    documents: Callable[[Any], int | None] = lambda config: None  # config -> most documents of a packed row; None: any
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law or ability -> why it does not hold
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # ^ field of Config -> values of other fields under which it takes effect, and of itself where none can be made up
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
        if not hasattr(rngs, 'params'):  # no isinstance: early checks build without nnx
            raise ValueError(f'rngs must be nnx.Rngs, such as nnx.Rngs(0); given {rngs!r:.60}')
        return self.module(config, dims, rngs=rngs)

    @property
    def examples(self) -> tuple:
        return self.example if isinstance(self.example, tuple) else (self.example,)

    def build_example(self, dims: Dims, *, rngs: nnx.Rngs) -> Mixer:
        """The mixer of `example`; of several, a Chain."""
        mixers = [self.build(config, dims, rngs=rngs) for config in self.examples]
        return mixers[0] if len(mixers) == 1 else Chain(mixers)


class Chain(Mixer):
    """Mixers one after another, each reading the sum of what went before: x -> f(x), then g(x + f(x)), …"""

    def __init__(self, mixers):
        self.mixers = nnx.List(mixers)

    def init_state(self, batch, capacity, dtype=None):
        return tuple(m.init_state(batch, capacity, dtype) for m in self.mixers)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        states, y, aux = [], jnp.zeros_like(x), {}
        for number, mixer in enumerate(self.mixers):
            x = x + y
            out = mixer(x, ctx, None if state is None else state[number])
            y, aux = out.y, {**aux, **out.aux}
            ctx = dataclasses.replace(ctx, shared={**ctx.shared, **out.shared})
            states.append(out.state)
        return Output(y, None if state is None else tuple(states), aux)
