"""Steerable attention: features turn with the space they live in, and so does the output; weights do not.

Equation: features f_l [P_l, C] of degree l, points x_i, r and u length and direction of x_i - x_j; per head and channel
    A_ij = sum_l <q_l,i, k_l,j + a_l(r) Y_l(u)>, w = softmax_j(|A_ij| / sqrt(size)), o_l,i = sum_j w_ij (v_l,j + b_l(r) Y_l(u));
    q, k, v, y by matrices on channels, each degree by itself; a, b are sums of bells of r, 0 at r = 0. Turning by phi:
    SE(2): f_m is complex, m = 0 … F - 1, f_m -> exp(-i m phi) f_m, Y_m = exp(-i m angle), size = C / heads.
    SE(3): l = 0 … F - 1 has 2 l + 1 real components, Y_1 = u, Y_2 = u u' - I / 3, size = C F² / heads.
    norm: f / sqrt(sum |f|²), over all m of a channel or the components of l;  at the end, product: y_l = sum of w times the
    parts of degree l of products of two degrees (Clebsch-Gordan; SE(2): f_m1 f_m2, m1 + m2 = m), a number w a channel and
    product;  gate: f gelu(|f| + b) / |f|.
Paper: Steerable transformers for volumetric data, 2024, arXiv 2405.15932.
Differs: bells of the distance stand for a table of distances of a grid; weights are scaled by C^-1/2. Frequencies of
    products do not wrap, as the release's do, which holds for some angles only. The front end from images, class
    tokens and the invariant read-out are no mixing of tokens, and left out. The width of the model holds
    [degree, component, channel], complex parts as two components; norms and MLPs of the blocks around are not equivariant.
Cost: O(T²) time, O(T) memory: the geometry of some rows of pairs at a time (XLA); it needs the whole set, and can not decode.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnx.nn import normal, param, softmax
from attnx.ops import masks, normalizers
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    group: str = 'se2'  # se2: the side input 'coordinates' without its third; se3
    num_heads: int = 4  # N
    frequencies: int = 2  # F: circular frequencies, or degrees (3 at most); the width divides into 2 F, or F², channels
    bells: int = 8  # functions of the distance
    reach: float = 4.0  # distance of the last bell
    weigh: str = 'modulus'  # what of A is weighed: modulus, real
    norm: bool = True  # normalise the features first
    product: bool = False  # products of degrees at the end
    gate: bool = False  # the gated non-linearity at the end

    def __post_init__(self):
        softmax.check_choice('group', self.group, ('se2', 'se3'))
        softmax.check_choice('weigh', self.weigh, ('modulus', 'real'))
        if not 1 <= self.frequencies <= (3 if self.group == 'se3' else self.frequencies) or self.bells < 1 or self.reach <= 0:
            raise ValueError('frequencies (of se3: 3 at most) and bells must be at least 1, reach positive')
        if self.num_heads < 1:
            raise ValueError(f'num_heads {self.num_heads} must be at least 1')


def harmonics(u, degree: int, group: str):
    """Y of unit vectors [..., 3] -> [..., P]."""
    x, y, z = u[..., 0], u[..., 1], u[..., 2]
    if group == 'se2':
        return ((x - 1j * y) ** degree)[..., None]
    if degree == 0:
        return jnp.ones_like(x)[..., None]
    if degree == 1:
        return u
    two, six = 2**0.5, 6**0.5
    parts = [two * x * y, two * y * z, two * x * z, (x * x - y * y) / two, (2 * z * z - x * x - y * y) / six]
    return jnp.stack(parts, axis=-1)


def products(parts: list, group: str) -> list:
    """Of each degree the parts of products of two degrees, channel by channel: [terms, B, T, P, C]."""
    if group == 'se2':
        return [jnp.stack([parts[a] * parts[m - a] for a in range(m // 2 + 1)]) for m in range(len(parts))]
    scalar, vector = parts[0], parts[1] if len(parts) > 1 else None
    if vector is None:
        return [scalar[None] ** 2]
    scalars, vectors = [scalar**2, jnp.sum(vector**2, axis=2, keepdims=True)], [scalar * vector]
    if len(parts) == 2:
        return [jnp.stack(scalars), jnp.stack(vectors)]
    # Degree 2 as symmetric traceless matrices; of a channel with itself, cross products are 0.
    basis = jnp.stack([_components(a, b) for a in jnp.eye(3) for b in jnp.eye(3)]).reshape(3, 3, 5)
    matrix = jnp.einsum('ijp,btpc->btijc', basis, parts[2])
    down = lambda m: jnp.einsum('ijp,btijc->btpc', basis, m)
    scalars.append(jnp.sum(parts[2] ** 2, axis=2, keepdims=True))
    vectors.append(jnp.einsum('btijc,btjc->btic', matrix, vector))
    square = jnp.einsum('btijc,btjkc->btikc', matrix, matrix)
    tensors = [scalar * parts[2], down(jnp.einsum('btic,btjc->btijc', vector, vector)), down(square)]
    return [jnp.stack(scalars), jnp.stack(vectors), jnp.stack(tensors)]


def _components(a, b):
    """The symmetric traceless part of a b' in the basis of `harmonics`, [5]."""
    (p, q, r), (x, y, z) = a, b
    two, six = 2**0.5, 6**0.5
    parts = [(p * y + q * x) / two, (q * z + r * y) / two, (p * z + r * x) / two, (p * x - q * y) / two]
    return jnp.stack([*parts, (2 * r * z - p * x - q * y) / six])


class SteerableAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, f = config, dims.dtype, config.frequencies
        self.complex = config.group == 'se2'
        share = 2 * f if self.complex else f * f
        if dims.width % share or dims.width // share % config.num_heads:
            raise ValueError(
                f'width {dims.width} does not divide into {share} components of channels for {config.num_heads} heads'
            )
        c = self.channels = dims.width // share
        parts = 2 if self.complex else 1

        def draw(*shape, scale, axes=('features', 'embed')):
            return param(normal(rngs, (f, parts, *shape), scale * parts**-0.5, dims.param_dtype), (None, None, *axes))

        self.query, self.key, self.value = (draw(c, c, scale=c**-0.5, axes=('embed', 'heads')) for _ in range(3))
        self.out = draw(c, c, scale=(2 * c * dims.num_layers) ** -0.5, axes=('heads', 'embed'))
        self.near_key, self.near_value = (draw(config.bells, c, scale=config.bells**-0.5) for _ in range(2))
        like = [jnp.zeros((1, 1, 1 if self.complex else 2 * i + 1, 1)) for i in range(f)]
        terms = [len(found) for found in products(like, config.group)]
        weights = lambda: normal(rngs, (sum(terms), parts, c), parts**-0.5, dims.param_dtype)
        self.product = param(weights(), (None, None, 'embed')) if config.product else None
        self.ends = [sum(terms[: n + 1]) for n in range(f)]
        self.shift = param(normal(rngs, (f, c), 1.0, dims.param_dtype), (None, 'embed')) if config.gate else None

    @property
    def degree(self):
        """Of each of the P components."""
        degrees = np.arange(self.config.frequencies)
        return np.repeat(degrees, 1 if self.complex else 2 * degrees + 1)

    def split(self, x):
        """x [B, T, M] -> features [B, T, P, C], the components of all degrees, complex64 or float32."""
        x, c = x.astype(jnp.float32), self.channels
        if self.complex:
            x = x.reshape(*x.shape[:2], -1, 2, c)
            return jax.lax.complex(x[..., 0, :], x[..., 1, :])
        return x.reshape(*x.shape[:2], -1, c)

    def join(self, f):
        f = jnp.stack([jnp.real(f), jnp.imag(f)], axis=3) if self.complex else f
        return f.reshape(*f.shape[:2], -1)

    def cast(self, p):
        """A parameter's matrices, [P, …]: those of a degree for each of its components."""
        p = p[...].astype(jnp.float32)
        return (jax.lax.complex(p[:, 0], p[:, 1]) if self.complex else p[:, 0])[self.degree]

    def size(self, f):
        """|f|² + 1e-8 of each component's degree, [B, T, P, C]."""
        square = jnp.real(f * jnp.conj(f))
        same = (self.degree[:, None] == self.degree).astype(square.dtype)
        return square + 1e-8 if self.complex else jnp.einsum('btpc,pr->btrc', square, same) + 1e-8

    def __call__(self, x, ctx: Context, state=None) -> Output:
        config, n, f = self.config, self.config.num_heads, self.split(x)
        where = ctx.side('coordinates').astype(jnp.float32)
        if where.shape != (*x.shape[:2], 3):
            raise ValueError(f"the side input 'coordinates' must be {[*x.shape[:2], 3]}, was given {list(where.shape)}")
        where = where.at[..., 2].set(0) if self.complex else where
        if config.norm:
            size = self.size(f)
            f = f / jnp.sqrt(jnp.sum(size, axis=2, keepdims=True) if self.complex else size)
        heads = lambda p: p.reshape(*p.shape[:-1], n, -1)
        turned = lambda f, kernel: jnp.einsum('btpc,pcd->btpd', f, self.cast(kernel))
        query, key, value = (heads(turned(f, kernel)) for kernel in (self.query, self.key, self.value))  # [B, T, P, N, d]
        near_key, near_value = heads(self.cast(self.near_key)), heads(self.cast(self.near_value))  # [P, bells, N, d]
        (batch, length, _), size = x.shape, self.channels // n * (1 if self.complex else config.frequencies**2)
        mask = None if ctx.segment_ids is None else masks.segments(ctx.segment_ids)

        def step(carry, first, rows):
            query, at = rows
            i = index_of(batch, at.shape[1], length, length, n, first)
            between = at[:, :, None] - where[:, None]
            far = jnp.sqrt(jnp.sum(jnp.square(between), axis=-1, keepdims=True) + 1e-12)
            centers = jnp.arange(1, config.bells + 1) * (config.reach / config.bells)
            bells = jnp.exp(-jnp.square((far - centers) * (config.bells / config.reach))) * far**2 / (1 + far**2)
            y = [harmonics(between / far, degree, config.group) for degree in range(config.frequencies)]
            y, query = jnp.concatenate(y, axis=-1), jnp.conj(query)
            a = jnp.einsum('btpnd,bspnd->bnts', query, key)
            a = a + jnp.einsum('btnrp,btsr,btsp->bnts', jnp.einsum('btpnd,prnd->btnrp', query, near_key), bells, y)
            s = jnp.sqrt(jnp.real(a * jnp.conj(a)) + 1e-12) if config.weigh == 'modulus' else jnp.real(a)
            w = normalizers.softmax(s * size**-0.5, evaluate(mask, i))
            read = jnp.einsum('bnts,bspnd->btpnd', w, value)
            read = read + jnp.einsum('btnrp,prnd->btpnd', jnp.einsum('bnts,btsr,btsp->btnrp', w, bells, y), near_value)
            return carry, read.reshape(*read.shape[:3], -1)

        rows = num_rows(batch * length * config.bells * len(self.degree), length)
        f = turned(by_rows(step, (), (query, where), rows)[1], self.out)
        if self.product is not None:
            w = self.product[...].astype(jnp.float32)
            w = jnp.split(jax.lax.complex(w[:, 0], w[:, 1]) if self.complex else w[:, 0], self.ends[:-1])
            parts = [f[:, :, self.degree == degree] for degree in range(config.frequencies)]
            made = zip(products(parts, config.group), w)
            f = jnp.concatenate([jnp.einsum('nbtpc,nc->btpc', found, mix) for found, mix in made], axis=2)
        if self.shift is not None:
            size = jnp.sqrt(self.size(f))
            f = f * jax.nn.gelu(size + self.shift[...].astype(jnp.float32)[self.degree]) / size
        return Output(self.join(f).astype(self.dtype))


SPEC = Spec(
    module=SteerableAttention,
    config=Config,
    paper='2405.15932',
    causal='bidirectional',
    inputs={'coordinates': 'float32 B T 3'},
    limits={
        'decode': 'attends to the whole set of points at once',
        'state': 'attends to the whole set of points at once',
    },
    example=(Config(group='se3', num_heads=2, bells=3, product=True), Config(gate=True)),  # a gate's zeros are not divided by
    flops=lambda config, dims, length: 4 * dims.width * length * (1 + config.bells / config.num_heads),
)
