"""Claims of papers, judged: `configs/ablations/claims.py` says what is claimed and by which rule, this file applies it.

    python -m attnx.ablate.claims                     the table of verdicts, from gallery/claims/results.csv
    python -m attnx.ablate.claims run --workers=8     trains all studies; the same command goes on where it was
    python -m attnx.ablate.claims run length s001     these alone
    python -m attnx.ablate.claims measure             throughput of S030's arms
    python -m attnx.ablate.claims collect             adds the runs in runs/ablations/claims to gallery/claims

Exit codes: 0 done, 2 bad input, 143 stopped.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from attnx import config as config_lib
from attnx.ablate import runner
from attnx.ablate.study import METRICS, Study, build
from attnx.dispatch import nearest

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / 'configs' / 'ablations' / 'claims.py'
GALLERY = ROOT / 'gallery' / 'claims'
HOLDS, FAILS, UNDECIDED, NOT_RUN = 'holds', 'does not hold', 'undecided', 'not run'

Outcomes = Mapping[tuple[str, str, str], Mapping[int, float]]  # (study, arm, metric) -> seed -> value


class Judged(NamedTuple):
    """A statement, the margin by which it holds, and what follows."""

    words: str
    margin: float | None  # mean over seeds of the weighted sum less the bound; None: outcomes are missing
    low: float | None  # 95 % interval of that mean
    high: float | None
    seeds: int
    verdict: str


class Verdict(NamedTuple):
    verdict: str
    why: str
    statements: tuple[Judged, ...]


@functools.cache
def claims_file():
    if not FILE.exists():
        raise ValueError(f'there is no {FILE}: claims are studied in a checkout of the project')
    spec = importlib.util.spec_from_file_location('attnx_claims', FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def studies() -> dict[str, Study]:
    """Every study of the file, by name."""
    return {name: config_lib.build(Study, claims_file().get_config(name)) for name in claims_file().STUDIES}


# The rule


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % interval of the mean by Student's t; infinitely wide for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, -float('inf'), float('inf')
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def judge_statement(words: str, weights: Mapping, bound: float, outcomes: Outcomes) -> Judged:
    """sum of weights times outcomes > bound, over the seeds that have all of them."""
    common = set.intersection(*(set(outcomes.get(key, {})) for key in weights))
    if not common:
        return Judged(words, None, None, None, 0, NOT_RUN)
    sums = [sum(w * outcomes[key][seed] for key, w in weights.items()) - bound for seed in sorted(common)]
    mean, low, high = interval(sums)
    return Judged(words, mean, low, high, len(sums), HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED)


def judge(claim: Mapping, outcomes: Outcomes) -> Verdict:
    """A claim of `configs/ablations/claims.py` on the outcomes of its studies."""
    judged = tuple(judge_statement(*statement, outcomes) for statement in claim['statements'])
    for weights, bound in claim['learned']:
        study, arm, metric = next(iter(weights))
        learned = judge_statement('', weights, bound, outcomes).margin
        if learned is None:
            return Verdict(NOT_RUN, f'{arm} of {study}', judged)
        if learned < 0:
            why = f'{arm} of {study} has not learned its task ({metric} beyond {abs(bound):g})'
            return Verdict(UNDECIDED, why, judged)
    for verdict in (FAILS, NOT_RUN, UNDECIDED):
        if named := [j.words for j in judged if j.verdict == verdict]:
            return Verdict(verdict, '; '.join(named), judged)
    return Verdict(HOLDS, '', judged)


# The table


def figure(j: Judged) -> str:
    return '—' if j.margin is None else f'{j.margin:+.4g} [{j.low:+.4g}, {j.high:+.4g}]'


def table(outcomes: Outcomes) -> list[list[str]]:
    """Header and one row a claim."""
    rows = [['', 'paper', 'claim', 'verdict', 'decided by']]
    for name, claim in claims_file().CLAIMS.items():
        found = judge(claim, outcomes)
        rows.append([name, f'{claim["title"]} ({claim["paper"]})', claim['claim'], found.verdict, found.why])
    return rows


def read(path: pathlib.Path) -> dict[tuple[str, str, str], dict[int, float]]:
    """Outcomes from a CSV file of study, arm, metric, seed, value, device."""
    if not path.exists():
        raise ValueError(f'there is no {path}; `collect` writes it from runs')
    outcomes: dict[tuple[str, str, str], dict[int, float]] = {}
    with path.open(newline='') as stream:
        for row in csv.DictReader(stream):
            outcomes.setdefault((row['study'], row['arm'], row['metric']), {})[int(row['seed'])] = float(row['value'])
    return outcomes


def page(path: pathlib.Path) -> str:
    """gallery/claims/README.md from results.csv: verdicts, the statements behind them, and the outcomes of the arms."""
    outcomes = read(path)
    with path.open(newline='') as stream:
        devices = sorted({row['device'] for row in csv.DictReader(stream)} - {'counted'})
    line = lambda row: '| ' + ' | '.join(str(c).replace('|', '\\|') for c in row) + ' |'
    lines = lambda rows: [line(rows[0]), '|' + '---|' * len(rows[0]), *map(line, rows[1:]), '']
    claims = claims_file().CLAIMS
    found = {name: judge(claim, outcomes) for name, claim in claims.items()}
    count = {verdict: sum(f.verdict == verdict for f in found.values()) for verdict in (HOLDS, FAILS, UNDECIDED, NOT_RUN)}
    text = [
        '# Twelve claims, judged at small scale', '',
        'Written by `python -m attnx.ablate.claims collect`; the rules stand in `configs/ablations/claims.py` and were fixed',
        'before the runs. Models are of 15 thousand to 250 thousand parameters, trained for a minute: a verdict is one on the',
        'claim at this scale, and no more. Intervals are 95 % (Student’s t over seeds, paired by seed), not corrected',
        'for the number of statements. Run on ' + '; '.join(devices) + '.', '',
        *(f'- {note}' for note in claims_file().NOTES), '',
        ', '.join(f'{verdict}: {n}' for verdict, n in count.items()) + '.', '',
        *lines([['', 'paper', 'claim', 'verdict'], *([
            name, f'[{c["title"]}](https://arxiv.org/abs/{c["paper"]})', c['claim'],
            f'**{found[name].verdict}**' + (f' ({found[name].why})' if found[name].why else ''),
        ] for name, c in claims.items())]),
        '## Statements', '',
        'A margin is above 0 where the statement is true, in the metric’s unit: nats, a share of answers, tokens/s.', '',
        *lines([['', 'statement', 'margin, 95 % interval', 'seeds', 'verdict'], *(
            [name, j.words, figure(j), j.seeds, j.verdict] for name, f in found.items() for j in f.statements
        )]),
        '## Outcomes', '', 'Means over seeds; every value is in [results.csv](results.csv).', '',
    ]  # fmt: skip
    show = lambda values: f'{statistics.fmean(values.values()):,.6g}' if values else '—'
    for name, study in claims_file().STUDIES.items():
        mine = {(arm, metric): values for (s, arm, metric), values in outcomes.items() if s == name}
        metrics = list(dict.fromkeys(metric for _, metric in mine))
        rows = [[arm, *(show(mine.get((arm, m))) for m in metrics)] for arm in dict.fromkeys(arm for arm, _ in mine)]
        if rows:
            text += [f'`{name}`: {study["question"]}', '', *lines([['arm', *metrics], *rows])]
    return '\n'.join(text)


# From runs


def outcomes_of(name: str, study: Study) -> list[list]:
    """Rows of study, arm, metric, seed, value, device from a study's folder."""
    from attnx.train import metrics

    size = {arm.name: study.costs(arm).parameters for arm in study.resolved()}
    rows = []
    for cell in study.cells():
        entry = runner.outcome(study, cell) or {}
        values = dict(entry.get('values', {}))
        curve = [e for e in metrics.read(cell.config.run_dir) if e['split'] == 'eval' and e['step'] > 0] if values else []
        values |= {f'curve/{m}': statistics.fmean(e[m] for e in curve) for m in METRICS if curve and m in curve[0]}
        values |= {'parameters': size[cell.arm]}
        device = entry.get('device', 'counted')
        rows += [[name, cell.arm, metric, cell.seed, value, device] for metric, value in values.items() if np.isfinite(value)]
    measured = runner.folder(study) / 'measured.jsonl'
    return rows + [json.loads(text) for text in (measured.read_text().splitlines() if measured.exists() else ())]


def collect() -> None:
    """Writes gallery/claims: README.md, and results.csv, where outcomes of runs/ablations/claims join or replace others."""
    made, path = studies(), GALLERY / 'results.csv'
    order = {(name, arm): i for i, (name, arm) in enumerate((n, a.name) for n, study in made.items() for a in study.resolved())}
    known: dict[tuple, list] = {}
    if path.exists():
        with path.open(newline='') as stream:
            for study, arm, metric, seed, value, device in list(csv.reader(stream))[1:]:
                known[study, arm, metric, int(seed)] = [study, arm, metric, int(seed), value, device]
    for row in (row for name, study in made.items() for row in outcomes_of(name, study)):
        if row[5] != 'counted' or tuple(row[:4]) not in known:
            known[tuple(row[:4])] = row
    rows = [row for row in known.values() if (row[0], row[1]) in order]
    rows.sort(key=lambda row: (order[row[0], row[1]], row[3]))
    GALLERY.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as stream:
        csv.writer(stream, lineterminator='\n').writerows([['study', 'arm', 'metric', 'seed', 'value', 'device'], *rows])
    (GALLERY / 'README.md').write_text(page(path))


def run(names: Sequence[str], worker: int, workers: int) -> None:
    """Trains what is left of these studies; each worker begins with another study, and helps with all of them."""
    made = studies()
    turn = worker * len(names) // workers
    for name in (*names[turn:], *names[:turn]):
        runner.run(made[name])


def measure(repeats: int = 15) -> None:
    """Tokens a second of S030's arms: the forward pass, and loss and gradients. Arms take turns, `repeats` times.

    On a CPU, a second of the processor's time: what else the machine does then hardly counts.
    """
    import jax
    import jax.numpy as jnp

    from attnx.train import step as step_lib
    from attnx.train.program import program

    clock, times = (time.process_time, 1) if jax.default_backend() == 'cpu' else (time.perf_counter, 3)

    def speed(call):
        start = clock()
        for _ in range(times):
            found = call()
        jax.block_until_ready(found)
        return times * length / (clock() - start)

    study, key, settings = studies()['s030'], jax.random.key(0), step_lib.Config()
    task = next(iter(study.tasks))
    calls, length = {}, build(study.on(study.resolved()[0], task)).data.length
    tokens = jax.random.randint(key, (1, length), 0, 256)
    batch = {'tokens': tokens, 'targets': tokens, 'weights': jnp.ones(tokens.shape)}
    for arm in study.resolved():
        given = build(study.on(arm, task)).model
        made = program(dataclasses.replace(given, vocab_size=256, max_length=length), packed=False)
        params, step = jax.jit(made.init)(key), functools.partial(step_lib.gradients, made.forward, config=settings)
        calls[arm.name, 'forward'] = jax.jit(made.forward), (params, batch, None)
        calls[arm.name, 'step'] = jax.jit(step), (params, batch, key)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda call: functools.partial(call[0].lower(*call[1]).compile(), *call[1]), calls.values())
        calls = dict(zip(calls, compiled))
    jax.block_until_ready([call() for call in calls.values()])
    folder = runner.folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'measured.jsonl').open('w', buffering=1) as log:
        for repeat, ((arm, what), call) in itertools.product(range(repeats), calls.items()):
            row = ['s030', arm, f'{what} tokens/s', repeat, speed(call), jax.devices()[0].device_kind]
            log.write(json.dumps(row) + '\n')
            print(*row[:5], flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog='python -m attnx.ablate.claims', description=__doc__.splitlines()[0])
    parser.add_argument('command', nargs='?', default='table', choices=('table', 'run', 'measure', 'collect'))
    parser.add_argument('names', nargs='*', help='run: studies; all that train if none is named')
    parser.add_argument('--workers', type=int, default=1, help='run: processes on this machine')
    parser.add_argument('--worker', type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    try:
        trained = [name for name in claims_file().STUDIES if name != 's030']
        if args.names and args.command != 'run':
            raise ValueError(f'{args.command} takes no names; given {" ".join(args.names)}')
        for name in args.names:
            if name not in trained:
                raise ValueError(f'run: unknown study {name!r}; {nearest(name, trained)}')
        if args.command == 'run':
            if args.worker is None and args.workers > 1:
                command = [sys.executable, '-m', 'attnx.ablate.claims', 'run', *args.names, f'--workers={args.workers}']
                started = [subprocess.Popen([*command, f'--worker={i}']) for i in range(args.workers)]
                return max(process.wait() for process in started)
            run(args.names or trained, args.worker or 0, args.workers)
        elif args.command == 'measure':
            measure()
        else:
            if args.command == 'collect':
                collect()
            for name, _, claim, verdict, why in table(read(GALLERY / 'results.csv'))[1:]:
                print(f'{name}  {verdict:14} {claim}{f"  [{why}]" if why else ""}')
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except runner.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 143
    return 0


if __name__ == '__main__':
    sys.exit(main())
