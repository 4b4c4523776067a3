"""Times whole training steps beside a PyTorch peer, and what several devices gain. One command, on an NVIDIA machine:

    python -m attnx.train.bench [words] [--json FILE] [--steps N] [--tiny] [--no-peer] [--set remat=full ...]
                                [--variant batch=64 unroll=1] [--together]

Words choose rows, in their order: the one of that name, or else those whose name contains it. A row is a model at a shape;
`scaling` rows run on one device and on all of them, `overhead` once more without norm, finite check and metrics, and with
checkpoints written in the background.
`--set` changes all rows, each `--variant` is measured beside them: fields of a row (`attnx.train.timing.Row`) or of its model.
The peer (`attnx.train.peer`) is the same model in PyTorch; it is left out where PyTorch is not installed.

Every measurement is a process of its own, so that none finds the memory of another. `--together` makes ours one process,
which traces one after another, compiles side by side and then times in turn: where time on the machine is short. It begins
with what is compiled after `--patience` seconds, the rest follows as it is ready; what is not within `--timeout` fails alone.
JAX_COMPILATION_CACHE_DIR=FOLDER keeps what was compiled for a second call. `--only-peer` runs PyTorch alone, on another GPU
(CUDA_VISIBLE_DEVICES) at the same time, say.

A step is timed between two waits for the device, over `--steps` steps after two that warm up; the median of three rounds.
MFU counts 6 FLOPs for each weight that a token meets and 3 times the mixing's own, causal halves not counted
(`attnx.plan.flops_per_token`), over the dense peak that `attnx.train.metrics` knows; recomputation does not count. Prints a
line a measurement and writes them all to FILE, as soon as there is another; then a table.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

from attnx.train.timing import Row

GPT2 = {
    'vocab_size': 50304, 'width': 768, 'num_layers': 12, 'pattern': ('a',), 'positions': 'learned', 'norm': 'layernorm',
    'mixers': {'a': {'kind': 'mha', 'num_heads': 12, 'position': 'none', 'bias': True}},
    'mlp': {'kind': 'gelu', 'hidden': 3072, 'bias': True}, 'unroll': 0,
}  # fmt: skip
LLAMA = {
    'vocab_size': 32000, 'width': 2048, 'num_layers': 24, 'pattern': ('a',), 'tie_embeddings': False,
    'mixers': {
        'a': {'kind': 'gqa', 'num_heads': 16, 'num_kv_heads': 16},
        'd': {'kind': 'gated_deltanet', 'num_heads': 16, 'key_expansion': 1.0, 'value_expansion': 1.0},
        'w': {'kind': 'gated_deltanet', 'num_heads': 24},  # as its paper: keys of 64, values of 128
        'g': {'kind': 'gla', 'num_heads': 16, 'key_expansion': 1.0},
        'l': {'kind': 'lightning', 'num_heads': 16},
    },
    'mlp': {'kind': 'swiglu', 'hidden': 5504},
}  # fmt: skip
CUT = {'kind': 'scaling', 'preset': 'fsdp_context', 'mesh': 'context', 'grow': 'length'}
SHORT = LLAMA | {'num_layers': 4, 'remat': 'dots'}
LONG = LLAMA | {'unroll': 0}  # a loop's stacks would be zeroed and copied into, beside nothing
HYBRID = LONG | {'pattern': ('d', 'd', 'd', 'a')}
WIDE = LONG | {'pattern': ('w', 'w', 'w', 'a')}
# A recurrent layer has more parameters, its gates; with narrower MLPs the model has as many, as in ablations (`ablate.match`).
narrower = lambda hidden: {'mlp': LLAMA['mlp'] | {'hidden': hidden}}

APART = {'xla_gpu_dot_merger_threshold_mb': 0}  # two products merged into one are taken apart again by two more passes

ROWS = (
    Row('gpt2-124m', GPT2, 1024, 32, compiler=APART),
    Row('gpt2-124m overhead', GPT2, 1024, 32, compiler=APART, kind='overhead'),
    Row('llama-1.3b', LLAMA | {'remat': 'dots'}, 4096, 8, accumulate=2),
    Row('llama-1.3b remat', LLAMA | {'remat': 'full'}, 4096, 8, kind='plain'),
    Row('llama-1.3b T16384', LONG, 16384, 1, kind='plain'),
    Row('hybrid-1.3b T16384', HYBRID | narrower(4992), 16384, 1, kind='plain'),
    Row('hybrid-1.3b wide T16384', WIDE | narrower(4480), 16384, 1, kind='plain'),
    Row('hybrid-1.42b T16384', HYBRID, 16384, 1, kind='plain'),
    Row('fsdp llama-1.3b', LLAMA | {'remat': 'dots'}, 4096, 8, accumulate=2, kind='scaling', preset='fsdp', mesh='fsdp'),
    Row('ring', SHORT, 65536, 1, **CUT, context='ring'),
    Row('heads', SHORT, 65536, 1, **CUT, context='heads'),
    Row('lasp2 lightning', SHORT | {'pattern': ('l',)}, 65536, 1, **CUT),
    Row('lasp2 gla', SHORT | {'pattern': ('g',)}, 65536, 1, **CUT),
    Row('lasp2 delta', SHORT | {'pattern': ('d',)}, 65536, 1, **CUT),
)
PEERS = ('eager', 'torch')  # PyTorch without torch.compile, which `--only-peer` times too and first; and with it
BEATEN = {  # by which row
    'hybrid-1.3b T16384': 'llama-1.3b T16384',
    'hybrid-1.3b wide T16384': 'llama-1.3b T16384',
    'hybrid-1.42b T16384': 'llama-1.3b T16384',
}


def tiny(row: Row) -> Row:
    """The same row at a size for a CPU: nothing but its code is tried."""
    mixers = {name: mixer | {'num_heads': 4} for name, mixer in row.model['mixers'].items()}
    mixers = {name: m | ({'num_kv_heads': 4} if 'num_kv_heads' in m else {}) for name, m in mixers.items()}
    small = {'vocab_size': 128, 'width': 64, 'num_layers': 4, 'mixers': mixers, 'mlp': row.model['mlp'] | {'hidden': 96}}
    return dataclasses.replace(row, model=row.model | small, length=64, batch=2, accumulate=min(row.accumulate, 2))


def changed(row: Row, given: list[str]) -> Row:
    """`row` with NAME=VALUE applied: fields of a Row, else of its ModelConfig."""
    for text in given:
        name, _, value = text.partition('=')
        with contextlib.suppress(json.JSONDecodeError):  # else it is a string
            value = json.loads(value)
        if name in {f.name for f in dataclasses.fields(Row)} - {'name', 'model', 'kind'}:
            row = dataclasses.replace(row, **{name: value})
        else:
            row = dataclasses.replace(row, model=row.model | {name: value})
    return row


# One process of measurements


def serve(jobs: list[dict], steps: int, small: bool, patience: float | None = None) -> None:
    """Prints a line for each job {'name', 'who', 'devices', 'set'}: all are compiled side by side, then timed in turn.

    Traced in turn: Python runs one thread at a time, so that of all that are traced at once none is ready before the last.
    patience: seconds after which those are timed that are compiled, the others as they are.
    """

    def say(number, run, *args):
        try:
            found = run(*args)
        except Exception as error:  # the others are still to be measured
            found = {'failed': f'{type(error).__name__}: {error}'[:300]}
        print('RESULT ' + json.dumps([number, found]), flush=True)

    rows = []
    for job in jobs:
        row = changed(next(r for r in ROWS if r.name == job['name']), job['set'])
        rows.append(tiny(row) if small else row)
    if jobs[0]['who'] in PEERS:
        from attnx.train import peer

        for number, (row, job) in enumerate(zip(rows, jobs)):
            say(number, peer.measure, row, steps, job['who'] == 'torch')
        return
    from attnx.train import timing

    dtype = 'float32' if small else 'bfloat16'
    programs: dict[str, concurrent.futures.Future] = {}  # jobs that differ in what is measured alone share one
    with concurrent.futures.ThreadPoolExecutor(1) as tracer, concurrent.futures.ThreadPoolExecutor(len(jobs)) as compilers:
        for row, job in zip(rows, jobs):
            who = 'bare' if job['who'] == 'bare' else 'attnx'
            row, devices = dataclasses.replace(row, name='', kind=''), job['devices']
            job['program'] = f'{row} {devices} {who}'
            if job['program'] not in programs:
                lowered = tracer.submit(timing.lower, row, devices, dtype, who)
                programs[job['program']] = compilers.submit(lambda lowered=lowered: timing.compiled(lowered.result()))
        concurrent.futures.wait(programs.values(), timeout=patience)
        made = [programs[job['program']] for job in jobs]
        left = list(range(len(jobs)))
        while left:
            concurrent.futures.wait([made[n] for n in left], return_when=concurrent.futures.FIRST_COMPLETED)
            number = next(n for n in left if made[n].done())
            left.remove(number)
            say(number, lambda n: timing.measure(made[n].result()._replace(row=rows[n], who=jobs[n]['who']), steps), number)


def measure(jobs: list[dict], options, told) -> list[dict[str, Any]]:
    """The jobs with what one process of their own has found; `told` is called with each as it comes."""
    command = [sys.executable, '-m', 'attnx.train.bench', '--jobs', json.dumps(jobs), '--steps', str(options.steps)]
    command += ['--tiny'] if options.tiny else []
    command += ['--patience', str(options.patience)] if options.patience else []
    env = dict(os.environ) | ({'JAX_PLATFORMS': 'cpu'} if jobs[0]['who'] in PEERS else {})
    found: dict[int, dict] = {}
    with tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        timer = threading.Timer(options.timeout, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith('RESULT '):
                number, found[number] = json.loads(line[7:])
                told(jobs[number] | found[number])
        process.wait()
        over = not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        why = f'more than {options.timeout} s' if over else (errors.read().strip().splitlines() or ['no output'])[-1][:300]
    return [job | found.get(number, {'failed': why}) for number, job in enumerate(jobs)]


def count_devices() -> int:
    done = subprocess.run([sys.executable, '-c', 'import jax; print(len(jax.devices()))'], capture_output=True, text=True)
    return int(done.stdout.split()[-1])


# The command


def compare(results: list[dict]) -> list[str]:
    """The ratios that the rows are there for."""
    from attnx.train import checkpoint

    done = [r for r in results if 'failed' not in r]
    known = {(label(r), r['who'], r['devices']): r for r in done}
    times = lambda r, other: r['tokens_per_second'] / other['tokens_per_second']
    lines = []
    for r in done:
        name, who, devices = label(r), r['who'], r['devices']
        find = lambda name, who, devices=1: known.get((name, who, devices))
        if 'save_ms' in r:
            every = checkpoint.Config().every
            share = 100 * r['save_ms'] / (every * r['step_ms'])
            lines.append(
                f'{name}: a checkpoint costs {r["save_ms"]:.0f} ms ({r["stall_ms"]:.0f} ms of them nothing runs), '
                f'{share:.2f} % of {every} steps'
            )
        if who == 'bare' and (full := find(name, 'attnx')):
            lines.append(f'{name}: norm, finite check and metrics cost {100 * (times(r, full) - 1):.2f} % of a step')
        if who != 'attnx':
            continue
        if r.get('variant') and (plain := find(r['name'], 'attnx', devices)):
            lines.append(f'{name}, {devices} devices: {times(r, plain):.3f} times the tokens/s without')
        if devices == 1 and (other := find(r['name'], 'torch')):
            lines.append(f'{name}: {times(r, other):.3f} times the tokens/s of PyTorch')
        if devices > 1 and (one := find(name, 'attnx')):
            work = times(r, one) * r['flops_per_token'] / one['flops_per_token']
            lines.append(f'{name}: {devices} devices have {times(r, one):.3f} times the tokens/s of one, {work:.3f} the FLOP/s')
        whole = BEATEN.get(r['name'])
        if whole and (other := find(whole, 'attnx')):
            lines.append(f'{name}: {times(r, other):.3f} times the tokens/s of {whole}')
    return lines


def label(result: dict) -> str:
    """The row's name and what a variant changes."""
    return ' '.join([result['name'], *result.get('variant', [])])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m attnx.train.bench', description=__doc__.splitlines()[0])
    parser.add_argument('words', nargs='*', help='rows whose name contains one of them; all by default')
    parser.add_argument('--json', help='file for all measurements')
    parser.add_argument('--steps', type=int, default=10, help='steps of a round')
    parser.add_argument('--tiny', action='store_true', help='shapes for a CPU')
    parser.add_argument('--no-peer', action='store_true', help='without PyTorch')
    parser.add_argument('--only-peer', action='store_true', help='PyTorch alone')
    parser.add_argument('--timeout', type=int, default=500, help='seconds for one process')
    parser.add_argument('--set', action='append', default=[], metavar='NAME=VALUE', help='a field of the row or of its model')
    parser.add_argument('--variant', action='append', default=[], nargs='+', metavar='NAME=VALUE', help='measured as well')
    parser.add_argument('--together', action='store_true', help='ours in one process')
    parser.add_argument('--patience', type=float, help='with --together: seconds until timing begins with what is compiled')
    parser.add_argument('--devices', type=int, default=0, help='devices of the scaling rows; 0: all')
    parser.add_argument('--jobs', type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.jobs:
        serve(options.jobs, options.steps, options.tiny, options.patience)
        return 0
    names = {r.name for r in ROWS}
    named = lambda row, word: row.name == word if word in names else word in row.name
    found = [r for word in options.words for r in ROWS if named(r, word)] if options.words else list(ROWS)
    chosen = [r for i, r in enumerate(found) if r not in found[:i]]
    if not chosen:
        print(f'no row is called like {" or ".join(options.words)}; rows: {", ".join(r.name for r in ROWS)}', file=sys.stderr)
        return 2
    has_torch = importlib.util.find_spec('torch') is not None and not options.no_peer
    total = options.devices or (count_devices() if any(r.kind == 'scaling' for r in chosen) else 1)
    jobs = []
    for row in chosen:
        variants = [[], *([] if row.kind == 'overhead' else options.variant)]
        runs = [('attnx', count, v) for count in sorted({1, total if row.kind == 'scaling' else 1}) for v in variants]
        runs += [('bare', 1, []), ('saving', 1, [])] if row.kind == 'overhead' else []
        runs = [] if options.only_peer else runs
        runs += [(who, 1, []) for who in (PEERS if options.only_peer else PEERS[-1:]) if row.kind == 'peer' and has_torch]
        for who, devices, variant in runs:
            given = {'set': options.set + variant} | ({'variant': variant} if variant else {})
            jobs.append({'name': row.name, 'who': who, 'devices': devices} | given)
    ours = [job for job in jobs if job['who'] not in PEERS]
    groups = [[job] for job in jobs if job not in ours or not options.together]  # the peer first
    groups += [ours] if options.together and ours else []
    results, came = [], []

    def tell(result):
        print(json.dumps(result), flush=True)
        came.append(result)
        write(came)

    def write(found):
        if options.json:
            with open(options.json, 'w') as file:
                json.dump(found, file, indent=1)

    for group in groups:
        results += measure(group, options, tell)
    write(results)  # with those that failed to come
    for r in results:
        if 'failed' in r:
            print(f'{label(r):<22} {r["who"]:<6} {r["devices"]} FAILED {r["failed"]}')
        else:
            mfu = f'MFU {100 * r["mfu"]:5.1f} %' if 'mfu' in r else 'MFU unknown'
            rate = f'{r["tokens_per_second"]:12,.0f} tokens/s  {r["step_ms"]:9.1f} ms'
            print(f'{label(r):<22} {r["who"]:<6} {r["devices"]} {rate}  {mfu}')
    print('\n'.join(compare(results)))
    if not has_torch and any(r.kind == 'peer' for r in chosen):
        print('no PyTorch peer: ' + ('--no-peer' if options.no_peer else 'torch is not installed'))
    return 1 if any('failed' in r for r in results) else 0


if __name__ == '__main__':
    sys.exit(main())
