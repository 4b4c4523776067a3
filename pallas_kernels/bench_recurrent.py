"""Gate and clock of the recurrent kernels, beside flash-linear-attention where it is installed.

    python -m pallas_kernels.bench_recurrent [words] [--json FILE] [--with MODULE:FUNCTION] [--patience S] [--no-gate]

Words keep the rows whose name contains one of them. `--with attnx.ops.{op}:xla` adds an implementation, {op} standing for
gated_linear or delta_rule, to the rows of no more than 16,384 tokens. The gate is that of `gated_linear.check` and
`delta_rule.check`. A few processes compile the rows, while others run the gate and others compile what Triton will choose from;
then rows are timed one after another, when nothing else runs, and PyTorch comes last. The peer `softmax` is the causal softmax
kernel, `copy` a copy of the state. Prints a JSON line a figure as soon as it is known, also to FILE, and a table; milliseconds
are medians, `kernels` their parts by CUPTI. What is not compiled within S seconds is not timed.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # many processes share the card


@dataclasses.dataclass(frozen=True)
class Row:
    op: str
    decay: str  # none, head, token, channel
    B: int
    T: int
    N: int = 16
    H: int = 128
    backward: bool = True
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        kind = {
            'gated_linear': {'none': 'linear', 'head': 'lightning', 'token': 'scalar', 'channel': 'gla'},
            'delta_rule': {'none': 'delta', 'token': 'gated-delta', 'channel': 'kda'},
        }[self.op][self.decay]
        return f'{kind} B{self.B}T{self.T}N{self.N}H{self.H}'

    @property
    def copied(self) -> int:
        """Bytes that a step of decoding cannot but move: the state, read and written."""
        return 2 * 4 * self.B * self.N * self.H**2 if self.T == 1 else 0


LINEAR, DELTA = 'gated_linear', 'delta_rule'
KINDS = [(LINEAR, 'head'), (LINEAR, 'token'), (LINEAR, 'channel'), (DELTA, 'none'), (DELTA, 'token'), (DELTA, 'channel')]
ROWS = [Row(op, decay, B, T) for B, T in ((8, 2048), (1, 65536)) for op, decay in KINDS]
ROWS += [Row(LINEAR, 'head', 1, T, backward=False) for T in (131072,)]
ROWS += [Row(DELTA, 'token', 1, T, backward=False) for T in (16384, 131072)]
ROWS += [Row(LINEAR, 'head', B, T, peers=('softmax',)) for B, T in ((4, 4096), (2, 8192), (1, 16384))]
STEPS = [(LINEAR, 'token'), (LINEAR, 'channel'), (DELTA, 'token')]
ROWS += [Row(op, decay, 64, 1, backward=False, peers=('copy',)) for op, decay in STEPS]
WORKERS, SHARDS = 5, 5  # processes that time, and processes of each gate
SEPARATOR = '::'


def arrays(row: Row):
    """The op's arguments, `initial_state` last, and the cotangent of its output."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 6)
    shape = row.B, row.T, row.N, row.H
    q, k, v, c = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(jnp.bfloat16)
    decay = {
        'none': lambda: None,
        'head': lambda: -8.0 / row.N * jnp.arange(row.N, dtype=jnp.float32),
        'token': lambda: jax.nn.log_sigmoid(jax.random.normal(keys[4], shape[:3])),
        'channel': lambda: jax.nn.log_sigmoid(jax.random.normal(keys[4], shape)) / 16,
    }[row.decay]()
    beta = (jax.random.uniform(keys[5], shape[:3]),) if row.op == DELTA else ()
    state = jax.random.normal(keys[5], (row.B, row.N, row.H, row.H)) if row.T == 1 else None
    return (q, k, v, *beta, decay, state), c


def clock(function, args, target=0.05, rounds=5) -> float:
    """Median milliseconds of a call, in batches that take `target` seconds."""
    import jax
    import numpy as np

    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    calls = max(2, min(100, int(target / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return float(np.median(times))


def parts(function, args) -> dict | None:
    """{kernel: microseconds} of one call, summed by name."""
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, found = profiler.Cupti().measure(function, aggregate=False)(*args)
    except Exception as error:
        return {f'{type(error).__name__}: {error}'[:200]: 0.0}
    total = {}
    for name, ms in found or []:
        total[name] = round(total.get(name, 0.0) + ms * 1e3, 1)
    return dict(sorted(total.items(), key=lambda x: -x[1])[:14])


def implementation(row: Row, peer: str):
    """The function that `peer` names, with the op's arguments."""
    if peer == 'softmax':
        from pallas_kernels.softmax_attention.check import causal
        from pallas_kernels.softmax_attention.mosaic_gpu import softmax_attention

        return lambda q, k, v, *_, **__: (softmax_attention(q, k, v, mask=causal), None)
    if peer == 'copy':
        return lambda *_, initial_state: (initial_state[0, 0, 0, 0], initial_state * 0.5)
    spec = f'pallas_kernels.{row.op}.mosaic_gpu:{row.op}' if peer == 'ours' else peer
    module, _, function = spec.format(op=row.op).partition(':')
    return getattr(importlib.import_module(module), function)


def build(row: Row, peer: str):
    """{figure: (compiled function, its arguments' maker)} or {figure: error}, each run once."""
    import jax

    op = implementation(row, peer)
    constant = row.decay in ('none', 'head')  # constants are not trained, as in lightning attention
    count = (4 if row.op == DELTA else 3) + (not constant)
    forward = jax.jit(lambda *a: op(*a[:-1], initial_state=a[-1])[: 1 if row.T > 1 else 2])

    @jax.jit
    def both(c, *a):
        out, pull = jax.vjp(lambda *trained: op(*trained, *a[count:-1])[0], *a[:count])
        return out, pull(c)  # without out, the forward sweep would be left out

    jobs = {'fwd': (forward, lambda a, c: a)} | ({'fwdbwd': (both, lambda a, c: (c, *a))} if row.backward else {})
    return {key: guarded(lambda f=f, pick=pick: run_once(f, pick, row)) for key, (f, pick) in jobs.items()}


def run_once(function, pick, row):
    import jax

    jax.block_until_ready(function(*pick(*arrays(row))))
    return function, pick


def guarded(f):
    try:
        return f()
    except Exception as error:
        return f'{type(error).__name__}: {str(error)[:300]}'


def worker(jobs, patience):
    """Compiles and runs every row once, says so, waits for its turn, then times."""
    start = time.perf_counter()

    def timed_build(row, peer):
        built = build(row, peer)
        print(f'BUILT {row.name} {peer} {time.perf_counter() - start:.0f} s', flush=True)
        return built

    pool = concurrent.futures.ThreadPoolExecutor(4)
    futures = [pool.submit(timed_build, *job) for job in jobs]
    concurrent.futures.wait(futures, patience)
    print('READY', flush=True)
    sys.stdin.readline()
    for (row, peer), future in zip(jobs, futures):
        figure = {'case': row.name, 'peer': peer}
        if not future.done():
            emit(figure | {'error': f'not compiled within {patience} s'})
            continue
        made = arrays(row)
        for key, found in future.result().items():
            if isinstance(found, str):
                figure[f'{key}_error'] = found
                continue
            function, pick = found
            a = pick(*made)
            figure[f'{key}_ms'] = guarded(lambda f=function, a=a: round(clock(f, a), 4))
            if row.B == 1 or peer not in ('ours', 'copy'):
                continue
            figure[f'{key}_kernels'] = found = guarded(lambda f=function, a=a: parts(f, a))
            if row.copied and isinstance(found, dict) and sum(found.values()):
                figure['device_ms'] = sum(found.values()) * 1e-3
                figure['GB_s'] = round(row.copied / sum(found.values()) * 1e-3)
        emit(figure)
    os._exit(0)  # what still compiles is left


def fla(row: Row):
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


def run_torch(rows, warm=False):
    """Times the rows, or only compiles what they run; Triton's choices are made while nothing else runs, and kept nowhere."""
    os.environ['FLA_CACHE_RESULTS'] = '0'
    import torch
    import triton.runtime
    from triton.testing import do_bench

    short = functools.partial(do_bench, warmup=2 if warm else 4, rep=2 if warm else 15)
    triton.runtime.driver.active.get_benchmarker = lambda: short
    timed = functools.partial(do_bench, warmup=10, rep=60, return_mode='median')
    if warm:
        timed = lambda f: f() is None or 0.0
    else:
        fla(Row(LINEAR, 'head', 1, 64))  # imports it
        print('READY', flush=True)
        sys.stdin.readline()

    def both(f, leaves, cotangent):
        f(*leaves).backward(cotangent)
        for x in leaves:
            x.grad = None

    for row in rows:
        figure = {'case': row.name, 'peer': 'fla'}
        try:
            f, args = fla(row)
            with torch.no_grad():
                figure['fwd_ms'] = round(timed(functools.partial(f, *args)), 4)
            if row.backward:
                leaves = [x.requires_grad_() for x in args]
                figure['fwdbwd_ms'] = round(timed(functools.partial(both, f, leaves, torch.randn_like(args[2]))), 4)
        except Exception as error:
            figure['error'] = f'{type(error).__name__}: {str(error)[:200]}'
        if not warm:
            emit(figure)
        torch.cuda.empty_cache()


def emit(figure):
    print('RESULT ' + json.dumps(figure), flush=True)


class Results(list):
    """Figures; each is written to the file as it comes."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        if path:
            open(path, 'w').close()

    def append(self, figure):
        super().append(figure)
        if self.path:
            with open(self.path, 'a') as file:
                print(json.dumps(figure), file=file)


def start(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read(process, results, until=None):
    """Collects a process's results; prints everything else it says. True if it said `until`."""
    for line in process.stdout:
        if line.startswith('RESULT '):
            results.append(json.loads(line[7:]))
            if 'fwd_ms' in results[-1] or 'error' in line:
                print(line[7:].rstrip(), flush=True)
        elif until and line.strip() == until:
            return True
        elif line.startswith(('ok', 'FAIL', 'BUILT')) or 'Error' in line:
            print(line.rstrip()[:600], flush=True)
    process.wait()
    return False


def table(results) -> str:
    lines = [f'{"case":36} {"ours fwd / +bwd ms":>22} {"peer":>6} {"fwd / +bwd ms":>22} {"times faster":>16}']
    for case in dict.fromkeys(r['case'] for r in results if 'case' in r):
        found = {r['peer']: r for r in results if r.get('case') == case}
        cell = lambda r: tuple(r.get(key) if isinstance(r.get(key), float) else None for key in ('fwd_ms', 'fwdbwd_ms'))
        text = lambda pair: ' / '.join(f'{x:.3f}' if x else '-' for x in pair)
        own = cell(found.get('ours', {}))
        for peer in [p for p in found if p != 'ours'] or ['']:
            other = cell(found.get(peer, {}))
            ratio = tuple(y / x if x and y else None for x, y in zip(own, other))
            lines.append(f'{case:36} {text(own):>22} {peer[-6:]:>6} {text(other):>22} {text(ratio):>16}')
    return '\n'.join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*')
    parser.add_argument('--json', metavar='FILE', help='a JSON line a figure')
    parser.add_argument('--patience', type=float, default=240.0)
    parser.add_argument('--with', dest='extra', action='append', default=[])
    parser.add_argument('--no-gate', action='store_true')
    parser.add_argument('--no-torch', action='store_true')
    parser.add_argument('--no-warm', action='store_true', help="leave Triton's cache as it is")
    parser.add_argument('--no-clock', action='store_true', help='compile only, where caches are kept on disk')
    parser.add_argument('--worker', nargs='+', help=argparse.SUPPRESS)
    parser.add_argument('--torch-only', choices=('warm', 'time'), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        pairs = (job.split(SEPARATOR) for job in args.worker)
        return worker([(next(r for r in ROWS if r.name == name), peer) for name, peer in pairs], args.patience)
    rows = [r for r in ROWS if not args.words or any(w in r.name for w in args.words)]
    if args.torch_only:
        return run_torch([r for r in rows if r.backward and not r.peers], args.torch_only == 'warm')
    others = lambda row: args.extra if row.B * row.T <= 2**14 and 'softmax' not in row.peers else ()
    me, results, good = ('-m', 'pallas_kernels.bench_recurrent'), Results(args.json), True
    patience = '--patience', str(args.patience)
    jobs = [f'{row.name}{SEPARATOR}{peer}' for row in rows for peer in ('ours', *row.peers, *others(row))]
    jobs = [start(*me, *patience, '--worker', *jobs[i::WORKERS]) for i in range(min(WORKERS, len(jobs)))]
    with_torch = not args.no_torch and importlib.util.find_spec('fla')
    peers = [start(*me, '--torch-only', 'time', *args.words)] if with_torch else []
    warm = [start(*me, '--torch-only', 'warm', r.name) for r in rows if r.B == 8] if with_torch and not args.no_warm else []
    if not args.no_gate:
        gate = lambda op, i: start('-m', f'pallas_kernels.{op}.check', f'{i}/{SHARDS}')
        for process in [gate(op, i) for i in range(SHARDS) for op in (LINEAR, DELTA)]:
            read(process, results)
            good &= process.returncode == 0
    for process in warm:
        read(process, results)
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        ready = list(pool.map(lambda job: read(job, results, until='READY'), jobs))
    waiting = [job for job, said in zip(jobs, ready) if said]
    if args.no_clock:
        for job in [*waiting, *peers]:
            job.kill()
        return 0 if good else 1
    for job in [*waiting, *(job for job in peers if read(job, results, until='READY'))]:
        job.stdin.write('go\n')
        job.stdin.flush()
        read(job, results)
    print(table(results), flush=True)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
