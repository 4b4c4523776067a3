import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx.ops import positions
from attnx.ops.positions import Scaling, axial_rope, lrpe, mixed_rope, permute, reflect, rope, rope_frequencies, rotate
from tests import tolerances
from tests.attnx.ops.recurrences import assert_close


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def scores(turn, q, k, at, shift=0):
    """Products of one query and one key seen from all pairs of places, [T, T]."""
    T = len(at)
    spread = lambda x: jnp.broadcast_to(x, (1, T, 1, x.shape[-1]))
    q, k = turn(spread(q), jnp.asarray(at)), turn(spread(k), jnp.asarray(at) + shift)
    return q[0, :, 0] @ k[0, :, 0].T


# Sinusoids


def test_sinusoidal():
    found = positions.sinusoidal(jnp.arange(7), 4, dtype=jnp.float64)
    p = np.arange(7)
    expected = np.stack([np.sin(p), np.cos(p), np.sin(p / 100), np.cos(p / 100)], axis=-1)
    assert_close(found, expected, 1e-6)  # angles are float32
    assert positions.sinusoidal(jnp.arange(6).reshape(2, 3), 8).shape == (2, 3, 8)


# RoPE


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('rotary_dim', [None, 4])
def test_rope_depends_on_the_difference(interleaved, rotary_dim):
    turn = lambda x, p: rope(x, p, interleaved=interleaved, rotary_dim=rotary_dim)
    q, k, at = normal(8), normal(8, seed=1), np.array([0, 3, 4, 10, 1000])
    assert_close(scores(turn, q, k, at), scores(turn, q, k, at + 77), tolerances.FLOAT64)
    table = scores(turn, q, k, np.arange(9))
    for gap in range(-8, 9):
        diagonal = np.diagonal(np.asarray(table), gap)
        assert_close(diagonal, np.full_like(diagonal, diagonal[0]), tolerances.FLOAT64)
    assert_close(np.diagonal(table), np.full(9, float(q @ k)), tolerances.FLOAT64)


@pytest.mark.parametrize('interleaved', [False, True])
def test_rope_equals_complex_rotation(interleaved):
    x = normal(2, 5, 3, 8)
    at = jnp.asarray([[0, 1, 2, 3, 4], [5, 0, 9, 9, 100]])
    pair = (lambda y: y[..., 0::2] + 1j * y[..., 1::2]) if interleaved else (lambda y: y[..., :4] + 1j * y[..., 4:])
    turn = np.exp(1j * np.asarray(at)[..., None, None] * 10000.0 ** (-np.arange(4) / 4))
    found = pair(np.asarray(rope(x, at, interleaved=interleaved)))
    expected = pair(np.asarray(x)) * turn
    assert_close(found.real, expected.real, tolerances.FLOAT64)
    assert_close(found.imag, expected.imag, tolerances.FLOAT64)


def test_rope_keeps_norms_and_untouched_channels():
    x, at = normal(1, 5, 2, 8), jnp.arange(5)
    assert_close(jnp.linalg.norm(rope(x, at), axis=-1), jnp.linalg.norm(x, axis=-1), tolerances.FLOAT64)
    assert np.array_equal(rope(x, at, rotary_dim=6)[..., 6:], x[..., 6:])
    assert np.array_equal(rope(x, jnp.zeros(5)), x)
    half = x.astype(jnp.bfloat16)
    assert rope(half, at).dtype == jnp.bfloat16
    # Far positions stay apart although bfloat16 can't tell them apart.
    far = rope(jnp.broadcast_to(half[:, :1], half.shape), 40000 + at).astype(jnp.float32)
    assert not np.array_equal(far[:, 0], far[:, 1])


@pytest.mark.parametrize('kind', positions.SCALINGS)
def test_scaling_by_one_changes_nothing(kind):
    plain = rope_frequencies(16)
    scaled = rope_frequencies(16, scaling=Scaling(kind, 1.0, original_length=64), length=64)
    assert_close(scaled.inverse, plain.inverse, tolerances.FLOAT64)
    assert scaled.factor == 1.0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(positions.SCALINGS), st.floats(1.1, 64), st.sampled_from([4, 16, 64]))
def test_scaling_slows_every_pair_by_at_most_the_factor(kind, factor, width):
    plain, scaled = (
        rope_frequencies(width, scaling=scaling, length=round(64 * factor)).inverse
        for scaling in (None, Scaling(kind, factor, original_length=64))
    )
    ratio = plain / scaled
    longest = factor if kind != 'dynamic' else factor * round(64 * factor) / 64 - factor + 1
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= longest * (1 + 1e-9)).all()
    assert (np.diff(ratio) >= -1e-9 * factor).all(), 'slower pairs are stretched more'


def test_scalings():
    plain = rope_frequencies(64).inverse
    frequencies = lambda *args, **kwargs: rope_frequencies(64, scaling=Scaling(*args), **kwargs)
    assert_close(frequencies('linear', 4.0).inverse, plain / 4, tolerances.FLOAT64)
    ntk = frequencies('ntk', 4.0).inverse
    assert_close(ntk[[0, -1]], plain[[0, -1]] / [1, 4], tolerances.FLOAT64)
    for length in (64, 2048):  # not yet beyond the original length
        assert_close(frequencies('dynamic', 4.0, 2048, length=length).inverse, plain, tolerances.FLOAT64)
    stretched = frequencies('dynamic', 4.0, 2048, length=4096).inverse  # (4 * 2) - 3 = 5
    assert_close(stretched, frequencies('ntk', 5.0).inverse, tolerances.FLOAT64)
    yarn = frequencies('yarn', 16.0, 4096)
    assert yarn.factor == pytest.approx(0.1 * np.log(16) + 1)
    assert_close(yarn.inverse[:5], plain[:5], tolerances.FLOAT64)
    assert_close(yarn.inverse[-5:], plain[-5:] / 16, tolerances.FLOAT64)
    # Bounds by hand for 64 channels, base 10000, length 4096: dim(32) = 10.46, dim(1) = 22.5.
    ramp = np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)
    assert_close(yarn.inverse, plain / 16 * ramp + plain * (1 - ramp), tolerances.FLOAT64)
    assert frequencies('yarn', 16.0, 4096, 32.0, 1.0, 1.5).factor == 1.5


def test_yarn_multiplies_scores_by_the_factor_squared():
    q, k, scaling = normal(16), normal(16, seed=1), Scaling('yarn', 8.0, 64)
    factor = rope_frequencies(16, scaling=scaling).factor
    same = scores(lambda x, p: rope(x, p, scaling=scaling), q, k, np.arange(3))
    assert_close(np.diagonal(same), np.full(3, float(q @ k) * factor**2), tolerances.FLOAT64)


# More dimensions


GRID = np.stack(np.meshgrid(np.arange(3), np.arange(4), indexing='ij'), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('interleaved', [False, True])
def test_axial_rope_depends_on_the_differences(shared, interleaved):
    turn = lambda x, c: axial_rope(x, c, shared=shared, interleaved=interleaved)
    q, k = normal(8), normal(8, seed=1)
    expected = np.asarray(scores(turn, q, k, GRID))
    assert_close(scores(turn, q, k, GRID + np.array([5, 11])), expected, tolerances.FLOAT64)
    moved = scores(turn, q, k, GRID, shift=np.array([1, 0]))
    assert np.abs(np.asarray(moved) - expected).max() > 1e-3


def test_axial_rope_is_rope_on_each_half():
    """As released: adjacent pairs, one half of the channels turned by one axis, the other half by the other."""
    x, c = normal(2, 12, 3, 8), jnp.broadcast_to(GRID, (2, 12, 2))
    found = axial_rope(x, c, interleaved=True)
    first = rope(x[..., :4], c[..., 0], base=100.0, interleaved=True)
    second = rope(x[..., 4:], c[..., 1], base=100.0, interleaved=True)
    assert_close(found, jnp.concatenate([first, second], axis=-1), tolerances.FLOAT64)


def test_shared_frequencies_with_equal_coordinates_are_rope():
    x, at = normal(2, 5, 3, 16), jnp.arange(5)
    found = axial_rope(x, jnp.stack([at] * 3, axis=-1), sections=(2, 3, 3), shared=True, base=10000.0)
    assert_close(found, rope(x, at), tolerances.FLOAT64)


def test_mixed_rope_holds_axial_rope():
    x, q, k = normal(1, 12, 3, 8), normal(8), normal(8, seed=1)
    half = rope_frequencies(4, 100.0).inverse
    axial = np.stack([np.concatenate([half, 0 * half]), np.concatenate([0 * half, half])])
    spread = jnp.broadcast_to(axial[:, None], (2, 3, 4))
    assert_close(mixed_rope(x, GRID, spread), axial_rope(x, GRID), tolerances.FLOAT64)
    learned = normal(2, 1, 4, seed=2)
    turn = lambda x, c: mixed_rope(x, c, learned)
    assert_close(scores(turn, q, k, GRID + 3), scores(turn, q, k, GRID), tolerances.FLOAT64)
    assert np.abs(jax.grad(lambda f: mixed_rope(x[:, :, :1], GRID, f)[..., 0].sum())(learned)).max() > 0


def test_lrpe_is_a_sum_of_cosines():
    q, k, theta = normal(6), normal(6, seed=1), normal(1, 6, seed=2)
    found = scores(lambda x, p: lrpe(x, p, theta), q, k, np.arange(4))
    gap = np.arange(4)[:, None] - np.arange(4)
    expected = np.einsum('h,h,ijh->ij', q, k, np.cos(gap[..., None] * np.asarray(theta)[0]))
    assert_close(found, expected, tolerances.FLOAT64)


def test_permute_is_the_power_of_a_permutation():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(9), np.roll(np.arange(9), 3)])
    x, at = normal(1, 6, 2, 9), np.array([0, 1, 2, 3, 50, 470])
    found = permute(x, at, rows)
    for t, p in enumerate(at):
        for n, row in enumerate(rows):
            power = np.arange(9)
            for _ in range(p):
                power = row[power]
            assert np.array_equal(found[0, t, n], x[0, t, n][power])


def test_reflect_is_its_own_inverse():
    x, normals = normal(2, 5, 3, 8), normal(3, 8, seed=1)
    found = reflect(x, normals)
    assert_close(reflect(found, normals), x, tolerances.FLOAT64)
    assert_close(reflect(normals[None, None], normals), -normals[None, None], tolerances.FLOAT64)
    assert_close((found * found).sum(-1), (x * x).sum(-1), tolerances.FLOAT64)


def test_positions_per_row_and_vmap():
    x, at = normal(2, 5, 3, 8), jnp.asarray([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    found = rope(x, at)
    assert_close(found[1:], rope(x[1:], at[1]), tolerances.FLOAT64)
    mapped = jax.vmap(lambda x, p: rope(x[None], p)[0])(x, at)
    assert_close(mapped, found, tolerances.FLOAT64)


def test_bad_input():
    x, at = normal(2, 5, 3, 8), jnp.arange(5)
    cases = [
        (lambda: rope(x, jnp.arange(4)), r'positions has shape \(4,\), expected \[B, T\] with B, T = \(2, 5\)'),
        (lambda: rope(x[0], at), r'x has shape \(5, 3, 8\) and dtype float64, expected floating \[B, T, N, H\]'),
        (lambda: rope(x, at, rotary_dim=3), 'rotary_dim is 3, expected an even number up to the head width 8'),
        (lambda: rope(x, at, rotary_dim=10), 'rotary_dim is 10'),
        (lambda: rope(x, at, scaling=Scaling('yarm', 2.0)), "unknown scaling 'yarm'; did you mean 'yarn'"),
        (lambda: rope(x, at, scaling=Scaling('yarn', 2.0)), 'yarn scaling has original_length 0'),
        (lambda: rope(x, at, scaling=Scaling('dynamic', 2.0, 64)), 'dynamic scaling needs length'),
        (lambda: rope(x, at, scaling=Scaling('linear', 0.5)), 'scaling factor is 0.5, expected at least 1'),
        (lambda: rope(x, at, base=1.0), 'base is 1.0, expected more than 1'),
        (lambda: axial_rope(x, at), r'coordinates has shape \(5,\), expected \[B, T, n\]'),
        (lambda: axial_rope(x, jnp.zeros((5, 3))), 'rotary_dim 8 has 4 pairs, expected a multiple of the 3 axes'),
        (lambda: axial_rope(x, jnp.zeros((5, 2)), sections=(1, 2)), r'sections \(1, 2\), expected 2 counts .* 4 pairs'),
        (lambda: mixed_rope(x, jnp.zeros((5, 2)), jnp.zeros((2, 4, 4))), r'frequencies has shape \(2, 4, 4\)'),
        (lambda: lrpe(x, at, jnp.zeros((8,))), r'expected \[N, H\] = \(3, 8\)'),
        (lambda: reflect(x, jnp.zeros((8,))), r'normals has shape \(8,\), expected \[N, H\] = \(3, 8\)'),
        (lambda: permute(x, at, np.zeros((3, 8), int)), 'rows that hold every channel once'),
        (lambda: rotate(x, jnp.zeros((2, 5, 5))), 'H at least 10'),
        (lambda: positions.sinusoidal(at, 5), 'rotary_dim is 5, expected a positive even number'),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
