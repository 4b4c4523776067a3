"""Studies that run: cut anywhere, batched, halved, swept; their results and report."""

import csv
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from attnx.ablate import Halving, Study, runner
from attnx.ablate.report import results_table, summary
from attnx.ablate.results import results
from attnx.train import checkpoint, metrics
from tests.studies import ARMS, SMALL, UNIFORM, curve, near, study


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """Three arms, two tasks of one vocabulary and length, two seeds; five runs of twelve, other outcomes for the rest."""
    pairs = {'kind': 'mqar', 'vocab_size': 16, 'num_pairs': 2, 'num_eval': 16}
    tasks = {'near': {}, 'far': {'data.task': pairs}}
    folder = tmp_path_factory.mktemp('done')
    made = study(folder, arms={'base': {}}, generate=({'swap': 'uniform_attention'},), tasks=tasks)
    for i, cell in enumerate(made.cells()):
        if cell.arm not in ARMS or (cell.task == 'far' and (cell.arm, cell.seed) != ('base', 0)):
            values = {'loss': 2 + i / 8, 'accuracy': i / 16}
            runner._write_outcome(made, cell, {'status': 'finished', 'values': values, 'seconds': 1.0})
    return made.run()


@pytest.fixture(scope='module')
def page(done):
    return done.report()


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
    made = Study(**{**given, 'evals': {'long': 'long', 'whole': {'data.batch_size': 16}}})
    for cell in (cell for cell in made.cells() if cell.arm == UNIFORM):  # one arm is run
        runner._write_outcome(made, cell, {'status': 'finished', 'values': {'accuracy': 0.5}, 'seconds': 1.0})
    return made.run()


def of_base(made):
    return {key: entry for key, entry in near(made).items() if key[0] == 'base'}


def test_batched_seeds_find_what_separate_runs_do(done, batched):
    """Equal parameters and rows; after four updates the numbers agree to rounding, and each run can be evaluated alone."""
    assert set(batched.results['status']) == {'finished'} and len(batched.results['arm']) == 4
    for (arm, seed), entry in of_base(batched).items():
        assert entry['values']['loss'] == pytest.approx(near(done)[arm, seed]['values']['loss'], rel=1e-5)
        mine, other = curve(batched, arm, seed), curve(done, arm, seed)
        assert [(e['step'], e['split']) for e in mine] == [(e['step'], e['split']) for e in other]
        assert mine[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-6)  # before the first update
    for name in ('loss', 'long/loss', 'whole/loss'):
        assert len({e['values'][name] for e in of_base(batched).values()}) == 2
    assert all(0 <= e['values']['long/accuracy'] <= 1 for e in of_base(batched).values())


@pytest.mark.slow
def test_a_batch_cut_short_begins_again_and_finds_the_same(batched, tmp_path, monkeypatch):
    """Cut at its second seed's outcome."""
    other = Study(**{**fields(batched), 'run_dir': str(tmp_path / 'other')})
    shutil.copytree(runner.folder(batched), tmp_path / 'other')
    for cell in (cell for cell in other.cells() if cell.arm == 'base'):
        (tmp_path / 'other' / 'results' / f'{cell.name}.json').unlink()
        shutil.rmtree(cell.config.run_dir)
    written = runner._write_outcome

    def killed(study, cell, entry):
        if (cell.arm, cell.seed) == ('base', 1):
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


@pytest.mark.parametrize('batch', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failing_arm_is_a_result(tmp_path, batch):
    """Of a batch too, where each run says what went wrong in it."""
    arms = {'base': {}, 'wild': {'optim.learning_rate': 1e30, 'optim.clip_norm': None}}
    made = study(tmp_path, arms=arms, batch_seeds=batch, seeds=(0, 1) if batch else (0,))
    for cell in (cell for cell in made.cells() if cell.arm == 'base'):
        runner._write_outcome(made, cell, {'status': 'finished', 'values': {'accuracy': 0.5}, 'seconds': 1.0})
    status = [e['status'] for e in runner.finished(made.run()) if e['arm'] == 'wild']
    assert len(status) == 1 + batch
    assert all(re.match('failed: .*gradient norm nan; first bad tensor', s) for s in status), status
    assert any('wild (failed' in line for line in summary(made, results(made), made.cells()))


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
