"""flash-linear-attention's side of `bench_recurrent`: one process times it, others compile what Triton chooses from."""

import functools
import os
import sys
import time

from pallas_kernels.bench_recurrent import LINEAR, Row, alone, emit


def function(row: Row):
    """flash-linear-attention's function of row's arguments, and these."""
    import torch
    import torch.nn.functional as F
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    shape = row.B, row.T, row.N, row.H
    draw = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
    gate = lambda shape: F.logsigmoid(torch.randn(shape, device='cuda'))
    beta = torch.rand(shape[:3], device='cuda', dtype=torch.bfloat16)
    q, k, v = draw(shape), F.normalize(draw(shape), dim=-1), draw(shape)
    constant = -8.0 / row.N * torch.arange(row.N, device='cuda', dtype=torch.float32)
    match row.op, row.decay:
        case 'gated_linear', 'head':
            return lambda *a: chunk_simple_gla(*a, g_gamma=constant)[0], (q, k, v)
        case 'gated_linear', 'token':
            return lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0], (q, k, v, gate(shape[:3]))
        case 'gated_linear', 'channel':
            return lambda *a: chunk_gla(*a)[0], (q, k, v, gate(shape) / 16)
        case 'delta_rule', 'none':
            return lambda *a: chunk_delta_rule(*a)[0], (q, k, v, beta)
        case 'delta_rule', 'token':
            return lambda *a: chunk_gated_delta_rule(*a)[0], (q, k, v, gate(shape[:3]), beta)
        case 'delta_rule', 'channel':
            return lambda *a: chunk_kda(*a)[0], (q, k, v, gate(shape) / 16, beta)
    raise ValueError(row)


def run(rows, lock, deadline):
    """Times each row once told that it may. What Triton chooses is chosen while nothing else is timed, and kept nowhere."""
    import torch
    import triton.runtime
    from triton.testing import do_bench

    triton.runtime.driver.active.get_benchmarker = lambda: functools.partial(do_bench, warmup=4, rep=15)
    timed = lambda f: round(do_bench(f, warmup=10, rep=60, return_mode='median'), 4)
    function(Row(LINEAR, 'head', 1, 64))  # imports it
    for row in rows:
        sys.stdin.readline()
        if time.time() > deadline:
            emit({'case': row.name, 'peer': 'fla', 'error': 'no time left'})
            continue
        with alone(lock):
            print('QUIET', flush=True)
            sys.stdin.readline()
            emit({'case': row.name, 'peer': 'fla'} | figures(row, timed))
        torch.cuda.empty_cache()


def figures(row, timed) -> dict:
    import torch

    def both(f, leaves, cotangent):
        f(*leaves).backward(cotangent)
        for x in leaves:
            x.grad = None

    figure = {}
    try:
        f, args = function(row)
        with torch.no_grad():
            figure['fwd_ms'] = timed(functools.partial(f, *args))
        if row.backward:
            leaves = [x.requires_grad_() for x in args]
            figure['fwdbwd_ms'] = timed(functools.partial(both, f, leaves, torch.randn_like(args[2])))
    except Exception as error:
        figure['error'] = f'{type(error).__name__}: {str(error)[:200]}'
    return figure


def prepare(rows, deadline, share):
    """Runs the rows with every n-th of what Triton's tuners choose from, from the i-th on, or all where none of these runs."""
    os.nice(10)
    import triton.runtime
    from triton.runtime.autotuner import Autotuner

    i, n = map(int, share.split('/'))
    init, run = Autotuner.__init__, Autotuner.run

    def fewer(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.every, self.configs = self.configs, self.configs[i::n] or self.configs[:1]

    def tolerant(self, *args, **kwargs):
        try:
            return run(self, *args, **kwargs)
        except Exception:
            self.configs = self.every
            self.cache.clear()
            return run(self, *args, **kwargs)

    Autotuner.__init__, Autotuner.run = fewer, tolerant
    triton.runtime.driver.active.get_benchmarker = lambda: lambda f, *_, **__: f() is None or [0.0] * 3
    for row in rows:
        if time.time() < deadline:
            figures(row, lambda f: f() is None)
        print(f'WARM {row.name}', flush=True)
