"""Times the softmax attention kernel against what a user would pick instead, after checking that it is right.

    python -m pallas_kernels.bench [words] [--json FILE] [--with module:function ...] [--tiles FILE ...] [--peers NAME,...]
        [--no-gate]

Words keep the rows whose name contains one of them. `--with attnx.ops.softmax_attention:xla` adds an implementation
with the op's signature, `--tiles FILE` ours with the choices of `softmax_attention.tiles` in that file. First every row's
mask, score and shape class pass the gate of `softmax_attention.check` at a small size; what fails is not timed. Peers:
cuDNN through `jax.nn`, tokamax where installed, and, in a second process, PyTorch's cuDNN, FlashAttention-2 and
FlexAttention. Both processes compile everything first; then they time, one after the other, this one in rounds over the
implementations of a row, each round in another order: what runs after a program that hardly warms the card meets higher
clocks. Ours includes the tables of blocks, FlexAttention is given them: for documents, whose tables depend on data,
`tables_ms` says what making them takes it. Times are medians; TFLOP/s count visible pairs, 3.5 times the forward for
forward + backward. Prints a table, one JSON line a figure, and writes them all to FILE. Several of these processes may run
at once: they take turns in timing.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch shares the card

WINDOW, DOCUMENT, PREFIX, SINK, CAP = 1024, 1536, 2048, 64, 30.0
SHAPES = [(8, 2048, 16, 16, 128), (2, 8192, 16, 16, 128), (2, 8192, 32, 32, 64), (2, 8192, 16, 4, 128)]
MAIN = SHAPES[1]
WIDE = (2, 8192, 8, 8, 256)
LOCK = os.path.join(tempfile.gettempdir(), 'pallas_kernels_bench.lock')  # of who times; the recurrent kernels' bench too
KINDS = ('window', 'documents', 'prefix', 'global-window', 'alibi', 'relative', 'softcap')


@dataclasses.dataclass(frozen=True)
class Row:
    kind: str
    shape: tuple[int, int, int, int, int]  # B, T, N, K, H

    @property
    def name(self) -> str:
        return '{} B{}T{}N{}K{}H{}'.format(self.kind, *self.shape)

    def visible(self) -> int:
        """Visible pairs of one head."""
        T = self.shape[1]
        if self.kind == 'full':
            return T * T
        if self.kind in ('causal', 'alibi', 'relative', 'softcap'):
            return T * T // 2  # as peers count
        if self.kind == 'window':
            return sum(min(i + 1, WINDOW) for i in range(T))
        if self.kind == 'documents':
            return sum(i % DOCUMENT + 1 for i in range(T))
        if self.kind == 'prefix':
            return sum(max(i + 1, PREFIX) for i in range(T))
        return sum(min(i + 1, WINDOW) + min(max(i + 1 - WINDOW, 0), SINK) for i in range(T))

    @property
    def flops(self) -> float:
        B, _, N, _, H = self.shape
        return 4.0 * B * N * H * self.visible()


def rows(words) -> list[Row]:
    found = [Row(kind, shape) for shape in (*SHAPES, WIDE) for kind in ('full', 'causal')]
    found += [Row(kind, MAIN) for kind in KINDS]
    return [r for r in found if not words or any(w in r.name for w in words)]


@contextlib.contextmanager
def turn():
    """One process at a time."""
    with open(LOCK, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def emit(results, **figure):
    results.append(figure)
    print('RESULT ' + json.dumps(figure), flush=True)


# JAX


def jax_inputs(row: Row, T=None):
    import jax
    import jax.numpy as jnp

    B, length, N, K, H = row.shape
    T = T or length
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, do = (jax.random.normal(key, (B, T, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N), strict=False))
    extra = None
    if row.kind == 'relative':
        extra = jax.random.normal(keys[4], (N, 2 * T - 1), jnp.float32)
    if row.kind == 'documents':  # data of the call, so that nothing about the blocks is known when it is compiled
        extra = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // DOCUMENT + 1, (B, T))
    return (q, k, v, extra), do


def mask_and_score(row: Row, B, T, N, extra):
    import jax.numpy as jnp

    from pallas_kernels import elementwise as ew
    from pallas_kernels.softmax_attention import check

    scale = T / row.shape[1]  # the gate runs the same picture at a smaller size
    size = lambda n: max(1, int(n * scale))
    mask = {
        'full': None,
        'window': check.window(size(WINDOW)),
        'prefix': check.prefix_lm(size(PREFIX)),
        'global-window': check.global_window(size(WINDOW), size(SINK)),
    }.get(row.kind, check.causal)
    if row.kind == 'documents':
        ids = jnp.asarray(check.documents(B, T, size(DOCUMENT))) if extra is None else extra
        mask = ew.as_mask(mask) & check.segments(ids)
    score = None
    if row.kind == 'alibi':
        score = check.alibi(2.0 ** (-8.0 * jnp.arange(1, N + 1) / N))
    if row.kind == 'relative':
        score = check.added(extra, 'hd')
    if row.kind == 'softcap':
        score = check.softcap(CAP)
    return mask, score


def ours(attention, row: Row):
    def call(q, k, v, extra):
        mask, score = mask_and_score(row, q.shape[0], q.shape[1], q.shape[2], extra)
        return attention(q, k, v, mask=mask, score=score)

    return call


def cudnn(row: Row):
    import jax

    if row.kind not in ('full', 'causal', 'window'):
        return None
    options: dict[str, Any] = {'is_causal': row.kind != 'full', 'implementation': 'cudnn'}
    if row.kind == 'window':
        options['local_window_size'] = (WINDOW - 1, 0)
    return lambda q, k, v, extra: jax.nn.dot_product_attention(q, k, v, **options)


def tokamax_mosaic(row: Row):
    if row.kind not in ('full', 'causal', 'window', 'softcap'):
        return None
    try:
        import tokamax
    except ImportError as error:
        return error
    options: dict[str, Any] = {'is_causal': row.kind != 'full', 'implementation': 'mosaic'}
    if row.kind == 'window':
        options['local_window_size'] = (WINDOW - 1, 0)
    if row.kind == 'softcap':
        options['logits_soft_cap'] = CAP
    return lambda q, k, v, extra: tokamax.dot_product_attention(q, k, v, **options)


def gate(row: Row, choices) -> str | None:
    """None, or what is wrong with the kernel, by these tiles, on this row's mask and score at T = 1000."""
    from pallas_kernels.softmax_attention import check, mosaic_gpu, tiles

    _, _, N, K, H = row.shape
    heads = 4 if N > K else 2
    small = check.Case(
        row.name,
        B=2,
        T=1000,
        N=heads,
        K=heads * K // N or 1,
        H=H,
        mask=lambda c: mask_and_score(row, c.B, c.T, c.N, None)[0] if row.kind != 'relative' else check.causal,
        score=lambda rng, c: (
            check._random('hd')(rng, c) if row.kind == 'relative' else mask_and_score(row, c.B, c.T, c.N, None)[1]
        ),
    )
    try:
        with tiles.within(choices):
            return check.verdict(check.errors(small, mosaic_gpu.softmax_attention))
    except Exception as error:
        return f'{type(error).__name__}: {str(error)[:300]}'


def timed_jax(f, args, target=0.03) -> float:
    """Milliseconds a call, over about `target` seconds of them."""
    import jax

    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    one = time.perf_counter() - start
    n = max(2, min(100, int(target / max(one, 1e-5))))
    start = time.perf_counter()
    for _ in range(n):
        out = f(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / n * 1e3


ROUNDS = 7


def run_jax(chosen, extra, tile_files, with_gate, peers, results, ready=lambda: None):
    import jax

    from pallas_kernels.softmax_attention import mosaic_gpu, tiles

    pool = concurrent.futures.ThreadPoolExecutor(12)
    choices = {'ours': {}} | {f'ours {x}': tiles.from_json(pathlib.Path(x).read_text(), x) for x in tile_files}
    gated = [(row, name) for row in chosen for name in choices] if with_gate else []
    wrong = dict(zip(gated, pool.map(lambda job: gate(job[0], choices[job[1]]), gated)))
    for (row, name), reason in wrong.items():
        emit(results, case=row.name, peer=f'gate of {name}', ok=reason is None, reason=reason)

    def compile_all(job):
        row, name, f = job
        try:
            args, do = jax.eval_shape(functools.partial(jax_inputs, row))
            wanted = (0, 1, 2, 3) if row.kind == 'relative' else (0, 1, 2)

            def both(do, *args):
                def part(*chosen_args):
                    full = list(args)
                    for i, x in zip(wanted, chosen_args):
                        full[i] = x
                    return f(*full)

                out, pull = jax.vjp(part, *(args[i] for i in wanted))
                return out, pull(do)

            start = time.perf_counter()
            with tiles.within(choices.get(name, {})):
                compiled = jax.jit(f).lower(*args).compile(), jax.jit(both).lower(do, *args).compile()
            return row, name, compiled, time.perf_counter() - start
        except Exception as error:
            return row, name, f'{type(error).__name__}: {str(error)[:300]}', 0.0

    jobs = []
    for row in chosen:
        jobs += [(row, n, ours(mosaic_gpu.softmax_attention, row)) for n in choices if not wrong.get((row, n))]
        jobs += [(row, name, ours(f, row)) for name, f in extra.items()]
        for name, make in (('jax-cudnn', cudnn), ('tokamax-mosaic', tokamax_mosaic)):
            f = make(row)
            if isinstance(f, ImportError):
                emit(results, case=row.name, peer=name, error=f'{type(f).__name__}: {f}')
            elif f is not None:
                jobs.append((row, name, f))
    jobs = [job for job in jobs if not peers or job[1].split()[0] in peers]
    done = list(pool.map(compile_all, jobs))
    ready()
    for row in chosen:
        mine = [(name, compiled, seconds) for r, name, compiled, seconds in done if r == row]
        times: dict[str, list] = {name: [] for name, *_ in mine}
        args, do = jax_inputs(row)
        with turn():
            for turn_of in range(ROUNDS):
                at = turn_of % len(mine)
                for name, compiled, _ in mine[at:] + mine[:at]:
                    if not isinstance(compiled, str):
                        try:
                            times[name].append((timed_jax(compiled[0], args), timed_jax(compiled[1], (do, *args))))
                        except Exception as error:
                            emit(results, case=row.name, peer=name, error=f'{type(error).__name__}: {str(error)[:300]}')
                            break
        for name, compiled, seconds in mine:
            if isinstance(compiled, str):
                emit(results, case=row.name, peer=name, error=compiled)
            elif times[name]:
                fwd, both = (statistics.median(x) for x in zip(*times[name]))
                temp = compiled[1].memory_analysis()
                more = {'compile_s': round(seconds, 1), 'temp_mib': temp and temp.temp_size_in_bytes >> 20}
                figures(results, row, name, fwd, both, **more)


def figures(results, row, name, fwd, both, **more):
    emit(
        results,
        case=row.name,
        peer=name,
        fwd_ms=round(fwd, 4),
        fwdbwd_ms=both and round(both, 4),
        fwd_tflops=round(row.flops / fwd / 1e9, 1),
        fwdbwd_tflops=both and round(3.5 * row.flops / both / 1e9, 1),
        **more,
    )


# PyTorch, in its own process


def run_torch(chosen, wanted, results):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from triton.testing import do_bench

    flex = torch.compile(flex_attention, dynamic=False)
    timed = lambda f: do_bench(f, warmup=20, rep=80, return_mode='median')
    draw = lambda *shape: torch.randn(*shape, device='cuda', dtype=torch.bfloat16)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.cache_size_limit = 256
    jobs = []
    for row in chosen:
        _, T, N, K, _ = row.shape
        grouped = N != K
        peers = {}
        if row.kind in ('full', 'causal'):
            for name, backend in (('torch-cudnn', 'CUDNN_ATTENTION'), ('torch-fa2', 'FLASH_ATTENTION')):

                def fused(q, k, v, backend=backend, row=row, grouped=grouped):
                    with sdpa_kernel(getattr(SDPBackend, backend)):
                        return F.scaled_dot_product_attention(q, k, v, is_causal=row.kind == 'causal', enable_gqa=grouped)

                peers[name] = fused
        causal = lambda b, h, i, j: i >= j
        documents = torch.arange(T, device='cuda') // DOCUMENT
        seen = {
            'full': None,
            'window': lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
            'documents': lambda b, h, i, j, d=documents: (i >= j) & (d[i] == d[j]),
            'prefix': lambda b, h, i, j: (i >= j) | (j < PREFIX),
            'global-window': lambda b, h, i, j: (i >= j) & ((i - j < WINDOW) | (j < SINK)),
        }.get(row.kind, causal)
        slopes = torch.exp2(-8.0 * torch.arange(1, N + 1, device='cuda') / N)
        strip = torch.randn(N, 2 * T - 1, device='cuda', requires_grad=row.kind == 'relative')
        score = {
            'alibi': lambda s, b, h, i, j, a=slopes: s + a[h] * (j - i),
            'relative': lambda s, b, h, i, j, a=strip, T=T: s + a[h, j - i + T - 1],
            'softcap': lambda s, b, h, i, j: CAP * torch.tanh(s / CAP),
        }.get(row.kind)
        build = functools.partial(create_block_mask, seen, None, None, T, T, device='cuda')
        block_mask = None if seen is None else build()
        peers['torch-flex'] = lambda q, k, v, score=score, block_mask=block_mask, grouped=grouped: flex(
            q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped
        )
        tables = build if row.kind == 'documents' else None  # else they are made once, whatever the data
        jobs += [(row, name, f, strip, tables) for name, f in peers.items() if not wanted or name in wanted]

    def attempt(row, name, f, strip, tables, compile_only):
        """Compiles, or times; whether it ran."""
        B, T, N, K, H = row.shape
        try:
            q, k, v = draw(B, N, T, H), draw(B, K, T, H), draw(B, K, T, H)
            do = draw(B, N, T, H)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]

            def forward():
                with torch.no_grad():
                    f(q, k, v)

            def both():
                f(*leaves).backward(do)
                for x in (*leaves, strip):
                    x.grad = None

            forward()
            fwd = None if compile_only else timed(forward)
            try:
                both()
                fwdbwd = None if compile_only else timed(both)
            except Exception as error:
                if compile_only:
                    emit(results, case=row.name, peer=name, error=f'backward: {type(error).__name__}: {str(error)[:200]}')
                fwdbwd = None
            if not compile_only:
                more = {'tables_ms': round(timed(tables), 4)} if tables else {}
                figures(results, row, name, fwd, fwdbwd, **more)
            return True
        except Exception as error:
            emit(results, case=row.name, peer=name, error=f'{type(error).__name__}: {str(error)[:200]}')
            return False
        finally:
            torch.cuda.empty_cache()

    jobs = [job for job in jobs if attempt(*job, compile_only=True)]
    print('READY', flush=True)
    sys.stdin.readline()
    with turn():
        for job in jobs:
            attempt(*job, compile_only=False)


def table(results) -> str:
    """One line a row: ours, the best peer, FlexAttention and their ratios, forward / forward + backward."""
    lines = [f'{"case":36} {"ours":>11} {"best peer":>28} {"ratio":>11} {"flex ratio":>11}']
    cases = list(dict.fromkeys(r['case'] for r in results))
    for case in cases:
        found = {r['peer']: r for r in results if r['case'] == case and r.get('fwd_ms')}
        mine = found.get('ours')
        if not mine:
            continue
        peers = {n: r for n, r in found.items() if n != 'ours' and n.split('-')[0] in ('jax', 'tokamax', 'torch')}
        cell, ratio, flex = [], [], []
        for key in ('fwd', 'fwdbwd'):
            best = min(((r[f'{key}_ms'], n) for n, r in peers.items() if r.get(f'{key}_ms')), default=None)
            cell.append(f'{peers[best[1]][f"{key}_tflops"]:.0f} {best[1]}' if best else '-')
            ratio.append(f'{best[0] / mine[f"{key}_ms"]:.2f}' if best else '-')
            other = peers.get('torch-flex', {}).get(f'{key}_ms')
            flex.append(f'{other / mine[f"{key}_ms"]:.2f}' if other else '-')
        rates = lambda r: f'{r["fwd_tflops"]:.0f} / {r["fwdbwd_tflops"]:.0f}'
        own = rates(mine)
        lines.append(f'{case:36} {own:>11} {" / ".join(cell):>28} {" / ".join(ratio):>11} {" / ".join(flex):>11}')
        lines += [f'{name:36} {rates(r):>11}' for name, r in found.items() if name.startswith('ours ')]
    return '\n'.join(lines)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ['recurrent']:  # the recurrent kernels have their own rows and options
        return importlib.import_module('pallas_kernels.bench_recurrent').main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*')
    parser.add_argument('--json')
    parser.add_argument('--with', dest='extra', action='append', default=[])
    parser.add_argument('--tiles', action='append', default=[])
    parser.add_argument('--peers', help='only these, "ours" included')
    parser.add_argument('--no-gate', action='store_true')
    parser.add_argument('--no-torch', action='store_true')
    parser.add_argument('--torch-only', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen, results = rows(args.words), []
    peers = args.peers.split(',') if args.peers else []
    if args.torch_only:
        run_torch(chosen, peers, results)
        return
    extra = {}
    for spec in args.extra:
        module, _, function = spec.partition(':')
        extra[spec] = getattr(importlib.import_module(module), function)
    torch = None
    if not args.no_torch and importlib.util.find_spec('torch'):
        command = [sys.executable, '-m', 'pallas_kernels.bench', '--torch-only', *args.words]
        command += ['--peers', args.peers] if args.peers else []
        pipe = subprocess.PIPE
        torch = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def lines(until=None):
        for line in torch.stdout if torch else ():
            if line.startswith('RESULT '):
                emit(results, **json.loads(line[7:]))
            if line.strip() == until:
                return

    run_jax(chosen, extra, args.tiles, not args.no_gate, peers, results, ready=lambda: lines('READY'))
    if torch:
        with contextlib.suppress(BrokenPipeError):
            torch.stdin.write('go\n')
            torch.stdin.flush()
        lines()
        torch.wait()
    print(table(results))
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(results, file, indent=1)


if __name__ == '__main__':
    main()
