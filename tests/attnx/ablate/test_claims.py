"""Claims: every study can run, the rule decides as it says, what is shipped follows from the outcomes shipped."""

import pytest

from attnx.ablate import claims

FILE = claims.claims_file()
RULE = {'claim': '', 'learned': [FILE.least('s', 'base', 'accuracy', 0.9)],
        'statements': [('better', *FILE.above('s', 'new', 'base', 'accuracy')),
                       ('solved', *FILE.least('s', 'new', 'accuracy', 0.95))]}  # fmt: skip


def outcomes(new, base=(0.92, 0.91, 0.93)):
    return {('s', arm, 'accuracy'): dict(enumerate(v)) for arm, v in (('new', new), ('base', base)) if v}


@pytest.mark.parametrize('name', FILE.STUDIES)
def test_every_arm_is_valid_and_rules_name_what_exists(name):
    study = claims.studies()[name]
    assert len(study.cells()) == len(study.seeds) * len(study.arms)  # validates and matches all arms
    known = {'loss', 'accuracy', 'nats_per_byte', 'parameters', FILE.FORWARD, FILE.STEP}
    known |= {f'{place}/{metric}' for place in (*study.evals, 'curve') for metric in claims.METRICS}
    used = {key for c in FILE.CLAIMS.values() for _, w, _ in c['statements'] for key in w}
    used |= {key for c in FILE.CLAIMS.values() for w, _ in c['learned'] for key in w}
    mine = {key for key in used if key[0] == name}
    assert mine and all(arm in study.arms and metric in known for _, arm, metric in mine)
    assert {study for study, _, _ in used} == {*FILE.STUDIES}


def test_sizes_are_what_the_rules_say():
    size = {n: {a.name: s.costs(a).parameters for a in s.resolved()}
            for n, s in claims.studies().items() if n in ('s008', 's018', 's022')}  # fmt: skip
    assert size['s008']['selective'] == size['s008']['softmax'] < size['s008']['twice the heads']
    assert abs(size['s018']['super, equal'] / size['s018']['mha'] - 1) < 0.005
    extra = FILE.LAYERS * (3 * FILE.HEADS * FILE.HEAD + (FILE.HEADS - 1) * FILE.HEAD * FILE.WIDTH)
    assert {size['s022'][f'mhe, {form}'] - size['s022']['one head'] for form in ('add', 'mul')} == {extra}


@pytest.mark.parametrize(
    ('new', 'base', 'verdict', 'why'),
    [
        ((0.99, 0.98, 0.99), (0.92, 0.91, 0.93), 'holds', ''),
        ((0.80, 0.81, 0.80), (0.92, 0.91, 0.93), 'does not hold', 'better; solved'),
        ((0.93, 0.931, 0.929), (0.92, 0.921, 0.919), 'does not hold', 'solved'),
        ((0.99, 0.80, 0.99), (0.92, 0.91, 0.93), 'undecided', 'better; solved'),
        ((0.99, 0.98, 0.99), (0.5, 0.6, 0.5), 'undecided', 'base of s has not learned its task (accuracy beyond 0.9)'),
        ((0.99,), (0.92, 0.91, 0.93), 'undecided', 'better; solved'),  # one seed says nothing
        ((), (0.92, 0.91, 0.93), 'not run', 'better; solved'),
        ((0.99, 0.98, 0.99), (), 'not run', 'base of s'),
    ],
)
def test_the_rule(new, base, verdict, why):
    found = claims.judge(RULE, outcomes(new, base))
    assert (found.verdict, found.why) == (verdict, why)


def test_statements_pair_by_seed_and_follow_their_direction():
    spread = {0: 1.0, 1: 5.0, 2: 9.0}
    lower = {seed: value - 0.1 for seed, value in spread.items()}
    found = lambda weights, bound: claims.judge_statement('', weights, bound, {('s', 'a', 'm'): lower, ('s', 'b', 'm'): spread})
    assert found(*FILE.below('s', 'a', 'b', 'm')).verdict == 'holds'
    assert found(*FILE.above('s', 'a', 'b', 'm')).verdict == 'does not hold'
    assert found(*FILE.below('s', 'a', 'b', 'm', by=0.2)).verdict == 'does not hold'
    assert found(*FILE.most('s', 'a', 'm', 5.0)).verdict == 'undecided'
    loss = {('s', 'x', 'loss'): {0: 1.0, 1: 1.1}, ('s', 'x', 'sixteen/loss'): {0: 1.05, 1: 1.1501}}
    assert claims.judge_statement('', *FILE.rise('s', 'x', 0.1), loss).verdict == 'holds'
    assert claims.judge_statement('', *FILE.rise('s', 'x', 0.0), loss).verdict == 'does not hold'


def test_the_interval_is_students():
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)


def test_collecting_adds_to_what_is_there(tmp_path, monkeypatch):
    """Rows of runs that are not here stay, those of runs that are here are replaced, sizes are no outcome."""
    name, old, new = 's012_one_layer', 'a machine', 'another'
    found = [[name, 'kv shifting', 'accuracy', 1, 0.5, new], [name, 'softmax', 'parameters', 0, 9, 'counted']]
    there = [[name, 'softmax', 'parameters', 0, 7, old], [name, 'kv shifting', 'accuracy', 0, 0.25, old],
             [name, 'kv shifting', 'accuracy', 1, 0.75, old], [name, 'gone', 'accuracy', 0, 0.5, old]]  # fmt: skip
    line, made = lambda row: ','.join(map(str, row)) + '\n', {name: claims.studies()[name]}
    (tmp_path / 'results.csv').write_text('study,arm,metric,seed,value,device\n' + ''.join(map(line, there)))
    monkeypatch.setattr(claims, 'GALLERY', tmp_path)
    monkeypatch.setattr(claims, 'studies', lambda: made)
    monkeypatch.setattr(claims, 'outcomes_of', lambda name, study: found)
    claims.collect()
    rows = (tmp_path / 'results.csv').read_text().splitlines(keepends=True)[1:]
    assert rows == [line(there[0]), line(there[1]), line(found[0])]
    assert (tmp_path / 'README.md').exists()


def test_what_is_shipped_follows_from_its_outcomes(capsys):
    assert (claims.GALLERY / 'README.md').read_text() == claims.page(claims.GALLERY / 'results.csv')
    assert claims.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FILE.CLAIMS] and len(lines) == 12


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(['run', 'lenght'], "unknown study 'lenght'; did you mean 'length'"), (['collect', 'length'], 'collect takes no names')],
)
def test_bad_commands_are_refused(arguments, message, capsys):
    assert claims.main(arguments) == 2
    assert message in capsys.readouterr().err
