"""Windows by layer: the same budget of keys, spread evenly, growing or shrinking with depth.

    python -m attnx.ablate --config=configs/ablations/window.py

Four layers of sliding-window attention on text of 256 tokens; three arms look at 128 keys in all, two are brackets.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'Does a budget of keys serve better spread evenly, growing or shrinking with depth?'
    c.base = 'configs/base.py'
    mixers = {f'w{w}': {'kind': 'sliding_window', 'window': w} for w in (8, 16, 32, 64, 256)}
    arms = {
        'even': '32 32 32 32',
        'growing': '16 16 32 64',
        'shrinking': '64 32 16 16',
        'short': '8 8 8 8',
        'full': '256 256 256 256',
    }
    c.arms = {
        name: {
            'model.pattern': tuple(f'w{w}' for w in windows.split()),
            'model.mixers': {f'w{w}': mixers[f'w{w}'] for w in windows.split()},
        }
        for name, windows in arms.items()
    }
    text = {'data.task': {'kind': 'text'}, 'data.length': 256, 'data.batch_size': 4, 'data.eval_batches': 32}
    c.tasks = {'text': {**QUIET, **text, 'model.num_layers': 4, 'model.width': 32, 'steps': 300}}
    c.metric = 'nats_per_byte'
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/window'
    return c
