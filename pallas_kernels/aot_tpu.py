"""TPU kernels compiled by the real compiler on a machine without a TPU, and what it says about their cost.

    python -m pallas_kernels.aot_tpu compile [--topology=v5e:1x1] [--slow] [words]    cases whose names hold a word
    python -m pallas_kernels.aot_tpu compile --in-turn [words]                        each for one chip, another each time
    python -m pallas_kernels.aot_tpu bundles [--topology=v6e:1x1]                     against JAX's splash attention

It needs libtpu: `pip install 'libtpu>=0.0.50,<0.1'`, or the extra `tpu-aot`. libtpu ends the process on some errors, so
tests run this in a child process. Nothing here is a measurement: speed on a TPU is estimated by the compiler.

`bundles` counts the instructions of the innermost grid step as the compiler finally issues them (one VLIW bundle a cycle)
and the registers that it spills, times the tiles that a mask leaves. A step branches on the class of its tile, which the
static count can't see, so each kernel is compiled with tiles of one class only, and the classes are weighed by their number.
"""

import dataclasses
import functools
import glob
import importlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import blocks, libtpu
from pallas_kernels import elementwise as ew
from pallas_kernels.delta_rule import mosaic_tpu as delta
from pallas_kernels.dropout import Dropout
from pallas_kernels.gated_linear import mosaic_tpu as linear
from pallas_kernels.softmax_attention import mosaic_tpu as softmax
from pallas_kernels.softmax_attention import paged_tpu

TOPOLOGIES = ('v5e:1x1', 'v5p:1x1x1', 'v6e:1x1')
bf16, f32 = jnp.bfloat16, jnp.float32


def compiled(function: Callable, args, topology: str):
    """`function` compiled for the first chip of `topology`; args are `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the topology is unknown.
    """
    try:
        device = topologies.get_topology_desc(topology, platform='tpu').devices[0]
    except Exception as error:
        raise ValueError(f'topology {topology!r} is unknown to libtpu; try one of {", ".join(TOPOLOGIES)}') from error
    mesh = Mesh(np.array([device]), ('x',))
    put = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # lowering asks which chip it is for
        return jax.jit(function).lower(*jax.tree.map(put, list(args))).compile()


# What is compiled


def causal(i):
    return i.k <= i.q + (i.k_len - i.q_len)


def near(i, size):
    return i.q + (i.k_len - i.q_len) - i.k < size


def same(i, a, b):
    return (a == b) & (a > 0)


def _softcap(s, i, cap):
    return cap * jnp.tanh(s / cap)


def _added(s, i, value):
    return s + value.astype(s.dtype)


def _alibi(s, i, slope):
    return s + slope * (i.k - i.q).astype(s.dtype)


def window(size: int) -> ew.Mask:
    return ew.Mask(causal) & ew.Mask(near, (), (size,))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, compiled with its gradients by all floating arrays if it has any: `call(*arrays) -> outputs`."""

    name: str
    call: Callable
    arrays: tuple[Any, ...]  # (shape, dtype)
    largest: int  # elements that no array of the program may reach
    slow: bool = True
    differentiable: bool = True
    operands: int = 0  # of the score that have gradients: a kernel each

    def compile(self, topology: str) -> dict:
        arrays = [jax.ShapeDtypeStruct(*a) for a in self.arrays]
        floating = [n for n, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
        outs = jax.eval_shape(self.call, *arrays)

        def loss(*args):
            args, weights = args[: len(arrays)], args[len(arrays) :]
            hide = lambda x: jnp.where(jnp.isfinite(x), x, 0)
            return sum((hide(o).astype(f32) * w).sum() for o, w in zip(self.call(*args), weights))

        weights = [jax.ShapeDtypeStruct(o.shape, f32) for o in outs]
        start = time.process_time()
        function = jax.value_and_grad(loss, floating) if self.differentiable else loss
        program = compiled(function, [*arrays, *weights], topology)
        text = program.as_text()
        sizes = [math.prod(map(int, s.split(','))) for s in re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', text)]
        return {
            'case': self.name,
            'topology': topology,
            'kernels': text.count('custom_call_target="tpu_custom_call"'),
            'expected': 1 + self.differentiable + self.operands,
            'largest': max(sizes),
            'allowed': self.largest,
            'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
            'cpu_seconds': round(time.process_time() - start, 1),
        }


def _attention(
    name, T, N=2, K=1, H=128, Hv=None, S=None, build=dict, extra=(), dtype=bf16, sides=None, largest=None, **case
):
    S = S or T
    q, k, v = (((1, *x), dtype) for x in ((T, N, H), (S, K, H), (S, K, Hv or H)))
    call = lambda q, k, v, *more: softmax.attend(q, k, v, sides=sides, **build(*more))
    return Case(name, call, (q, k, v, *extra), largest or T * S, **case)


def _recurrence(op, decay, T, N=4, K=2, H=128, V=128, B=1, dtype=bf16, largest=None, **case):
    row, shape = (B, T, N), {'head': (N,), 'token': (B, T, N), 'channel': (B, T, N, H)}
    arrays = [((B, T, K, H), dtype), ((B, T, K, H), dtype), ((*row, V), dtype)]
    arrays += [(row, f32)] if op is delta else []
    arrays += [(shape[decay], f32)] if decay != 'none' else []
    arrays += [((B, N, H, V), f32), ((B, T), jnp.int32)]
    run = op.delta_rule if op is delta else op.gated_linear
    call = lambda *a: run(*a[:-2], initial_state=a[-2], segment_ids=a[-1])
    return Case(f'{run.__name__} {decay}' + ', a step' * (T == 1), call, tuple(arrays), largest or T * T, **case)


def _paged(T, window):
    call = functools.partial(paged_tpu.paged_attention, window=window)
    pool = ((2, 4096, 64, 128), bf16)
    arrays = ((8, T, 16, 128), bf16), pool, pool, ((8, 512), jnp.int32), ((8,), jnp.int32)
    return Case(f'paged attention, {T} new tokens', call, arrays, 2**27, slow=T > 1, differentiable=False)


def cases() -> list[Case]:
    documents = lambda ids: {'mask': window(1024) & ew.Mask(same, (ew.Operand(ids, 'bq'), ew.Operand(ids, 'bk')))}
    plain = lambda: {'mask': causal}
    score = lambda fn, index: lambda x: {'mask': causal, 'score': ew.Score((ew.Term(fn, (ew.Operand(x, index),)),))}
    capped = lambda sinks: {
        'mask': causal, 'score': ew.Score((ew.Term(_softcap, (), (30.0,)),)), 'sinks': sinks, 'dropout': Dropout(0.1, 3)
    }  # fmt: skip

    def strip(x, ids):
        return {**score(_added, 'hd')(x), **documents(ids), 'dropout': Dropout(0.1, 3)}

    small = (256, 256, 256)
    return [
        _attention('attention causal', 8192, build=plain),
        _attention('attention causal, 32768 tokens', 32768, build=plain, N=1),
        _attention('attention window and documents, 32768 tokens', 32768, N=8, K=2, build=documents,
                   extra=[((1, 32768), jnp.int32)]),
        _attention('attention small tiles, strip, documents, dropout', 4096, build=strip, sides=small, slow=False,
                   extra=[((2, 8191), f32), ((1, 4096), jnp.int32)], operands=1),
        _attention('attention full', 4096),
        _attention('attention width 64', 4096, H=64, build=plain),
        _attention('attention widths 80 and 192, ragged', 1000, S=1300, H=80, Hv=192, build=plain, largest=2**24),
        _attention('attention width 256, 32768 tokens', 32768, H=256, N=1, build=plain),
        _attention('attention softcap, sinks, dropout', 4096, build=capped, extra=[((2,), f32)]),
        _attention('attention alibi', 4096, build=score(_alibi, 'h'), extra=[((2,), f32)], operands=1),
        _attention('attention strip', 4096, build=score(_added, 'hd'), extra=[((2, 8191), f32)], operands=1),
        _attention('attention bias', 2048, build=score(_added, 'hqk'), extra=[((2, 2048, 2048), bf16)],
                   largest=2**25, operands=1),  # the caller's bias; v6e's program names it as 2^24 bytes
        _attention('attention bias that heads share', 2048, N=8, build=score(_added, 'qk'), extra=[((2048, 2048), f32)],
                   largest=2**25, operands=1),
        _attention('attention row and head bias', 2048, build=score(_added, 'hq'), extra=[((2, 2048), f32)], operands=1),
        _attention('attention column bias', 2048, build=score(_added, 'k'), extra=[((2048,), f32)], operands=1),
        _attention('attention float32', 2048, build=plain, dtype=f32),
        *(_recurrence(op, decay, 8192, slow=decay != 'token')
          for op in (linear, delta) for decay in ('none', 'head', 'token', 'channel')),
        _paged(1, None),
        _paged(4, 1024),
        *(_recurrence(op, decay, 1, B=32, differentiable=False, largest=2**24)
          for op in (linear, delta) for decay in ('token', 'channel')),
        _recurrence(linear, 'token', 32768, H=256, V=256, N=1, K=1),
        _recurrence(delta, 'token', 2048, dtype=f32, H=64, V=64),
    ]  # fmt: skip


# Cost by the compiler


def unit_use(path: str) -> tuple[int, dict[str, int]]:
    """Bundles, and how often each unit is used, of a dumped per-bundle table."""
    with open(path) as file:
        lines = file.read().splitlines()
    names = [x.strip() for x in lines[1].split(',')]
    rows = [[int(x) for x in r.split()] for r in lines[4:] if r.strip()[:1].isdigit()]
    return len(rows), {n: sum(r[i] for r in rows) for i, n in enumerate(names)}


def _count(function, args, topology, folder, names) -> dict[str, tuple[int, int]]:
    """Bundles and spilled registers of the kernels whose names hold `names`."""
    for path in glob.glob(f'{folder}/*'):
        os.remove(path)
    compiled(function, args, topology)
    found = {}
    for name in names:
        (path,) = [p for p in glob.glob(f'{folder}/*per-bundle-utilization*') if name in os.path.basename(p)]
        bundles, units = unit_use(path)
        found[name] = bundles, units.get('VSTORE:SPILL', 0)
    return found


def _gradients(call):
    return lambda q, k, v, w: jax.grad(lambda q, k, v: (call(q, k, v).astype(f32) * w).sum(), (0, 1, 2))(q, k, v)


def _first(q, k, v, **options):
    return softmax.attend(q, k, v, **options)[0]


def _splash(T, size, side):
    # The peer of this table, and no part of the library, which imports nothing from jax.experimental.pallas.ops.
    package = 'jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_'
    kernel, masks = (importlib.import_module(package + x) for x in ('kernel', 'mask'))
    mask = masks.CausalMask((T, T)) if size is None else masks.LocalMask((T, T), (size - 1, 0), 0)
    part = min(side, 512)
    tile = {'block_q': side, 'block_kv': side, 'block_kv_compute': part}
    tile |= {f'{name}_dkv' if name != 'block_kv_compute' else 'block_kv_dkv_compute': n for name, n in tile.items()}
    sizes = kernel.BlockSizes(**tile, use_fused_bwd_kernel=True)
    attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([mask]), block_sizes=sizes)
    return lambda q, k, v: jax.vmap(attend)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def bundles(topology: str, folder: str, T: int = 8192, H: int = 128):
    """Prints bundles and spills of a head's forward and backward pass, ours and splash attention's; libtpu dumps to folder."""
    x = jax.ShapeDtypeStruct((1, T, 1, H), bf16)
    args = [x, x, x, jax.ShapeDtypeStruct(x.shape, f32)]
    classify = blocks.classify
    for name, size in (('causal', None), ('causal, window 1024', 1024)):
        mask = ew.Mask(causal) if size is None else window(size)
        rows = []
        for side in (512, 1024):
            part = min(side, 512)
            classes = classify(mask, 1, 1, T, T, side, side)
            number = {kind: int((classes == kind).sum()) for kind in (blocks.PARTIAL, blocks.FULL)}
            ours = {}
            for kind, amount in number.items():
                if not amount:
                    continue
                forced = lambda *_, kind=kind, shape=classes.shape: np.full(shape, kind, np.int8)
                with mock.patch.object(blocks, 'classify', forced):
                    call = functools.partial(_first, mask=mask, sides=(side, side, part))
                    found = _count(_gradients(call), args, topology, folder, ('attention_forward', 'attention_backward'))
                for pass_, cost in found.items():
                    ours[pass_] = np.add(ours.get(pass_, (0, 0)), np.multiply(amount, cost))
            peer = _count(_gradients(_splash(T, size, side)), args, topology, folder, ('mha_fwd', 'mha_dkv'))
            live = sum(number.values())
            rows.append((side, live, list(ours.values()), [np.multiply(live, x) for x in peer.values()]))
        for n, pass_ in enumerate(('forward', 'backward')):
            best = min(row[3][n][0] for row in rows)
            for side, live, ours, peer in rows:
                (a, b), (c, d) = ours[n], peer[n]
                print(
                    f'{topology:9} {name:20} {pass_:9} tile {side:4}, {live:3} live: bundles {a:7} spills {b:6} | splash '
                    f'{c:7} {d:6} | {a / c:.2f} of it, {a / best:.2f} of its best',
                    flush=True,
                )


def main(argv: list[str]) -> int:
    command, options = argv[0] if argv else '', [a for a in argv[1:] if a.startswith('--')]
    words = [a for a in argv[1:] if not a.startswith('--')]
    topology = next((a.split('=')[1] for a in options if a.startswith('--topology=')), None)
    if command not in ('compile', 'bundles'):
        print(__doc__)
        return 2
    if reason := libtpu.missing():
        print(reason)
        return 3
    if command == 'bundles':
        with tempfile.TemporaryDirectory() as folder:  # one for all chips: libtpu reads its flags once
            regex = '.*(final_hlo-static).*'
            libtpu.prepare(xla_jf_dump_to=folder, xla_jf_dump_llo_text='true', xla_jf_dump_llo_pass_label_regex=regex)
            for name in [topology] if topology else ('v5e:1x1', 'v6e:1x1'):
                bundles(name, folder)
        print(f'Estimated by the compiler ({libtpu.versions()}), not measured: no TPU was at hand.')
        return 0
    libtpu.prepare()
    failed = 0
    wanted = [c for c in cases() if ('--slow' in options or not c.slow) and any(w in c.name for w in words or [''])]
    for n, case in enumerate(wanted):
        for name in [topology] if topology else TOPOLOGIES[n % 3 :][:1] if '--in-turn' in options else TOPOLOGIES:
            try:
                result = case.compile(name)
                good = result['kernels'] >= result['expected'] and result['largest'] < result['allowed']
            except Exception as error:
                result, good = {'case': case.name, 'topology': name, 'error': str(error)[:2000]}, False
            failed += not good
            print(json.dumps({'good': good, **result}), flush=True)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))


