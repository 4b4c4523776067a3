"""Which principles of attention matter: weights from context, from tokens at all, the softmax? In all layers or half?

    python -m attnx.ablate --config=configs/ablations/principles.py

Relaxed forms of attention (2510.11602) in all four layers, or interleaved with softmax attention: uniform weights; static:
queries and keys from token embeddings; position-only: from a noise of the position, so that the map is the same for all
inputs; softmax-free: the second-order Taylor polynomial of the exponential. All at equal parameters, on text.
"""

from ml_collections import ConfigDict

OPTIM = {'kind': 'adamw', 'learning_rate': 1e-2, 'schedule': 'cosine', 'warmup': 50, 'weight_decay': 0.01}
QUIET = {'checkpoint.every': 0, 'checkpoint.keep_best': 0, 'sample.tokens': 0, 'eval_every': 100, 'optim': OPTIM}
MODEL = {'model.num_layers': 4, 'model.width': 32, 'model.mlp.hidden': 64, 'model.conv_taps': 3, 'model.tie_embeddings': False}
TEXT = {'data.task': {'kind': 'text'}, 'data.length': 128, 'data.batch_size': 8, 'data.eval_batches': 16, 'steps': 300}


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'Which principles of attention matter: weights from context, from tokens, the softmax? In all layers or half?'
    c.base, c.common = 'configs/base.py', MODEL
    forms = {
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
    c.tasks = {'text': {**QUIET, **TEXT}}
    c.metric = 'nats_per_byte'
    c.match = {'what': 'parameters', 'by': 'model.mlp.hidden', 'step': 1}
    c.seeds = (0, 1, 2)
    c.run_dir = 'runs/ablations/principles'
    return c
