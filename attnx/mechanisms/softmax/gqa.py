"""Grouped-query softmax attention; one key/value head is multi-query attention.

Equation: o_t = sum_s softmax_s(scale q_t . k_s) v_s with N query heads reading K key/value heads, head h reads h // (N / K).
Paper: GQA: training generalized multi-query transformer models from multi-head checkpoints, 2023, arXiv 2305.13245;
    multi-query: Fast transformer decoding: one write-head is all you need, 2019, arXiv 1911.02150;
    fewer query heads than width / H: Sparse query attention (SQA): a computationally efficient attention mechanism with query
    heads reduction, 2025, arXiv 2510.01817. With P = width / H, sSQA has N = K = P / 2, xSQA N = K = P / 4, xSMQA
    N = P / 4 and K = 1; SQA any K <= N < P.
Differs: positions, masks, scores, sinks and QK-norm are options that the papers do not have; their defaults are RoPE alone.
Cost: train O(T²) time, N H products a pair, O(T) memory, through the fused op; decode reads and keeps 2 K H numbers a
    token.
"""

import dataclasses

from attnx.nn import attention
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    num_kv_heads: int = 2  # K key/value heads; divides num_heads; 1 is multi-query attention; 0: as many as num_heads


class GroupedQueryAttention(attention.Attention):
    """The base as it is."""


SPEC = Spec(
    module=GroupedQueryAttention,
    config=Config,
    paper='2305.13245',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops,
)
