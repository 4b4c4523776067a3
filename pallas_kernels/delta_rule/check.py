"""The correctness gate of the delta rule kernel: `python -m pallas_kernels.delta_rule.check [words]`.

As `pallas_kernels.gated_linear.check`.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.gated_linear import check as linear

NAMES = ('query', 'key', 'value', 'beta', 'log_decay', 'state')
FLOORS = {'state': 2e-5, 'dstate': 2e-5, 'dbeta': 1e-4, 'dlog_decay': 1.5e-4}


def oracle(query, key, value, beta, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, dtype=jnp.float64):
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
    einsum = functools.partial(jnp.einsum, precision='highest')
    scale = 1.0 if scale is None else scale

    def step(state, xs):
        q, k, v, b, a = xs
        state = a[..., None] * state
        u = b[..., None] * (v - einsum('bnk,bnkv->bnv', k, state))
        state = state + k[..., :, None] * u[..., None, :]
        return state, scale * einsum('bnk,bnkv->bnv', q, state)

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, beta.astype(dtype), decay))
    state, out = jax.lax.scan(step, state, xs)
    return jnp.moveaxis(out, 0, 1), state


@dataclasses.dataclass
class Case(linear.Case):
    beta: tuple = (0.0, 1.0)  # range; a seventh of the tokens each has its two ends
    collinear: float = 0.0  # how near keys are to one direction, below 1

    def arrays(self, draw=0):
        """As `linear.Case.arrays`, with beta after value."""
        (query, key, value, log_decay, state), ids, cotangents = super().arrays(draw)
        rng = np.random.default_rng(7 + draw)
        beta = rng.uniform(*self.beta, size=value.shape[:3])
        beta[:, ::7], beta[:, 3::7] = self.beta
        if self.collinear:
            key = (1 - self.collinear) * np.asarray(key, np.float64) + self.collinear * self.K**-0.5
            key = jnp.asarray(key / np.linalg.norm(key, axis=-1, keepdims=True), jnp.bfloat16)
        return (query, key, value, jnp.asarray(beta, jnp.float32), log_decay, state), ids, cotangents


CASES = [
    Case('one token', T=1, B=3, N=4, heads=2),
    Case('one token, per channel', T=1, decay='channel', K=40, V=80),
    Case('two tokens', T=2),
    Case('17', T=17, decay='none'),
    Case('64', T=64, decay='head'),
    Case('1000', B=2, T=1000, resets=0.01, scale=0.1),
    Case('1000, shared heads', T=1000, N=4, heads=2, resets=0.1),
    Case('1000, no decay', T=1000, decay='none', scale=0.1),
    Case('8192 in pieces', T=8192, strength=(0.0, 0.02), resets=0.0005),
    Case('8192 in pieces, no decay', T=8192, decay='none', state=False),
    Case('1000, constant', T=1000, decay='head', scale=0.1),
    Case('per channel', T=1000, N=4, heads=2, decay='channel', scale=0.1),
    Case('per channel, resets', T=1000, decay='channel', resets=0.02),
    Case('per channel, in pieces', T=4096, decay='channel', strength=(0.0, 0.02), resets=0.0005),
    Case('per channel, strong', T=300, decay='channel', strength=(0.0, 50.0)),
    Case('per channel, widths 64, 128', T=200, K=64, V=128, decay='channel', state=False),
    Case('per channel, widths 128, 64', T=200, K=128, V=64, decay='channel'),
    Case('per channel, widths 40, 40', T=200, K=40, V=40, decay='channel'),
    Case('strong', T=1000, strength=(0.0, 50.0)),
    Case('erase', T=1000, strength=(0.0, 0.1), erase=0.05),
    Case('reflecting', T=300, decay='none', beta=(0.0, 2.0)),
    Case('nearly collinear keys', T=300, decay='none', beta=(0.9, 1.0), collinear=0.95),
    Case('widths 64, 64', T=200, K=64, V=64),
    Case('widths 64, 128', T=200, K=64, V=128),
    Case('widths 128, 64', T=200, K=128, V=64),
    Case('widths 40, 80', T=200, K=40, V=80),
]
precise = [c for c in CASES if c.decay != 'channel' and c.T > 1]
CASES += [dataclasses.replace(c, name=f'{c.name}, highest', precision='highest') for c in precise]


def check(case: Case, interpret=False, form=None, kernel=mosaic_gpu.delta_rule) -> tuple[bool, dict]:
    """(passes, {result: (error, error of the float32 form)})."""
    floors = {} if case.precision else FLOORS
    kernel = functools.partial(kernel, precision=case.precision)
    return linear.compare(kernel, oracle, case, NAMES, floors, interpret, form)


if __name__ == '__main__':
    sys.exit(linear.main(sys.argv[1:], CASES, check))
