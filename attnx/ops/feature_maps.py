"""Feature maps φ for linear attention: weights φ(q)·φ(k) in place of exp(q·k). Pure functions of [..., H].

`fixed(name)` finds those without parameters; `hedgehog`, `t2r` and `product` take learned ones. Maps that are never
negative may be normalised (`attnx.ops.gated_linear.normalized_gated_linear`); `identity` and `product` may not.
`taylor` features have signs, but their products are positive.
"""

import functools
import math

import jax
import jax.numpy as jnp

from attnx import dispatch


def identity(x):
    """φ(x) = x: weights q·k."""
    return x


def relu(x):
    """φ(x) = max(x, 0). All features of a token can be zero."""
    return jax.nn.relu(x)


def elu1(x):
    """φ(x) = elu(x) + 1: x + 1 above zero, exp(x) below; always positive. Paper: 2006.16236."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def silu(x):
    """φ(x) = x σ(x), the activation of lightning attention's queries and keys. Paper: 2307.14995."""
    return jax.nn.silu(x)


def exp(x, shift=None):
    """φ(x) = exp(x - shift), by default shift = max_h x_h of each vector, so that it can't overflow.

    A factor per query cancels in normalised attention. A factor per key does not: for keys it makes another map, the
    softmax up to each token's sum; give one `shift` for all tokens of a head where exp itself is meant.
    """
    return jnp.exp(x - (jnp.max(x, axis=-1, keepdims=True) if shift is None else shift))


def exp_pair(x):
    """φ(x) = [exp(x - max x), exp(-x + min x)], H -> 2H: sees both signs, can't overflow. Paper: 2402.04347."""
    return jnp.concatenate([exp(x), exp(-x)], axis=-1)


def softmax(x):
    """φ(x) = softmax over the features: positive, bounded, sums to one."""
    return jax.nn.softmax(x, axis=-1)


def dpfp(x, nu: int = 1):
    """Deterministic parameter-free projection, H -> 2H nu: r_i r_{i-j} for r = relu([x, -x]), j = 1..nu.

    Paper: 2102.11174.
    """
    if nu < 1:
        raise ValueError(f'dpfp: nu is {nu}, expected at least 1')
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def taylor(x):
    """Second-order Taylor features, H -> 1 + H + H²: φ(q)·φ(k) = 1 + s + s²/2 for s = q·k / √H.

    Paper: 2402.18668; the approximate attention of 2510.11602.
    """
    width = x.shape[-1]
    x = x / width**0.25
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], width * width)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square / math.sqrt(2)], axis=-1)


def _linear(name, x, weight, bias):
    """x [B, T, N, H] by each head's weight [N, H, F], plus bias [N, F]."""
    if weight.ndim != 3 or x.shape[-2:] != weight.shape[:2]:
        raise ValueError(
            f'{name}: weight has shape {weight.shape}, expected [N, H, F] = ({x.shape[-2]}, {x.shape[-1]}, F)'
        )
    y = jnp.einsum('...nh,nhf->...nf', x, weight)
    if bias is None:
        return y
    if bias.shape != (weight.shape[0], weight.shape[2]):
        raise ValueError(f'{name}: bias has shape {bias.shape}, expected [N, F] = {(weight.shape[0], weight.shape[2])}')
    return y + bias


def t2r(x, weight, bias=None):
    """φ(x) = relu(x W + b), x [..., N, H], W [N, H, F], b [N, F] -> [..., N, F]. Paper: 2103.13076."""
    return jax.nn.relu(_linear('t2r', x, weight, bias))


def product(x, weight, other):
    """φ(x) = (x W) ∘ (x W'), W and W' [N, H, F]: learned products of pairs of features."""
    return _linear('product', x, weight, None) * _linear('product', x, other, None)


def hedgehog(x, weight, bias=None, *, normalize: str = 'joint', floor: float = 1e-12):
    """Hedgehog's learned map, H -> 2F, for y = x W + b, x [..., N, H], W [N, H, F], b [N, F].

    Args:
      normalize: 'joint' is softmax over the 2F features of [y, -y]; 'halves' is [softmax(y), softmax(-y)], LoLCATs's;
        'none' is the paper's [exp(y), exp(-y)], which can overflow.
      floor: least feature, against 0/0 in the normalised form.

    Paper: 2402.04347, 2410.10254.
    """
    y = _linear('hedgehog', x, weight, bias)
    pair = jnp.concatenate([y, -y], axis=-1)
    if normalize == 'joint':
        features = softmax(pair)
    elif normalize == 'halves':
        features = jnp.concatenate([softmax(y), softmax(-y)], axis=-1)
    elif normalize == 'none':
        features = jnp.exp(pair)
    else:
        raise ValueError(f'hedgehog: unknown normalize {normalize!r}; {dispatch.nearest(normalize, _NORMALIZE)}')
    return jnp.maximum(features, floor)


_NORMALIZE = ('joint', 'halves', 'none')

FIXED = {
    'identity': identity,
    'relu': relu,
    'elu1': elu1,
    'silu': silu,
    'exp': exp,
    'exp_pair': exp_pair,
    'softmax': softmax,
    'taylor': taylor,
} | {f'dpfp{nu}': functools.partial(dpfp, nu=nu) for nu in (1, 2, 3)}
FIXED['dpfp'] = dpfp


def fixed(name: str):
    """The map of that name without parameters; `dpfp2` is dpfp with nu = 2. ValueError names the valid ones."""
    if name not in FIXED:
        raise ValueError(f'unknown feature map {name!r}; {dispatch.nearest(name, FIXED)}')
    return FIXED[name]


def width(name: str, head_dim: int) -> int:
    """How many features `fixed(name)` makes of `head_dim`."""
    return jax.eval_shape(fixed(name), jax.ShapeDtypeStruct((head_dim,), jnp.float32)).shape[0]
