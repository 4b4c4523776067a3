"""What is read from a compiled program: known products, bytes and traffic inside loops."""

# ruff: noqa: E501  (lines as compilers print them)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnx import sharding
from attnx.train import hlo


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def run(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    cost = hlo.cost(compiled(run, jnp.ones((64, 32)), jnp.ones((7, 32, 32))), 1)
    assert cost.flops == 7 * 2 * 64 * 32 * 32 and not cost.unknown and not cost.collectives
    # Of the stacked weights a round reads its own, in whichever instruction.
    assert 7 * 4 * 32 * 32 <= cost.bytes < 7 * 10 * 4 * (64 * 32 + 32 * 32)


def test_gradients_of_a_scan_keep_one_array_a_round():
    def loss(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    cost = hlo.cost(compiled(jax.grad(loss, (0, 1)), jnp.ones((64, 32)), jnp.ones((7, 32, 32))), 1)
    assert cost.flops == 3 * 7 * 2 * 64 * 32 * 32
    assert 7 * 64 * 32 * 4 <= cost.kept <= 2 * 7 * 64 * 32 * 4


def test_collectives_by_kind_and_volume():
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 4})

    def body(x, _):
        w = lax.all_gather(x, 'fsdp', tiled=True)  # [8, 16] -> [32, 16]
        y = lax.psum(jnp.sin(x), 'data')
        z = lax.psum_scatter(jnp.cos(w), 'fsdp', tiled=True)
        return lax.ppermute(y + z, 'fsdp', [(i, (i + 1) % 4) for i in range(4)]), None

    run = jax.shard_map(lambda x: lax.scan(body, x, None, length=7)[0], mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'))
    given = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, P('fsdp')))
    with jax.set_mesh(mesh):
        cost = hlo.cost(compiled(run, given), 8)
    found = {}
    for c in cost.collectives:
        total = found.setdefault((c.kind, c.group), np.zeros(3))
        total += np.array([c.times, c.times * c.payload, c.times * c.wire])
    rows, columns, whole, part = (0, 1, 2, 3), (0, 4), 32 * 16 * 4, 8 * 16 * 4
    want = {
        ('all-gather', rows): (7, 7 * whole, 7 * whole * 3 / 4),
        ('all-reduce', columns): (7, 7 * part, 7 * part * 2 * 1 / 2),
        ('reduce-scatter', rows): (7, 7 * whole, 7 * whole * 3 / 4),
    }
    for name, numbers in want.items():
        np.testing.assert_array_equal(found[name], numbers)
    (permute,) = (v for (kind, _), v in found.items() if kind == 'collective-permute')
    np.testing.assert_array_equal(permute, (7, 7 * part, 7 * part))


@pytest.mark.parametrize(
    ('text', 'group'),
    [
        ('replica_groups={{0,2},{1,3}}', (0, 2)),
        ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4)),
        ("replica_groups=mesh['data'=4,'fsdp'=8,'tensor'=2] {'fsdp'}", (0, 2, 4, 6, 8, 10, 12, 14)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ('source_target_pairs={{3,5},{5,3}}', (3, 5)),
        ('', (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups(text, group):
    assert hlo.group_of(text, 8) == group


# Lines as the TPU compiler prints them.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused.1 (p.0: bf16[14,64,32], p.1: s32[]) -> bf16[64,32] {
  %p.0 = bf16[14,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %c.1 = s32[]{:T(128)} constant(0)
  %slice.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %c.1, %c.1), dynamic_slice_sizes={1,64,32}
  ROOT %bitcast.1 = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
}

%all-reduce-scatter.1 (p.2: bf16[64,32]) -> bf16[8,32] {
  %p.2 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %c.2 = s32[]{:T(128)} constant(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%p.2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice.2 = bf16[8,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %c.2, %c.2), dynamic_slice_sizes={8,32}
}

%body (arg: (s32[], bf16[14,64,32], bf16[8,32])) -> (s32[], bf16[14,64,32], bf16[8,32]) {
  %arg = (s32[]{:T(128)}, bf16[14,64,32]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[8,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w.1 = bf16[14,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %w.2 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%w.1, %i.1), kind=kLoop, calls=%fused.1
  %y.1 = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%w.2), kind=kCustom, calls=%all-reduce-scatter.1
  %k.1 = (bf16[4,8]{1,0}, f32[4]{0}) custom-call(%y.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"eH(%x)","cost_estimate":{"flops":"1000","transcendentals":"8","bytes_accessed":"300"}}}
  ROOT %out = (s32[]{:T(128)}, bf16[14,64,32]{2,1,0:T(8,128)(2,1)}, bf16[8,32]{1,0:T(8,128)(2,1)}) tuple(%i.1, %w.1, %y.1)
}

%condition (arg.1: (s32[], bf16[14,64,32], bf16[8,32])) -> pred[] {
  %c.3 = s32[]{:T(128)} constant(14)
  %arg.1 = (s32[]{:T(128)}, bf16[14,64,32]{2,1,0:T(8,128)(2,1)}, bf16[8,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %c.3), direction=LT
}

ENTRY %main (q: bf16[4,64,128], k: bf16[4,128,32]) -> bf16[4,64,32] {
  %q = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,128,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %init = (s32[]{:T(128)}, bf16[14,64,32]{2,1,0:T(8,128)(2,1)}, bf16[8,32]{1,0:T(8,128)(2,1)}) tuple(%q, %k, %k)
  %while.1 = (s32[]{:T(128)}, bf16[14,64,32]{2,1,0:T(8,128)(2,1)}, bf16[8,32]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  ROOT %conv = bf16[4,64,32]{2,1,0:T(8,128)(2,1)} convolution(%q, %k), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""


def test_what_the_tpu_compiler_prints():
    """A slice counts as the slice, on-chip memory is free, kernels tell their work, a scatter hides in a fusion."""
    cost = hlo.cost(TPU, 8)
    by_name = {w.name: w for w in cost.work}
    assert by_name['w.2'].bytes == 64 * 32 * 2 + 4 and by_name['w.2'].times == 14
    assert (by_name['k.1'].flops, by_name['k.1'].bytes) == (1000, 300)
    (scatter,) = cost.collectives
    assert (scatter.kind, scatter.times, scatter.payload) == ('reduce-scatter', 14, 64 * 32 * 2)
    assert by_name['conv'].flops == 2 * 4 * 64 * 128 * 32  # a product of 4 pairs, written as a dilated convolution


def test_elements_of_tuples_written_short():
    """XLA's files write get-tuple-element(%x), index=1 as %x#1."""
    text = """HloModule m

%body (p: (s32[], f32[7,4,8], f32[8,8])) -> (s32[], f32[7,4,8], f32[8,8]) {
  %p = (s32[], f32[7,4,8]{2,1,0}, /*index=2*/f32[8,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %p#2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[7,4,8]{2,1,0}, f32[8,8]{1,0}) tuple(%p#0, %p#1, %p#2)
}

%condition (q: (s32[], f32[7,4,8], f32[8,8])) -> pred[] {
  %q = (s32[], f32[7,4,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%q#0, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[7,4,8], f32[8,8])) -> (s32[], f32[7,4,8], f32[8,8]) {
  %a = (s32[], f32[7,4,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[7,4,8]{2,1,0}, f32[8,8]{1,0}) while(%a), condition=%condition, body=%body
}
"""
    program, _ = hlo.parse(text)
    assert program['body']['p#2'].type == 'f32[8,8]{1,0:T(8,128)}' and list(program['body'])[-1] == 't'
    cost = hlo.cost(text, 1)
    assert cost.flops == 7 * 2 * 4 * 8 * 8 and not cost.unknown
    assert cost.bytes == 7 * 4 * (4 * 8 + 8 * 8 + 4 * 8)
