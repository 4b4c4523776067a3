"""Gate and clock of the recurrent kernels, beside flash-linear-attention where it is installed.

    python -m pallas_kernels.bench_recurrent [words] [options]

Options: --json FILE, --with MODULE:FUNCTION, --patience S, --gate CASE, --no-gate.

Words keep the rows whose name contains one of them, in the words' order. `--with attnx.ops.{op}:xla` adds an implementation,
{op} standing for gated_linear or delta_rule; one that names its op goes to that op's rows, one that is no kernel to rows of no
more than 16,384 tokens. The gate, first, is that of `gated_linear.check` and `delta_rule.check`, where they have rows, and of
kernels that are added; of all cases, or those that contain CASE. Then a few processes each compile a row, take the only lock,
time it and say so; no row waits for another. The one of PyTorch does likewise; what Triton chooses from is compiled beforehand
by processes of less priority, each a part, which run it once. The peer `softmax` is the causal softmax kernel, `copy` a copy of
the state. Prints a JSON line a figure as soon as it is known, also to FILE, and at last a table; milliseconds are medians,
`kernels` their parts by CUPTI. Rows that are not begun within S seconds are left out.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

from pallas_kernels import bench

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # many processes share the card
os.environ['FLA_CACHE_RESULTS'] = '0'


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
WORKERS, WARMERS, SHARDS = 2, 5, 5  # processes that time, that compile for Triton, and of each gate
ME = 'pallas_kernels.bench_recurrent'
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


def named(extra, op: str) -> list[str]:
    """Of the implementations that are added, those of `op`."""
    others = {LINEAR, DELTA} - {op}
    return [spec.format(op=op) for spec in extra if not others & set(re.split('[.:]', spec))]


def ours(spec: str) -> bool:
    return spec.startswith('pallas_kernels.')


def gates(rows, words, extra) -> list[list[str]]:
    """The gates' processes: of the kernels of the rows' ops, and of kernels that are added."""
    added = lambda op: [[f'kernel={spec}'] for spec in named(extra, op) if ours(spec)]
    ops = dict.fromkeys(row.op for row in rows)
    each = [(f'pallas_kernels.{op}.check', *words, *kernel) for op in ops for kernel in ([], *added(op))]
    return [[*command, f'{i}/{SHARDS}'] for i in range(SHARDS) for command in each]


def implementation(row: Row, peer: str):
    """The function that `peer` names, with the op's arguments."""
    if peer == 'softmax':
        from pallas_kernels.softmax_attention.check import causal
        from pallas_kernels.softmax_attention.mosaic_gpu import softmax_attention

        return lambda q, k, v, *_, **__: (softmax_attention(q, k, v, mask=causal), None)
    if peer == 'copy':
        return lambda *_, initial_state: (initial_state[0, 0, 0, 0], initial_state * 0.5)
    spec = f'pallas_kernels.{row.op}.mosaic_gpu:{row.op}' if peer == 'ours' else peer
    module, _, function = spec.partition(':')
    return getattr(importlib.import_module(module), function)


def build(row: Row, peer: str):
    """{figure: (compiled function, its arguments)} or {figure: error}, each run once."""
    import jax

    op, (a, c) = implementation(row, peer), arrays(row)
    constant = row.decay in ('none', 'head')  # constants are not trained, as in lightning attention
    count = (4 if row.op == DELTA else 3) + (not constant)
    forward = jax.jit(lambda *a: op(*a[:-1], initial_state=a[-1])[: 1 if row.T > 1 else 2])

    @jax.jit
    def both(c, *a):
        out, pull = jax.vjp(lambda *trained: op(*trained, *a[count:-1])[0], *a[:count])
        return out, pull(c)  # without out, the forward sweep would be left out

    jobs = {'fwd': (forward, a)} | ({'fwdbwd': (both, (c, *a))} if row.backward else {})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = {key: pool.submit(guarded, lambda job=job: run_once(*job)) for key, job in jobs.items()}
    return {key: future.result() for key, future in made.items()}


def run_once(function, args):
    import jax

    jax.block_until_ready(function(*args))
    return function, args


def guarded(f):
    try:
        return f()
    except Exception as error:
        return f'{type(error).__name__}: {str(error)[:300]}'


@contextlib.contextmanager
def alone(path):
    """While nothing else is timed."""
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def worker(jobs, lock, deadline):
    """Compiles, then times one row after another."""
    for row, peer in jobs:
        figure = {'case': row.name, 'peer': peer}
        if time.time() > deadline:
            emit(figure | {'error': 'no time left'})
            continue
        built = build(row, peer)
        with alone(lock):
            emit(figure | measured(built, row, peer))


def measured(built, row, peer) -> dict:
    figure = {}
    for key, found in built.items():
        if isinstance(found, str):
            figure[f'{key}_error'] = found
            continue
        figure[f'{key}_ms'] = guarded(lambda f=found: round(clock(*f), 4))
        if row.B == 1 or not (peer in ('ours', 'copy') or ours(peer)):
            continue
        figure[f'{key}_kernels'] = found = guarded(lambda f=found: parts(*f))
        if row.copied and isinstance(found, dict) and sum(found.values()):
            figure['device_ms'] = sum(found.values()) * 1e-3
            figure['GB_s'] = round(row.copied / sum(found.values()) * 1e-3)
    return figure


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
    command = [sys.executable, '-m', *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read(process, results, tell=lambda *words: None):
    """Collects a process's results, passes on what it asks for and prints what else it says, until it ends."""
    for line in process.stdout:
        word, _, rest = line.strip().partition(' ')
        if word == 'RESULT':
            results.append(json.loads(rest))
            print(rest, flush=True)
        if word in ('RESULT', 'WARM', 'QUIET'):
            tell(word, rest)
        elif line.startswith(('ok', 'FAIL')) or 'Error' in line:
            print(line.rstrip()[:600], flush=True)
    process.wait()


def start_torch(rows, options, results, others) -> list:
    """Threads that read the process that times PyTorch and those that compile for it.

    It is told of a row when all these have it; while it times, which takes the processor too, they and the others stand still.
    """
    names = [r.name for r in rows]
    timer = start(ME, *options, '--torch', 'time', *names)
    warmers = [start(ME, *options, '--torch', f'{i}/{WARMERS}', *names) for i in range(WARMERS)]
    seen, lock = collections.Counter(), threading.Lock()

    def go():
        timer.stdin.write('go\n')
        timer.stdin.flush()

    def signal_all(number):
        for process in (*warmers, *others):
            if process.poll() is None:
                process.send_signal(number)

    def tell(word, rest):
        with lock:
            if word == 'WARM':
                seen[rest] += 1
                if seen[rest] == WARMERS:
                    go()
            elif word == 'QUIET':
                signal_all(signal.SIGSTOP)
                go()
            else:
                signal_all(signal.SIGCONT)

    def follow(process):
        read(process, results, tell)
        if process is timer:
            signal_all(signal.SIGCONT)

    return [threading.Thread(target=follow, args=(process,)) for process in (timer, *warmers)]


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
    parser.add_argument('--patience', type=float, default=600.0)
    parser.add_argument('--with', dest='extra', action='append', default=[])
    parser.add_argument('--gate', metavar='WORD', action='append', default=[])
    parser.add_argument('--no-gate', action='store_true')
    parser.add_argument('--no-torch', action='store_true')
    for option in ('--worker', '--torch', '--lock', '--deadline'):
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    deadline = float(args.deadline or time.time() + args.patience)
    if args.worker:
        pairs = (job.split(SEPARATOR) for job in args.words)
        return worker([(next(r for r in ROWS if r.name == name), peer) for name, peer in pairs], args.lock, deadline)
    rows = list(dict.fromkeys(r for w in args.words or [''] for r in ROWS if w in r.name))
    if args.torch:
        from pallas_kernels import bench_fla  # it stands on this module

        if args.torch == 'time':
            return bench_fla.run(rows, args.lock, deadline)
        return bench_fla.prepare(rows, deadline, args.torch)
    results, good = Results(args.json), True
    if not args.no_gate:
        for process in [start(*command) for command in gates(rows, args.gate, args.extra)]:
            read(process, results)
            good &= process.returncode == 0
        deadline = time.time() + args.patience
    small = lambda row: row.B * row.T <= 2**14
    others = lambda row: [x for x in named(args.extra, row.op) if small(row) or ours(x)] if 'softmax' not in row.peers else []
    jobs = [f'{row.name}{SEPARATOR}{peer}' for row in rows for peer in ('ours', *row.peers, *others(row))]
    beside = [r for r in rows if r.backward and not r.peers]
    options = '--lock', bench.LOCK, '--deadline', str(deadline)
    workers = [start(ME, *options, '--worker', 'yes', *jobs[i::WORKERS]) for i in range(min(WORKERS, len(jobs)))]
    threads = [threading.Thread(target=read, args=(process, results)) for process in workers]
    if beside and not args.no_torch and importlib.util.find_spec('fla'):
        threads += start_torch(beside, options, results, workers)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(table(results), flush=True)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
