"""Studies: arms and matching, statistics, the runner under kills, the report."""

import csv
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from attnx import config as config_lib
from attnx import models
from attnx.ablate import Halving, Match, Study, match, runner, statistics
from attnx.ablate.report import results_table, summary
from attnx.ablate.results import results
from attnx.nn import to_flat
from attnx.train import checkpoint, metrics


def base(**change):
    given = {
        'steps': 4,
        'eval_every': 2,
        'model': {'width': 16, 'num_layers': 2, 'pattern': ('gla', 'gqa'), 'mlp': {'hidden': 32}},
        'data': {'task': {'kind': 'induction', 'num_eval': 16}, 'length': 16, 'batch_size': 8},
        'optim': {'kind': 'adamw', 'learning_rate': 1e-2, 'warmup': 1, 'decay': 1},
        'checkpoint': {'every': 2},
        'log': {'every': 1},
    }
    return {**given, **change}


SMALL = base(
    model={'width': 16, 'num_layers': 2, 'pattern': ('mha',), 'mlp': {'kind': 'none'}, 'tie_embeddings': False},
    checkpoint={'every': 0, 'keep_best': 0},
)
UNIFORM = 'layer 0: uniform_attention'  # as the generator names it
ARMS = {'base': {}, UNIFORM: {'model.overrides': {0: 'uniform_attention'}}}


def study(tmp_path, **change):
    """Every run below trains one of three small models, so that a file of tests compiles few programs."""
    given = {
        'question': 'Which <b>mixer</b>?',
        'base': SMALL,
        'arms': ARMS,
        'seeds': (0, 1),
        'metric': 'accuracy',
        'run_dir': str(tmp_path / 'study'),
    }
    return Study(**{**given, **change})


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """Three arms, two tasks of one vocabulary and length, two seeds; half of it was run, for the rest stand other outcomes."""
    pairs = {'kind': 'mqar', 'vocab_size': 16, 'num_pairs': 2, 'num_eval': 16}
    tasks = {'near': {}, 'far': {'data.task': pairs}}
    folder = tmp_path_factory.mktemp('done')
    made = study(folder, arms={'base': {}}, generate=({'swap': 'uniform_attention'},), tasks=tasks)
    for i, cell in enumerate(made.cells()):
        if cell.arm not in ARMS or (cell.arm, cell.task) == (UNIFORM, 'far'):
            values = {'loss': 2 + i / 8, 'accuracy': i / 16}
            runner._write_outcome(made, cell, {'status': 'finished', 'values': values, 'seconds': 1.0})
    return made.run()


@pytest.fixture(scope='module')
def page(done):
    return done.report()


def near(made):
    """(arm, seed) -> outcome of the first task."""
    return {(e['arm'], e['seed']): e for e in runner.finished(made) if e['task'] in ('', 'near')}


def curve(study, arm, seed):
    """The log of a run of the first task, less times."""
    cell = next(c for c in study.cells() if (c.arm, c.seed) == (arm, seed) and c.task in ('', 'near'))
    return [{k: v for k, v in e.items() if k not in metrics.TIMES} for e in metrics.read(cell.config.run_dir)]


# Arms


def test_generators():
    arms = Study(question='?', base=base(), arms={}, generate=({'swap': 'gqa'}, {'swap': 'gla'})).named_arms()
    assert arms == {'layer 0: gqa': {'model.overrides': {0: 'gqa'}}, 'layer 1: gla': {'model.overrides': {1: 'gla'}}}
    one = {'kind': 'gqa', 'num_heads': 1, 'num_kv_heads': 1}
    arms = Study(question='?', base=base(), arms={'base': {}}, generate=({'swap': one},)).named_arms()
    assert list(arms) == ['base', 'layer 0: gqa', 'layer 1: gqa']
    put = {'model.mixers': {'gqa swapped in': one}}
    assert arms['layer 1: gqa'] == {'model.overrides': {1: 'gqa swapped in'}, **put}
    six = base(model={**base()['model'], 'num_layers': 4})
    entry = {'patterns': {'mixers': ('gla', 'gqa'), 'count': 2}}
    assert len(Study(question='?', base=six, arms={}, generate=(entry,)).named_arms()) == math.comb(4, 2)
    grid = {'model.width': (16, 32), 'steps': (2, 3)}
    assert len(Study(question='?', base=base(), arms={}, generate=({'grid': grid},)).named_arms()) == 4
    drawn = Study(question='?', base=base(), arms={}, generate=({'random': {'grid': grid, 'num': 2, 'seed': 1}},)).named_arms()
    assert len(drawn) == 2 and drawn.items() <= Study(
        question='?', base=base(), arms={}, generate=({'grid': grid},)
    ).named_arms().items()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'arms': {'a': {}, 'b': {'model.pattern': ('gla', 'gqa', 'gla')[:2]}}}, "arm 'b' equals arm 'a'"),
        ({'arms': {'a': {}, 'b': {'model.overrides': {1: 'gqa'}}}}, "arm 'b' equals arm 'a'"),
        ({'arms': {'a': {}, 'b': {'model.patern': ('gqa',)}}}, "unknown key config.model.patern; did you mean 'pattern'"),
        ({'arms': {'a': {}, 'b': {'model.pattern': ('gpa',)}}}, "arm 'b': .*did you mean 'gqa'"),
        ({'arms': {'a': {}, 'b': {'model.width': 18}}}, "'b': .*must divide into num_heads 4"),
        ({'arms': {'a': {}}}, 'at least two arms'),
        ({'baseline': 'bas'}, "unknown arm 'bas'; did you mean 'base'"),
        ({'metric': 'acuracy'}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({'metric': 'nats_per_byte'}, "'induction' has no metric 'nats_per_byte'"),
        ({'base': base(data={'task': {'kind': 'regression'}, 'batch_size': 8})}, "'regression' has no metric 'accuracy'"),
        ({'batch_seeds': True, 'halving': Halving(rungs=(0.5,))}, 'with batch_seeds they are trained to their end'),
        ({'batch_seeds': True, 'arms': {'a': {}, 'b': {'health.every': 5}}}, "arm 'b': health.every=5: runs that are batched"),
        ({'metric': 'lang/accuracy', 'evals': {'long': {'data.length': 32}}}, "did you mean 'long'"),
        ({'evals': {'x': {'data.task.kind': 'nope'}}}, "unknown task 'nope'"),
        ({'evals': {'x': 'sparse'}}, "'induction' has no split 'sparse'; valid: four times, long"),
        ({'generate': ({'swop': 'gqa'},)}, 'is not one of swap, patterns, grid, random'),
        ({'rate': 'transfer', 'base': base(optim={'kind': 'muon', 'learning_rate': 1e-2})}, "optim.kind is 'muon'"),
        ({'match': Match(what='state', by='model.mlp.hidden')}, "'gqa': (no model.mlp.hidden up to|state can not be matched)"),
        ({'match': Match(what='flops', to='nobody')}, "unknown arm 'nobody'"),
    ],
)
def test_bad_studies_are_refused_before_any_step(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **{'base': base(), 'arms': {'base': {}, 'gqa': {'model.pattern': ('gqa',)}}, **change}).run()
    assert not (tmp_path / 'study').exists()


# Matching


def test_a_state_is_matched_by_the_size_of_a_latent():
    """Bytes of keys and values of two heads of 16, by the rank of a latent beside 16 rotated numbers."""
    mixers = lambda **m: {'model.pattern': ('m',), 'model.mixers': {'m': m}}
    arms = {'heads': mixers(kind='gqa', num_heads=2, num_kv_heads=2, head_dim=16)}
    arms['latent'] = mixers(kind='mla', num_heads=2, head_dim=16, rope_dim=16)
    made = Study(question='?', base=base(), arms=arms, match=Match(what='state', by='model.mixers.m.kv_rank', step=1))
    found = {arm.name: arm for arm in made.resolved()}
    assert found['latent'].change['model.mixers.m.kv_rank'] == 2 * 2 * 16 - 16
    assert made.costs(found['latent']).state == made.costs(found['heads']).state


@pytest.mark.parametrize('what', ['parameters', 'flops'])
def test_arms_are_matched(tmp_path, what):
    made = study(tmp_path, base=base(), arms={'base': {}, 'gqa': {'model.pattern': ('gqa',)}, 'thin': {'model.width': 8}},
                 match=Match(what=what, by='model.mlp.hidden', step=1, tolerance=0.02))  # fmt: skip
    costs = {arm.name: made.costs(arm) for arm in made.resolved()}
    goal = getattr(costs['base'], what)
    assert all(abs(getattr(c, what) / goal - 1) <= 0.02 for c in costs.values())
    assert costs['base'] != costs['gqa']


def test_an_impossible_match_names_the_nearest():
    with pytest.raises(ValueError, match=r'nearest is model\.mlp\.hidden = 104 with 104 \(\+4\.0%\)'):
        match.solve(lambda n: n, 100, Match(what='parameters', step=104))
    assert match.solve(lambda n: 3 * n, 300, Match(what='parameters', step=4)) == (100, 0.0)


def test_arms_begin_with_equal_shared_parts():
    build = lambda **c: to_flat(models.build(models.ModelConfig(vocab_size=9, width=16, num_layers=3, **c), rngs=nnx.Rngs(0)))
    one, other = build(pattern=('gqa',)), build(pattern=('gqa',), overrides={1: 'gla'})
    # 'gqa' is one stack of three layers, the other three stacks of one.
    for layer in (0, 2):
        for name in ('mixer/query/kernel', 'mlp/down/kernel'):
            a = one[f'body/stacks/0/layers/0/{name}'][layer]
            assert np.array_equal(a, other[f'body/stacks/{layer}/layers/0/{name}'][0])
    assert np.array_equal(one['body/stacks/0/layers/0/mlp/down/kernel'][1], other['body/stacks/1/layers/0/mlp/down/kernel'][0])
    assert np.array_equal(one['embedding'], other['embedding'])


# Statistics


def test_paired_differences():
    from scipy import stats

    arm, other = {0: 1.0, 1: 2.5, 2: 2.0, 9: 7.0}, {0: 0.5, 1: 1.0, 2: 1.0, 8: 0.0}
    found = statistics.difference(arm, other)
    assert found.seeds == 3 and found.mean == pytest.approx(1.0)
    assert found.p == pytest.approx(stats.ttest_rel([1, 2.5, 2], [0.5, 1, 1]).pvalue)
    means = np.array(np.meshgrid(*[[0.5, 1.5, 1.0]] * 3)).reshape(3, -1).mean(0)
    assert found.low == pytest.approx(np.percentile(means, 2.5))
    assert statistics.difference({0: 1.0}, {0: 2.0}).p is None
    assert statistics.difference({0: 1.0}, {1: 2.0}) is None


def test_holm():
    made = [statistics.Difference(3, 0, 0, 0, p) for p in (0.04, 0.01, 0.03, None)]
    assert [d.adjusted for d in statistics.holm(made)] == pytest.approx([0.06, 0.03, 0.06, None])


def test_false_alarms_are_as_rare_as_promised():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(300):
        base_values = dict(enumerate(rng.normal(size=4)))
        arms = [dict(enumerate(rng.normal(size=4))) for _ in range(5)]
        alarms += any(d.adjusted < 0.05 for d in statistics.holm([statistics.difference(a, base_values) for a in arms]))
    assert alarms / 300 < 0.08


def test_pareto():
    assert statistics.pareto([(1, 3), (2, 2), (2, 3), (3, 1), (3, 1)]) == [0, 1, 3, 4]


# Runs


def test_results(done):
    table = done.results
    assert len(table['arm']) == 3 * 2 * 2 and set(table['status']) == {'finished'}
    assert all(len(column) == 12 for column in table.values())
    assert all(0 <= v <= 1 for v in table['values.accuracy'])
    found = results(done)
    assert {r.arm for r in found} == {*ARMS, 'layer 1: uniform_attention'}
    assert all(r.against.seeds == 2 for r in found if r.arm != 'base')


def test_nothing_is_run_twice(done, monkeypatch):
    monkeypatch.setattr(runner, 'execute', lambda *a: pytest.fail('ran again'))
    done.run()


def test_seeds_share_data_and_differ(done):
    cells = [c for c in done.cells() if c.task == 'near' and c.seed == 0]
    assert len({c.config.data.seed for c in cells}) == 1
    assert {c.config.seed for c in done.cells()} == {0, 1}


def test_a_changed_study_is_refused(done):
    with pytest.raises(ValueError, match=r'base\.steps: saved 4, now 6'):
        Study(**{**fields(done), 'base': {**SMALL, 'steps': 6}}).run()
    spelled = {**SMALL, 'data': {**SMALL['data'], 'threads': 2}, 'context': 'auto'}  # defaults
    runner.claim(Study(**{**fields(done), 'base': spelled}))
    with pytest.raises(ValueError, match=r"base\.sharding: saved .*now 'fsdp'"):
        runner.claim(Study(**{**fields(done), 'base': {**spelled, 'sharding': 'fsdp'}}))
    forked = Study(**{**fields(done), 'base': {**SMALL, 'steps': 6}, 'run_dir': done.run_dir + '-fork'})
    runner.claim(forked)  # another folder: another study


def fields(made):
    return {name: getattr(made, name) for name in Study.__dataclass_fields__}


def test_report(page):
    text = page.read_text()
    assert 'Which &lt;b&gt;mixer&lt;/b&gt;?' in text and '<b>mixer</b>' not in text
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="http', text), 'the page must work offline'
    folder = page.parent
    names = {p.stem for p in (folder / 'figures').iterdir()}
    assert {'curves_near', 'effects_near', 'layers_far', 'tasks', 'pareto_state_near'} <= names
    rows = list(csv.DictReader((folder / 'results.csv').read_text().splitlines()))
    lines = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
    assert len(rows) == len(lines) == 12
    assert float(rows[0]['values.accuracy']) == lines[0]['values']['accuracy']
    summary = (folder / 'report.md').read_text()
    assert 'Best accuracy on near' in summary and UNIFORM in summary


@pytest.mark.skipif(shutil.which('chromium') is None, reason='needs a chromium')
def test_the_page_draws_all_figures_in_a_browser_without_a_network(page):
    browser = ['chromium', '--headless', '--no-sandbox', '--disable-gpu']
    browser += ['--proxy-server=127.0.0.1:9', '--enable-logging=stderr']
    shown = subprocess.run(
        [*browser, '--virtual-time-budget=20000', '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and 'CONSOLE' not in shown.stderr, shown.stderr[-2000:]
    drawn = re.findall(r'<svg class="main-svg"', shown.stdout)
    figures = [p.stem for p in (page.parent / 'figures').iterdir()]
    assert len(re.findall('plotly-graph-div js-plotly-plot', shown.stdout)) == len(figures) > 4 and len(drawn) >= len(figures)
    titles = re.findall(r'class="gtitle"[^>]*>(?:<tspan[^>]*>)?([^<]+)', shown.stdout)
    assert len(titles) == len(figures) and any('bootstrap' in title for title in titles)
    assert 'Which &lt;b&gt;mixer&lt;/b&gt;?' in shown.stdout  # as text, after a browser has read it


def test_halving_drops_the_arms_that_are_behind(done, tmp_path):
    """Both arms pause at step 2; the better one by then goes on, and ends as if it had not paused."""
    at_rung = {arm: next(e['loss'] for e in curve(done, arm, 0) if (e['split'], e['step']) == ('eval', 2)) for arm in ARMS}
    better, worse = sorted(at_rung, key=at_rung.get)
    given = {**fields(done), 'arms': ARMS, 'generate': (), 'tasks': {}, 'seeds': (0,), 'metric': 'loss', 'baseline': better}
    given |= {'halving': Halving(rungs=(0.5,), keep=0.1), 'run_dir': str(tmp_path / 'halved')}
    made = Study(**given).run()
    found = {e['arm']: e for e in runner.finished(made)}
    assert found[worse]['status'] == 'dropped at step 2' and found[better]['status'] == 'finished'
    assert found[better]['values'] == near(done)[better, 0]['values']
    shutil.rmtree(tmp_path / 'halved' / 'results')
    assert runner.hopeless(Study(**{**given, 'baseline': worse}), made.cells(), 2) == []  # a baseline goes on


def test_a_sweep_takes_each_arms_best_rate(tmp_path):
    made = study(tmp_path, learning_rates=(1e-3, 1e-2), metric='loss', seeds=(0, 1))
    losses = {('base', 1e-3): 1.0, ('base', 1e-2): 2.0, (UNIFORM, 1e-3): 4.0, (UNIFORM, 1e-2): 3.0}
    for cell in made.cells():
        assert cell.config.optim.learning_rate == cell.rate
        values = {'loss': losses[cell.arm, cell.rate] + cell.seed}
        runner._write_outcome(made, cell, {'status': 'finished', 'values': values, 'seconds': 1.0})
    found = {r.arm: r for r in results(made)}
    assert {arm: r.rate for arm, r in found.items()} == {'base': 1e-3, UNIFORM: 1e-2}
    assert len(made.results['arm']) == 8 and found[UNIFORM].against.mean == 2.0
    assert results_table(made, list(found.values()))[2][-1] == '0.01'


@pytest.fixture(scope='module')
def batched(done, tmp_path_factory):
    folder = tmp_path_factory.mktemp('batched') / 'study'
    given = {**fields(done), 'arms': ARMS, 'generate': (), 'tasks': {}, 'run_dir': str(folder), 'batch_seeds': True}
    return Study(**{**given, 'evals': {'long': 'long'}}).run()


def test_batched_seeds_find_what_separate_runs_do(done, batched):
    """Equal parameters and rows; after four updates the numbers agree to rounding, and each run can be evaluated alone."""
    assert set(batched.results['status']) == {'finished'} and len(batched.results['arm']) == 4
    for (arm, seed), entry in near(batched).items():
        assert entry['values']['loss'] == pytest.approx(near(done)[arm, seed]['values']['loss'], rel=1e-5)
        mine, other = curve(batched, arm, seed), curve(done, arm, seed)
        assert [(e['step'], e['split']) for e in mine] == [(e['step'], e['split']) for e in other]
        assert mine[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-6)  # before the first update
    for name in ('loss', 'long/loss'):
        assert len({e['values'][name] for e in near(batched).values()}) == 4
    assert all(0 <= v <= 1 for v in batched.results['values.long/accuracy'])


def test_a_batch_cut_short_begins_again_and_finds_the_same(batched, tmp_path, monkeypatch):
    """One arm is there, the other is cut at its second seed's outcome."""
    other = Study(**{**fields(batched), 'run_dir': str(tmp_path / 'other')})
    shutil.copytree(runner.folder(batched), tmp_path / 'other')
    for cell in (cell for cell in other.cells() if cell.arm == UNIFORM):
        (tmp_path / 'other' / 'results' / f'{cell.name}.json').unlink()
        shutil.rmtree(cell.config.run_dir)
    written = runner._write_outcome

    def killed(study, cell, entry):
        if (cell.arm, cell.seed) == (UNIFORM, 1):
            raise KeyboardInterrupt
        return written(study, cell, entry)

    monkeypatch.setattr(runner, '_write_outcome', killed)
    with pytest.raises(KeyboardInterrupt):
        other.run()
    assert len(runner.finished(other)) == 3
    monkeypatch.setattr(runner, '_write_outcome', written)
    shutil.rmtree(cell.config.run_dir)  # lost: its batch is run again
    values = lambda made: {key: e['values'] for key, e in near(made).items()}
    assert values(other.run()) == values(batched)


def test_a_failing_arm_is_a_result(tmp_path):
    """Of a batch too, where each run says what went wrong in it."""
    arms = {'base': {}, 'wild': {'optim.learning_rate': 1e30, 'optim.clip_norm': None}}
    made = study(tmp_path, arms=arms, batch_seeds=True)
    for cell in (cell for cell in made.cells() if cell.arm == 'base'):
        runner._write_outcome(made, cell, {'status': 'finished', 'values': {'accuracy': 0.5}, 'seconds': 1.0})
    status = [e['status'] for e in runner.finished(made.run()) if e['arm'] == 'wild']
    assert len(status) == 2 and all(re.match('failed: .*gradient norm nan; first bad tensor', s) for s in status), status
    assert any('wild (failed' in line for line in summary(made, results(made), made.cells()))


def numbers(made):
    """What a report says, less times and places."""
    tables = results_table(made, results(made))
    speed = tables[0].index('tokens/s')
    values = {p.name: json.loads(p.read_text())['values'] for p in (runner.folder(made) / 'results').iterdir()}
    curves = {(c.arm, c.seed): curve(made, c.arm, c.seed) for c in made.cells()}
    return [row[:speed] + row[speed + 1 :] for row in tables], summary(made, results(made), made.cells()), values, curves


def test_a_study_cut_anywhere_finds_the_same_numbers(done, tmp_path, monkeypatch):
    """Cut at random writes: of a log line, a checkpoint, an outcome. The slow test kills processes."""
    often = {**SMALL, 'checkpoint': {'every': 2}}
    given = {**fields(done), 'base': often, 'arms': ARMS, 'generate': (), 'tasks': {}, 'seeds': (0,)}
    made = Study(**{**given, 'run_dir': str(tmp_path / 'cut')})
    places = [(metrics.Log, 'write'), (runner, '_write'), (checkpoint.Checkpoints, 'save')]
    written = {place: getattr(*place) for place in places}
    left = [math.inf]

    def counted(place):
        def call(*given, **named):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return written[place](*given, **named)

        return call

    for place in places:
        monkeypatch.setattr(*place, counted(place))
    for writes in np.random.default_rng(0).integers(3, 9, 3):  # a run takes eleven
        left[0] = int(writes)
        with pytest.raises(KeyboardInterrupt):
            made.run()
    left[0] = math.inf
    made.run()
    for arm in ARMS:
        assert near(made)[arm, 0]['values'] == near(done)[arm, 0]['values']
        assert curve(made, arm, 0) == curve(done, arm, 0)


STUDY = """
from ml_collections import ConfigDict
def get_config():
    c = ConfigDict(convert_dict=False)
    c.question, c.base, c.arms = 'q', {base!r}, {arms!r}
    c.seeds, c.metric, c.run_dir = (0, 1, 2), 'accuracy', {run_dir!r}
    return c
"""


def _run_study(file, begins):
    """What a killed process does; `begins` is set when the imports are done."""
    begins.set()
    config_lib.build(Study, config_lib.as_dict(_load(file), 'study')).run()


@pytest.mark.slow
def test_killed_and_parallel_studies_find_the_same_numbers(tmp_path, monkeypatch):
    """Twenty SIGKILLs at random times after the imports; then two workers finish the study.

    The times are drawn from how long the whole takes. Processes are forked from one that has imported everything.
    """
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
    forks = multiprocessing.get_context('forkserver')
    forks.set_forkserver_preload([__name__, 'attnx.train.loop', 'orbax.checkpoint'])
    files = {name: tmp_path / f'{name}.py' for name in ('whole', 'parts')}
    for name, file in files.items():
        often = {**SMALL, 'checkpoint': {'every': 1}}
        file.write_text(STUDY.format(base=often, arms=ARMS, run_dir=str(tmp_path / name)))

    def start(name):
        begins = forks.Event()
        process = forks.Process(target=_run_study, args=(files[name], begins))
        process.start()
        assert begins.wait(120)
        return process, time.monotonic()

    process, began = start('whole')
    process.join()
    assert process.exitcode == 0
    whole, kills, done, rng = time.monotonic() - began, 0, [], np.random.default_rng(0)
    while kills < 20:
        process, _ = start('parts')
        process.join(whole * rng.uniform(0.02, 0.4))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        done.append(len(list((tmp_path / 'parts' / 'results').glob('*.json'))))
        if process.exitcode == 0:  # finished: another such study begins
            shutil.rmtree(tmp_path / 'parts')
    print(f'20 kills in runs of at most {0.4 * whole:.1f} s; runs finished after each: {done}')
    command = [sys.executable, '-m', 'attnx.ablate', f'--config={files["parts"]}', '--workers=2']
    assert subprocess.run(command, cwd=pathlib.Path(__file__).parents[3]).returncode == 0
    made = {n: config_lib.build(Study, config_lib.as_dict(_load(file), 'study')) for n, file in files.items()}
    assert numbers(made['whole']) == numbers(made['parts']) and len(numbers(made['whole'])[2]) == 6


@pytest.mark.parametrize(('visible', 'given'), [('4,7', ['4', '7', '4']), (None, ['0', '1', '0'])])
def test_workers_share_devices_out(tmp_path, monkeypatch, visible, given):
    """With a `nvidia-smi` that lists two GPUs, and a Python that says what it was given."""
    for name, text in {'nvidia-smi': 'echo GPU 0: x; echo GPU 1: y', 'python': f'env > {tmp_path}/$$'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert runner.workers_of([], 3) == 0
    said = [path.read_text() for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert sorted(re.search('CUDA_VISIBLE_DEVICES=(.*)', text)[1] for text in said) == sorted(given)
    assert all('MEM_FRACTION=0.45' in text for text in said)  # two of three share a GPU
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert runner.gpus() == []


SBATCH = """#!/bin/sh
cp "$1" {folder}/script.sh
echo Submitted batch job 7
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case $1 in *=*) shift ;; --output|--error) shift 2 ;; *) shift ;; esac; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A `sbatch` that keeps the script it is given, and a `srun` that runs its command here."""
    pytest.importorskip('submitit')
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, text in {'sbatch': SBATCH.replace('{folder}', str(folder)), 'srun': SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
    return folder / 'script.sh'


def test_workers_are_submitted_as_a_slurm_array(tmp_path, slurm):
    options = runner.slurm_options(['timeout_min=240', 'slurm_partition=gpu'])
    jobs = runner.submit(['--config=a study.py', '--workers', '8'], 3, tmp_path / 'study', options)
    script = slurm.read_text()
    for line in ('--array=0-2%3', '--partition=gpu', '--time=240', '--job-name=ablate'):
        assert f'#SBATCH {line}\n' in script, script
    assert [job.job_id for job in jobs] == ['7_0', '7_1', '7_2']
    call = jobs[2].submission()
    command = [sys.executable, '-m', 'attnx.ablate', '--config=a study.py', '--workers', '8']
    assert call.function is subprocess.run and call.args[0][:6] == command and '--workers=1' in call.args[0][6:]


@pytest.mark.parametrize(
    ('options', 'message'),
    [(['time'], "'time' is not name=value"), (['slurm_partitoin=gpu'], 'slurm_options .*partitoin')],
)
def test_bad_slurm_options_are_refused(tmp_path, slurm, options, message):
    with pytest.raises(ValueError, match=message):
        runner.submit([], 2, tmp_path / 'study', runner.slurm_options(options))
    assert not slurm.exists()


def test_without_slurm_nothing_is_submitted(tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ValueError, match='--slurm needs sbatch'):
        runner.submit([], 2, tmp_path, {})


@pytest.mark.slow
def test_a_slurm_array_runs_the_study(tmp_path, slurm):
    """Through the command line; what SLURM would start is started here, both tasks of the array at once."""
    root, file = pathlib.Path(__file__).parents[3], tmp_path / 'study.py'
    file.write_text(STUDY.format(base=SMALL, arms=ARMS, run_dir=str(tmp_path / 'study')))
    command = [sys.executable, '-m', 'attnx.ablate', '--config', str(file)]
    assert subprocess.run([*command, '--slurm', '2'], cwd=root).returncode == 0
    task = {f'SLURM_{name}': '7' for name in ('JOB_ID', 'ARRAY_JOB_ID')} | {'SLURM_JOB_NODELIST': 'here'}
    task |= {f'SLURM_{name}': '1' for name in ('NTASKS', 'JOB_NUM_NODES')}
    task |= {f'SLURM_{name}': '0' for name in ('NODEID', 'PROCID', 'LOCALID')} | {'SLURMD_NODENAME': 'here'}
    started = [
        subprocess.Popen(['bash', str(slurm)], cwd=root, env={**os.environ, **task, 'SLURM_ARRAY_TASK_ID': str(i)})
        for i in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    made = config_lib.build(Study, config_lib.as_dict(_load(file), 'study'))
    assert made.results['status'] == ['finished'] * 6


def test_studies_of_the_repository_are_valid():
    from ml_collections import ConfigDict

    files = sorted((pathlib.Path(__file__).parents[3] / 'configs' / 'ablations').glob('*.py'))
    assert files
    for file in (file for file in files if file.stem != 'claims'):  # test_claims.py has each of those
        made = config_lib.build(Study, config_lib.as_dict(_load(file), 'study'))
        assert made.cells(), file
        assert isinstance(_load(file), ConfigDict)


def _load(file):
    import importlib.util

    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_costs_count_what_the_model_has():
    config = models.ModelConfig(vocab_size=9, width=16, num_layers=2, pattern=('gqa',))
    found = match.costs(config, 32)
    built = jax.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    assert found.parameters == sum(v.size for v in to_flat(built).values())
    assert found.state > match.costs(config, 16).state > 0


def test_the_gallery_shows_studies_of_the_repository():
    """Every report belongs to a study as it stands: its question, its arms, its seeds; a study that changed is run again."""
    root = pathlib.Path(__file__).parents[3]
    folders = sorted(path.parent for path in (root / 'gallery').glob('*/report.md'))
    assert folders
    for folder in folders:
        made = config_lib.build(Study, config_lib.as_dict(_load(root / 'configs' / 'ablations' / f'{folder.name}.py'), 'study'))
        rows = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
        text = (folder / 'report.md').read_text()
        assert text.startswith(f'# {made.question}\n'), folder
        assert {r['arm'] for r in rows} == set(made.named_arms()) and {r['task'] for r in rows} == set(made.on_tasks), folder
        assert {r['seed'] for r in rows} == set(made.seeds) and all(made.metric in r['values'] for r in rows), folder
        assert all((folder / link).exists() for link in re.findall(r'\((figures/[^)]+)\)', text)), folder
        assert f'({folder.name}/report.md)' in (root / 'gallery' / 'README.md').read_text()
