"""The flow of logits: exact against fixed steps, still where its field is zero; the transition length in its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import catalog
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

daft = catalog.module('daft')


@pytest.mark.parametrize('rate', [0.0, 1e-3, -0.8, 1.5])
def test_exact_is_the_solver(rate):
    z, drive, ramp = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).standard_normal((3, 7)))
    exact, rk4 = daft.Config(), daft.Config(solver='rk4', solver_steps=32)
    run = lambda config: daft.flow(z, jnp.float32(rate), drive, ramp, config)
    close(run(exact), run(rk4), 1e-5)


def test_without_a_field_nothing_moves():
    mixer, x = oracle.build('daft', num_heads=2, steps=3, report=True), oracle.inputs()
    length = jax.jit(lambda mixer: mixer(x, oracle.Context()).aux['transition_length'])
    moving = length(mixer)
    mixer.direction[...] = jnp.zeros_like(mixer.direction[...])
    assert float(length(mixer)) == 0 < float(moving) < 2
    assert not np.asarray(mixer.queries(jnp.asarray(x))).any()


def test_disjoint_maps_are_one_apart():
    key = 100 * jnp.eye(2).reshape(1, 2, 1, 2)
    query = jnp.eye(2).reshape(1, 1, 2, 2)  # two steps, each on another key
    close(daft.transition_length(query, key, 2, 1.0, None, None), [[[1.0]]], tolerances.FLOAT32)
    assert dataclasses.is_dataclass(daft.Config)
