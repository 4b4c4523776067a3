"""The short convolution's kernel: interpreted and lowered on the CPU, the whole gate on a GPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.short_conv import check, mosaic_gpu


@pytest.mark.parametrize(
    'case',
    [
        check.Case(17, D=256, resets=0.3),
        check.Case(2, D=256),
        check.Case(40, B=1, D=256, W=3, activation=None, state=False),
        check.Case(40, B=1, D=256, W=1),
        check.Case(70, B=1, unit=4, resets=0.1),
        check.Case(70, B=1, D=256, unit=8, W=2, dtype='float32', state=False),
    ],
    ids=str,
)
def test_interpreted_with_race_detection(case):
    good, errors = check.check(case, interpret=True)
    assert good, errors


def test_lowers_for_hopper():
    x = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    options = {'activation': 'silu', 'unit_heads': 5}
    loss = lambda x, w, ids: mosaic_gpu.short_conv(x, w, segment_ids=ids, **options)[0].astype(jnp.float32).sum()
    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    arguments = x(2, 100, 640), x(4, 640), x(2, 100, dtype=jnp.int32)
    jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=['cuda'], disabled_checks=allowed)(*arguments)


@pytest.mark.parametrize(
    'shape, taps, words',
    [
        ((1, 1, 256), 4, 'one token'),
        ((1, 8, 130), 4, 'multiple of 128 and 256 at least, given 130'),
        ((1, 8, 256), 9, 'up to 8 taps, given 9'),
    ],
)
def test_refusals(shape, taps, words):
    x, kernel = jnp.zeros(shape, jnp.bfloat16), jnp.zeros((taps, shape[-1]), jnp.bfloat16)
    assert words in mosaic_gpu.unsupported(x, kernel)
    with pytest.raises(ValueError, match='short_conv on mosaic_gpu'):
        mosaic_gpu.short_conv(x, kernel)


def test_refuses_heads_wider_than_a_warp():
    x, kernel = jnp.zeros((1, 8, 512), jnp.bfloat16), jnp.zeros((4, 512), jnp.bfloat16)
    assert 'divide the 128 channels of a warp, given 256' in mosaic_gpu.unsupported(x, kernel, unit_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize('case', check.CASES, ids=str)
def test_grid(case):
    good, errors = check.check(case)
    assert good, errors
