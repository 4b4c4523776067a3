"""The correctness gate of the short convolution: `python -m pallas_kernels.short_conv.check [--clock]`.

Outputs, last window and every gradient against the same sums in float64; the error may be twice that of the XLA form, and a
second run must be bit-equal. `--clock` then times forward + backward of a wide layer beside the XLA form.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.short_conv import mosaic_gpu

FACTOR = 2.0


@dataclasses.dataclass
class Case:
    T: int
    B: int = 2
    D: int = 512
    W: int = 4
    resets: float = 0.0
    state: bool = True
    activation: str | None = 'silu'
    dtype: str = 'bfloat16'

    def arrays(self):
        """x, kernel, initial_state, segment_ids and the cotangents."""
        rng = np.random.default_rng(self.T + self.W)
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape), self.dtype)
        x, kernel, dy = normal(self.B, self.T, self.D), normal(self.W, self.D), normal(self.B, self.T, self.D)
        state, dlast = (normal(self.B, self.W - 1, self.D) for _ in range(2))
        ids = jnp.asarray(np.cumsum(rng.random((self.B, self.T)) < self.resets, 1), jnp.int32) if self.resets else None
        return x, kernel, state if self.state else None, ids, (dy, dlast)


CASES = [
    Case(2),
    Case(17, resets=0.3),
    Case(1000, resets=0.05),
    Case(1000, D=384, W=7, resets=0.2, state=False),
    Case(100, D=128, W=2, activation=None),
    Case(100, D=256, W=1),
    Case(8192, B=1, resets=0.001),
    Case(300, dtype='float32', resets=0.1),
]


def plain(x, kernel, state, ids, activation):
    """The same sums in XLA."""
    age = mosaic_gpu._age(ids, kernel.shape[0])
    state = jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype) if state is None else state
    outputs = mosaic_gpu.outputs if x.dtype != jnp.float64 else lambda *a: mosaic_gpu.outputs(*a, dtype=jnp.float64)
    return outputs(activation == 'silu', x, kernel, state, age), mosaic_gpu.last(x, state, age)


def results(function, case, dtype=None, **options):
    x, kernel, state, ids, cotangents = case.arrays()
    if dtype:
        x, kernel, state, cotangents = jax.tree.map(lambda a: a.astype(dtype), (x, kernel, state, cotangents))
    call = lambda x, kernel, state: function(x, kernel, state, ids, case.activation, **options)
    run = lambda x, kernel, state: (lambda out, pull: (*out, *pull(cotangents)))(*jax.vjp(call, x, kernel, state))
    run = run if options.get('interpret') else jax.jit(run)
    return [np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a) for a in run(x, kernel, state) if a is not None]


def kernel(x, kernel, state, ids, activation, interpret=False):
    return mosaic_gpu.short_conv(x, kernel, initial_state=state, segment_ids=ids, activation=activation, interpret=interpret)


def check(case: Case, interpret=False) -> tuple[bool, list]:
    """(passes, (error, error of the XLA form) of y, last window, dx, dkernel, dstate)."""
    got = results(kernel, case, interpret=interpret)
    again = got if interpret else results(kernel, case)
    narrow = results(plain, case)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend='cpu')[0]):
        want = results(plain, case, jnp.float64)
    norm = lambda a: float(np.linalg.norm(a.astype(np.float64)))
    errors = [tuple(norm(a - w) / max(norm(w), 1e-30) for a in pair) for *pair, w in zip(got, narrow, want)]
    good = all(np.array_equal(a, b) for a, b in zip(got, again))
    return good and all(e <= max(FACTOR * p, 1e-6) for e, p in errors), errors


def clock():
    """Milliseconds of forward + backward at B8 T2048 D2048, four taps and SiLU, with resets."""
    from pallas_kernels.bench_recurrent import clock

    case = Case(2048, B=8, D=2048, resets=0.002, state=False)
    x, taps, _, ids, (dy, _) = case.arrays()
    for name, function in (('ours', kernel), ('xla', plain)):
        call = lambda x, taps, f=function: f(x, taps, None, ids, 'silu')[0]
        both = jax.jit(lambda x, taps, dy, call=call: (lambda y, pull: (y, pull(dy)))(*jax.vjp(call, x, taps)))
        forward = clock(jax.jit(call), (x, taps))
        print(f'{name} forward {forward:.4f} ms, + backward {clock(both, (x, taps, dy)):.4f} ms', flush=True)


def main(words):
    failed = 0
    for case in CASES:
        good, errors = check(case)
        failed += not good
        print('ok  ' if good else 'FAIL', case, ' '.join(f'{e:.1e}/{p:.1e}' for e, p in errors), flush=True)
    if '--clock' in words:
        clock()
    return failed


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
