"""Tile sizes by shape class. The figures behind them are in README.md."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Forward:
    consumers: int  # consumer warpgroups, 64 query rows each
    keys: int  # keys a step
    stages: int  # key and value tiles in flight
    registers: tuple[int, int]  # consumer, producer
    turns: bool = True  # consumers issue in turns
    buffers: int = 2  # query tiles in flight


@dataclasses.dataclass(frozen=True)
class Backward:
    queries: int  # query rows a step; a block owns 128 keys
    stages: int  # query tiles in flight
    registers: tuple[int, int]


def forward(H: int, Hv: int) -> Forward:
    """Tiles for head widths H and Hv (multiples of 64)."""
    wide = max(H, Hv)
    if wide <= 64:
        return Forward(3, 128, 2, (160, 32))
    if wide <= 128:
        return Forward(2, 128, 2, (240, 24))
    return Forward(2, 64, 2, (240, 24), buffers=1)


def backward(H: int, Hv: int) -> Backward:
    if max(H, Hv) <= 64:
        return Backward(128, 2, (240, 24))
    return Backward(64, 2, (240, 24))
