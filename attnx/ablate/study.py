"""A study: one question, arms that differ from a base in named settings, seeds; and the runs that follow from it."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from attnx import config as config_lib
from attnx import tasks
from attnx.ablate import match as match_lib
from attnx.ablate.generators import generated
from attnx.ablate.match import Match
from attnx.dispatch import nearest
from attnx.train.config import Config, check_batched, completed

METRICS = {'loss': False, 'accuracy': True, 'nats_per_byte': False}  # name -> whether more is better
RATES = ('shared', 'transfer')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving: arms that are behind at a rung are not trained further."""

    rungs: tuple = ()  # shares of the steps at which arms are compared: (0.25, 0.5); (): all arms run to the end
    keep: float = 0.5  # share of the arms that go on after each rung; the baseline always does

    def __post_init__(self):
        if not all(0 < r < 1 for r in self.rungs) or list(self.rungs) != sorted(set(self.rungs)) or not 0 < self.keep < 1:
            raise ValueError(f'halving: rungs {self.rungs} must grow inside (0, 1), keep {self.keep} lie in (0, 1)')


class Arm(NamedTuple):
    name: str
    change: dict  # setting of the base -> value
    config: dict  # the base with the change, nested


class Cell(NamedTuple):
    """One run of a study."""

    name: str  # a file name, unique in the study
    arm: str
    task: str
    seed: int
    rate: float
    config: Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Every arm is trained on every task with every seed (and learning rate), then evaluated.

    Settings are dotted paths into the base config, as on the command line: {'model.pattern': ('gla', 'gqa')}.
    """

    question: str  # what the study asks, in one sentence
    base: Any  # a training config as a mapping, or the path of a config file
    common: Mapping = dataclasses.field(default_factory=dict)  # settings that this study puts into the base
    arms: Mapping  # name -> settings that differ from the base
    generate: tuple = ()  # further arms: ({'swap': 'gqa'}, {'patterns': {'mixers': ('gla', 'gqa'), 'count': 2}}, {'grid': …})
    tasks: Mapping = dataclasses.field(default_factory=dict)  # name -> settings; none: the base's own
    # name -> other data to evaluate the end on: settings, or the name of one of the task's own splits (attnx.tasks.elsewhere)
    evals: Mapping = dataclasses.field(default_factory=dict)
    seeds: tuple = (0, 1, 2)  # of parameters, data order and generated rows alike
    metric: str = 'loss'  # what is compared: loss, accuracy, nats_per_byte; 'name/metric' of an entry of evals
    baseline: str = ''  # the arm that others are compared with; '': the first
    match: Match = dataclasses.field(default_factory=Match)  # the cost that arms share
    learning_rates: tuple = ()  # swept: every arm runs with each and is judged by its best; (): the base's own
    rate: str = 'shared'  # without a sweep: shared; transfer: times base width / width, for AdamW and widths that differ
    halving: Halving = dataclasses.field(default_factory=Halving)  # early stopping of hopeless arms
    batch_seeds: bool = False  # an arm's seeds are one program, batched by vmap: as separate runs but for rounding, and quicker
    # where one small model leaves the device idle (on one CPU core by 6 % only, with width 32); saved at their end only
    run_dir: str = 'runs/ablations/study'  # everything the study writes

    def __post_init__(self):
        base = load(self.base) if isinstance(self.base, str | pathlib.Path) else config_lib.as_dict(self.base, 'base')
        object.__setattr__(self, 'base', changed(base, config_lib.as_dict(self.common, 'common')))
        for name in ('arms', 'tasks', 'evals'):
            object.__setattr__(self, name, config_lib.as_dict(getattr(self, name), name))
        if not self.question.strip():
            raise ValueError('question is empty: say in one sentence what the study asks')
        if not self.run_dir:
            raise ValueError('run_dir is empty; give a folder')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f'seeds {self.seeds}: give at least one, each once')
        if self.rate not in RATES:
            raise ValueError(f'unknown rate {self.rate!r}; {nearest(self.rate, RATES)}')
        if self.learning_rates and self.rate != 'shared':
            raise ValueError('learning_rates are swept; rate stays shared')
        if self.batch_seeds and self.halving.rungs:
            raise ValueError('halving stops runs on the way; with batch_seeds they are trained to their end at once')

    # Arms

    def named_arms(self) -> dict[str, dict]:
        """Name -> settings, of given and generated arms.

        Raises:
          ValueError: two arms of one name, no arm, an unknown generator.
        """
        found = {name: dict(change or {}) for name, change in self.arms.items()}
        for entry in self.generate:
            for name, change in generated(config_lib.as_dict(entry, 'generate'), self.base).items():
                if name in found:
                    raise ValueError(f'two arms are named {name!r}')
                found[name] = change
        if len(found) < 2:
            raise ValueError(f'a study compares at least two arms; there is {", ".join(found) or "none"}')
        if self.baseline and self.baseline not in found:
            raise ValueError(f'baseline: unknown arm {self.baseline!r}; {nearest(self.baseline, found)}')
        return found

    @property
    def reference(self) -> str:
        return self.baseline or next(iter(self.named_arms()))

    @property
    def on_tasks(self) -> dict[str, dict]:
        """Name -> settings of the tasks; '' is the base's own."""
        return dict(self.tasks) or {'': {}}

    @property
    def more(self) -> bool:
        """Whether more of the metric is better."""
        return METRICS[self.metric.rpartition('/')[2]]

    def cells(self) -> list[Cell]:
        """Every run, resolved, matched and validated, before the first step of any.

        Raises:
          ValueError: an arm equals another, is refused by what it builds, or can't be matched; each by its name.
        """
        arms = self.resolved()
        cells = []
        for task, arm in itertools.product(self.on_tasks, arms):
            given = self.on(arm, task)
            rates = self.learning_rates or (self._rate(given),)
            for rate, seed in itertools.product(rates, self.seeds):
                name = '-'.join(slug(part) for part in (arm.name, task, f'seed{seed}') if part)
                name += f'-lr{rate:g}' if self.learning_rates else ''
                own = changed(given, {'optim.learning_rate': rate, 'seed': seed, 'data.seed': seed})
                own = changed(own, {'run_dir': str(pathlib.Path(self.run_dir) / 'runs' / name)})
                cells.append(Cell(name, arm.name, task, seed, rate, _named(arm.name, build, own)))
        if len({c.name for c in cells}) < len(cells):
            raise ValueError('two runs have one name: arms or tasks differ in punctuation only; rename one')
        return cells

    def on(self, arm: Arm, task: str) -> dict:
        return changed(arm.config, self.on_tasks[task] or {})

    def resolved(self) -> list[Arm]:
        """The arms at their matched sizes; validated on every task."""
        put = lambda change: changed(self.base, change)
        arms = [Arm(name, change, _named(name, put, change)) for name, change in self.named_arms().items()]
        if self.match.what != 'none':
            arms = self._matched(arms)
        seen: dict[str, str] = {}
        for arm in arms:
            for task in self.on_tasks:
                self._check(arm, task)
            key = effect(build(self.on(arm, next(iter(self.on_tasks)))))
            if key in seen:
                raise ValueError(f'arm {arm.name!r} equals arm {seen[key]!r}: nothing would be compared')
            seen[key] = arm.name
        return arms

    def costs(self, arm: Arm, task: str = '') -> match_lib.Costs:
        return costs_of(build(self.on(arm, task or next(iter(self.on_tasks)))))

    def _matched(self, arms: list[Arm]) -> list[Arm]:
        what, by = self.match.what, self.match.by
        aim = self.match.to or self.reference
        target = {a.name: a for a in arms}.get(aim)
        if target is None:
            raise ValueError(f'match.to: unknown arm {aim!r}; {nearest(aim, [a.name for a in arms])}')
        goal = getattr(self.costs(target), what)

        def solved(arm: Arm) -> Arm:
            cost = lambda n: getattr(self.costs(arm._replace(config=changed(arm.config, {by: n}))), what)
            off = getattr(self.costs(arm), what) / goal - 1
            if not by and abs(off) > self.match.tolerance:
                raise ValueError(f'{what} is {off:+.1%} off that of {aim!r}; resize the arm, or set match.by to solve for')
            if not by or abs(off) <= 1e-6:
                return arm
            if by in arm.change:
                raise ValueError(f'it sets {by}, which is what match solves for')
            setting, _ = match_lib.solve(cost, goal, self.match)
            return Arm(arm.name, {**arm.change, by: setting}, changed(arm.config, {by: setting}))

        return [arm if arm.name == aim else _named(arm.name, solved, arm) for arm in arms]

    def _check(self, arm: Arm, task: str) -> None:
        def check():
            config = build(self.on(arm, task))
            if self.batch_seeds:
                check_batched(config)
            made = task_of(config)
            if made.packed:
                config.model.check_packing(made.documents)
            config.model.check_inputs({*made.train[0]} - {*tasks.FIELDS})
            costs_of(config)
            name, _, inner = self.metric.rpartition('/')
            if name and name not in self.evals:
                raise ValueError(f'metric {self.metric!r}: unknown entry of evals; {nearest(name, self.evals)}')
            if inner not in METRICS:
                raise ValueError(f'unknown metric {inner!r}; {nearest(inner, METRICS)}')
            if inner == 'nats_per_byte' and made.token_bytes is None:
                raise ValueError(f"the task {made.kind!r} has no metric 'nats_per_byte'; it has loss, accuracy")
            if inner == 'accuracy' and made.real:
                raise ValueError(f"the task {made.kind!r} has no metric 'accuracy'; it has loss")
            for change in self.evals.values():
                task_of(build(other_data(self.on(arm, task), change)))

        _named(arm.name + (f' on {task}' if task else ''), check)

    def _rate(self, given: dict) -> float:
        rate = float(given['optim']['learning_rate'])
        if self.rate == 'shared':
            return rate
        if given['optim'].get('kind', 'muon') != 'adamw':
            raise ValueError(f"rate 'transfer' scales AdamW's step with width; optim.kind is {given['optim'].get('kind')!r}")
        return rate * self.base['model']['width'] / given['model']['width']

    # What is done with it

    def run(self, *, workers: int = 1) -> 'Study':
        """Trains what is not yet trained; see `runner.run`."""
        from attnx.ablate import runner

        runner.run(self, workers=workers)
        return self

    @property
    def results(self) -> dict[str, list]:
        """Column -> values, a row for every finished run: `pandas.DataFrame(study.results)`."""
        from attnx.ablate import runner

        return runner.table(runner.finished(self))

    def report(self) -> pathlib.Path:
        """Writes the report from what is finished, and returns the path of its page."""
        from attnx.ablate import report

        return report.write(self)

    def description(self) -> dict:
        """What the runs depend on, as plain JSON: a study that differs is another study."""
        flat = {'question': self.question, 'metric': self.metric, 'baseline': self.reference, 'seeds': self.seeds}
        flat |= {'batch_seeds': self.batch_seeds, 'learning_rates': self.learning_rates, 'rate': self.rate}
        flat |= {'tasks': self.tasks, 'evals': self.evals}
        flat |= config_lib.flatten({'match': config_lib.to_dict(self.match), 'halving': config_lib.to_dict(self.halving)})
        flat |= {f'base.{k}': v for k, v in config_lib.flatten(config_lib.to_dict(self.base)).items() if k != 'run_dir'}
        flat |= {f'arms.{name}': change for name, change in self.named_arms().items()}
        return json.loads(json.dumps(flat, default=str))

    def says_the_same_without(self, settings: list[str]) -> bool:
        """Whether these settings of the base are defaults: a newer file may spell out more of them than an older one."""
        base = json.loads(json.dumps(config_lib.to_dict(self.base), default=str))
        full = build(base)
        for setting in settings:
            *groups, last = setting.split('.')
            inner = base
            for group in groups:
                inner = inner[group]
            del inner[last]
        return effect(build(base)) == effect(full)


def load(path) -> dict:
    """The mapping that the config file's get_config returns. Relative to the working folder, or to the checkout."""
    found = pathlib.Path(path)
    if not found.exists():
        found = pathlib.Path(__file__).parents[2] / path
    if not found.exists():
        raise ValueError(f'base: there is no config file {path}')
    spec = importlib.util.spec_from_file_location(f'attnx_config_{found.stem}', found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_lib.as_dict(module.get_config(), 'base')


def changed(base: Mapping, change: Mapping) -> dict:
    """A copy of nested `base` with dotted settings put in.

    Raises:
      ValueError: a path leads through something that is no group of settings.
    """
    result = dict(base)
    for path, value in change.items():
        inner, (*groups, last) = result, path.split('.')
        for group in groups:
            below = inner.get(group)
            if below is not None and not isinstance(below, Mapping):
                raise ValueError(f'{path}: {group} is {below!r}, not a group of settings')
            inner[group] = dict(below or {})
            inner = inner[group]
        inner[last] = dict(value) if isinstance(value, Mapping) else value
    return result


def other_data(given: dict, change: Mapping | str) -> dict:
    """A config with other data: by settings, or by the name of one of its task's splits out of distribution.

    Raises:
      ValueError: the task has no such split.
    """
    if not isinstance(change, str):
        return changed(given, change)
    task = task_of(build(given))
    splits = tasks.elsewhere({**given['data']['task'], 'kind': task.kind}, task.length)
    if change not in splits:
        raise ValueError(f'evals: the task {task.kind!r} has no split {change!r}; {nearest(change, splits)}')
    fields, length = splits[change]
    return changed(given, {'data.task': fields, 'data.length': length})


def build(given: dict) -> Config:
    return config_lib.build(Config, given)


_TASKS: dict[str, Any] = {}


def task_of(config: Config):
    """The task of a config, opened once in a process."""
    key = json.dumps([config.data.task, config.data.length, config.data.seed], sort_keys=True, default=str)
    if key not in _TASKS:
        _TASKS[key] = tasks.build(config.data.task, length=config.data.length, seed=config.data.seed)
    return _TASKS[key]


_COSTS: dict[str, match_lib.Costs] = {}


def costs_of(config: Config) -> match_lib.Costs:
    """What a config's model costs on its task, counted once in a process."""
    made = task_of(config)
    model = completed(config.model, made)
    key = f'{made.length} {model!r}'
    if key not in _COSTS:
        _COSTS[key] = match_lib.costs(model, made.length)
    return _COSTS[key]


def _named(arm: str, function, *args):
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f'arm {arm!r}: {error}') from error


def effect(config: Config) -> str:
    """Equal for configs that train the same model in the same way, whatever names their layers have."""
    layers = [(layer.spec.module.__name__, config_lib.to_dict(layer.config)) for layer in config.model.layers()]
    whole = config_lib.to_dict(config)
    whole['model'] = {k: v for k, v in whole['model'].items() if k not in ('pattern', 'overrides', 'mixers')}
    return config_lib.fingerprint({**whole, 'layers': repr(layers)})


def slug(text: str) -> str:
    """As part of a file name: letters, digits, dots and underscores; what was replaced stays distinct by a digest."""
    plain = re.sub(r'[^A-Za-z0-9._]+', '_', str(text)).strip('_')
    return plain if plain == text else f'{plain[:40]}_{hashlib.sha256(str(text).encode()).hexdigest()[:6]}'
