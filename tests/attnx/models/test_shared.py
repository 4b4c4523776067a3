"""What layers publish to later ones in the same pass: who sees it, in training, by gradient and in decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import config as config_lib
from attnx import plan
from attnx.models import ModelConfig, build
from attnx.nn import from_flat, to_flat
from tests import tolerances
from tests.laws import close

SMALL = {'vocab_size': 31, 'width': 32, 'max_length': 32, 'mlp': {'kind': 'relu', 'hidden': 16}}
MIXERS = {
    'kv': {'kind': 'cla'},
    'q': {'kind': 'cla', 'source': 'shared'},
    'local': {'kind': 'sliding_window', 'window': 4},
}
REPEATED = {'pattern': ('kv', 'q'), 'num_layers': 4}  # each repeat has its own keys and values
ONCE = {'pattern': ('local',), 'num_layers': 5, 'overrides': {2: 'kv', 3: 'q', 4: 'q'}}  # YOCO: all read layer 2


def config_of(mixers=MIXERS, **fields):
    used = {*fields['pattern'], *fields.get('overrides', {}).values()}
    mixers = {name: mixer for name, mixer in mixers.items() if name in used}
    return config_lib.build(ModelConfig, {**SMALL, 'mixers': mixers, **fields}, 'config.model')


def model_of(**fields):
    config = config_of(**fields)
    return jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope='module')
def tokens():
    return np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)


@pytest.mark.quick('once')
@pytest.mark.parametrize('fields', [REPEATED, ONCE, {**ONCE, 'remat': 'full'}], ids=['repeated', 'once', 'remat'])
def test_scan_equals_layer_by_layer(fields, tokens):
    model = model_of(**fields)
    out = jax.jit(lambda m, t: m(t).logits)(model, tokens)
    close(out, jax.jit(lambda m, t: dict(m.trace(t)))(model, tokens)['logits'], tolerances.FLOAT32)


@pytest.mark.quick('repeated')
@pytest.mark.parametrize('fields', [REPEATED, ONCE], ids=['repeated', 'once'])
def test_readers_have_no_keys_and_send_gradients_to_their_source(fields, tokens):
    """The output projections of sources zeroed: what reaches their keys comes through the layers that read them."""
    model = model_of(**fields)
    flat = to_flat(model)
    sources = [name.rsplit('/', 2)[0] for name in flat if name.endswith('mixer/key/kernel') and 'stacks/0' not in name]
    sources = sources if fields is ONCE else ['body/stacks/0/layers/0/mixer']
    assert len(sources) == 1
    readers = [n for n in flat if '/mixer/query/' in n and n.replace('query', 'key') not in flat]
    assert sum(flat[n].shape[0] for n in readers) == 2
    mute = jax.tree_util.tree_map_with_path(
        lambda path, v: v * 0 if sources[0] + '/out/kernel' in _path(path) else v, model
    )
    grads = to_flat(jax.jit(jax.grad(lambda m: jnp.sum(jnp.square(m(tokens).logits))))(mute))
    for name in ('key/kernel', 'value/kernel'):
        found = np.abs(np.asarray(grads[f'{sources[0]}/{name}'])).max(axis=(1, 2))
        assert (found > 0).all(), 'a repeat of the source gets no gradient'


def _path(path):
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', None)))) for k in path)


@pytest.mark.quick('once')
@pytest.mark.parametrize('fields', [REPEATED, ONCE], ids=['repeated', 'once'])
def test_decoding_equals_the_full_pass(fields, tokens):
    model = model_of(**fields)
    prompts = [tokens[0, :5].tolist(), tokens[1, :3].tolist()]
    found, logits = attnx.generate(model, prompts, max_new_tokens=4, temperature=0, return_logits=True)
    rows = np.zeros((2, 9), np.int32)
    for row, prompt, new in zip(rows, prompts, found):
        row[: len(prompt) + 4] = [*prompt, *new]
    whole = jax.jit(lambda m: m(rows).logits)(model)
    for row, prompt, seen in zip(whole, prompts, logits):
        close(seen, row[len(prompt) - 1 : len(prompt) + 3], tolerances.FLOAT32)


def test_a_prompt_leaves_readers_its_last_token_alone(tokens):
    """YOCO's early exit: the same logits and state, without most of the work of layers that only read."""
    model = model_of(**{**ONCE, 'num_layers': 12, 'overrides': {2: 'kv', **dict.fromkeys(range(3, 12), 'q')}})
    ids = np.ones_like(tokens)
    ids[1, :4] = 0  # a shorter prompt, padded on the left
    prefill = lambda last: jax.jit(lambda m, t: m(t, segment_ids=ids, state=m.init_state(2, 16), last=last)[:2])
    (whole, state), (end, other) = prefill(False)(model, tokens), prefill(True)(model, tokens)
    close(end, whole[:, -1:], tolerances.FLOAT32)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
        close(b, a, tolerances.FLOAT32)
    run = jax.make_jaxpr(lambda m, t: m(t, segment_ids=ids, state=m.init_state(2, 16), last=True).logits)
    scans = [e.outvars[0].aval.shape for e in run(model, tokens).eqns if e.primitive.name == 'scan']
    assert scans == [(2, 12, 32), (2, 12, 32), (2, 1, 32)]  # local layers, the source, its readers


def test_only_sources_keep_a_cache():
    state = jax.eval_shape(lambda: model_of(**ONCE).init_state(1, 8))
    kept = [sum(leaf.size for leaf in jax.tree.leaves(layer['mixer'])) > 0 for stack in state for layer in stack]
    assert kept == [True, True, False]  # local, kv, q
    shape = plan.plan(config_of(**ONCE), length=16, batch=2)
    assert not shape.refused
    assert [layer.state_bytes > 0 for layer in shape.layers] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ('fields', 'error'),
    [
        ({'pattern': ('q', 'kv'), 'num_layers': 4}, r"layer 0 \(q\) reads 'kv', which no earlier layer .* embedding"),
        ({'pattern': ('kv',), 'num_layers': 4, 'overrides': {3: 'q'}}, r"layer 3 \(q\) reads 'kv'"),  # kv is repeated
        ({'pattern': ('kv', 'other'), 'num_layers': 2}, r"layer 1 \(other\) reads 'kb'"),
        ({'pattern': ('kv', 'wide'), 'num_layers': 2}, r'reads keys and values of 4 heads of width 8'),
    ],
)
def test_what_is_not_published_is_refused(fields, error):
    mixers = MIXERS | {
        'other': {'kind': 'cla', 'source': 'shared', 'name': 'kb'},
        'wide': {'kind': 'cla', 'source': 'shared', 'num_kv_heads': 4},
    }
    with pytest.raises(ValueError, match=error):
        config = config_of(**{**fields, 'mixers': mixers})
        config.layers()
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        jax.eval_shape(lambda t: build(config, rngs=nnx.Rngs(0))(t).logits, tokens)


def test_side_inputs_reach_layers_and_their_absence_is_told(tokens):
    config = config_of(pattern=('guided_heads',), num_layers=1, vocab_size=0, input_dim=4)
    with pytest.raises(ValueError, match=r"layer 0 \(guided_heads\) needs the side input 'tokens' \(int32 B T\).*it has: none"):
        config.check_inputs(())
    config.check_inputs(('tokens',))
    mixers = {'t': {'kind': 'task_experts', 'num_tasks': 2, 'num_experts': 4, 'top_k': 2}}
    config = config_of(pattern=('t',), num_layers=2, mixers=mixers)
    config.check_inputs(())  # 'int32 B T ?': one task needs none
    model = jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    flat = {k: v + 0.1 * rng.standard_normal(v.shape).astype(v.dtype) for k, v in to_flat(model).items()}
    run = jax.jit(lambda f, task: from_flat(model, f)(tokens, inputs={'task': task}).logits)
    assert not np.allclose(run(flat, np.zeros_like(tokens)), run(flat, np.ones_like(tokens)))
    with pytest.raises(ValueError, match=r"no side input 'task' .there is: tokens."):
        jax.eval_shape(lambda m: m(tokens).logits, model)
