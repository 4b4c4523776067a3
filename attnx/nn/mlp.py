"""Channel mixers: what follows the token mixer in a block."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.dispatch import nearest
from attnx.nn.layers import Linear, dropout
from attnx.sharding import constrain
from attnx.spec import Dims

GATED = {'swiglu': jax.nn.silu, 'geglu': jax.nn.gelu}
PLAIN = {'gelu': jax.nn.gelu, 'boom': jax.nn.gelu, 'relu2': lambda x: jnp.square(jax.nn.relu(x)), 'relu': jax.nn.relu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The MLP of every block."""

    kind: str = 'swiglu'  # swiglu, geglu (gated: three matrices); gelu, relu2 (squared ReLU), relu (two); boom (one); none
    hidden: int = 0  # hidden width; 0: 8/3 of the width if gated, else 4 times, rounded up to a multiple of 8
    bias: bool = False  # biases in the projections

    def __post_init__(self):
        valid = (*GATED, *PLAIN, 'none')
        if self.kind not in valid:
            raise ValueError(f'unknown mlp kind {self.kind!r}; {nearest(self.kind, valid)}')
        if self.hidden < 0:
            raise ValueError(f'mlp hidden {self.hidden} is negative')

    def width(self, model_width: int) -> int:
        if self.kind == 'boom':
            if self.hidden % model_width:
                raise ValueError(f'mlp hidden {self.hidden} is no multiple of width {model_width}: boom sums such parts')
            return self.hidden or 4 * model_width
        wanted = self.hidden or (8 * model_width / 3 if self.kind in GATED else 4 * model_width)
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
        up = self.up(x)
        hidden = PLAIN[self.kind](up) if self.gate is None else GATED[self.kind](self.gate(x)) * up
        return constrain(hidden, ('batch', 'length', 'mlp'))

    def __call__(self, x: jax.Array, *, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        hidden = self.hidden(x)
        if self.down is None:
            return dropout(hidden.reshape(*x.shape[:-1], -1, x.shape[-1]).sum(axis=-2), rate, key)
        return dropout(self.down(hidden), rate, key)
