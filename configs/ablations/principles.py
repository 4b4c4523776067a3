"""Which principles of attention matter: mixing, weights from the input, the softmax? Everywhere, or in every second layer?

    python -m attnx.ablate --config=configs/ablations/principles.py

Relaxed forms of attention (2510.11602) in all four layers, or interleaved with softmax attention: no mixing; uniform weights;
static: queries and keys from token embeddings; position-only: from a noise of the position, so that the map is the same for
all inputs; softmax-free: the second-order Taylor polynomial of the exponential. On text at equal parameters; on recall
without MLPs, which could equal them.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 200, 'optim': OPTIM}
MODEL = {'model.num_layers': 4, 'model.width': 64, 'model.conv_taps': 3, 'model.tie_embeddings': False}
TEXT = {'data.task': {'kind': 'text'}, 'data.length': 128, 'data.batch_size': 16, 'data.eval_batches': 32, 'steps': 1000}
TEXT |= {'optim.learning_rate': 3e-3}
RECALL = {'data.task': {'kind': 'mqar', 'num_pairs': 8}, 'data.length': 64, 'data.batch_size': 32, 'steps': 1500}
RECALL |= {'model.mlp.kind': 'none', 'model.mlp.hidden': 0}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'Which principles of attention matter: mixing, weights from the input, the softmax? Everywhere or interleaved?'
    c.base = 'configs/base.py'
    forms = {
        'no mixing': {'kind': 'no_mixing'},
        'uniform': {'kind': 'uniform_attention'},
        'static': {'kind': 'static_queries', 'num_heads': 2, 'num_kv_heads': 2},
        'position-only': {'kind': 'static_queries', 'source': 'noise', 'num_heads': 2, 'num_kv_heads': 2},
        'softmax-free': {'kind': 'linear_transformer', 'feature_map': 'taylor'},
    }
    softmax = {'kind': 'gqa', 'num_heads': 2, 'num_kv_heads': 2}
    c.arms = {'softmax': {'model.pattern': ('a',), 'model.mixers': {'a': softmax}}}
    for name, form in forms.items():
        c.arms[name] = {'model.pattern': ('x',), 'model.mixers': {'x': form}}
        c.arms[f'{name}, interleaved'] = {'model.pattern': ('x', 'a'), 'model.mixers': {'x': form, 'a': softmax}}
    c.tasks = {'text': {**MODEL, **QUIET, **TEXT}, 'recall': {**MODEL, **QUIET, **RECALL}}
    c.metric = 'accuracy'
    c.match = {'what': 'parameters', 'by': 'model.mlp.hidden', 'step': 1}
    c.seeds = (0, 1, 2)
    c.batch_seeds = True
    c.run_dir = 'runs/ablations/principles'
    return c
