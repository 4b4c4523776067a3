"""Combinations that the mathematics forbids are refused by name when the config is read, before anything is built."""

import pytest

from attnx import config as config_lib
from attnx.models import ModelConfig

REFUSED = [
    ({'kind': 'mla', 'position': 'shaw'}, 'shaw is a mechanism of its own'),  # values of latents have no table to add
    ({'kind': 'gqa', 'scores': (('cope', 64),)}, 'cope is a mechanism of its own'),
    ({'kind': 'mla', 'num_kv_heads': 2}, 'unknown key config.model.mixers.a.num_kv_heads'),
    ({'kind': 'gqa', 'num_kv_heads': 3}, 'num_kv_heads 3 does not divide num_heads'),
    ({'kind': 'gqa', 'scale': float('nan')}, 'config.model.mixers.a.scale = nan: expected a finite number'),
    ({'kind': 'task_experts', 'head_dim': -1}, 'head_dim -1 must not be negative'),
    ({'kind': 'gla', 'value_expansion': -1.0}, 'both widths must be at least 1'),
    ({'kind': 'gqa', 'sinks': True, 'off_by_one': True}, 'choose one'),
    ({'kind': 'cog', 'sinks': True}, 'the signed weights have no such logit'),
    ({'kind': 'sigmoid_attention', 'off_by_one': True}, 'sigmoid weights have no denominator'),
    ({'kind': 'cope', 'position': 'rope'}, 'CoPE is the position code'),
    ({'kind': 'coca', 'position': 'none'}, 'CoCA is a rotary code'),
    ({'kind': 'transformer_xl', 'position': 'rope'}, 'sinusoids of the distance are the position code'),
    ({'kind': 'dynamic_bias', 'position': 'rope'}, 'the bias is the position code'),
    ({'kind': 'mvpa', 'position': 'rope'}, 'times and channels are the position code'),
    ({'kind': 'mvpa', 'off_by_one': True}, 'no such logit in the denominator'),
    ({'kind': 'skim', 'position': 'rope'}, 'the layout is the position code'),
    ({'kind': 'dual_rope', 'position': 'none'}, 'without rotary positions'),
    ({'kind': 'dual_rope', 'mode': 'mean', 'gamma': 2.0}, "gamma is of mode 'sum'"),
    ({'kind': 'dual_rope', 'rope': {'grid': 4}}, 'positions and frames are numbers on a line'),
    ({'kind': 'equal_distance', 'position': 'none'}, 'equally distant'),
    ({'kind': 'shaw', 'labels': 3, 'max_distance': 4}, 'labels stand in place of distances'),
    ({'kind': 'minimal_attention', 'similarity': 'merged', 'num_heads': 4}, 'num_heads 4'),
    ({'kind': 'guided_heads', 'patterns': ('next',)}, 'a causal model has no next token'),
    ({'kind': 'steerable'}, 'bidirectional only'),
    ({'kind': 'echo', 'source': 'shared'}, "reads 'attention', which no earlier layer"),
    ({'kind': 'cross_attention', 'position': 'rope'}, 'a token and a memory entry have no distance'),
]


@pytest.mark.parametrize(('mixer', 'message'), REFUSED, ids=str)
def test_refused_by_name(mixer, message):
    fields = {'vocab_size': 16, 'width': 32, 'num_layers': 2, 'pattern': ('a',), 'mixers': {'a': mixer}}
    with pytest.raises(ValueError) as error:
        config = config_lib.build(ModelConfig, fields, 'config.model')
        config.layers()
        config.check(16)
    assert message in str(error.value)
