"""Breaks training runs on purpose: `python tests/chaos.py --faults 100 --seconds 900`.

With `--operations` it kills a run at each of its file operations, in turn. Else a fault, by chance, is a kill (at any time,
at a file operation, inside the write of a checkpoint), a SIGTERM, damage to a file of a checkpoint, a full disk, a lost
process of two, a NaN born in a chosen layer, malformed data, or other settings. After each the same command must continue
to what an undisturbed run gives, bit for bit (every array, every line of metrics.jsonl but its times), or stop with the
right message and then, the cause removed, continue so. Prints a table; exit code 1 if anything was lost.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'

import jax

from tests.faults import FAULTS, operations
from tests.trainers import (
    EVERY,
    PAIR,
    Lost,
    Places,
    Trainer,
    at_batch,
    expect,
    expect_same,
    make_config,
    sealed,
    suicide,
)

jax.config.update('jax_compilation_cache_dir', os.environ.get('TEST_CACHE', str(ROOT / '.jax_cache')))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def prepare_places(root: pathlib.Path) -> Places:
    places = Places(root)
    rng = random.Random(0)
    words = ['def', 'return', 'x', 'y', '+', '(', ')', ':', '\n    ']
    documents = [' '.join(rng.choices(words, k=rng.randrange(2, 30))) for _ in range(60)]
    places.corpus.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
    expect(Trainer(make_config(root / 'first', places.corpus)).wait(), 0)  # fills the compilation cache
    began, counter = time.monotonic(), root / 'operations'

    def count():
        found = 0

        def hook(event, args):
            nonlocal found
            if event in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir') and str(places.whole) in str(args[0]):
                found += 1
                if str(args[0]).endswith('loss.png'):
                    os.write(descriptor, f'{found}\n'.encode())

        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(hook)

    expect(Trainer(make_config(places.whole, places.corpus), count).wait(), 0)
    (root / 'seconds').write_text(str(time.monotonic() - began))
    counter.write_text(counter.read_text().split()[0])
    expect_same(root / 'first', places.whole)
    ended = Trainer(make_config(places.half, places.corpus), at_batch(3 * EVERY + 2, suicide)).wait()
    assert ended[0] == -9 and len(sealed(places.half)) >= 2, ended
    return places


def prepare_pair(places: Places) -> None:
    expect(Trainer(make_config(places.pair, places.corpus, **PAIR), devices=2).wait(), 0)


def attempt(job):
    """One fault: (kind, what happened, None or what was lost, seconds)."""
    number, kind, seed, options, root, deadline = job
    if time.monotonic() > deadline:
        return kind, '', 'skipped', 0.0
    began, run_dir = time.monotonic(), pathlib.Path(root, f'fault_{number}')
    try:
        told, lost = FAULTS[kind][1](run_dir, Places(pathlib.Path(root)), random.Random(seed), **options), None
    except Exception as error:
        told, lost = '', f'{type(error).__name__}: {error}' + ('' if isinstance(error, Lost) else traceback.format_exc())
    if lost is None:
        for path in run_dir.parent.glob(f'{run_dir.name}*'):
            if path.name in (run_dir.name, f'{run_dir.name}.data', f'{run_dir.name}.jsonl'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kind, told, lost, time.monotonic() - began


def plan(faults: int, kinds: list[str], rng: random.Random) -> list[str]:
    """`faults` kinds by their shares, each at least once where there is room, in random order."""
    shares = {kind: FAULTS[kind][0] for kind in kinds}
    chosen = kinds[:] if faults >= len(kinds) else []
    while len(chosen) < faults:
        counts = collections.Counter(chosen)
        chosen.append(max(kinds, key=lambda k: (shares[k] / (counts[k] + 1), rng.random())))
    rng.shuffle(chosen)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--faults', type=int, default=100)
    parser.add_argument('--seconds', type=float, default=900, help='no fault begins after so long')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2, help='faults at a time')
    parser.add_argument('--kinds', nargs='*', default=list(FAULTS), choices=list(FAULTS), metavar='KIND')
    parser.add_argument('--operations', action='store_true', help='instead: a kill at every file operation of a run')
    given = parser.parse_args()
    if given.operations and any(getattr(given, name) != parser.get_default(name) for name in ('faults', 'kinds')):
        parser.error('--operations kills once at every file operation: it takes no --faults and no --kinds')
    rng, began = random.Random(given.seed), time.monotonic()
    root = pathlib.Path(tempfile.mkdtemp(prefix='chaos_'))
    places = prepare_places(root)
    if given.operations:
        planned = [('kill at a file operation', {'at': n}) for n in range(1, operations(places))]
    else:
        planned = [(kind, {}) for kind in plan(given.faults, given.kinds, rng)]
    kinds = [kind for kind, _ in planned]
    if any('of two' in kind or 'processes' in kind for kind in kinds):
        prepare_pair(places)
    jobs = [(n, kind, rng.random(), options, str(root), began + given.seconds) for n, (kind, options) in enumerate(planned)]
    table = {kind: [0, 0, 0.0] for kind in FAULTS if kind in kinds}
    skipped, losses = 0, []
    with multiprocessing.get_context('fork').Pool(given.workers) as pool:
        for number, (kind, told, lost, seconds) in enumerate(pool.imap_unordered(attempt, jobs)):
            if lost == 'skipped':
                skipped += 1
                continue
            row = table[kind]
            row[0], row[1], row[2] = row[0] + 1, row[1] + (lost is None), row[2] + seconds
            losses += [(kind, lost)] if lost else []
            print(f'{number + 1:4}  {"LOST" if lost else "ok  "}  {seconds:5.1f} s  {kind}: {told or lost}', flush=True)
    print(f'\n{"fault":<32}{"tried":>6}{"survived":>10}{"seconds each":>14}')
    for kind, (tried, survived, seconds) in table.items():
        if tried:
            print(f'{kind:<32}{tried:>6}{survived:>10}{seconds / tried:>14.1f}')
    tried, survived = (sum(row[i] for row in table.values()) for i in (0, 1))
    print(f'{"all":<32}{tried:>6}{survived:>10}{time.monotonic() - began:>12.0f} s in all')
    if skipped:
        print(f'{skipped} faults were not tried: --seconds {given.seconds:g} were over')
    if losses:
        print(f'their folders are kept in {root}')
        return 1
    shutil.rmtree(root)
    return 0 if survived else 1


if __name__ == '__main__':
    sys.exit(main())
