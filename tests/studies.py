"""Studies of small models, for the tests of `attnx.ablate`: what they are made of, and what they found."""

import importlib.util
import json

from attnx.ablate import Study, runner
from attnx.ablate.report import results_table, summary
from attnx.ablate.results import results
from attnx.train import metrics


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
    """Every run trains one of three small models, so that a file of tests compiles few programs."""
    given = {
        'question': 'Which <b>mixer</b>?',
        'base': SMALL,
        'arms': ARMS,
        'seeds': (0, 1),
        'metric': 'accuracy',
        'run_dir': str(tmp_path / 'study'),
    }
    return Study(**{**given, **change})


def near(made):
    """(arm, seed) -> outcome of the first task."""
    return {(e['arm'], e['seed']): e for e in runner.finished(made) if e['task'] in ('', 'near')}


def curve(study, arm, seed):
    """The log of a run of the first task, less times."""
    cell = next(c for c in study.cells() if (c.arm, c.seed) == (arm, seed) and c.task in ('', 'near'))
    return [{k: v for k, v in e.items() if k not in metrics.TIMES} for e in metrics.read(cell.config.run_dir)]


def numbers(made):
    """What a report says, less times and places."""
    tables = results_table(made, results(made))
    speed = tables[0].index('tokens/s')
    values = {p.name: json.loads(p.read_text())['values'] for p in (runner.folder(made) / 'results').iterdir()}
    curves = {(c.arm, c.seed): curve(made, c.arm, c.seed) for c in made.cells()}
    return [row[:speed] + row[speed + 1 :] for row in tables], summary(made, results(made), made.cells()), values, curves


STUDY = """
from ml_collections import ConfigDict
def get_config():
    c = ConfigDict(convert_dict=False)
    c.question, c.base, c.arms = 'q', {base!r}, {arms!r}
    c.seeds, c.metric, c.run_dir = (0, 1, 2), 'accuracy', {run_dir!r}
    return c
"""


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
