"""How many attention layers does a recurrent model need, for recall and for text?

    python -m attnx.ablate --config=configs/ablations/ratio.py

Four layers: linear attention with 0 to 4 layers of softmax attention among them, and gated linear attention, at equal
parameters; on recall without MLPs, where they only slow learning. A short convolution before every mixer gives all of them
the previous token.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}
MODEL = {'model.num_layers': 4, 'model.width': 32, 'model.mlp.hidden': 64, 'model.conv_taps': 3, 'model.tie_embeddings': False}
TEXT = {'data.task': {'kind': 'text'}, 'data.length': 128, 'data.batch_size': 8, 'data.eval_batches': 16, 'steps': 1000}
RECALL = {'data.task': {'kind': 'mqar', 'num_pairs': 8, 'vocab_size': 64}, 'data.length': 32, 'data.batch_size': 32}
RECALL |= {'model.mlp.kind': 'none', 'model.mlp.hidden': 0, 'steps': 2000}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'How many attention layers does a recurrent model need, for recall and for text?'
    c.base, c.common = 'configs/base.py', MODEL
    softmax = {'kind': 'gqa', 'num_heads': 1, 'num_kv_heads': 1, 'position': 'none'}
    mixers = {'l': {'kind': 'linear_transformer'}, 'a': softmax, 'g': {'kind': 'gla'}}
    patterns = {'softmax': 'aaaa', '3 of 4': 'laaa', '2 of 4': 'lala', '1 of 4': 'llal', 'linear': 'llll', 'gated': 'gggg'}
    c.arms = {
        name: {'model.pattern': tuple(pattern), 'model.mixers': {key: mixers[key] for key in pattern}}
        for name, pattern in patterns.items()
    }
    c.tasks = {'text': {**QUIET, **TEXT}, 'recall': {**QUIET, **RECALL}}
    c.metric = 'accuracy'
    c.match = {'what': 'parameters', 'by': 'model.mlp.hidden', 'step': 1}
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/ratio'
    return c
