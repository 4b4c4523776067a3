"""The correctness gate of the gated linear kernel.

    python -m pallas_kernels.gated_linear.check [words] [i/n] [form=MODULE:FUNCTION] [kernel=MODULE:FUNCTION]

The kernel's outputs, last state and every gradient are compared with a token-by-token recurrence in float64, and a second run
must be bit-equal. The error of a result may be twice that of a float32 form with its results rounded, for results in float32
`FLOORS` too. That form is the same recurrence in float32, or the one named, such as `form=attnx.ops.gated_linear:xla`. Errors
beyond twice the form's are marked with `!`. `kernel` names another kernel of the op, to be checked instead. The error of a few
numbers is mostly luck, such as how much cancels in a constant decay's gradient, a sum over all tokens: results of at most `FEW`
numbers are drawn `DRAWS` times, and the draws count as one result of as many more numbers.
"""

import dataclasses
import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_linear import mosaic_gpu

FACTOR = 2.0
FEW, DRAWS = 16, 8
NAMES = ('query', 'key', 'value', 'log_decay', 'state')
FLOORS = {'state': 5e-7, 'dstate': 5e-7, 'dlog_decay': 3e-6}


def oracle(query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, dtype=jnp.float64):
    """Token by token, in `dtype`."""
    (B, T, N, V), K = value.shape, key.shape[3]
    wide = lambda x: jnp.repeat(x, N // x.shape[2], 2).astype(dtype)
    query, key, value = map(wide, (query, key, value))
    decay = jnp.ones((1, 1, N), dtype) if log_decay is None else jnp.exp(log_decay.astype(dtype))
    decay = decay if decay.ndim == 4 else jnp.broadcast_to(decay, (B, T, N))[..., None]
    if segment_ids is not None:
        reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
        decay = jnp.where(reset[..., None, None], 0, decay)
    state = jnp.zeros((B, N, K, V), dtype) if initial_state is None else initial_state.astype(dtype)
    scale = 1.0 if scale is None else scale

    def step(state, xs):
        q, k, v, a = xs
        state = a[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum('bnk,bnkv->bnv', q, state, precision='highest')

    state, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, decay)))
    return jnp.moveaxis(out, 0, 1), state


@dataclasses.dataclass
class Case:
    name: str
    B: int = 1
    T: int = 128
    N: int = 2
    heads: int | None = None  # of query and key
    K: int = 128
    V: int = 128
    decay: str = 'token'  # none, head, token, channel
    strength: tuple = (0.01, 0.2)  # range of -log_decay
    erase: float = 0.0  # part of the tokens whose log_decay is -inf
    state: bool = True
    resets: float = 0.0  # part of the tokens that begin a segment
    scale: float | None = None
    trained: bool = True  # log_decay has a gradient
    precision: str | None = None

    def arrays(self, draw=0):
        """query, key, value, log_decay, initial_state, segment_ids and the cotangents of the results."""
        rng = np.random.default_rng([sum(map(ord, self.name)), draw] if draw else sum(map(ord, self.name)))
        B, T, N, heads = self.B, self.T, self.N, self.heads or self.N
        normal = lambda *shape, dtype=jnp.bfloat16: jnp.asarray(rng.normal(size=shape), dtype)
        query, value = normal(B, T, heads, self.K), normal(B, T, N, self.V)
        key = rng.normal(size=(B, T, heads, self.K))
        key = jnp.asarray(key / np.linalg.norm(key, axis=-1, keepdims=True), jnp.bfloat16)
        shape = {'none': None, 'head': (N,), 'token': (B, T, N), 'channel': (B, T, N, self.K)}[self.decay]
        log_decay = None
        if shape:
            log_decay = -rng.uniform(*self.strength, size=shape)
            log_decay = jnp.asarray(np.where(rng.random(shape) < self.erase, -np.inf, log_decay), jnp.float32)
        state = normal(B, N, self.K, self.V, dtype=jnp.float32) if self.state else None
        ids = jnp.asarray(np.cumsum(rng.random((B, T)) < self.resets, 1), jnp.int32) if self.resets else None
        cotangents = normal(B, T, N, self.V), normal(B, N, self.K, self.V, dtype=jnp.float32)
        return (query, key, value, log_decay, state), ids, cotangents


CASES = [
    Case('one token', T=1, B=3, N=4, heads=2),
    Case('one token, per channel', T=1, decay='channel', K=40, V=80),
    Case('two tokens', T=2),
    Case('17', T=17, decay='none'),
    Case('64', T=64, decay='head'),
    Case('1000', B=2, T=1000, resets=0.01, scale=0.1),
    Case('1000, shared heads', T=1000, N=4, heads=2, resets=0.1),
    Case('1000, no decay, resets', T=1000, decay='none', state=False, resets=0.05),
    Case('1000, constant', T=1000, decay='head', scale=0.1),
    Case('8192 in pieces', T=8192, strength=(0.0, 0.02), resets=0.0005),
    Case('8192 constant in pieces', T=8192, decay='head', state=False),
    Case('1000, shared heads, not trained', T=1000, N=4, heads=2, decay='head', state=False, trained=False),
    Case('8192 in pieces, not trained', T=8192, decay='head', strength=(0.0, 0.002), trained=False),
    Case('per channel', T=1000, N=4, heads=2, decay='channel', scale=0.1),
    Case('per channel, resets', T=1000, decay='channel', resets=0.02),
    Case('per channel, in pieces', T=4096, decay='channel', strength=(0.0, 0.02), resets=0.0005),
    Case('per channel, widths 256, 128', T=200, K=256, V=128, decay='channel'),
    Case('per channel, near the span', T=300, decay='channel', strength=(1.9, 2.05)),
    Case('per channel, strong', T=300, decay='channel', strength=(0.0, 50.0)),
    Case('per channel, -50', T=300, decay='channel', strength=(49.9, 50.0)),
    Case('per channel, widths 64, 128', T=200, K=64, V=128, decay='channel'),
    Case('per channel, widths 128, 64', T=200, K=128, V=64, decay='channel'),
    Case('per channel, widths 40, 40', T=200, K=40, V=40, decay='channel'),
    Case('strong', T=1000, strength=(0.0, 50.0)),
    Case('erase', T=1000, strength=(0.0, 0.1), erase=0.05),
    Case('-50', T=300, strength=(49.9, 50.0)),
    Case('widths 64, 64', T=200, K=64, V=64),
    Case('widths 64, 128', T=200, K=64, V=128),
    Case('widths 128, 256', T=200, K=128, V=256),
    Case('widths 256, 128', T=200, K=256, V=128),
    Case('widths 256, 256', T=200, K=256, V=256),
    Case('widths 40, 80', T=200, K=40, V=80),
]
precise = [c for c in CASES if c.decay in ('head', 'token') and c.T > 1 and c.trained]
CASES += [dataclasses.replace(c, name=f'{c.name}, highest', precision='highest') for c in precise]


def gradients(function, arrays, ids, cotangents, scale, wide=None, names=NAMES):
    """{name: result or gradient} of a form; `wide` casts everything first. What has no name is a constant."""
    if wide:
        arrays, cotangents = jax.tree.map(lambda x: x.astype(wide), (arrays, cotangents))

    def forward(*trained):
        given = iter(trained)
        *rest, state = [next(given) if name else x for name, x in zip(names, arrays)]
        return function(*rest, initial_state=state, segment_ids=ids, scale=scale)

    (out, state), pull = jax.vjp(forward, *(x for name, x in zip(names, arrays) if name))
    grads = pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, (out, state))))
    return {'out': out, 'state': state, **{f'd{n}': g for n, g in zip(filter(None, names), grads) if g is not None}}


def check(case: Case, interpret=False, form=None, kernel=mosaic_gpu.gated_linear) -> tuple[bool, dict]:
    """(passes, {result: (error, error of the float32 form)})."""
    names = [name if case.trained or name != 'log_decay' else None for name in NAMES]
    floors = {} if case.precision else FLOORS
    kernel = functools.partial(kernel, precision=case.precision)
    return compare(kernel, oracle, case, names, floors, interpret, form)


def compare(kernel, oracle, case, names, floors, interpret, form):
    """`check` of any recurrent kernel against any oracle; form: the float32 form, None for the oracle's."""

    def run(function, wide=None, traced=True):
        f = lambda *given: gradients(function, *given, case.scale, wide, names)
        f = jax.jit(f) if traced else f
        return lambda given: jax.tree.map(np.asarray, f(*given))

    ours = run(functools.partial(kernel, interpret=interpret), traced=not interpret)
    exact = run(functools.partial(oracle, dtype=jnp.float64), jnp.float64)
    plain = run(form or functools.partial(oracle, dtype=jnp.float32), jnp.float32)

    def draw(number):
        """{result: (norms of the error, of the form's, of what is right, size)} and whether a second run is equal."""
        given = case.arrays(number)
        got = ours(given)
        again = got if interpret else ours(given)
        with jax.default_device(jax.local_devices(backend='cpu')[0]):  # thousands of tiny steps
            with jax.enable_x64(True):
                want = exact(given)
            narrow = plain(given)
        errors = {}
        for name, x in got.items():
            rounded = np.asarray(jnp.asarray(narrow[name]).astype(x.dtype)).astype(np.float64)
            norm = max(np.linalg.norm(want[name]), 1e-30)
            error, of_form = (float(np.linalg.norm(y.astype(np.float64) - want[name])) for y in (x, rounded))
            if name == 'dlog_decay' and np.abs(want[name]).max() < 1e-15:  # nothing is felt through the decays
                error = float(np.abs(x).max()) * norm
            errors[name] = error, of_form, norm, x.size
        return errors, all(np.array_equal(got[n], again[n], equal_nan=True) for n in got)

    found, good = draw(0)
    drawn = [found]
    if few := [name for name, (*_, size) in found.items() if size <= FEW]:
        more, equal = zip(*map(draw, range(1, DRAWS)))
        drawn, good = [found, *more], good and all(equal)
    errors = {}
    for name in found:
        *parts, norm = np.linalg.norm([d[name][:3] for d in drawn[: None if name in few else 1]], axis=0)
        errors[name] = [float(part / norm) for part in parts]
    good &= all(error <= max(FACTOR * of_form, floors.get(name, 0.0)) for name, (error, of_form) in errors.items())
    return good, errors


def function_of(spec: str):
    """MODULE:FUNCTION."""
    module, _, name = spec.partition(':')
    return getattr(importlib.import_module(module), name)


def main(words, cases, check):
    """Checks the cases that contain one of the words; of these, where a word is i/n, every n-th from the i-th on."""
    shard = next((w for w in words if re.fullmatch(r'\d+/\d+', w)), '0/1')
    named = {key: function_of(spec) for key, spec in (w.split('=') for w in words if '=' in w)}
    words = [w for w in words if w != shard and '=' not in w]
    first, every = map(int, shard.split('/'))
    failed = 0
    for case in [c for c in cases if not words or any(w in c.name for w in words)][first::every]:
        try:
            good, errors = check(case, **named)
            text = ' '.join(f'{n} {e:.1e}/{p:.1e}{"!" * (e > FACTOR * p)}' for n, (e, p) in errors.items())
        except Exception as error:
            good, text = False, f'{type(error).__name__}: {str(error)[:300]}'
        failed += not good
        print('ok  ' if good else 'FAIL', case.name, text, flush=True)
    return failed


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:], CASES, check))
