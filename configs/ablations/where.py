"""One attention layer in a recurrent model: where?

    python -m attnx.ablate --config=configs/ablations/where.py

Six layers of gated linear attention; every arm swaps one of them for softmax attention.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 3e-3, 'schedule': 'cosine', 'warmup': 20, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'optim': OPTIM}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'One attention layer in a recurrent model of six: where?'
    c.base = 'configs/base.py'
    c.arms = {'gla': {}}
    c.generate = ({'swap': 'gqa'},)
    model = {'model.pattern': ('gla',), 'model.mixers': {}, 'model.width': 64, 'model.conv_taps': 3}
    recall = {'data.task': {'kind': 'mqar', 'num_pairs': 16}, 'data.length': 128, 'data.batch_size': 32}
    c.tasks = {'recall': {**model, **QUIET, **recall, 'steps': 400, 'eval_every': 100}}
    c.metric = 'accuracy'
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/where'
    return c
