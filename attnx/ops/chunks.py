"""What the chunked forms of the matrix recurrences share: layout, decays without overflow, a chunk's reads and writes.

A recurrence over T tokens with state S [H, Hv] is cut into chunks of C. Inside a chunk pairs of tokens are compared all
at once; between chunks only the state passes. With log-decays g_t <= 0 three kinds of sums over a chunk's tokens are
needed,

    within_ij = sum_{j < r <= i} g_r      before_i = sum_{r <= i} g_r      after_j = sum_{r > j} g_r

and none is had by subtracting cumulative sums: at 50 nats a token that would cancel all digits. Each is a sum of terms
of one sign, so that every exponent is <= 0 and exp neither overflows nor loses precision. For a decay per channel the
pair's exponent cannot leave the product q_i k_j. There the chunk is halved again and again: a pair meets where its two
tokens fall into different halves, and with that boundary as the reference row the product is (exp(sum from the boundary
to i) q_i) . (exp(sum from j to the boundary) k_j), one batch of matmuls over the log2 C levels.

Shapes in a chunk: [B, K, G, C, ...] where N = K G value heads share K query and key heads (their G is 1, broadcast).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from pallas_kernels import apart

# float32 means float32 on every platform: states and inverses are sums over thousands of tokens.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


# Bad input ----------------------------------------------------------------------------------------------------------


def require_shape(op: str, name: str, array, letters: str, sizes: dict[str, int], *, floating: bool = True):
    """Raises ValueError unless `array` has one dimension per letter, equal to `sizes`, which learns the new letters."""
    if not hasattr(array, 'dtype'):
        raise ValueError(f'{op}: {name} must be an array, given {type(array).__name__}')
    shape, names = jnp.shape(array), letters.split()
    layout = f'[{", ".join(names)}]'
    if len(shape) != len(names):
        raise ValueError(f'{op}: {name} has shape {shape}, expected {len(names)} dimensions {layout}')
    wanted = tuple(sizes.get(letter, size) for letter, size in zip(names, shape))
    if shape != wanted:
        raise ValueError(f'{op}: {name} has shape {shape}, expected {layout} = {wanted}')
    kind, dtype = ('floating', jnp.floating) if floating else ('integer', jnp.integer)
    if not jnp.issubdtype(jnp.result_type(array), dtype):
        raise ValueError(f'{op}: {name} has dtype {jnp.result_type(array)}, expected a {kind} one')
    sizes.update(zip(names, shape))


def require_range(op: str, name: str, array, low: float, high: float, hint: str):
    """Raises ValueError for concrete values outside [low, high]; traced values pass, there is nothing to look at."""
    if array is None or isinstance(array, core.Tracer) or not getattr(array, 'is_fully_addressable', True):
        return
    array = np.asarray(array)
    outside = array[(array < low) | (array > high)]
    if outside.size:
        raise ValueError(f'{op}: {name} holds {float(outside.flat[0]):.6g}, expected values in [{low}, {high:.6g}]: {hint}')


def require_recurrence(op, query, key, value, log_decay, initial_state, segment_ids, scale, chunk, precision) -> None:
    """The checks that gated_linear and delta_rule share; N value heads may share K query and key heads."""
    sizes = {}
    require_shape(op, 'value', value, 'B T N Hv', sizes)
    require_shape(op, 'query', query, 'B T K H', sizes)
    require_shape(op, 'key', key, 'B T K H', sizes)
    if 0 in sizes.values():
        raise ValueError(f'{op}: a dimension is 0: query has shape {jnp.shape(query)}, value {jnp.shape(value)}')
    if sizes['N'] % sizes['K']:
        raise ValueError(f'{op}: query and key have {sizes["K"]} heads, expected a divisor of the {sizes["N"]} heads of value')
    if log_decay is not None:
        layouts = {1: 'N', 3: 'B T N', 4: 'B T N H'}
        if jnp.ndim(log_decay) not in layouts:
            raise ValueError(f'{op}: log_decay has shape {jnp.shape(log_decay)}, expected [N], [B, T, N] or [B, T, N, H]')
        require_shape(op, 'log_decay', log_decay, layouts[jnp.ndim(log_decay)], sizes)
        require_range(op, 'log_decay', log_decay, -np.inf, 1e-3, 'the state is multiplied by exp(log_decay) and may not grow')
    if initial_state is not None:
        require_shape(op, 'initial_state', initial_state, 'B N H Hv', sizes)
    if segment_ids is not None:
        require_shape(op, 'segment_ids', segment_ids, 'B T', sizes, floating=False)
    if precision not in (None, 'highest'):
        raise ValueError(f"{op}: precision is {precision!r}, expected None or 'highest'")
    if scale is not None and (jnp.ndim(scale) or isinstance(scale, str)):
        raise ValueError(f'{op}: scale must be one number, given {scale!r}')
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1)):
        nearest = 2 ** max(0, round(float(np.log2(chunk)))) if isinstance(chunk, int) and chunk > 0 else 64
        raise ValueError(f'{op}: chunk is {chunk!r}, expected a power of two, such as {nearest}')


# Layout -------------------------------------------------------------------------------------------------------------


def resets(segment_ids):
    """[B, T] bool: tokens that begin a segment. The first token never does: it continues the initial state."""
    first = jnp.zeros_like(segment_ids[:, :1], bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def running(combine, x, segment_ids=None):
    """x_1, combine(x_1, x_2), … along axis 1, from the start of each segment: [B, T, …], ids int [B, T]."""
    if segment_ids is None:
        return jax.lax.associative_scan(combine, x, axis=1)
    new = resets(segment_ids).reshape(*segment_ids.shape, *[1] * (x.ndim - 2))
    join = lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], combine(a[1], b[1])))
    return jax.lax.associative_scan(join, (jnp.broadcast_to(new, x.shape), x), axis=1)[1]


def at_the_end(x, segment_ids=None):
    """Each token's x at the last token of its segment: [B, T, …]."""
    length = x.shape[1]
    if segment_ids is None:
        return jnp.broadcast_to(x[:, -1:], x.shape)
    ends = jnp.diff(segment_ids, axis=1, append=segment_ids[:, -1:]) != 0
    last = jax.lax.cummin(jnp.where(ends, jnp.arange(length), length - 1), axis=1, reverse=True)
    return jnp.take_along_axis(x, last.reshape(*last.shape, *[1] * (x.ndim - 2)), axis=1)


def split(x, chunk: int, num_heads: int):
    """[B, T, N, ...] -> [T/C, B, K, G, C, ...] with K = num_heads; a ragged end is filled with zeros.

    Zeros are idle tokens of every recurrence here: they write nothing and decay nothing.
    """
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, chunk, num_heads, x.shape[2] // num_heads, *x.shape[3:])
    return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))


def join(x, length: int):
    """[T/C, B, K, G, C, ...] -> [B, T, N, ...], the inverse of `split`."""
    x = x.transpose(1, 0, 4, 2, 3, *range(5, x.ndim))
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :length]


def split_resets(segment_ids, chunk: int):
    """[B, T] -> [T/C, B, 1, 1, C] int32: resets since the chunk began, inclusive; None stays None."""
    if segment_ids is None:
        return None
    return jnp.cumsum(split(resets(segment_ids).astype(jnp.int32)[..., None], chunk, 1), axis=-1)


# Decays -------------------------------------------------------------------------------------------------------------


def spans(g):
    """g [..., C] -> within [..., C, C] (0 where j >= i), before [..., C], after [..., C]: the sums named above."""
    seen = np.tri(g.shape[-1], dtype=bool)
    within = matmul(jnp.where(seen, _finite(g)[..., None, :], 0), jnp.tri(g.shape[-1], k=-1, dtype=g.dtype))
    return within, within[..., 0] + g[..., :1], within[..., -1, :]


def _finite(g):
    """-inf as a number whose sums are finite: 0 * inf is no sum."""
    return jnp.maximum(g, jnp.finfo(g.dtype).min / (2 * max(g.shape)))


@functools.cache
def _halvings(length: int):
    """How a chunk is halved, [L, C, C] twice, L = log2 C: which g to sum for a token's factor, and which pairs meet.

    At level l pairs (i, j) meet if j is in the earlier and i in the later half of one block of C / 2^l tokens. Row t
    holds ones for t's half up to t if it is a later one, for what follows t in its half if it is an earlier one.
    """
    t = np.arange(length)
    sums, pairs = [], []
    half = length // 2
    while half:
        same = t[:, None] // half == t // half
        later = (t // half % 2 == 1)[:, None]
        sums.append(same & np.where(later, t <= t[:, None], t > t[:, None]))
        pairs.append((t[:, None] // (2 * half) == t // (2 * half)) & later & ~later.T)
        half //= 2
    shape = (-1, length, length)
    return np.array(sums).reshape(shape), np.array(pairs).reshape(shape)


class ChannelDecay:
    """Factors of log-decays per channel g [..., C, H].

    Attributes:
      levels: [..., L, C, H], exp of each token's sum to the boundary at which it meets others, level by level.
      before, after: exp of the sums over the chunk, [..., C, H].
    """

    def __init__(self, g):
        length, width = g.shape[-2:]
        sums, self.pairs = _halvings(length)
        ends = np.tri(length, dtype=bool)[None], ~np.tri(length, dtype=bool)[None]
        sums = np.concatenate([sums, *ends]).reshape(-1, length)
        factors = jnp.exp(matmul(jnp.asarray(sums, g.dtype), _finite(g)))
        factors = factors.reshape(*g.shape[:-2], -1, length, width)
        self.levels, self.before, self.after = factors[..., :-2, :, :], factors[..., -2, :, :], factors[..., -1, :, :]

    def products(self, rows, columns):
        """sum_h rows_ih columns_jh exp(sum_{j < r <= i} g_rh) for j <= i, else 0: [..., C, H] each -> [..., C, C]."""
        later, earlier = rows[..., None, :, :] * self.levels, columns[..., None, :, :] * self.levels
        dots = jnp.where(self.pairs, matmul(later, jnp.swapaxes(earlier, -1, -2)), 0)
        own = jnp.sum(rows * columns, axis=-1)[..., None] * jnp.eye(rows.shape[-2], dtype=rows.dtype)
        return jnp.sum(dots, axis=-3) + own


@jax.custom_jvp
def unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower triangular a [..., C, C], C a power of two: forward substitution by blocks.

    If X inverts the diagonal blocks of C/2^l tokens, X - X a' X inverts those twice as large, a' being what stands between
    the halves of these. Matmuls alone, the same on every platform; every block is a true inverse, of moderate size in
    the delta rule, where a Neumann series would cancel.
    """
    _, pairs = _halvings(a.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    for level, between in enumerate(pairs[::-1]):
        corner = jnp.where(between, a, 0)
        inverse -= matmul(inverse, matmul(corner, inverse)) if level else corner
    return inverse


@unit_lower_inverse.defjvp
def _(primals, tangents):
    inverse = unit_lower_inverse(*primals)
    return inverse, -matmul(inverse, matmul(tangents[0], inverse))


@jax.custom_jvp
def unit_lower_solve(a, b):
    """(I + a)^-1 b for strictly lower triangular a [..., C, C] and b [..., C, d]."""
    return matmul(unit_lower_inverse(a), b)


@unit_lower_solve.defjvp
def _(primals, tangents):
    # Derivatives by way of the solution: cheaper than those of the inverse, and no digits cancel in them.
    (a, b), (da, db) = primals, tangents
    inverse = unit_lower_inverse(a)
    x = matmul(inverse, b)
    return x, matmul(inverse, db - matmul(da, x))


# One chunk ----------------------------------------------------------------------------------------------------------


class Chunk:
    """What a chunk's keys and decays do to rows of queries, to the state it is given and to the state it leaves.

    Args:
      key: [B, K, 1, C, H].
      log_decay: None, one per token [B, K, G, C] (B may be 1), or one per token and channel [B, K, G, C, H].
      count: resets since the chunk began, inclusive, [B, 1, 1, C], or None.
    """

    def __init__(self, key, log_decay, count):
        self.key, length = key, key.shape[-2]
        self.channels = self.within = None
        if log_decay is None:
            before = after = jnp.ones((length, 1), key.dtype)
        elif log_decay.ndim == key.ndim:
            self.channels = ChannelDecay(log_decay)
            before, after = self.channels.before, self.channels.after
        else:
            self.within, before, after = map(jnp.exp, spans(log_decay))
            before, after = before[..., None], after[..., None]
        total = jnp.swapaxes(before[..., -1:, :], -1, -2)
        visible = np.tri(length, dtype=bool)
        if count is not None:  # masked, not decayed by -inf: 0 * inf would spoil gradients
            visible = visible & (count[..., :, None] == count[..., None, :])
            first, last = (count == 0)[..., None], (count == count[..., -1:])[..., None]
            before, after = jnp.where(first, before, 0), jnp.where(last, after, 0)
            total = jnp.where(first[..., -1:, :], total, 0)
        self.before, self.after, self.total, self.visible = before, after, total, visible

    def products(self, rows):
        """rows_i . key_j, decayed from j to i, for visible j <= i: [B, K, G, C, C]."""
        if self.channels:
            dots = self.channels.products(rows, self.key)
        else:
            dots = matmul(rows, jnp.swapaxes(self.key, -1, -2))
            dots = dots if self.within is None else dots * self.within
        return jnp.where(self.visible, dots, 0)

    def read(self, rows, state):
        """rows_i times the given state as token i finds it, [B, K, G, C, Hv]."""
        if self.channels:
            return matmul(rows * self.before, state)
        return self.before * matmul(rows, state)

    def write(self, values, state):
        """The state after the chunk: the given one decayed, and every key^T value decayed from its token on."""
        if self.channels:
            return self.total * state + matmul(jnp.swapaxes(self.key * self.after, -1, -2), values)
        return self.total * state + matmul(jnp.swapaxes(self.key, -1, -2), self.after * values)


def scan(body, query, key, value, per_token, log_decay, initial_state, segment_ids, chunk: int):
    """Runs body(state, query, chunk, value, per_token) -> (state, out) over the chunks, keeping one state a chunk.

    The body is recomputed in the backward pass: memory is O(T), with [H, Hv] once per chunk. What is not finite stays in its
    document.
    """
    run = lambda *arrays: _scan(body, *arrays, segment_ids, chunk)
    return apart.documents(run, query, key, value, per_token, log_decay, initial_state, segment_ids)


def _scan(body, query, key, value, per_token, log_decay, initial_state, segment_ids, chunk):
    (_, length, num_heads, _), (_, _, num_values, width) = key.shape, value.shape
    cut = lambda x: None if x is None else split(x, chunk, num_heads)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, length, num_values))
    dtype, output = accumulator(query, key, value), value.dtype
    state = first_state(initial_state, key, value, dtype)
    state = state.reshape(-1, num_heads, num_values // num_heads, key.shape[-1], width)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, xs):
        *arrays, count = xs
        query, key, value, per_token, log_decay = (None if x is None else x.astype(dtype) for x in arrays)
        state, out = body(state, query, Chunk(key, log_decay, count), value, per_token)
        return state, out.astype(output)

    xs = (*map(cut, (query, key, value, per_token, log_decay)), split_resets(segment_ids, chunk))
    state, out = jax.lax.scan(step, state, xs)
    return join(out, length), state.reshape(-1, num_values, *state.shape[3:])


# One token ----------------------------------------------------------------------------------------------------------


def accumulator(*arrays):
    """The dtype of states and sums: float32, or float64 where the inputs are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def first_state(initial_state, key, value, dtype):
    """The state [B, N, H, Hv] that the first token finds."""
    if initial_state is not None:
        return jnp.asarray(initial_state, dtype)
    shape = value.shape[0], value.shape[2], key.shape[3], value.shape[3]
    return jax.lax.full_like(value, 0, dtype, shape)  # of value, to vary over a caller's shard_map as it does


def step_by_step(update, query, key, value, per_token, log_decay, initial_state, segment_ids, scale):
    """Runs state <- update(state, key, value, per_token); out = scale query state, token after token: the definition.

    Heads are repeated here, arrays are [B, N, ...] a token, the state is [B, N, H, Hv].
    """
    dtype, output, groups = accumulator(query, key, value), value.dtype, value.shape[2] // key.shape[2]
    query, key = (jnp.repeat(x, groups, axis=2) for x in (query, key))
    if log_decay is not None:
        decay = jnp.exp(jnp.asarray(log_decay, dtype))
        if decay.ndim == 1:
            decay = jnp.broadcast_to(decay, value.shape[:3])
        decay = decay[..., None] if decay.ndim == 4 else decay[..., None, None]
    keep = None if segment_ids is None else ~resets(segment_ids)[..., None, None, None]

    def step(state, xs):
        query, key, value, per_token, decay, keep = xs
        state = state if keep is None else jnp.where(keep, state, 0)
        state = state if decay is None else decay * state
        state = update(state, key, value, per_token)
        return state, jnp.einsum('bnh,bnhv->bnv', query, state, precision='highest')

    time_first = lambda x: jnp.moveaxis(x, 1, 0)
    query, key, value, per_token = (None if x is None else x.astype(dtype) for x in (query, key, value, per_token))
    query = query if scale is None else scale * query
    xs = jax.tree.map(time_first, (query, key, value, per_token, None if log_decay is None else decay, keep))
    state = first_state(initial_state, key, value, dtype)
    if value.shape[1] == 1:
        state, out = step(state, jax.tree.map(lambda x: x[0], xs))
        out = out[None]
    else:
        state, out = jax.lax.scan(step, state, xs)
    return jnp.moveaxis(out, 0, 1).astype(output), state


def size(chunk, key, value, log_decay) -> int:
    """Tokens a chunk: as asked for or by shape, and not more than the next power of two over T.

    Work within a chunk grows with C, work between chunks with the heads' width over C: about as wide as the heads is best,
    half of that where decays per channel make the inside dearer. 64 is as much as pays on CPU and GPU.
    """
    if chunk is None:
        per_channel = log_decay is not None and log_decay.ndim == 4
        chunk = min(max(_power_of_two(max(key.shape[3], value.shape[3])) // (2 if per_channel else 1), 16), 64)
    return min(chunk, _power_of_two(value.shape[1]))


def _power_of_two(n: int) -> int:
    """The least not below n."""
    return 1 << (n - 1).bit_length()
