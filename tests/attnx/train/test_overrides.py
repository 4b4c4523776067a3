"""Every mechanism trains from configs/base.py with one line changed: `--config.model.pattern="('<name>',)"`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import catalog
from attnx import config as config_lib
from attnx.spec import side_input
from attnx.train import loop, optim, step
from configs import base

ROWS, LENGTH, VOCAB = 2, 32, 64
# All run with `make test SLOW=1`; else this one.
QUICK = ('kv_shifting',)
# A mixer that reads token ids alone gives the norm before it no gradient.
STILL = {name: ['body/stacks/0/layers/0/mixer_norm/scale'] for name in ('decoupled_embeddings', 'skip')}


def override(name: str) -> dict:
    """What differs from the base config: names of keys -> values."""
    spec = catalog.get(name)
    if 'memory' in spec.needs:
        return {'kind': 'encoder_decoder', 'cross': name, 'pattern': ('gqa',)}
    kind = {'kind': 'encoder'} if spec.causal == 'bidirectional' else {}
    if set(spec.reads(spec.config())) <= {'embedding'}:
        return {**kind, 'pattern': (name,)}
    # Layers that read what others publish come with them: the configs of the example.
    mixers = {f'part_{i}': {'kind': name, **config_lib.to_dict(c)} for i, c in enumerate(spec.examples)}
    return {**kind, 'mixers': mixers, 'pattern': tuple(mixers)}


def batch(name: str, packed: bool) -> dict:
    rng, spec = np.random.default_rng(0), catalog.get(name)
    tokens = rng.integers(1, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    ids = np.ones((ROWS, LENGTH), np.int32)
    if packed:
        ids[:, LENGTH // 2 :] = 2
    start = np.where(ids == 2, LENGTH // 2, 0)
    found = {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'weights': np.ones((ROWS, LENGTH), np.float32),
        'segment_ids': ids,
        'positions': (np.arange(LENGTH) - start).astype(np.int32),
    }
    if 'memory' in spec.needs:
        found |= {'source': tokens[:, :9], 'source_mask': np.ones((ROWS, 9), bool)}
    for side, kind in spec.inputs.items():
        if side != 'tokens' and not kind.endswith('?'):
            shape = side_input(kind, ROWS, LENGTH)
            found[side] = np.abs(2 * rng.standard_normal(shape.shape)).astype(shape.dtype)
    return found


@pytest.mark.parametrize(
    'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in catalog.scan()]
)
def test_two_steps(name):
    given = base.get_config()
    change = override(name)
    sizes = {'num_layers': max(2, len(change['pattern'])), 'vocab_size': VOCAB, 'max_length': LENGTH}
    mixers = change.pop('mixers', None)
    given.model.update(change | sizes)
    if mixers:
        given.model.mixers.update(mixers)
    if change.get('kind') == 'encoder_decoder':
        given.model.encoder.num_layers = 1
    config = config_lib.build(loop.Config, given)
    spec = catalog.get(name)
    # Some have room for one document a row by default.
    packed = 'packing' not in spec.limits and spec.documents(spec.config()) is None
    made = loop.program(config.model, packed=packed)
    transform, rate = optim.build(config.optim, config.steps, made.axes)
    update = jax.jit(step.train_step(made.forward, transform, rate, config.step))
    before = state = jax.jit(lambda: step.init_state(made.init(jax.random.key(0)), transform))()
    for _ in range(2):
        state, metrics = update(state, batch(name, packed), jax.random.key(0))
    assert int(metrics['bad']) == 0 and np.isfinite(float(metrics['loss']))
    still = [k for k, v in state['params'].items() if bool(jnp.all(v == before['params'][k]))]
    assert still == STILL.get(name, [])
