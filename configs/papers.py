"""One small model for each paper of scores, heads and positions: `python train.py --config=configs/papers.py:moh`.

`VARIANTS` below are the names; each says its paper, an arXiv id, and what it changes of a four-layer byte-level model of width
128: settings of `model`, to be copied as they are into any config, and of other parts under their names. All else is that of
`configs/base.py`. Mechanisms that read side inputs, or another sequence, learn from scenes, encoders classify digits.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

WIDTH, PLACES = 128, 16  # heads of width 8: the sizes that the sparse query attention variants are named after
KV = {'kv': {'kind': 'cla'}, 'q': {'kind': 'cla', 'source': 'shared'}}
SCENE = {'data.task': {'kind': 'scene'}}  # has every side input
TEXT = 'Values come from what is read here, and who attends to whom from what was written down before it. '
FILMS = {'kind': 'encoder', 'data.task': {'kind': 'scene', 'classify': True}}
IMAGES = {'kind': 'encoder', 'data.task': {'kind': 'digits'}}


def one(paper, kind, **fields):
    return {'paper': paper, 'pattern': ('a',), 'mixers': {'a': {'kind': kind, **fields}}}


def half(paper, kind, **fields):
    """In every second layer, softmax attention in the others."""
    return {**one(paper, kind, **fields), 'pattern': ('a', 'gqa')}


def grouped(paper, num_heads, num_kv_heads):
    return one(paper, 'gqa', num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=WIDTH // PLACES)


SCORES = {
    'no_mixing': half('2510.11602', 'no_mixing'),
    'approximate': half('2510.11602', 'linear_transformer', feature_map='taylor'),
    'non_approximate': half('2510.11602', 'key_only'),
    'random_fixed': {**half('2510.11602', 'static_queries', source='fixed'), 'fixed': 'noise'},
    'random_maps': half('2510.11602', 'static_queries', source='noise'),
    'text_fixed': {**half('2510.11602', 'static_queries', source='fixed'), 'fixed': TEXT},
    'static_embedding': half('2510.11602', 'static_queries'),
    'minimal': {**one('2410.13732', 'minimal_attention', similarity='cholesky'), **IMAGES, 'mlp': {'kind': 'none'}},
    'symmetric': {**one('2410.13732', 'minimal_attention', similarity='shared', values=True, output=True, num_heads=8)},
    'gaussian_adaptive': {**half('2401.11143', 'gaussian_adaptive'), **IMAGES},
    'knowledge_markers': {**one('2210.10144', 'knowledge_markers', span=16), **SCENE},
    'cog': {**one('2411.07176', 'cog'), 'overrides': {0: 'gqa', 3: 'gqa'}},  # softmax in the first and last layer
    'neural_attention': one('2502.17206', 'neural_attention'),
    'conditioned_pooling': {**half('1906.03674', 'conditioned_pooling'), **SCENE},
    'selective': one('2410.02703', 'selective', budget=64, memory_weight=0.1),
    'steerable': {**one('2405.15932', 'steerable', gate=True), **FILMS},
    'steerable_se3': {**one('2405.15932', 'steerable', group='se3', gate=True), **FILMS},
    'coulgat': {**one('1912.08409', 'coulgat'), **FILMS},
    'attention_transition': one('2307.13365', 'attention_transition'),
    'kv_shifting': one('2411.19574', 'kv_shifting'),
    'daft': one('1905.11666', 'daft', report=True),
    'lssa': one('2501.13428', 'softplus_attention', power=0.0),
    'lssar': one('2501.13428', 'softplus_attention', power=15.0),
    'decoupled_embeddings': half('2410.02604', 'decoupled_embeddings', vocab_size=257, top_k=16),
    'relu': one('2309.08586', 'relu_attention'),
    'sigmoid': one('2409.04431', 'sigmoid_attention', position='none', scores=(('alibi',),), qk_norm=True),
    'sinks': one('2309.17453', 'gqa', sinks=True, masks=(('global_window', 64, 4),)),
    'off_by_one': one('Attention is off by one', 'gqa', off_by_one=True),
    'differential': one('2410.05258', 'differential'),
    'forgetting': one('2503.02130', 'forgetting'),
    'luong': {
        'paper': '1508.04025',
        'kind': 'encoder_decoder',
        'cross': 'luong',
        'mixers': {'luong': {'kind': 'luong', 'reach': 'local_p'}},
        'pattern': ('gqa',),
        'data.task': {'kind': 'scene', 'source': True},
    },
    'uniform': half('2210.08457', 'uniform_attention'),
    'broadcast': half('2210.08457', 'uniform_attention', form='scaled'),
    'qk_norm': one('2010.04245', 'gqa', qk_norm=True),
    'softcap': one('2408.00118', 'gqa', scores=(('softcap', 50.0),)),
}

UNION = {'kind': 'moe', 'hidden': 48, 'bias': False, 'experts': 8, 'top_k': 4, 'gates': 'select'}
DUAL = {'sensory_heads': 4, 'relational_heads': 4}
HEADS = {
    'mha': one('1706.03762', 'mha', num_heads=8),
    'moh': one('2410.11842', 'moh', num_heads=8, shared_heads=2, top_k=4),  # 75% of the heads
    'moh_norm': one('2410.11842', 'moh', num_heads=8, shared_heads=4, top_k=2, router='norm'),
    'task_experts': {  # of attention in every layer, of the MLP in every second one; the tasks are the scene's frames
        **one('2306.17165', 'task_experts', num_tasks=3, num_experts=8, top_k=4),
        'mlp_overrides': {layer: {'kind': 'moe', 'tasks': 3, 'gates': 'plain', 'experts': 8} for layer in (1, 3)},
        **SCENE,
    },
    'optimised': one('2403.01643', 'super_attention', layout='optimised'),
    'efficient': one('2403.01643', 'super_attention', layout='efficient'),
    'super': one('2403.01643', 'super_attention'),
    'guided_heads': one('2112.05364', 'guided_heads', num_heads=8, patterns=('matching', 'sentence', 'previous')),
    'dual': {  # one retriever of symbols for all layers
        'paper': '2405.16727',
        'pattern': ('a',),
        'mixers': {'first': {'kind': 'dual', **DUAL}, 'a': {'kind': 'dual', **DUAL, 'retriever': 'shared'}},
        'overrides': {0: 'first'},
    },
    'mae': one('2005.06537', 'mae', num_heads=8),
    'mhe_add': one('2310.07911', 'mhe', num_heads=8, form='add'),
    'mhe_mul': one('2310.07911', 'mhe', num_heads=8, form='mul'),
    'sha_rnn': {
        'paper': '1911.11423',
        'pattern': ('rnn',),
        'mixers': {'rnn': {'kind': 'sha_rnn', 'attention': False}, 'sha': {'kind': 'sha_rnn'}},
        'overrides': {2: 'sha'},  # one attention head, in the second last layer
        'mlp': {'kind': 'boom', 'hidden': 0, 'bias': True},
        'norm': 'layernorm',
    },
    'label_attention': {
        **one('1911.03875', 'label_attention', num_labels=16, key_dim=16, value_dim=16, label_dim=16),
        **IMAGES,
    },
    'plm': {  # latent attention without query compression, squared ReLU
        **one('2503.12167', 'mla', num_heads=4, head_dim=32, rope_dim=16, value_dim=32, kv_rank=64),
        'mlp': {'kind': 'relu2', 'hidden': 0, 'bias': False},
        'optim': {'schedule': 'wsdc', 'hold': 40, 'floor': 0.1},  # warmup, stable, decay, constant
    },
    'smha': {  # unions of experts, in attention and in the MLP
        **one('2503.02495', 'smha', num_heads=8),
        'mlp': UNION,
    },
    'uoe_data': {  # experts choose half of a row's tokens
        **one('2503.02495', 'mha', num_heads=8),
        **IMAGES,
        'mlp': {**UNION, 'capacity': 1.0, 'order': 'probability'},
    },
    'uoe_experts': {  # a row chooses half of the experts
        **one('2503.02495', 'mha', num_heads=8),
        **IMAGES,
        'mlp': {**UNION, 'router': 'row'},
    },
    'echo': {
        'paper': '2409.14595',
        'pattern': ('own', 'copy'),
        'mixers': {'own': {'kind': 'echo'}, 'copy': {'kind': 'echo', 'source': 'shared'}},
    },
    'moa': {  # experts of attention and of the MLP
        **one('2404.07413', 'moa', num_experts=8, top_k=2, num_kv_heads=4),
        'mlp': {'kind': 'moe', 'hidden': 0, 'bias': False, 'experts': 8, 'top_k': 2},
    },
    'latent': one('2503.11132', 'mla', num_heads=4, head_dim=16, rope_dim=16, value_dim=32, kv_rank=32, latent_norm=False),
    'gqa': grouped('2305.13245', 16, 4),
    'sqa': grouped('2510.01817', 8, 4),
    'ssqa': grouped('2510.01817', 8, 8),
    'xsqa': grouped('2510.01817', 4, 4),
    'xsmqa': grouped('2510.01817', 4, 1),
    'cla': {'paper': '2405.12981', 'pattern': ('kv', 'q'), 'mixers': KV},
    'yoco': {
        'paper': '2405.05254',
        'pattern': ('local',),
        'mixers': {**KV, 'local': {'kind': 'sliding_window', 'window': 64}},
        'overrides': {2: 'kv', 3: 'q'},
    },
    'talking_heads': one('2003.02436', 'talking_heads', num_heads=8),
    'head_mask': {**one('2009.09672', 'mha', num_heads=8), 'step': {'mask_heads': 4}},
    'attention_drop': {**one('2406.15786', 'mha', num_heads=8), 'overrides': {2: 'skip'}},
}

POSITIONS = {
    'mvpa': {**one('2506.20354', 'mvpa', num_channels=9), **SCENE},
    'oat': {
        **one('2407.13335', 'mha', position='none', num_heads=8),
        'kind': 'encoder_decoder',
        'output': 'pointer',
        'grid': 6,
        'encoder': {'num_layers': 4, 'pattern': ('a',)},
        'norm_position': 'post',
        'data.task': {'kind': 'scanpath'},
    },
    'cope': one('2405.18719', 'cope'),
    'coca': one('2309.08646', 'coca'),
    'shaw': one('1803.02155', 'shaw'),
    'edges': {**one('1803.02155', 'shaw', labels=3), **FILMS},
    'skim': {
        'paper': '2109.01078',
        'pattern': ('own', 'same'),
        'mixers': {'own': {'kind': 'skim', 'num_places': 4}, 'same': {'kind': 'skim', 'source': 'shared'}},
        **SCENE,
    },
    'skim_mask': {
        'paper': '2109.01078',
        'pattern': ('map', 'a', 'a', 'a'),
        'mixers': {'map': {'kind': 'skim', 'num_places': 4}, 'a': {'kind': 'skim', 'source': 'mask', 'top_k': 8}},
        **SCENE,
    },
    'music': one('1809.04281', 'music'),
    'music_local': one('1809.04281', 'music', max_distance=64, masks=(('window', 64),)),
    'rcmha': one('2308.03429', 'rcmha'),
    'dual_rope': {**one('2409.03206', 'dual_rope', whole_frames=True), **SCENE},
    'equal_distance': {**one('2312.08870', 'equal_distance'), **SCENE},
    'transformer_xl': one('1901.02860', 'transformer_xl'),
    't5': one('1910.10683', 'gqa', position='none', scores=(('t5', 32, 128),), scale=1.0),
    'alibi': one('2108.12409', 'gqa', position='none', scores=(('alibi',),)),
    'rope': one('2104.09864', 'gqa'),
    'yarn': one('2309.00071', 'gqa', rope={'scaling': 'yarn', 'factor': 2.0, 'original_length': 128}),
    'axial_rope': {**one('2403.13298', 'gqa', rope={'base': 100.0, 'grid': 4}), **IMAGES},
    'lrpe': one('2307.09270', 'lightning', decay='none', lrpe='unitary'),
    'lrpe_orthogonal': one('2307.09270', 'lightning', decay='none', lrpe='orthogonal'),
    'lrpe_permutation': one('2307.09270', 'lightning', decay='none', lrpe='permutation'),
    'lrpe_d': one('2307.09270', 'lightning', lrpe='unitary'),
    'dynamic_bias': one('2108.00154', 'dynamic_bias'),
    'dynamic_bias_grid': {**one('2108.00154', 'dynamic_bias', grid=4), **IMAGES},
    'attention_buckets': {**one('2312.04455', 'gqa'), 'sample': {'bases': (10_000.0, 17_500.0, 25_000.0)}},
}

VARIANTS = {**SCORES, **HEADS, **POSITIONS}


def get_config(variant: str = 'moh') -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f'unknown variant {variant!r} of configs/papers.py; valid: {", ".join(VARIANTS)}')
    spec = importlib.util.spec_from_file_location('base', pathlib.Path(__file__).parent / 'base.py')
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    c = base.get_config()
    c.run_dir = f'runs/papers/{variant}'
    with c.unlocked():
        c.model.num_layers = 4
        c.model.mixers = ConfigDict()
        for name, value in VARIANTS[variant].items():
            if name in ('step', 'sample', 'optim'):
                c[name].update(value)
            elif name == 'data.task':
                c.data.task, c.data.length = ConfigDict(value), 0
            elif name != 'paper':
                c.model[name] = ConfigDict(value) if name in ('mixers', 'mlp', 'encoder') else value
    return c
