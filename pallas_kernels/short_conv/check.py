"""The correctness gate of the short convolution: `python -m pallas_kernels.short_conv.check [--clock]`.

Outputs, last window and every gradient against the same sums in float64; the error may be twice that of the XLA form, and a
second run must be bit-equal. `--clock` then times forward + backward of a wide layer beside the XLA form.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_linear import check as grid
from pallas_kernels.short_conv import mosaic_gpu

FACTOR = 2.0
NAMES = ('y', 'last', 'dx', 'dkernel', 'dstate')


@dataclasses.dataclass
class Case:
    T: int
    B: int = 2
    D: int = 512
    W: int = 4
    resets: float = 0.0
    state: bool = True
    activation: str | None = 'silu'
    unit: int | None = None  # heads of unit length
    dtype: str = 'bfloat16'

    @property
    def name(self) -> str:
        return ' '.join(f'{key}={value}' for key, value in dataclasses.asdict(self).items())

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
    Case(1000, D=768, W=7, resets=0.2, state=False),
    Case(100, D=256, W=2, activation=None),
    Case(100, D=256, W=1),
    Case(8192, B=1, resets=0.001),
    Case(300, dtype='float32', resets=0.1),
    Case(1000, unit=4, resets=0.05),
    Case(17, D=1024, unit=16),
    Case(300, D=256, unit=4, W=2, activation=None, state=False),
    Case(300, dtype='float32', unit=4, resets=0.1),
    Case(8192, B=1, D=2048, unit=16, state=False),
    Case(200, D=640, unit=5, resets=0.05),
    Case(200, D=384, unit=12),
]


def plain(x, kernel, state, ids, activation, unit):
    """The same sums in XLA."""
    age = mosaic_gpu._age(ids, kernel.shape[0])
    state = jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype) if state is None else state
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return mosaic_gpu.plain(activation == 'silu', unit, x, kernel, state, age, dtype), mosaic_gpu.last(x, state, age)


def results(function, case, dtype=None, **options):
    x, kernel, state, ids, cotangents = case.arrays()
    if dtype:
        x, kernel, state, cotangents = jax.tree.map(lambda a: a.astype(dtype), (x, kernel, state, cotangents))
    call = lambda x, kernel, state: function(x, kernel, state, ids, case.activation, case.unit, **options)
    run = lambda x, kernel, state: (lambda out, pull: (*out, *pull(cotangents)))(*jax.vjp(call, x, kernel, state))
    run = run if options.get('interpret') else jax.jit(run)
    wide = lambda a: np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a)
    return {name: wide(a) for name, a in zip(NAMES, run(x, kernel, state)) if a is not None}


def kernel(x, kernel, state, ids, activation, unit, interpret=False):
    options = {'initial_state': state, 'segment_ids': ids, 'activation': activation, 'unit_heads': unit}
    return mosaic_gpu.short_conv(x, kernel, **options, interpret=interpret)


def check(case: Case, interpret=False, form=None) -> tuple[bool, dict]:
    """(passes, {result: (error, error of the XLA form)})."""
    got = results(kernel, case, interpret=interpret)
    again = got if interpret else results(kernel, case)
    narrow = results(form or plain, case)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend='cpu')[0]):
        want = results(plain, case, jnp.float64)
    norm = lambda a: float(np.linalg.norm(a.astype(np.float64)))
    error = lambda a, w: norm(a - w) / max(norm(w), 1e-30)
    errors = {name: (error(got[name], w), error(narrow[name], w)) for name, w in want.items()}
    good = all(np.array_equal(got[name], again[name]) for name in got)
    return good and all(e <= max(FACTOR * p, 1e-6) for e, p in errors.values()), errors


def clock():
    """Microseconds of kernels by CUPTI, least of five: forward, and forward + backward, of layers with four taps and SiLU."""
    from pallas_kernels.bench_recurrent import parts

    for case in (Case(2048, B=8, resets=0.002), Case(16384, B=1), Case(16384, B=1, unit=16)):
        case = dataclasses.replace(case, D=2048, state=False)
        x, taps, _, ids, (dy, _) = case.arrays()
        for name, function in (('ours', kernel), ('xla', plain)):
            call = lambda x, taps, f=function, c=case, ids=ids: f(x, taps, None, ids, 'silu', c.unit)[0]
            both = jax.jit(lambda x, taps, dy, call=call: (lambda y, pull: (y, pull(dy)))(*jax.vjp(call, x, taps)))
            for what, run, given in (('forward', jax.jit(call), (x, taps)), ('both', both, (x, taps, dy))):
                jax.block_until_ready(run(*given))
                least = min((parts(run, given) for _ in range(5)), key=lambda found: sum(found.values()))
                print(f'{case.name}: {name} {what} {sum(least.values()):.1f}', least, flush=True)


if __name__ == '__main__':
    words = [w for w in sys.argv[1:] if w != '--clock']
    failed = grid.main(words, CASES, check)
    if len(words) + 1 < len(sys.argv):
        clock()
    sys.exit(failed)
