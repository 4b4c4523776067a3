"""Chips that a run may be planned for, their published peaks, and what they make of work and links. Imports no jax."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from attnx.names import nearest


class Chip(NamedTuple):
    """A device as JAX sees it; published peaks."""

    flops: float  # dense bfloat16, FLOP/s
    memory: float  # bytes that a program may use
    bandwidth: float  # of main memory, bytes/s
    link: float  # bytes/s of one link to a neighbour, each way; GPU: of all links to the others of its node, each way
    sides: tuple[str, ...]  # topologies on offer; GPU: none
    wraps: int  # a side of a multiple of this many chips is a ring
    source: str
    devices: int = 1  # a chip, as JAX sees it; peaks are then a device's, and chips are links' ends


_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x4', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
_SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CLOUD = 'cloud.google.com/tpu/docs'
CHIPS = {
    'v4': Chip(275e12, 30.75 * 2**30, 1228e9, 50e9, _CUBES, 4, f'{_CLOUD}/v4'),
    'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 50e9, _SQUARES, 16, f'{_CLOUD}/v5e'),
    'v5p': Chip(459e12, 95.73 * 2**30, 2765e9, 100e9, _CUBES, 4, f'{_CLOUD}/v5p'),
    'v6e': Chip(918e12, 31.24 * 2**30, 1638e9, 100e9, _SQUARES, 16, f'{_CLOUD}/v6e'),
    'tpu7x': Chip(1153e12, 94.74 * 2**30, 3690e9, 50e9, _CUBES, 4, f'{_CLOUD}/tpu7x', 2),
    'a100': Chip(312e12, 80e9, 2039e9, 300e9, (), 0, 'NVIDIA A100 80GB SXM data sheet'),
    'h100': Chip(989e12, 80e9, 3350e9, 450e9, (), 0, 'NVIDIA H100 SXM data sheet'),
    'h200': Chip(989e12, 141e9, 4800e9, 450e9, (), 0, 'NVIDIA H200 SXM data sheet'),
    'b200': Chip(2250e12, 180e9, 7700e9, 900e9, (), 0, 'NVIDIA DGX B200 data sheet'),
}
NODE, NETWORK = 8, 50e9  # GPUs that share NVLink, and bytes/s each way of a GPU's network card (400 Gbit/s)
# Shares of the peaks that a good program gets: products, main memory, links.
PRODUCTS, MEMORY, LINKS = 0.9, 0.85, 0.85


class Topology(NamedTuple):
    name: str
    chip: Chip
    kind: str  # key of CHIPS
    sides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.sides) * self.chip.devices

    @property
    def tpu(self) -> bool:
        return bool(self.chip.sides)


def known() -> str:
    tpus = [f'{name}:{"|".join(chip.sides)}' for name, chip in CHIPS.items() if chip.sides]
    gpus = [f'{name}:<number>' for name, chip in CHIPS.items() if not chip.sides]
    return '; '.join((*tpus, *gpus))


def topology(name: str) -> Topology:
    """'v5p:8x8x8' or 'h100:8'.

    Raises:
      ValueError: it is none; with the list.
    """
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name.lower())
    if not found or found[1] not in CHIPS:
        near = nearest(found[1] if found else name.lower().split(':')[0], tuple(CHIPS))
        raise ValueError(f'unknown topology {name!r}; {near}; topologies: {known()}')
    chip, sides = CHIPS[found[1]], tuple(map(int, found[2].split('x')))
    if (chip.sides and found[2] not in chip.sides) or min(sides) < 1:
        count = lambda side: math.prod(map(int, side.split('x')))
        valid = sorted(chip.sides, key=lambda side: abs(math.log(count(side) / max(math.prod(sides), 1))))
        near = ', '.join(f'{found[1]}:{side}' for side in valid[:3])
        raise ValueError(f'unknown topology {name!r}; nearest: {near}; topologies: {known()}')
    if not chip.sides and len(sides) > 1:
        raise ValueError(f'unknown topology {name!r}: a number of GPUs is expected, such as {found[1]}:{math.prod(sides)}')
    return Topology(name.lower(), chip, found[1], sides)


def seconds_of(work: Iterable[tuple[float, float, bool]], chip: Chip) -> float:
    """A roofline over (FLOPs, bytes, background): one after another, each bound by products or by memory."""
    products, memory = PRODUCTS * chip.flops, MEMORY * chip.bandwidth
    done = list(work)
    front = sum(max(flops / products, moved / memory) for flops, moved, background in done if not background)
    return max(front, sum(moved for _, moved, _ in done) / memory)


def links(coords, where: Topology) -> int:
    """Links over which a device sends at once: two along each side of the torus that is a ring, else one."""
    total = 0
    for axis, side in enumerate(where.sides):
        places = {c[axis] for c in coords}
        total += 0 if len(places) == 1 else 2 if len(places) == side and side % where.chip.wraps == 0 else 1
    return max(total, 1)
