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


KERNELS: tuple[Kernel, ...] = (
    Kernel('softmax_attention', 'mosaic_gpu', 'pallas_kernels.softmax_attention.mosaic_gpu', 'cuda', 'Hopper (H100, H200)'),
    Kernel('gated_linear', 'mosaic_gpu', 'pallas_kernels.gated_linear.mosaic_gpu', 'cuda', 'Hopper (H100, H200)'),
    Kernel('delta_rule', 'mosaic_gpu', 'pallas_kernels.delta_rule.mosaic_gpu', 'cuda', 'Hopper (H100, H200)'),
    Kernel('short_conv', 'mosaic_gpu', 'pallas_kernels.short_conv.mosaic_gpu', 'cuda', 'Hopper (H100, H200)'),
    # Compiled for these chips, never timed on one.
    Kernel('softmax_attention', 'mosaic_tpu', 'pallas_kernels.softmax_attention.mosaic_tpu', 'tpu', 'v5e, v5p, v6e'),
    Kernel('paged_attention', 'mosaic_tpu', 'pallas_kernels.softmax_attention.paged_tpu', 'tpu', 'v5e, v5p, v6e'),
    Kernel('gated_linear', 'mosaic_tpu', 'pallas_kernels.gated_linear.mosaic_tpu', 'tpu', 'v5e, v5p, v6e'),
    Kernel('delta_rule', 'mosaic_tpu', 'pallas_kernels.delta_rule.mosaic_tpu', 'tpu', 'v5e, v5p, v6e'),
)
