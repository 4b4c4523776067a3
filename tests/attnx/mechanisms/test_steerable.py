"""Turning and moving the points turns the output, whatever the angle."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
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
    parts = mixer.split(jnp.asarray(x))
    if group == 'se2':
        angle = np.arctan2(r[1, 0], r[0, 0])
        return mixer.join([p * np.exp(-1j * m * angle).astype(np.complex64) for m, p in enumerate(parts)])
    e = np.zeros((5, 3, 3))
    e[0, [0, 1], [1, 0]] = e[1, [1, 2], [2, 1]] = e[2, [0, 2], [2, 0]] = 2**-0.5
    e[3, [0, 1], [0, 1]] = np.array([1, -1]) / 2**0.5
    e[4, [0, 1, 2], [0, 1, 2]] = np.array([-1, -1, 2]) / 6**0.5
    two = np.einsum('aij,ik,jl,bkl->ab', e, r, r, e)
    matrices = [np.eye(1), r, two]
    return mixer.join([jnp.einsum('pq,btqc->btpc', d.astype(np.float32), p) for d, p in zip(matrices, parts)])


@pytest.mark.parametrize('weigh', ['modulus', 'real'])
@pytest.mark.parametrize('group', ['se2', 'se3'])
def test_equivariance(group, weigh):
    options = {'group': group, 'num_heads': 2, 'frequencies': 3, 'bells': 4, 'gate': True, 'weigh': weigh}
    mixer = oracle.build('steerable', width=steerable_width[group], causal=False, **options)
    x, r = oracle.inputs(width=steerable_width[group], length=7), turn(group)
    points = np.random.default_rng(1).standard_normal((2, 7, 3))
    run = lambda x, points: mixer(x, Context(inputs={'coordinates': jnp.asarray(points, jnp.float32)})).y
    y = run(jnp.asarray(x), points)
    moved = run(act(mixer, x, r, group), points @ r.T + np.array([0.3, -2.0, 0.0 if group == 'se2' else 1.0]))
    close(moved, act(mixer, y, r, group), 1e-4)
    assert np.abs(np.asarray(moved) - np.asarray(y)).max() > 0.01  # the rotation is not the identity
