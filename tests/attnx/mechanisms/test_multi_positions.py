"""Identities of mechanisms with more than one position: frames, times and channels, grids, labels of edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import ops
from attnx.spec import Context, Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

B, T, M = 2, 12, 32
DIMS = Dims(width=M, max_length=T, dtype=jnp.float32)
X = np.random.default_rng(0).standard_normal((B, T, M)).astype(np.float32)
FRAMES = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 3, 3]] * B, np.int32)
UNITS = np.array([[0, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 6]] * B, np.int32)


def built(name, causal=True, **fields):
    spec = attnx.get(name)
    dims = dataclasses.replace(DIMS, causal=causal)
    return jax.jit(lambda: spec.build(spec.config(num_heads=4, **fields), dims, rngs=nnx.Rngs(0)))()


def run(mixer, x=X, **inputs):
    return oracle.run(mixer, x, inputs=inputs)


def sensitivity(mixer, **inputs):
    """bool [T, T]: does output i change with input j?"""
    y = jax.jacobian(lambda x: run(mixer, x, **inputs)[0].sum(-1))(jnp.asarray(X))[:, 0]
    return np.abs(np.asarray(y)).max(-1) > 0


def test_units_are_tokens_of_text_and_frames():
    units, _ = built('dual_rope').units(jnp.asarray(FRAMES), Context(), None)
    assert np.array_equal(units, UNITS)


def test_dual_rope_without_frames_or_weight_is_rope():
    base = built('gqa', num_kv_heads=4)
    mixer = oracle.like(base, built('dual_rope', gamma=0.0))
    close(run(mixer, frame=FRAMES), run(base), tolerances.FLOAT32)
    text = oracle.like(base, built('dual_rope', gamma=0.5))  # tau = m: frequencies times 1.5, positions likewise
    stretched = oracle.run(base, X, positions=np.broadcast_to(1.5 * np.arange(T, dtype=np.float32), (B, T)))
    close(run(text, frame=0 * FRAMES), stretched, tolerances.FLOAT32)


def test_dual_rope_means_scores_or_deals_heads():
    """Scores written out: the mean of both rotations, or one rotation a head."""
    base = built('gqa', num_kv_heads=4)
    q, k, v = base.project(jnp.asarray(X))
    at = lambda x, where: ops.positions.rope(x, jnp.asarray(where))
    score = lambda where: jnp.einsum('btnh,bsnh->bnts', at(q, where), at(k, where)) * 8**-0.5
    place, unit = score(np.arange(T)[None].repeat(B, 0)), score(UNITS)
    mixed = jnp.concatenate([unit[:, :1], place[:, 1:]], axis=1)
    for fields, s in (({'mode': 'mean'}, (place + unit) / 2), ({'mode': 'heads', 'temporal_heads': 1}, mixed)):
        w = jax.nn.softmax(jnp.where(np.tril(np.ones((T, T), bool)), s, -jnp.inf))
        expected = base.out(jnp.einsum('bnts,bsnh->btnh', w, v).reshape(B, T, M))
        close(run(oracle.like(base, built('dual_rope', **fields)), frame=FRAMES), expected, tolerances.FLOAT32)


def test_whole_frames_see_each_other_and_the_past():
    frames = FRAMES[0]
    expected = np.tril(np.ones((T, T), bool)) | ((frames[:, None] == frames) & (frames > 0))
    assert np.array_equal(sensitivity(built('dual_rope', whole_frames=True), frame=FRAMES), expected)
    assert np.array_equal(sensitivity(built('dual_rope'), frame=FRAMES), np.tril(np.ones((T, T), bool)))


def test_whole_frames_decode_frame_by_frame():
    mixer = built('dual_rope', whole_frames=True)
    expected, state, at, found = run(mixer, frame=FRAMES), mixer.init_state(B, T, jnp.float32), 0, []
    for count in (1, 1, 3, 3, 1, 1, 2):
        part = slice(at, at + count)
        y, state = oracle.extend(mixer, X[:, part], Context(inputs={'frame': FRAMES[:, part]}), state)
        found.append(y)
        at += count
    close(jnp.concatenate(found, axis=1), expected, tolerances.FLOAT32)


def test_one_channel_and_a_wide_window_is_transformer_xl():
    xl = built('transformer_xl')
    mixer = oracle.like(xl, built('mvpa', window=T))
    mixer.channel.kernel = nnx.Param(jnp.zeros_like(mixer.channel.kernel[...]))
    mixer.time, mixer.content_bias, mixer.time_bias = xl.far, mixer.content_bias, mixer.time_bias
    xl.content_bias, xl.position_bias = mixer.content_bias, mixer.time_bias
    y = run(mixer, time=np.arange(T)[None].repeat(B, 0), channel=np.zeros((B, T), np.int32))
    close(y, run(xl), tolerances.FLOAT32)


def test_mvpa_equals_its_equation():
    time, channel = np.repeat(np.arange(4), 3)[None].repeat(B, 0), np.tile([0, 1, 4], 4)[None].repeat(B, 0)
    mixer = built('mvpa', num_kv_heads=2, window=1, num_channels=4, time_width=6, whole_steps=True)
    q, k, v = (np.asarray(a, np.float64) for a in mixer.project(jnp.asarray(X)))
    k, v = (np.repeat(a, 2, axis=2) for a in (k, v))
    number = lambda p: np.asarray(p[...], np.float64)
    bias = lambda p: np.repeat(number(p), 2, axis=0)
    far = time[0][:, None] - time[0]
    angles = far[..., None] * 10_000.0 ** (-np.arange(0, 6, 2) / 6)
    code = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(T, T, 6)
    times = np.repeat((code @ number(mixer.time.kernel)).reshape(T, T, 2, 8), 2, axis=2)
    table = np.repeat((number(mixer.channels) @ number(mixer.channel.kernel)).reshape(4, 2, 8), 2, axis=1)
    between = table[np.minimum(np.abs(channel[0][:, None] - channel[0]), 3)]
    s = np.einsum('btnh,bsnh->bnts', q + bias(mixer.content_bias), k) * (np.abs(far) <= 1)
    s += np.einsum('btnh,tsnh->bnts', q + bias(mixer.time_bias), times)
    s += np.einsum('btnh,tsnh->bnts', q + bias(mixer.channel_bias), between)
    s = np.where(far >= 0, s * 8**-0.5, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    o = np.einsum('bnts,bsnh->btnh', w / w.sum(-1, keepdims=True), v).reshape(B, T, M)
    close(run(mixer, time=time, channel=channel), o @ number(mixer.out.kernel), tolerances.FLOAT32)


def test_order_of_channels_does_not_matter():
    """Channels of one time, in any order: the outputs go with them."""
    time, channel = np.repeat(np.arange(4), 3)[None].repeat(B, 0), np.tile([0, 1, 2], 4)[None].repeat(B, 0)
    mixer, order = built('mvpa', num_channels=4, whole_steps=True), np.arange(T).reshape(4, 3)[:, [2, 0, 1]].reshape(-1)
    moved = run(mixer, X[:, order], time=time[:, order], channel=channel[:, order])
    close(moved, run(mixer, time=time, channel=channel)[:, order], tolerances.FLOAT32)


@pytest.mark.parametrize('log_distance', [False, True])
def test_dynamic_bias_equals_its_equation(log_distance):
    mixer = built('dynamic_bias', num_kv_heads=4, log_distance=log_distance, hidden=8)
    q, k, v = mixer.project(jnp.asarray(X))
    far = jnp.arange(T)[:, None] - jnp.arange(T)
    s = jnp.einsum('btnh,bsnh->bnts', q, k) * 8**-0.5 + jnp.moveaxis(mixer.distance_bias(far[..., None]), -1, 0)
    w = jax.nn.softmax(jnp.where(far >= 0, s, -jnp.inf))
    close(run(mixer), mixer.out(jnp.einsum('bnts,bsnh->btnh', w, v).reshape(B, T, M)), tolerances.FLOAT32)


def test_dynamic_bias_of_a_grid_is_evaluated_at_rows_and_columns():
    mixer = built('dynamic_bias', causal=False, num_kv_heads=4, grid=4, hidden=8)
    q, k, v = mixer.project(jnp.asarray(X))
    place = jnp.stack([jnp.arange(T) // 4, jnp.arange(T) % 4], axis=-1)
    bias = jnp.moveaxis(mixer.distance_bias(place[:, None] - place), -1, 0)
    w = jax.nn.softmax(jnp.einsum('btnh,bsnh->bnts', q, k) * 8**-0.5 + bias)
    close(run(mixer), mixer.out(jnp.einsum('bnts,bsnh->btnh', w, v).reshape(B, T, M)), tolerances.FLOAT32)


def test_dynamic_bias_of_zero_is_attention_without_positions():
    mixer = built('dynamic_bias', num_kv_heads=4)
    mixer.bias.kernel = nnx.Param(jnp.zeros_like(mixer.bias.kernel[...]))
    close(run(mixer), run(oracle.like(mixer, built('gqa', num_kv_heads=4, position='none'))), tolerances.FLOAT32)


def test_distances_are_labels_of_edges():
    distances = built('shaw', max_distance=3)
    labels = oracle.like(distances, built('shaw', labels=7))
    labels.key_table, labels.value_table = distances.key_table, distances.value_table
    edges = np.clip(np.arange(T) - np.arange(T)[:, None], -3, 3) + 3
    close(run(labels, edges=np.broadcast_to(edges, (B, T, T))), run(distances), tolerances.FLOAT32)


def test_labelled_graphs_have_no_order_and_unlabelled_edges_nothing_to_add():
    rng = np.random.default_rng(1)
    mixer, edges, order = built('shaw', causal=False, labels=5), rng.integers(0, 5, (B, T, T)), rng.permutation(T)
    y, moved = run(mixer, edges=edges), run(mixer, X[:, order], edges=edges[:, order][:, :, order])
    close(moved, y[:, order], tolerances.FLOAT32)
    plain = oracle.like(mixer, built('gqa', causal=False, num_kv_heads=4, position='none'))
    close(run(mixer, edges=np.full((B, T, T), -1)), run(plain), tolerances.FLOAT32)
    assert mixer.init_state(B, T) is None
