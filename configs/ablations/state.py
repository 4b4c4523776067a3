"""Decoding state: many narrow heads, few wide ones, or a latent, at equal bytes a token?

    python -m attnx.ablate --config=configs/ablations/state.py

Two layers without MLPs. Every arm keeps 64 numbers a token and layer: keys and values of four, two or one head, or a latent
of 48 with 16 rotated.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'At equal bytes of state, what serves recall: many narrow key heads, few wide ones, or a latent?'
    c.base = 'configs/base.py'
    mixers = {
        'four heads of 8': {'kind': 'gqa', 'num_kv_heads': 4, 'head_dim': 8},
        'two heads of 16': {'kind': 'gqa', 'num_kv_heads': 2, 'head_dim': 16},
        'one head of 32': {'kind': 'gqa', 'num_kv_heads': 1, 'head_dim': 32},
        'latent of 48 and 16': {'kind': 'mla', 'head_dim': 16, 'rope_dim': 16, 'kv_rank': 48},
    }
    c.arms = {name: {'model.mixers': {'a': mixer}} for name, mixer in mixers.items()}
    model = {'model.num_layers': 2, 'model.width': 32, 'model.pattern': ('a',), 'model.conv_taps': 3}
    model |= {'model.mlp.kind': 'none', 'model.tie_embeddings': False}
    recall = {'data.task': {'kind': 'mqar', 'num_pairs': 8, 'vocab_size': 64}, 'data.length': 32, 'data.batch_size': 32}
    c.tasks = {'recall': {**QUIET, **model, **recall, 'steps': 250}}
    c.metric = 'accuracy'
    c.match = {'what': 'state', 'by': ''}
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/state'
    return c
