"""Tile sizes by shape class. The figures behind them are in README.md."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Forward:
    consumers: int  # consumer warpgroups, 64 query rows each
    keys: int  # keys a step
    stages: int  # key and value tiles in flight
    registers: tuple[int, int]  # consumer, producer
    turns: bool  # consumers issue in turns
    order: str  # grid axes, the last varies fastest


@dataclasses.dataclass(frozen=True)
class Backward:
    queries: int  # query rows a step; a block owns 128 keys
    stages: int  # query tiles in flight
    outs: int  # dq tiles on their way out
    registers: tuple[int, int]


def forward(H: int, Hv: int, lists: bool) -> Forward:
    """Tiles for head widths H and Hv (multiples of 64); `lists`: the mask leaves blocks out."""
    wide = max(H, Hv)
    order = 'qbh' if lists else 'bhq'
    if wide <= 64:
        return Forward(3, 128, 2, (160, 32), False, order)
    if wide <= 128:
        return Forward(2, 128, 2, (240, 24), True, order)
    return Forward(2, 64, 2, (240, 24), True, order)


def backward(H: int, Hv: int) -> Backward:
    if max(H, Hv) <= 64:
        return Backward(128, 2, 2, (240, 24))
    return Backward(64, 2, 2, (240, 24))
