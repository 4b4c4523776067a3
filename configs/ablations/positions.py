"""Position codes: which of them still works at four times the length it was trained for?

    python -m attnx.ablate --config=configs/ablations/positions.py

Two layers of softmax attention recall what followed a token at length 32; then they are asked at 64 and 128.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 5e-3, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'Which position code extrapolates to four times the training length?'
    c.base = 'configs/base.py'
    codes = {
        'rope': {},
        'none': {'position': 'none'},
        'alibi': {'position': 'none', 'scores': (('alibi',),)},
        't5': {'position': 'none', 'scores': (('t5', 32, 32),)},
        'rope, a quarter': {'rope': {'fraction': 0.25}},
    }
    c.arms = {
        name: {'model.mixers': {'a': {'kind': 'gqa', 'num_heads': 2, 'num_kv_heads': 2, **code}}}
        for name, code in codes.items()
    }
    induction = {'data.task': {'kind': 'induction'}, 'data.length': 32, 'data.batch_size': 32, 'steps': 500}
    model = {'model.num_layers': 2, 'model.width': 32, 'model.pattern': ('a',), 'model.conv_taps': 3}
    model |= {'model.tie_embeddings': False}
    c.tasks = {'induction': {**QUIET, **model, **induction}}
    c.evals = {'twice': {'data.length': 64}, 'four times': {'data.length': 128}}
    c.metric = 'four times/accuracy'
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/positions'
    return c
