"""Associative recall: which mechanisms answer how many questions about how many pairs, and how large is their state?

    python -m attnx.ablate --config=configs/ablations/recall.py

Multi-query associative recall as Zoology (2312.04927) has it, in two layers without MLP: softmax attention keeps all pairs,
what keeps a state of fixed size can not once there are more pairs than it has room for. A short convolution before every
mixer gives all of them the previous token. More heads are a smaller state: of linear attention 32² / heads numbers a layer.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}
MODEL = {'model.num_layers': 2, 'model.pattern': ('m',), 'model.conv_taps': 3, 'model.width': 32}
MODEL |= {'model.mlp': {'kind': 'none'}, 'model.tie_embeddings': False}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'Which mechanisms recall how many pairs?'
    c.base = 'configs/base.py'
    mixers = {
        'softmax': {'kind': 'gqa', 'num_heads': 1, 'num_kv_heads': 1, 'position': 'none'},
        'linear, 1 head': {'kind': 'linear_transformer', 'num_heads': 1},
        'linear, 4 heads': {'kind': 'linear_transformer', 'num_heads': 4},
    }
    c.arms = {name: {'model.mixers': {'m': mixer}} for name, mixer in mixers.items()}
    common = {**QUIET, **MODEL, 'data.batch_size': 32, 'steps': 1500}
    c.tasks = {
        f'{pairs} pairs': {
            **common, 'data.task': {'kind': 'mqar', 'num_pairs': pairs, 'vocab_size': vocab}, 'data.length': 4 * pairs,
        }
        for pairs, vocab in ((16, 64), (32, 256))
    }  # fmt: skip
    c.metric = 'accuracy'
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/recall'
    return c
