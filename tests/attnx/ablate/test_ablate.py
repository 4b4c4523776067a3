"""Studies: arms and matching, statistics, the runner under kills, the report."""

import contextlib
import csv
import json
import math
import pathlib
import re
import shutil
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


def study(tmp_path, **change):
    given = {
        'question': 'Which <b>mixer</b>?',
        'base': base(),
        'arms': {'base': {}, 'gqa': {'model.pattern': ('gqa',)}},
        'seeds': (0, 1),
        'metric': 'accuracy',
        'run_dir': str(tmp_path / 'study'),
    }
    return Study(**{**given, **change})


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    made = study(
        tmp_path_factory.mktemp('done'),
        generate=({'swap': 'retnet'},),
        evals={'long': {'data.length': 32}},
        tasks={'near': {}, 'far': {'data.length': 24}},
    )
    return made.run()


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
        ({'generate': ({'swop': 'gqa'},)}, 'is not one of swap, patterns, grid, random'),
        ({'rate': 'transfer', 'base': base(optim={'kind': 'muon', 'learning_rate': 1e-2})}, "optim.kind is 'muon'"),
        ({'match': Match(what='state', by='model.mlp.hidden')}, "'gqa': (no model.mlp.hidden up to|state can not be matched)"),
        ({'match': Match(what='flops', to='nobody')}, "unknown arm 'nobody'"),
    ],
)
def test_bad_studies_are_refused_before_any_step(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **change).run()
    assert not (tmp_path / 'study').exists()


# Matching


@pytest.mark.parametrize('what', ['parameters', 'flops'])
def test_arms_are_matched(tmp_path, what):
    made = study(tmp_path, arms={'base': {}, 'gqa': {'model.pattern': ('gqa',)}, 'thin': {'model.width': 8}},
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
    assert len(table['arm']) == 4 * 2 * 2 and set(table['status']) == {'finished'}
    assert all(len(column) == 16 for column in table.values())
    assert all(0 <= v <= 1 for v in table['values.long/accuracy'])
    found = results(done)
    assert {r.arm for r in found} == {'base', 'gqa', 'layer 0: retnet', 'layer 1: retnet'}
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
        Study(**{**fields(done), 'base': base(steps=6)}).run()


def fields(made):
    return {name: getattr(made, name) for name in Study.__dataclass_fields__}


def test_report(done):
    page = done.report()
    text = page.read_text()
    assert 'Which &lt;b&gt;mixer&lt;/b&gt;?' in text and '<b>mixer</b>' not in text
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="http', text), 'the page must work offline'
    folder = page.parent
    names = {p.stem for p in (folder / 'figures').iterdir()}
    assert {'curves_near', 'effects_near', 'layers_far', 'tasks', 'pareto_state_near'} <= names
    rows = list(csv.DictReader((folder / 'results.csv').read_text().splitlines()))
    lines = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
    assert len(rows) == len(lines) == 16
    assert float(rows[0]['values.accuracy']) == lines[0]['values']['accuracy']
    summary = (folder / 'report.md').read_text()
    assert 'Best accuracy on near' in summary and 'layer 0: retnet' in summary


@pytest.mark.skipif(shutil.which('chromium') is None, reason='needs a chromium')
def test_the_page_draws_all_figures_in_a_browser_without_a_network(done):
    page = done.report()
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


def test_a_failing_arm_is_a_result(tmp_path):
    arms = {'base': {}, 'wild': {'optim.learning_rate': 1e30, 'optim.clip_norm': None}}
    made = study(tmp_path, arms=arms, seeds=(0,)).run()
    status = dict(zip(made.results['arm'], made.results['status']))
    assert status['base'] == 'finished' and status['wild'].startswith('failed')
    made.report()


def test_halving_drops_the_arms_that_are_behind(tmp_path):
    arms = {'base': {}, 'slow': {'optim.learning_rate': 1e-9}, 'slower': {'optim.learning_rate': 1e-10}}
    made = study(tmp_path, arms=arms, seeds=(0,), metric='loss', halving=Halving(rungs=(0.5,), keep=0.4)).run()
    status = dict(zip(made.results['arm'], made.results['status']))
    assert status == {'base': 'finished', 'slow': 'dropped at step 2', 'slower': 'dropped at step 2'}


def test_sweep_takes_each_arms_best_rate(tmp_path):
    made = study(tmp_path, learning_rates=(1e-9, 1e-2), metric='loss', seeds=(0,)).run()
    rows = list(zip(*(made.results[k] for k in ('arm', 'values.loss', 'rate'))))
    best = {arm: min((loss, rate) for a, loss, rate in rows if a == arm)[1] for arm in ('base', 'gqa')}
    assert {r.arm: r.rate for r in results(made)} == best
    assert len(made.results['arm']) == 4


def test_batched_seeds_find_what_separate_runs_do(done, tmp_path):
    """Equal parameters and rows; after four updates the numbers agree to rounding, and each run can be evaluated alone."""
    given = {**fields(done), 'generate': (), 'tasks': {'near': {}}, 'run_dir': str(tmp_path / 'batched'), 'batch_seeds': True}
    made = Study(**given).run()
    assert set(made.results['status']) == {'finished'} and len(made.results['arm']) == 4
    separate = {(e['arm'], e['seed']): e['values'] for e in runner.finished(done) if e['task'] == 'near'}
    for entry in runner.finished(made):
        wanted = separate[entry['arm'], entry['seed']]
        assert entry['values'].keys() == wanted.keys()
        for name in ('loss', 'long/loss'):
            assert entry['values'][name] == pytest.approx(wanted[name], rel=1e-5)
    cells = {c.name: c for c in done.cells()}
    for cell in made.cells():
        mine, other = metrics.read(cell.config.run_dir), metrics.read(cells[cell.name].config.run_dir)
        assert [(e['step'], e['split']) for e in mine] == [(e['step'], e['split']) for e in other]
        assert mine[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-6)  # before the first update
    assert len({e['values']['loss'] for e in runner.finished(made)}) == 4


def test_a_batch_cut_short_begins_again_and_finds_the_same(tmp_path, monkeypatch):
    made = study(tmp_path, batch_seeds=True, arms={'base': {}, 'gqa': {'model.pattern': ('gqa',)}})
    whole = {e['arm'] + str(e['seed']): e['values'] for e in runner.finished(made.run())}
    other = Study(**{**fields(made), 'run_dir': str(tmp_path / 'other')})
    written = runner._write_outcome

    def killed(study, cell, entry):
        if cell.name == 'gqa-seed1':
            raise KeyboardInterrupt
        return written(study, cell, entry)

    monkeypatch.setattr(runner, '_write_outcome', killed)
    with pytest.raises(KeyboardInterrupt):
        other.run()
    assert len(runner.finished(other)) == 3
    monkeypatch.setattr(runner, '_write_outcome', written)
    shutil.rmtree(next(c for c in other.cells() if c.name == 'gqa-seed1').config.run_dir)  # lost: its batch is run again
    assert {e['arm'] + str(e['seed']): e['values'] for e in runner.finished(other.run())} == whole


def test_a_batch_with_a_nan_says_which_run_it_was(tmp_path):
    arms = {'base': {}, 'wild': {'optim.learning_rate': 1e30, 'optim.clip_norm': None}}
    made = study(tmp_path, arms=arms, batch_seeds=True).run()
    status = list(zip(made.results['arm'], made.results['status']))
    assert all(s == 'finished' if a == 'base' else s.startswith('failed') for a, s in status) and len(status) == 4


STUDY = """
from ml_collections import ConfigDict
def get_config():
    c = ConfigDict(convert_dict=False)
    c.question, c.base = 'q', {base!r}
    c.arms = {{'base': {{}}, 'gqa': {{'model.pattern': ('gqa',)}}, 'gla': {{'model.pattern': ('gla',)}}}}
    c.seeds, c.metric, c.run_dir = (0, 1, 2, 3), 'accuracy', {run_dir!r}
    return c
"""


def numbers(made):
    """What a report says, less times and places."""
    tables = results_table(made, results(made))
    speed = tables[0].index('tokens/s')
    values = {p.name: json.loads(p.read_text())['values'] for p in (runner.folder(made) / 'results').iterdir()}
    return [row[:speed] + row[speed + 1 :] for row in tables], summary(made, results(made), made.cells()), values


def test_a_study_cut_anywhere_finds_the_same_numbers(tmp_path, monkeypatch):
    """Cut at random writes: of a log line, a checkpoint, an outcome. The slow test kills processes."""
    made = study(tmp_path, arms={'base': {}, 'gqa': {'model.pattern': ('gqa',)}}, seeds=(0,))
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
    left[0] = calls = 10**6
    made.run()
    calls -= left[0]
    other = Study(**{**fields(made), 'run_dir': str(tmp_path / 'other')})
    rng, cuts = np.random.default_rng(0), 0
    for _ in range(4):
        left[0] = int(rng.integers(1, calls // 3))
        try:
            other.run()
        except KeyboardInterrupt:
            cuts += 1
    left[0] = math.inf
    assert cuts > 2 and numbers(other.run()) == numbers(made)


@pytest.mark.slow
def test_killed_and_parallel_studies_find_the_same_numbers(tmp_path):
    """Twenty kills at random times; then two workers finish it. The times are drawn from how long the whole takes."""
    root = pathlib.Path(__file__).parents[3]

    def start(folder, *flags):
        file = tmp_path / f'{folder}.py'
        file.write_text(STUDY.format(base=base(), run_dir=str(tmp_path / folder)))
        return subprocess.Popen([sys.executable, '-m', 'attnx.ablate', f'--config={file}', *flags], cwd=root)

    began = time.monotonic()
    assert start('whole').wait() == 0
    whole, kills, rng = time.monotonic() - began, 0, np.random.default_rng(0)
    for _ in range(60):
        process = start('parts', '--noreport')
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(whole * rng.uniform(0.1, 0.6))
        kills += process.poll() is None
        process.kill()
        process.wait()
        if kills == 20:
            break
        if process.returncode == 0:  # finished: another such study begins
            shutil.rmtree(tmp_path / 'parts')
    finished = len(list((tmp_path / 'parts' / 'results').glob('*.json')))
    print(f'{kills} kills; the last left {finished} of 12 runs finished')
    assert kills == 20 and start('parts', '--workers=2').wait() == 0
    made = {n: config_lib.build(Study, config_lib.as_dict(_load(tmp_path / f'{n}.py'), 'study')) for n in ('whole', 'parts')}
    assert numbers(made['whole']) == numbers(made['parts']) and len(numbers(made['whole'])[2]) == 12


def test_studies_of_the_repository_are_valid():
    from ml_collections import ConfigDict

    files = sorted((pathlib.Path(__file__).parents[3] / 'configs' / 'ablations').glob('*.py'))
    assert files
    for file in files:
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
