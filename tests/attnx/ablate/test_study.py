"""Studies before they run: arms and matching, statistics, what the repository holds."""

import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

from attnx import config as config_lib
from attnx import models
from attnx.ablate import Halving, Match, Study, match, statistics
from attnx.nn import to_flat
from tests.studies import base, load, study

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
        ({'generate': ({'random': {'grid': {}, 'num': 1, 'sead': 3}},)}, "unknown key generate.random.sead; .*'seed'"),
        ({'generate': ({'swap': {'num_heads': 1}},)}, "a mixer's name, or its settings with its kind"),
        ({'generate': ({'patterns': {'mixers': ('gla', 'gqa')}},)}, "generate.patterns: .*'count'"),
        ({'generate': ({'patterns': {'mixers': ('gla',), 'count': 1}},)}, 'places one mixer among another'),
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


def test_studies_of_the_repository_are_valid():
    from ml_collections import ConfigDict

    files = sorted((pathlib.Path(__file__).parents[3] / 'configs' / 'ablations').glob('*.py'))
    assert files
    for file in (file for file in files if file.stem != 'claims'):  # test_claims.py has each of those
        made = config_lib.build(Study, config_lib.as_dict(load(file), 'study'))
        assert made.cells(), file
        assert isinstance(load(file), ConfigDict)


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
        made = config_lib.build(Study, config_lib.as_dict(load(root / 'configs' / 'ablations' / f'{folder.name}.py'), 'study'))
        rows = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
        text = (folder / 'report.md').read_text()
        assert text.startswith(f'# {made.question}\n'), folder
        assert {r['arm'] for r in rows} == set(made.named_arms()) and {r['task'] for r in rows} == set(made.on_tasks), folder
        assert {r['seed'] for r in rows} == set(made.seeds) and all(made.metric in r['values'] for r in rows), folder
        assert all((folder / link).exists() for link in re.findall(r'\((figures/[^)]+)\)', text)), folder
        assert f'({folder.name}/report.md)' in (root / 'gallery' / 'README.md').read_text()
