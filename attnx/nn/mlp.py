"""Channel mixers: what follows the token mixer in a block."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.dispatch import nearest
from attnx.nn.layers import Linear, dropout
from attnx.nn.moe import MoE
from attnx.sharding import constrain
from attnx.spec import Dims

GATED = {'swiglu': jax.nn.silu, 'geglu': jax.nn.gelu}
PLAIN = {'gelu': jax.nn.gelu, 'boom': jax.nn.gelu, 'relu2': lambda x: jnp.square(jax.nn.relu(x)), 'relu': jax.nn.relu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The MLP of a block."""

    kind: str = 'swiglu'  # swiglu, geglu (gated: three matrices); gelu, relu2 (squared ReLU), relu (two); boom (one); moe; none
    hidden: int = 0  # hidden width, of each expert; 0: 8/3 of the width if gated, else 4 times, up to a multiple of 8
    bias: bool = False  # biases in the projections
    expert: str = 'swiglu'  # moe: kind of each expert
    experts: int = 8  # moe: how many
    top_k: int = 2  # moe: experts that each token is sent to
    capacity: float = 0.0  # moe: c: an expert takes c times its even share of a row's tokens, the rest pass by; 0: all
    router_z: float = 1e-3  # moe: weight of the router's z-loss
    balance: float = 1e-2  # moe: weight of the load-balance loss
    order: str = 'place'  # moe with a capacity: whom experts take: the first by place, or of highest probability (encoders)
    router: str = 'token'  # moe: token: each goes its way; row: all tokens of a row go one way, by a matrix for rows (encoders)
    gates: str = 'normed'  # moe: weight of the chosen: normed, plain probabilities, select: 1 (2503.02495)
    tasks: int = 1  # moe: routers, chosen among by the side input 'task' where more than 1 (Mod-Squad: 2306.17165)
    task_weight: float = 5e-4  # moe of several tasks: weight of the loss that ties tasks to experts

    def __post_init__(self):
        valid = (*GATED, *PLAIN, 'moe', 'none')
        if self.kind not in valid:
            raise ValueError(f'unknown mlp kind {self.kind!r}; {nearest(self.kind, valid)}')
        if self.expert not in (*GATED, *PLAIN):
            raise ValueError(f'unknown mlp expert {self.expert!r}; {nearest(self.expert, (*GATED, *PLAIN))}')
        if self.hidden < 0 or min(self.capacity, self.router_z, self.balance, self.task_weight) < 0:
            raise ValueError('mlp hidden, capacity, router_z, balance and task_weight must not be negative')
        if self.kind == 'moe' and not 1 <= self.top_k <= self.experts:
            raise ValueError(f'mlp top_k {self.top_k} must lie in [1, experts {self.experts}]')
        if self.gates not in ('normed', 'plain', 'select'):
            raise ValueError(f'unknown mlp gates {self.gates!r}; {nearest(self.gates, ("normed", "plain", "select"))}')
        for name, valid in (('order', ('place', 'probability')), ('router', ('token', 'row'))):
            if (given := getattr(self, name)) not in valid:
                raise ValueError(f'unknown mlp {name} {given!r}; {nearest(given, valid)}')
        if self.order == 'probability' and (not self.capacity or self.router == 'row'):
            raise ValueError("mlp order 'probability': experts choose where they have a capacity, among a router's tokens")
        if self.router == 'row' and (self.tasks > 1 or self.capacity):
            raise ValueError("mlp router 'row': the row is one choice, without tasks of tokens or capacities for them")
        if self.tasks < 1 or (self.tasks == 1 and self.task_weight != 5e-4):
            raise ValueError(f'mlp tasks {self.tasks} must be at least 1, and more for task_weight {self.task_weight}')
        if self.gates == 'plain' and self.top_k == 1:
            raise ValueError("mlp gates 'plain': with one expert a token they are plain as they are; leave them 'normed'")
        if self.kind == 'moe' and self.bias:
            raise ValueError('mlp bias: the experts of kind moe have none')
        ours = {f.name: f.default for f in dataclasses.fields(self)[3:]}
        if self.kind != 'moe' and (set_ := [name for name, default in ours.items() if getattr(self, name) != default]):
            raise ValueError(f'mlp {set_[0]} belongs to kind moe; kind is {self.kind!r}')
        if self.kind == 'none' and (self.hidden or self.bias):
            raise ValueError(f"mlp kind 'none' has no hidden width and no biases; given hidden {self.hidden}, bias {self.bias}")

    @property
    def looks_ahead(self) -> bool:
        """Whether where a token goes depends on later ones."""
        return self.order == 'probability' or self.router == 'row'

    def width(self, model_width: int) -> int:
        if self.kind == 'boom':
            if self.hidden % model_width:
                raise ValueError(f'mlp hidden {self.hidden} is no multiple of width {model_width}: boom sums such parts')
            return self.hidden or 4 * model_width
        kind = self.expert if self.kind == 'moe' else self.kind
        wanted = self.hidden or (8 * model_width / 3 if kind in GATED else 4 * model_width)
        return int(wanted) if self.hidden else -(-int(wanted) // 8) * 8


class MLP(nnx.Module):
    """down(act(gate x) * up x) if gated, else down(act(up x)); boom: gelu(up x) in parts as wide as x, summed (arXiv
    1911.11423). x [B, T, M]."""

    def __init__(self, config: Config, dims: Dims, *, rngs: nnx.Rngs):
        hidden = config.width(dims.width)
        into, out = ('embed', 'mlp'), ('mlp', 'embed')
        self.up = Linear(dims.width, hidden, into, dims, rngs=rngs, bias=config.bias)
        self.gate = Linear(dims.width, hidden, into, dims, rngs=rngs, bias=config.bias) if config.kind in GATED else None
        scale = (2 * dims.num_layers) ** -0.5
        down = lambda: Linear(hidden, dims.width, out, dims, rngs=rngs, bias=config.bias, scale=scale)
        self.down = None if config.kind == 'boom' else down()
        self.kind = config.kind

    def hidden(self, x: jax.Array) -> jax.Array:
        """x [B, T, M] -> [B, T, hidden], what `down` reads."""
        given = (self.up(x),) if self.gate is None else (self.gate(x), self.up(x))
        hidden = jax.checkpoint(PLAIN[self.kind] if self.gate is None else lambda g, u: GATED[self.kind](g) * u)
        # Computed again in the backward pass: an activation's derivative is as large as it, and dearer to store and read.
        return constrain(hidden(*given), ('batch', 'length', 'mlp'))

    def __call__(self, x: jax.Array, *, rate: float = 0.0, key: jax.Array | None = None, segment_ids=None, inputs=None):
        """x [B, T, M] -> (y [B, T, M], {}): nothing auxiliary; documents and side inputs are all the same to it."""
        hidden = self.hidden(x)
        if self.down is None:
            return dropout(hidden.reshape(*x.shape[:-1], -1, x.shape[-1]).sum(axis=-2), rate, key), {}
        return dropout(self.down(hidden), rate, key), {}


def build(config: Config, dims: Dims, *, rngs: nnx.Rngs) -> MLP | MoE | None:
    """The MLP that `config` names; None for 'none'."""
    if config.kind == 'none':
        return None
    if config.kind == 'moe':
        gated = config.expert in GATED
        return MoE(config, dims, (GATED if gated else PLAIN)[config.expert], gated, rngs=rngs)
    return MLP(config, dims, rngs=rngs)
