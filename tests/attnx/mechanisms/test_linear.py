"""What is special to the linear mechanisms: identities between them and the papers' constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import catalog
from attnx.nn.recurrence import document_positions
from attnx.spec import Context, Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def build(name, width=16, num_layers=4, causal=True, **options):
    spec = attnx.get(name)
    dims = Dims(width=width, causal=causal, num_layers=num_layers)
    return jax.jit(lambda: spec.build(spec.config(**options), dims, rngs=nnx.Rngs(0)))()


def inputs(width=16, batch=2, length=12, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length, width)).astype(np.float32)


def heads(linear, x, n):
    """float64 [B, T, N, H] of a projection."""
    y = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64)
    return y.reshape(*y.shape[:-1], n, -1)


def silu(x):
    return x / (1 + np.exp(-x))


def recurrence(q, k, v, decay):
    """o_t = q_t S_t, S_t = decay_t S_{t-1} + k_t^T v_t in float64; decay broadcasts to [B, T, N]."""
    decay = np.broadcast_to(decay, v.shape[:3])
    state, out = np.zeros((*v[:, 0].shape[:2], q.shape[-1], v.shape[-1])), np.zeros(v.shape)
    for t in range(v.shape[1]):
        state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = np.einsum('bnh,bnhv->bnv', q[:, t], state)
    return out


def rms(x, eps=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def merge(x):
    return x.reshape(*x.shape[:2], -1)


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


def test_positions_restart_in_documents_and_go_on_after_a_state():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    start = jnp.asarray([5, 7])
    found = document_positions(Context(), ids, 6, start)
    assert found.tolist() == [[5, 6, 0, 1, 2, 0], [7, 8, 9, 10, 11, 12]]
    assert document_positions(Context(), None, 3).tolist() == [[0, 1, 2]]
    given = jnp.full((2, 6), 4)
    assert document_positions(Context(positions=given), ids, 6, start) is given


# RetNet


def test_retnet_decays_are_the_papers():
    module = catalog.module('retnet')
    np.testing.assert_allclose(np.exp(module.log_decay(4)), 1 - 2.0 ** -np.arange(5, 9), rtol=1e-6)


def test_retnet_is_its_parallel_form():
    mixer, x, n = build('retnet', num_heads=2), inputs(), 2
    q, k, v = (heads(f, x, n) for f in (mixer.query, mixer.key, mixer.value))
    theta = 10_000.0 ** -np.linspace(0, 1, 4)
    turn = np.exp(1j * np.arange(12)[:, None] * theta)[None, :, None]  # released pairs: 2i and 2i + 1
    q, k = ((y[..., ::2] + 1j * y[..., 1::2]) * turn for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - np.arange(n))
    steps = np.arange(12)
    decay = np.where(steps[:, None] >= steps, gamma[:, None, None] ** (steps[:, None] - steps), 0)
    scores = np.einsum('btnh,bsnh->bnts', q, k.conj()).real * decay / np.sqrt(8)
    out = np.einsum('bnts,bsnv->btnv', scores, v)
    expected = (merge(rms(out)) * silu(x @ kernel(mixer.gate))) @ kernel(mixer.out)
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)
    # The released row scalings vanish in the norm, but for its epsilon.
    scores = scores / np.sqrt(decay.sum(-1, keepdims=True))
    scores = scores / np.clip(np.abs(scores).sum(-1, keepdims=True), 1, 5e4)
    close(rms(np.einsum('bnts,bsnv->btnv', scores, v), eps=0), rms(out, eps=0), tolerances.FLOAT64)


def test_retnet_is_gla_of_constant_decay_without_positions():
    mixer, x = build('retnet', num_heads=2, value_expansion=1.0), inputs()
    gla = build('gla', num_heads=2, key_expansion=1.0, gate_temperature=1.0)
    for name in ('query', 'key', 'value', 'gate', 'out'):
        getattr(gla, name).kernel[...] = getattr(mixer, name).kernel[...]
    gamma = np.repeat(1 - 2.0 ** (-5 - np.arange(2)), 8)
    gla.decay_up.kernel[...] = jnp.zeros_like(gla.decay_up.kernel[...])
    gla.decay_up.bias[...] = jnp.asarray(np.log(gamma / (1 - gamma)), jnp.float32)
    still = Context(positions=jnp.zeros((2, 12), jnp.int32))
    close(mixer(x, still).y, oracle.run(gla, x), tolerances.FLOAT32)


def test_retnet_sees_only_differences_of_positions():
    mixer, x = build('retnet', num_heads=2), inputs()
    steps = jnp.broadcast_to(jnp.arange(12), (2, 12))
    close(oracle.run(mixer, x, positions=steps + 100), oracle.run(mixer, x), tolerances.FLOAT32)


# Lightning


@pytest.mark.parametrize('layer', [0, 1, 3])
def test_lightning_decays(layer):
    module = catalog.module('lightning')
    release = [-(2.0 ** (-8 * (h + 1) / 8)) * (1 - layer / 3 + 1e-5) for h in range(8)]
    np.testing.assert_allclose(module.release_decay(8, layer, 4), release, rtol=1e-5)
    paper = [-8 * h / 8 * (1 - layer / 4) for h in range(8)]
    np.testing.assert_allclose(module.paper_decay(8, layer, 4), paper, rtol=1e-6)
    traced = jax.jit(lambda l: (module.release_decay(8, l, 4), module.paper_decay(8, l, 4)))(layer)
    np.testing.assert_allclose(traced[0], release, rtol=1e-5)
    np.testing.assert_allclose(traced[1], paper, rtol=1e-6)


@pytest.mark.parametrize('decay', ['release', 'paper', 'none'])
def test_lightning_is_its_recurrence(decay):
    mixer, x, n = build('lightning', num_heads=2, decay=decay), inputs(), 2
    q, k, v = (heads(f, x, n) for f in (mixer.query, mixer.key, mixer.value))
    log = {'release': -np.array([2.0**-4, 2.0**-8]) * (1 - 2 / 3 + 1e-5), 'paper': -np.array([0, 4]) * 0.5, 'none': 0}
    out = recurrence(silu(q), silu(k), v, np.exp(log[decay]))
    expected = (rms(merge(out)) * (x @ kernel(mixer.gate))) @ kernel(mixer.out)
    close(oracle.run(mixer, x, layer=2), expected, tolerances.FLOAT32)


def test_lightning_lrpe_weighs_channels_by_cosines_of_the_distance():
    mixer, x, n = build('lightning', num_heads=2, lrpe='unitary', decay='none'), inputs(), 2
    q, k, v = (heads(f, x, n) for f in (mixer.query, mixer.key, mixer.value))
    theta = (10_000 ** (-2 * np.arange(16) / 16)).reshape(2, 8)
    steps = np.arange(12)
    cosines = np.cos((steps[:, None] - steps)[..., None, None] * theta)
    scores = np.einsum('btnh,bsnh,tsnh->bnts', silu(q), silu(k), cosines) * np.tri(12)
    out = np.einsum('bnts,bsnv->btnv', scores, v)
    expected = (rms(merge(out)) * (x @ kernel(mixer.gate))) @ kernel(mixer.out)
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)


@pytest.mark.parametrize('lrpe', ['orthogonal', 'permutation'])
def test_lightning_lrpe_keeps_products_and_their_differences(lrpe):
    """Scores are those without positions at equal ones, depend on differences, and decoding counts on."""
    mixer, x = build('lightning', num_heads=2, lrpe=lrpe, decay='none'), inputs()
    q, k = (jnp.asarray(inputs(batch=1, length=1, seed=seed)).reshape(1, 1, 2, 8) for seed in (1, 2))
    at = lambda q, k, i, j: np.sum(mixer.place(q, jnp.array([[i]])) * mixer.place(k, jnp.array([[j]])), axis=-1)
    close(at(q, k, 7, 7), np.sum(q * k, axis=-1), tolerances.FLOAT32)
    close(at(q, k, 9, 4), at(q, k, 6, 1), tolerances.FLOAT32)
    assert np.abs(at(q, k, 9, 4) - at(q, k, 4, 4)).max() > 0.1
    whole, state, found = oracle.run(mixer, x), mixer.init_state(2, 12, jnp.float32), []
    for part in (x[:, :6], x[:, 6:]):
        y, state = oracle.extend(mixer, part, Context(), state)
        found.append(y)
    close(np.concatenate(found, axis=1), whole, tolerances.FLOAT32)


def test_lightning_refuses_unknown_options():
    config = attnx.get('lightning').config
    with pytest.raises(ValueError, match=r'decay.*papr.*release, paper, none'):
        config(decay='papr')
    with pytest.raises(ValueError, match='gate_activation'):
        config(gate_activation='relu6')
    with pytest.raises(ValueError, match=r'seed=1: lrpe .unitary. draws nothing'):
        config(lrpe='unitary', seed=1)


# Mamba-2


def test_mamba2_is_its_step_recurrence():
    mixer = build('mamba2', head_dim=8, state_dim=4, num_groups=2, conv_taps=0)
    x, n = inputs(), 4
    activate = lambda f: silu(np.asarray(x, np.float64) @ kernel(f.linear)).reshape(2, 12, -1, f.linear.kernel.shape[1])
    value = activate(mixer.value).reshape(2, 12, n, 8)
    b, c = (np.repeat(activate(f).reshape(2, 12, 2, 4), n // 2, axis=2) for f in (mixer.key, mixer.query))
    step = np.logaddexp(0, x @ kernel(mixer.step) + np.asarray(mixer.dt_bias[...], np.float64))
    decay = np.exp(-step * np.exp(np.asarray(mixer.log_rate[...], np.float64)))
    y = recurrence(c, b, step[..., None] * value, decay) + value  # D = 1
    y = merge(y) * silu(x @ kernel(mixer.gate))
    expected = rms(y.reshape(2, 12, 2, -1)).reshape(2, 12, -1) @ kernel(mixer.out)
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)


def test_mamba2_initial_values():
    mixer = build('mamba2', width=1024, head_dim=16, state_dim=8)
    step = np.logaddexp(0, np.asarray(mixer.dt_bias[...], np.float64))
    rate = np.exp(np.asarray(mixer.log_rate[...], np.float64))
    assert 0.99e-3 <= step.min() < 3e-3 < 3e-2 < step.max() <= 1.01e-1
    assert 0.99 <= rate.min() < 4 < 12 < rate.max() <= 16.01


def test_mamba2_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r'inner width 32.*head_dim 5'):
        build('mamba2', head_dim=5)
    with pytest.raises(ValueError, match=r'num_groups 3.*4 heads'):
        build('mamba2', head_dim=8, num_groups=3)


# Linear transformer


MAPS = ('identity', 'elu1', 'relu', 'exp', 'exp_pair', 'dpfp', 'taylor', 't2r', 'hedgehog', 'product')


def features(x, name, learned):
    """The feature maps once more, in float64."""
    if name == 'product':
        first, second = (np.einsum('btnh,nhf->btnf', x, np.asarray(w[...])) for w in (learned.weight, learned.other))
        return first * second
    if name in ('t2r', 'hedgehog'):
        x = np.einsum('btnh,nhf->btnf', x, np.asarray(learned.weight[...], np.float64)) + np.asarray(learned.bias[...])
    both = np.concatenate([x, -x], axis=-1)
    if name == 'hedgehog':
        return np.exp(both) / np.exp(both).sum(-1, keepdims=True)
    if name == 'exp':
        return np.exp(x - x.max(-1, keepdims=True))
    if name == 'exp_pair':
        return np.concatenate([np.exp(x - x.max(-1, keepdims=True)), np.exp(x.min(-1, keepdims=True) - x)], axis=-1)
    if name == 'dpfp':
        return np.maximum(both, 0) * np.roll(np.maximum(both, 0), 1, axis=-1)
    if name == 'elu1':
        return np.where(x > 0, x + 1, np.exp(x))
    return x if name == 'identity' else np.maximum(x, 0)


@pytest.mark.quick(
    'identity-causal', 'exp_pair-causal', 't2r-causal', 'taylor-causal', 'exp-bidirectional', 'dpfp-bidirectional'
)
@pytest.mark.parametrize('causal', [True, False], ids=['causal', 'bidirectional'])
@pytest.mark.parametrize('name', MAPS)
def test_linear_transformer_is_its_quadratic_form(name, causal):
    normalize = name not in ('identity', 'product')
    mixer = build('linear_transformer', num_heads=2, feature_map=name, normalize=normalize, causal=causal)
    x = inputs()
    q, k, v = (heads(f, x, 2) for f in (mixer.query, mixer.key, mixer.value))
    if name == 'taylor':
        dots = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(8)
        weights = 1 + dots + dots**2 / 2
    else:
        q, k = features(q, name, mixer.query_map), features(k, name, mixer.key_map)
        weights = np.einsum('btnf,bsnf->bnts', q, k)
    weights = weights * np.tri(12) if causal else weights
    out = np.einsum('bnts,bsnv->btnv', weights, v)
    out = out / (np.moveaxis(weights.sum(-1), 1, 2)[..., None] + 1e-6) if normalize else rms(out)
    close(oracle.run(mixer, x), merge(out) @ kernel(mixer.out), tolerances.FLOAT32)
    ids = np.asarray([[1] * 12, [7] * 12], np.int32)  # one document, by the path for several
    close(oracle.run(mixer, x, segment_ids=ids), oracle.run(mixer, x), tolerances.FLOAT32)


def test_bidirectional_documents_do_not_see_each_other():
    mixer, x = build('linear_transformer', num_heads=2, causal=False), inputs()
    ids = np.asarray([[1] * 4 + [2] * 5 + [0] * 3, [3] * 12], np.int32)
    y = oracle.run(mixer, x, segment_ids=ids)
    for row, part in ((0, slice(0, 4)), (0, slice(4, 9)), (1, slice(0, 12))):
        alone = mixer(x[row : row + 1, part], Context()).y
        close(y[row, part], alone[0], tolerances.FLOAT32)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(oracle.run(mixer, x, segment_ids=ids)[0, 4:9])))(x)
    assert np.abs(dx[0, :4]).max() == np.abs(dx[0, 9:]).max() == np.abs(dx[1]).max() == 0
    with pytest.raises(ValueError, match='takes no state'):
        mixer(x, Context(), state=object())


def test_linear_transformer_weights_sum_to_one():
    mixer, x = build('linear_transformer', num_heads=2, eps=0.0), inputs()
    constant = np.concatenate([x[..., :15], np.ones_like(x[..., :1])], axis=-1)
    mixer.value.kernel[...] = jnp.zeros((16, 16)).at[15].set(1.0)
    mixer.out.kernel[...] = jnp.eye(16)
    close(oracle.run(mixer, constant), np.ones_like(x), tolerances.FLOAT32)


def test_hedgehog_of_zero_maps_is_the_running_mean():
    mixer, x = build('linear_transformer', num_heads=2, feature_map='hedgehog'), inputs()
    mixer.key_map.weight[...] = jnp.zeros_like(mixer.key_map.weight[...])
    mean = np.cumsum(x @ kernel(mixer.value), axis=1) / np.arange(1, 13)[:, None]
    close(oracle.run(mixer, x), mean @ kernel(mixer.out), tolerances.FLOAT32)


def test_linear_transformer_refuses_what_has_no_effect_or_no_meaning():
    config = attnx.get('linear_transformer').config
    with pytest.raises(ValueError, match='both signs'):
        config(feature_map='identity')
    with pytest.raises(ValueError, match='feature_dim is for'):
        config(feature_map='elu1', feature_dim=8)
    with pytest.raises(ValueError, match=r'unknown feature_map .elu.*did you mean .elu1'):
        config(feature_map='elu-1')
    mixer = build('linear_transformer', num_heads=2, causal=False)
    assert mixer.init_state(2, 8) is None
