"""A stand-in model for tests of steps, a flat dict of parameters and pure functions; and a whole run of a tiny real one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.train import loop
from tests import runs

VOCAB, WIDTH, LAYERS = 11, 8, 3
AXES = {
    'embed/embedding': ('vocab', 'embed'),
    'stacks/0/layers/0/mlp/kernel': ('layers', 'embed', 'heads'),
    'stacks/0/layers/0/norm/scale': ('layers', 'embed'),
}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {'vocab': VOCAB, 'embed': WIDTH, 'heads': WIDTH, 'layers': LAYERS}
    shapes = {name: tuple(sizes[a] for a in axes) for name, axes in AXES.items()}
    draw = lambda name, shape: np.ones(shape) if name.endswith('scale') else rng.normal(size=shape) * 0.3
    return {name: jnp.asarray(draw(name, shape), jnp.float32) for name, shape in shapes.items()}


def forward(params, batch, key, step=None):
    """Mixes each token with the mean of those before it. aux: one loss per layer."""
    x = params['embed/embedding'][batch['tokens']]
    count = jnp.arange(1, x.shape[1] + 1)[:, None]

    def body(x, layer):
        kernel, scale = layer
        y = jnp.tanh((jnp.cumsum(x, 1) / count * scale) @ kernel)
        return x + y, jnp.mean(jnp.square(y))

    x, sizes = jax.lax.scan(body, x, (params['stacks/0/layers/0/mlp/kernel'], params['stacks/0/layers/0/norm/scale']))
    return x @ params['embed/embedding'].T, {'size_loss': sizes, 'size': sizes}


def make_batch(seed=0, rows=8, length=6, **change):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (rows, length)).astype(np.float32)
    return {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'weights': weights} | change


@pytest.fixture
def tiny():
    """The stand-in as a namespace: params(), batch(), forward, AXES."""
    return types.SimpleNamespace(params=make_params, batch=make_batch, forward=forward, axes=AXES, vocab=VOCAB)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(12):
        (folder / f'file_{i}.py').write_text(runs.TEXT.replace('10', str(i)) * 3)
    return str(folder)


@pytest.fixture
def config(corpus, tmp_path):
    return runs.make_config(corpus, tmp_path / 'run')


@pytest.fixture(scope='session')
def whole(corpus, tmp_path_factory):
    """The folder of an uninterrupted run."""
    made = runs.make_config(corpus, tmp_path_factory.mktemp('whole') / 'run')()
    assert loop.run(made).status == 'complete'
    return made.run_dir
