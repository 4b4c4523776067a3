"""Pure functions: arrays in, arrays out. No Flax, no config.

`attnx.ops.softmax_attention` is the function; its forms come by `from attnx.ops.softmax_attention import xla`.
"""

from attnx.ops import feature_maps, masks, normalizers, positions, scores
from attnx.ops.delta_rule import delta_rule
from attnx.ops.gated_linear import gated_linear
from attnx.ops.paged_attention import paged_attention
from attnx.ops.selective_attention import selective_attention
from attnx.ops.short_conv import short_conv
from attnx.ops.softmax_attention import Dropout, softmax_attention
from attnx.ops.weighted_attention import weighted_attention
from attnx.ops.weighted_mean import weighted_mean

__all__ = [
    'Dropout', 'delta_rule', 'feature_maps', 'gated_linear', 'masks', 'normalizers', 'paged_attention', 'positions',
    'scores', 'selective_attention', 'short_conv', 'softmax_attention', 'weighted_attention', 'weighted_mean',
]  # fmt: skip
