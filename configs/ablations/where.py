"""One attention layer in a recurrent model: where?

    python -m attnx.ablate --config=configs/ablations/where.py

Four layers of linear attention without MLPs; every arm swaps one of them for softmax attention.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'One attention layer in a recurrent model of four: where?'
    model = {'model.pattern': ('linear_transformer',), 'model.mixers': {}, 'model.width': 32, 'model.conv_taps': 3}
    model |= {'model.num_layers': 4, 'model.mlp.kind': 'none', 'model.tie_embeddings': False}
    c.base, c.common = 'configs/base.py', model
    c.arms = {'linear': {}}
    c.generate = ({'swap': {'kind': 'gqa', 'num_heads': 1, 'num_kv_heads': 1, 'position': 'none'}},)
    recall = {'data.task': {'kind': 'mqar', 'num_pairs': 8, 'vocab_size': 64}, 'data.length': 32, 'data.batch_size': 32}
    c.tasks = {'recall': {**QUIET, **recall, 'steps': 2000}}
    c.metric = 'accuracy'
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/where'
    return c
