"""Turning and moving the points turns the output, whatever the angle."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.encoder import steerable
from tests.attnx.mechanisms import oracle
from tests.laws import close

steerable_width = {'se2': 24, 'se3': 36}


def turn(group):
    """A random rotation: matrix [3, 3]."""
    if group == 'se2':
        c, s = np.cos(0.7), np.sin(0.7)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    q = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]
    return q * np.sign(np.linalg.det(q))


def act(mixer, x, r, group):
    """The action of a rotation on features [B, T, M]."""
    f = mixer.split(jnp.asarray(x))
    if group == 'se2':
        angle = np.arctan2(r[1, 0], r[0, 0])
        return mixer.join(f * np.exp(-1j * np.arange(3) * angle).astype(np.complex64)[:, None])
    e = np.zeros((5, 3, 3))
    e[0, [0, 1], [1, 0]] = e[1, [1, 2], [2, 1]] = e[2, [0, 2], [2, 0]] = 2**-0.5
    e[3, [0, 1], [0, 1]] = np.array([1, -1]) / 2**0.5
    e[4, [0, 1, 2], [0, 1, 2]] = np.array([-1, -1, 2]) / 6**0.5
    two = np.einsum('aij,ik,jl,bkl->ab', e, r, r, e)
    matrices = [np.eye(1), r, two]
    parts = [f[:, :, :1], f[:, :, 1:4], f[:, :, 4:]]
    turned = [jnp.einsum('pq,btqc->btpc', d.astype(np.float32), p) for d, p in zip(matrices, parts)]
    return mixer.join(jnp.concatenate(turned, axis=2))


@pytest.mark.quick("se2-{'weigh': 'real'}", "se3-{'product': True, 'gate': True}")
@pytest.mark.parametrize('fields', [{'gate': True}, {'weigh': 'real'}, {'product': True, 'gate': True}], ids=str)
@pytest.mark.parametrize('group', ['se2', 'se3'])
def test_equivariance(group, fields):
    options = {'group': group, 'num_heads': 2, 'frequencies': 3, 'bells': 4, **fields}
    mixer = oracle.build('steerable', width=steerable_width[group], causal=False, **options)
    x, r = oracle.inputs(width=steerable_width[group], length=7), turn(group)
    points = np.random.default_rng(1).standard_normal((2, 7, 3))
    run = lambda x, points: oracle.run(mixer, x, inputs={'coordinates': points.astype(np.float32)})
    y = run(jnp.asarray(x), points)
    moved = run(act(mixer, x, r, group), points @ r.T + np.array([0.3, -2.0, 0.0 if group == 'se2' else 1.0]))
    close(moved, act(mixer, y, r, group), 1e-4)
    assert np.abs(np.asarray(moved) - np.asarray(y)).max() > 0.01  # the rotation is not the identity


def test_products_are_those_of_harmonics():
    """Products of harmonics of one direction are harmonics of it, up to a number: frequencies add, l = 1 and 2 make 0, 1, 2."""
    u = np.random.default_rng(2).standard_normal((1, 5, 3))
    u = jnp.asarray(u / np.linalg.norm(u, axis=-1, keepdims=True), jnp.float32)
    flat = u.at[..., 2].set(0)
    flat = flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)
    for group, where in (('se2', flat), ('se3', u)):
        parts = [steerable.harmonics(where, degree, group)[..., None] for degree in range(3)]
        for part, found in zip(parts, steerable.products(parts, group)):
            for term in found:
                ratio = np.sum(np.conj(part) * term, axis=2) / np.sum(np.abs(part) ** 2, axis=2)
                assert np.allclose(term, ratio[:, :, None] * part, atol=1e-6) and np.ptp(np.abs(ratio)) < 1e-5
