"""The one list of kernels: op -> ordered implementations, as data.

A row's module holds a function named as the op, with the op's exact signature (no `impl`) and its own derivative rule, and
`unsupported(*args, **kwargs) -> str | None`: why this call can't run there, or None. Where shapes decide how it runs,
`schedule_of(*args, **kwargs) -> str` says so. Modules load only when asked for.
"""

from typing import NamedTuple


class Kernel(NamedTuple):
    op: str
    impl: str  # what `impl=` takes
    module: str
    platform: str  # jax's name: 'cuda', 'tpu'
    hardware: str  # least hardware, for people


HOPPER, CHIPS = 'Hopper (H100, H200)', 'v5e, v5p, v6e'  # the chips: compiled for them, never timed on one
SOFTMAX = 'pallas_kernels.softmax_attention'

KERNELS: tuple[Kernel, ...] = (
    Kernel('softmax_attention', 'mosaic_gpu', f'{SOFTMAX}.mosaic_gpu', 'cuda', HOPPER),
    Kernel('softmax_attention_backward', 'mosaic_gpu', f'{SOFTMAX}.mosaic_gpu', 'cuda', HOPPER),
    Kernel('gated_linear', 'mosaic_gpu', 'pallas_kernels.gated_linear.mosaic_gpu', 'cuda', HOPPER),
    Kernel('delta_rule', 'mosaic_gpu', 'pallas_kernels.delta_rule.mosaic_gpu', 'cuda', HOPPER),
    Kernel('short_conv', 'mosaic_gpu', 'pallas_kernels.short_conv.mosaic_gpu', 'cuda', HOPPER),
    Kernel('softmax_attention', 'mosaic_tpu', f'{SOFTMAX}.mosaic_tpu', 'tpu', CHIPS),
    Kernel('softmax_attention_backward', 'mosaic_tpu', f'{SOFTMAX}.mosaic_tpu', 'tpu', CHIPS),
    Kernel('paged_attention', 'mosaic_tpu', f'{SOFTMAX}.paged_tpu', 'tpu', CHIPS),
    Kernel('gated_linear', 'mosaic_tpu', 'pallas_kernels.gated_linear.mosaic_tpu', 'tpu', CHIPS),
    Kernel('delta_rule', 'mosaic_tpu', 'pallas_kernels.delta_rule.mosaic_tpu', 'tpu', CHIPS),
)
