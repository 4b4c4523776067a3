"""What one run of a compiled program costs, read from its optimised HLO text: products, memory traffic, collectives.

The compiler's own analysis counts the body of a loop once; here it counts as often as it runs. FLOPs are those of matrix
products and of kernels (by their own estimates), bytes are what an instruction reads and writes of the chip's main memory: what
lies in on-chip memory is free, a slice of a large array counts as the slice. Everything is per device.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4}
BYTES |= {'f64': 8, 's64': 8, 'u64': 8, 'c64': 8, 's4': 0.5, 'u4': 0.5}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
# What moves nothing by itself.
FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'after-all', 'partition-id', 'replica-id',
    'opt-barrier', 'custom-call-start', 'custom-call-update', 'custom-call-done',
)  # fmt: skip


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes


class Collective(NamedTuple):
    """Devices that exchange an array, as often as a step does it."""

    kind: str
    group: tuple[int, ...]  # devices of the first group, by their place in the mesh
    times: float
    payload: float  # bytes of the whole array
    wire: float  # bytes that a device sends, round a ring


class Work(NamedTuple):
    """One instruction, as often as a step runs it."""

    name: str
    op: str
    times: float
    flops: float
    bytes: float

    @property
    def background(self) -> bool:
        """A copy beside other work."""
        return self.op.endswith('-start')

    @property
    def kernel(self) -> bool:
        return self.op == 'custom-call' and self.flops > 0


class Cost(NamedTuple):
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    kept: float  # bytes that the layers keep for the backward pass: stacked by one loop, read by another
    unknown: tuple[str, ...]  # loops whose number of rounds the text does not show: counted once

    @property
    def flops(self) -> float:
        return sum(w.times * w.flops for w in self.work)

    @property
    def bytes(self) -> float:
        return sum(w.times * w.bytes for w in self.work)


Program = Mapping[str, Mapping[str, Instruction]]  # computation -> name -> instruction, in order


def parse(text: str) -> tuple[Program, str]:
    """The computations of HLO text, and the name of the entry."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = '', {}
    for line in text.splitlines():
        if header := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
            current = found[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (given := re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)', line)) and current is not None:
            text = given[2]
            end = _closing(text, 0) if text.startswith('(') else text.index(' ')
            kind, rest = text[:end], text[end:].lstrip()
            if '(' not in rest:
                continue
            op, opened = rest[: rest.index('(')], rest.index('(')
            close = _closing(rest, opened)
            inside = rest[opened + 1 : close - 1]
            operands = tuple(re.findall(r'%([\w.\-#]+)', inside)) if op not in ('constant', 'parameter') else (inside,)
            for operand in operands if '#' in inside else ():
                _element(operand, current)
            current[given[1]] = Instruction(given[1], kind, op, operands, rest[close:])
    return found, entry


def _element(name: str, current: dict[str, Instruction]) -> None:
    """Makes 'x#3', short for the third element of x, an instruction of its own, which other texts write out."""
    whole, _, at = name.rpartition('#')
    if whole and name not in current:
        _element(whole, current)
        kind = _elements(current[whole].type)[int(at)]
        current[name] = Instruction(name, kind, 'get-tuple-element', (whole,), f', index={at}')


def _elements(kind: str) -> list[str]:
    """The types of a tuple."""
    found, depth = [''], 0
    for c in re.sub(r'/\*.*?\*/', '', kind)[1:-1]:
        depth += (c in '([{') - (c in ')]}')
        if c == ',' and not depth:
            found.append('')
        else:
            found[-1] += c
    return [x.strip() for x in found]


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if not depth:
            return i + 1
    return len(text)


def shapes(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(dtype, dimensions, layout) of each array of a type."""
    found = re.findall(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', kind)
    return [(dtype, tuple(int(n) for n in dims.split(',') if n), layout) for dtype, dims, layout in found]


def size(kind: str, main_only: bool = True) -> float:
    """Bytes of a type; only of what lies in main memory, by default."""
    total = 0.0
    for dtype, dims, layout in shapes(kind):
        space = re.search(r'S\((\d+)\)', layout)
        if not (main_only and space and space[1] != '0'):
            total += BYTES.get(dtype, 1) * math.prod(dims)
    return total


def _called(rest: str) -> list[str]:
    names = re.findall(r'(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)', rest)
    if branches := re.search(r'branch_computations=\{([^}]*)\}', rest):
        names += [b.strip(' %') for b in branches[1].split(',')]
    return names


# Products


def flops_of(i: Instruction, types: Mapping[str, Instruction]) -> float:
    """Of one instruction by itself: dot, convolution, or a kernel with an estimate."""
    if i.op == 'custom-call':
        told = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', i.rest)
        return float(told[1]) if told else 0.0
    if i.op not in ('dot', 'convolution'):
        return 0.0
    (_, out, _), (_, left, _), (_, right, _) = (shapes(t)[0] for t in (i.type, *(types[o].type for o in i.operands[:2])))
    if i.op == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted[1].split(',') if d)
    lhs, rhs, result = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
    groups = lambda name: int(m[1]) if (m := re.search(rf'{name}=(\d+)', i.rest)) else 1
    window = re.search(r'window=\{([^}]*)\}', i.rest)
    field = lambda name: m[1].split('x') if window and (m := re.search(rf'\b{name}=([\d_x\-]+)', window[1])) else None
    total = 2.0 * left[lhs.index('b')] * right[rhs.index('i')] * right[rhs.index('o')] / groups('batch_group_count')
    for n, dim in enumerate(c for c in result if c.isdigit()):
        at = lambda name, default, n=n: int(f[n]) if (f := field(name)) else default
        low = int(pads[n].split('_')[0]) if (pads := field('pad')) else 0
        inputs, outputs = left[lhs.index(dim)], out[result.index(dim)]
        stride, grown, spread = at('stride', 1), at('lhs_dilate', 1), at('rhs_dilate', 1)
        places = (y * stride + k * spread - low for y in range(outputs) for k in range(at('size', 1)))
        total *= sum(0 <= p <= (inputs - 1) * grown and p % grown == 0 for p in places)
    return total


# Memory


def _fused_bytes(i: Instruction, types: Mapping[str, Instruction], inner: Mapping[str, Instruction]) -> float:
    """A fusion reads its operands and writes its results, but of arrays that it slices or updates in place only that part."""
    users: dict[str, list[Instruction]] = {}
    for j in inner.values():
        for operand in j.operands:
            users.setdefault(operand, []).append(j)
    through = lambda name: [u for j in users.get(name, ()) for u in (through(j.name) if j.op == 'bitcast' else [j])]
    total, updated = 0.0, 0.0
    for j in inner.values():
        if j.op != 'parameter':
            continue
        given = types[i.operands[int(j.operands[0])]].type
        readers, whole = through(j.name), size(given)
        if whole and readers and all(u.op in ('dynamic-slice', 'gather', 'slice') for u in readers):
            total += min(whole, sum(size(u.type, False) for u in readers))
        elif whole and readers and all(u.op == 'dynamic-update-slice' for u in readers):
            part = sum(size(inner[u.operands[1]].type, False) for u in readers if u.operands[1] in inner)
            total, updated = total + part, updated + whole - part  # as much is written
        else:
            total += whole
    return total + max(size(i.type) - updated, 0.0)


def bytes_of(i: Instruction, types: Mapping[str, Instruction], program: Program) -> float:
    """Main memory that one instruction reads and writes."""
    given = [types[o].type for o in i.operands if o in types]
    if i.op == 'fusion':
        return _fused_bytes(i, types, program[_called(i.rest)[0]])
    if i.op in ('dynamic-slice', 'slice', 'gather'):
        return 2 * size(i.type)
    if i.op == 'dynamic-update-slice':
        return 2 * size(given[1])
    if i.op.endswith('-start'):  # its type repeats the operand: (operand, result, …) or (result, operand, …)
        parts = shapes(i.type)[:2]
        return sum(size(f'{d}[{",".join(map(str, s))}]{layout}') for d, s, layout in parts)
    if i.op == 'custom-call' and (told := re.search(r'"bytes_accessed":"(\d+)"', i.rest)):
        return float(told[1])
    return sum(map(size, given)) + size(i.type)


# Collectives


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective; three spellings."""
    if m := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
        axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", m[1])]
        used, members, step = re.findall(r"'(\w+)'", m[2]), [0], 1
        for name, n in reversed(axes):
            if name in used:
                members = [x + step * k for k in range(n) for x in members]
            step *= n
        return tuple(sorted(members))
    if m := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
        dims = [int(n) for n in m[3].split(',')]
        order = [int(n) for n in m[4].split(',')] if m[4] else list(range(len(dims)))
        strides = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
        found = [0]
        for d in order:
            found = [x + strides[d] * k for x in found for k in range(dims[d])]
        return tuple(found[: int(m[2])])
    if m := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
        return tuple(int(n) for n in m[1].split(','))
    if m := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', rest):
        return int(m[1]), int(m[2])
    return tuple(range(devices))


def _collective(i: Instruction, kind: str, within: str, times: float, devices: int) -> Collective:
    group = group_of(i.rest, devices)
    g, arrays = len(group), [BYTES.get(d, 1) * math.prod(s) for d, s, _ in shapes(i.type)]
    payload = sum(arrays) if i.op == kind or kind == 'all-reduce' else max(arrays)
    if kind == 'reduce-scatter':
        payload *= g  # its type is the shard
    if kind == 'all-reduce' and 'scatter' in within:  # on TPU: a fusion of an all-reduce and a slice
        kind = 'reduce-scatter'
    share = {'all-reduce': 2 * (g - 1) / g, 'collective-permute': 1.0}.get(kind, (g - 1) / g)
    return Collective(kind, group, times, payload, payload * share)


# The whole program


def rounds(program: Program, i: Instruction) -> int | None:
    """How often a loop runs: told, or the bound that its counter from 0 is compared with; None: unknown."""
    if told := re.search(r'known_trip_count\W+n\W+(\d+)', i.rest):
        return int(told[1])
    condition = program[re.search(r'condition=%?([\w.\-]+)', i.rest)[1]]
    tests = [(j, condition) for j in condition.values() if j.op == 'compare']
    for j in condition.values():  # the comparison may be fused
        if j.op == 'fusion':
            inner = program[_called(j.rest)[0]]
            constants = [condition[o] for o in j.operands if condition[o].op == 'constant']
            if constants and any(k.op == 'compare' and 'direction=LT' in k.rest for k in inner.values()):
                return int(constants[0].operands[0])
    for j, where in tests:
        if 'direction=LT' in j.rest:
            for operand in j.operands:
                if where[operand].op == 'constant':
                    return int(where[operand].operands[0])
    return None


def cost(text: str, devices: int) -> Cost:
    """What the program costs a device that runs it with `devices` others, itself counted."""
    program, entry = parse(text)
    work: list[Work] = []
    collectives: list[Collective] = []
    unknown: list[str] = []
    stacked: list[tuple[Counter, Counter]] = []

    def inside(name: str, times: float, within: str) -> float:
        """FLOPs of a fusion; its collectives are noted."""
        total = 0.0
        for i in program[name].values():
            kind = i.op.removesuffix('-start')
            if kind in COLLECTIVES:
                collectives.append(_collective(i, kind, within, times, devices))
            total += flops_of(i, program[name])
            if i.op == 'fusion':
                total += sum(inside(c, times, c) for c in _called(i.rest))
        return total

    def walk(name: str, times: float) -> None:
        for i in program[name].values():
            kind = i.op.removesuffix('-start')
            if i.op in FREE or i.op.endswith(('-done', '-update')):
                continue
            if kind in COLLECTIVES:
                collectives.append(_collective(i, kind, name, times, devices))
            elif i.op == 'while':
                n = rounds(program, i)
                if n is None:
                    unknown.append(i.name)
                body = re.search(r'body=%?([\w.\-]+)', i.rest)[1]
                stacked.append(_stacks(program[body], n or 1))
                walk(body, times * (n or 1))
            elif kind in ('call', 'async', 'conditional'):
                for called in _called(i.rest):
                    walk(called, times)
            elif i.op == 'fusion':
                (called,) = _called(i.rest)
                before = len(collectives)
                flops = inside(called, times, called)
                moved = 0.0 if len(collectives) > before else bytes_of(i, program[name], program)
                work.append(Work(i.name, i.op, times, flops, moved))
            else:
                moved = bytes_of(i, program[name], program)
                work.append(Work(i.name, i.op, times, flops_of(i, program[name]), moved))

    walk(entry, 1.0)
    kept = [made & read for n, (made, _) in enumerate(stacked) for m, (_, read) in enumerate(stacked) if n != m]
    most = max((sum(size(t) * n for t, n in k.items()) for k in kept), default=0.0)
    return Cost(tuple(work), tuple(collectives), most, tuple(unknown))


def _stacks(body: Mapping[str, Instruction], n: int) -> tuple[Counter, Counter]:
    """Types of the arrays, stacked over the rounds, that the body of a loop fills, and of those that it only reads."""
    root = list(body.values())[-1]
    made, read = Counter(), Counter()
    for at, name in enumerate(root.operands if root.op == 'tuple' else ()):
        i = body[name]
        same = i.op == 'get-tuple-element' and body[i.operands[0]].op == 'parameter' and f'index={at},' in i.rest + ','
        dims = shapes(i.type)[0][1] if shapes(i.type) else ()
        if len(dims) > 1 and dims[0] == n:
            (read if same else made)[re.sub(r'\{[^}]*\}', '', i.type)] += 1
    return made, read
