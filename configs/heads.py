"""One small language model for each way to arrange heads: `python train.py --config=configs/heads.py:moh`.

`VARIANTS` below are the names; each is what it changes of a four-layer byte-level model of width 128, and can be copied as it
is into `model` of any config. Data, optimiser and all else are those of `configs/base.py`; an encoder reads digits.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

WIDTH, PLACES = 128, 16  # heads of width 8: the sizes that the sparse query attention variants are named after
KV = {'kv': {'kind': 'cla'}, 'q': {'kind': 'cla', 'source': 'shared'}}


def one(kind, **fields):
    return {'pattern': ('a',), 'mixers': {'a': {'kind': kind, **fields}}}


def sqa(num_heads, num_kv_heads):
    return one('gqa', num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=WIDTH // PLACES)


VARIANTS = {
    'mha': one('mha', num_heads=8),
    'moh': one('moh', num_heads=8, shared_heads=2, top_k=4),  # 75% of the heads
    'moh_norm': one('moh', num_heads=8, shared_heads=4, top_k=2, router='norm'),
    'task_experts': one('task_experts', num_experts=8, top_k=4),  # one task: the data have no side input `task`
    'optimised': one('super_attention', layout='optimised'),
    'efficient': one('super_attention', layout='efficient'),
    'super': one('super_attention'),
    'guided_heads': one('guided_heads', num_heads=8, patterns=('matching', 'sentence', 'previous')),
    'dual': one('dual', sensory_heads=4, relational_heads=4),
    'mae': one('mae', num_heads=8),
    'mhe_add': one('mhe', num_heads=8, form='add'),
    'mhe_mul': one('mhe', num_heads=8, form='mul'),
    'sha_rnn': {
        'pattern': ('rnn',),
        'mixers': {'rnn': {'kind': 'sha_rnn', 'attention': False}, 'sha': {'kind': 'sha_rnn'}},
        'overrides': {2: 'sha'},  # one attention head, in the second last layer
        'mlp': {'kind': 'boom', 'hidden': 0, 'bias': True},
        'norm': 'layernorm',
    },
    'label_attention': {'kind': 'encoder', **one('label_attention', num_labels=16, key_dim=16, value_dim=16, label_dim=16)},
    'plm': {  # latent attention without query compression, squared ReLU
        **one('mla', num_heads=4, head_dim=32, rope_dim=16, value_dim=32, kv_rank=64),
        'mlp': {'kind': 'relu2', 'hidden': 0, 'bias': False},
    },
    'smha': one('smha', num_heads=8),
    'echo': {'pattern': ('own', 'copy'), 'mixers': {'own': {'kind': 'echo'}, 'copy': {'kind': 'echo', 'source': 'shared'}}},
    'moa': one('moa', num_experts=8, top_k=2, num_kv_heads=4),
    'latent': one('mla', num_heads=4, head_dim=16, rope_dim=16, value_dim=32, kv_rank=32, latent_norm=False),
    'gqa': sqa(16, 4),
    'sqa': sqa(8, 4),
    'ssqa': sqa(8, 8),
    'xsqa': sqa(4, 4),
    'xsmqa': sqa(4, 1),
    'cla': {'pattern': ('kv', 'q'), 'mixers': KV},
    'yoco': {
        'pattern': ('local',),
        'mixers': {**KV, 'local': {'kind': 'sliding_window', 'window': 64}},
        'overrides': {2: 'kv', 3: 'q'},
    },
    'talking_heads': one('talking_heads', num_heads=8),
}


def get_config(variant: str = 'moh') -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f'unknown variant {variant!r} of configs/heads.py; valid: {", ".join(VARIANTS)}')
    spec = importlib.util.spec_from_file_location('base', pathlib.Path(__file__).parent / 'base.py')
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    c = base.get_config()
    c.run_dir = f'runs/heads/{variant}'
    with c.unlocked():
        c.model.num_layers = 4
        for name, value in VARIANTS[variant].items():
            c.model[name] = ConfigDict(value) if name in ('mixers', 'mlp') else value
        if c.model.kind == 'encoder':  # it sees the whole sequence: let it classify images
            c.data.task.kind, c.data.length, c.sample.tokens = 'digits', 0, 0
    return c
