"""The options of softmax mechanisms: in packed rows, with caches and rings, and what they refuse."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from attnx import ops
from attnx.nn import softmax
from attnx.nn.softmax import Rope
from attnx.nn.state import Keys, starts
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close, positions_of

LENGTH = 18
OPTIONS = {
    'window_dilated_alibi_softcap': {
        'masks': (('window', 7), ('dilated', 3, 2)),
        'scores': (('alibi',), ('softcap', 2.0)),
    },
    'global_t5_norm_sinks': {
        'masks': (('global_window', 3, 2),),
        'scores': (('t5', 8, 12), ('temperature', 0.5)),
        'qk_norm': True,
        'sinks': True,
    },
    'blocks_grid': {'masks': (('block_causal', 4), ('strided', 2)), 'rope': Rope(grid=4, base=100.0)},
    'yarn': {'rope': Rope(scaling='yarn', factor=4.0, original_length=8, fraction=0.5), 'scale': 0.7},
    'ring': {
        'window': 4,
        'masks': (('strided', 2),),
        'scores': (('t5', 8), ('alibi',)),
        'position': 'none',
    },
}


@pytest.mark.parametrize('name', OPTIONS)
def test_documents_and_caches_make_no_difference(name):
    kind = 'sliding_window' if name == 'ring' else 'gqa'
    mixer = oracle.build(kind, num_heads=4, num_kv_heads=2, **OPTIONS[name])
    if mixer.core.buckets is not None:
        mixer.core.buckets[...] = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
    x = oracle.inputs(length=LENGTH)
    ids = np.array([[1] * 7 + [2] * 11, [0] * 4 + [3] * 9 + [4] * 5], np.int32)
    run = lambda x, ids: np.asarray(oracle.run(mixer, x, segment_ids=ids, positions=positions_of(ids)))
    packed = run(x, ids)
    for rows, start, stop in ((0, 0, 7), (0, 7, 18), (1, 4, 13), (1, 13, 18)):
        alone, real = np.roll(x, -start, axis=1), np.tile((np.arange(LENGTH) < stop - start).astype(np.int32), (2, 1))
        close(packed[rows, start:stop], run(alone, real)[rows, : stop - start], tolerances.FLOAT32)
    state, found, at = mixer.init_state(2, LENGTH, jnp.float32), [], 0
    for n in (6, 6, *[1] * 6):
        part = slice(at, at + n)
        ctx = Context(segment_ids=ids[:, part], positions=np.asarray(positions_of(ids))[:, part])
        y, state = oracle.extend(mixer, x[:, part], ctx, state)
        found.append(y)
        at += n
    close(jnp.concatenate(found, axis=1), packed, tolerances.FLOAT32)


def test_rope_on_a_grid_turns_by_row_and_column():
    mixer, x = oracle.build('mha', width=32, rope=Rope(grid=5, base=100.0)), oracle.inputs(width=32, length=14)
    where = np.arange(14)

    def turn(y):
        out = []
        for n, at in ((0, where // 5), (1, where % 5)):  # pairs (i, i + 4) of 8 channels: two turn by each coordinate
            pair = y[..., [2 * n, 2 * n + 1, 4 + 2 * n, 5 + 2 * n]]
            angle = (at[:, None] * 100.0 ** (-np.arange(2) / 2))[:, None]
            a, b = pair[..., :2], pair[..., 2:]
            out.append((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)))
        return np.concatenate([out[0][0], out[1][0], out[0][1], out[1][1]], axis=-1)

    q, k, v = (oracle.heads(x, f, 4) for f in (mixer.query, mixer.key, mixer.value))
    expected = oracle.project(oracle.attend(turn(q), turn(k), v, oracle.causal(14)), mixer.out)
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)


def test_starts_of_documents():
    ids = jnp.array([[0, 0, 3, 3, 3, 1], [2, 2, 2, 2, 0, 0]])
    assert starts(ids).tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]]


@pytest.mark.parametrize(('first_query', 'first_key', 'length', 'keys'), [(5, 0, 3, 9), (5, 2, 3, 6), (0, 0, 1, 4)])
def test_distances_are_a_strip(first_query, first_key, length, keys):
    q, k = first_query + jnp.arange(length), first_key + jnp.arange(keys)
    found = Keys(
        arrays=(jnp.zeros((1, keys)),), query_ids=None, key_ids=None, query_slots=q[None], key_slots=k[None]
    ).distances()
    at = np.arange(keys) - np.arange(length)[:, None] + length - 1
    assert np.array_equal(found[at], k - q[:, None])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'position': 'rop'}, "did you mean 'rope'"),
        ({'masks': (('windw', 3),)}, "did you mean 'window'"),
        ({'scores': ('alibi',)}, "'name', parameters"),
        ({'masks': (('dilated', 3),)}, "('dilated', 3)"),
        ({'masks': (('window', 0),)}, 'at least 1'),
        ({'scores': (('softcap',),)}, "('softcap',)"),
        ({'scores': (('t5', 7),)}, 'num_buckets'),
        ({'dropout': 1.0}, 'dropout'),
    ],
)
def test_errors_name_what_is_valid(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        softmax.Options(**options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'scaling': 'yarm', 'factor': 2.0}, "did you mean 'yarn'"),
        ({'factor': 2.0}, 'a factor a scaling'),
        ({'scaling': 'ntk', 'factor': 2.0, 'grid': 4}, 'grid'),
        ({'fraction': 0.0}, 'fraction'),
    ],
)
def test_rope_refuses_what_would_have_no_effect(options, message):
    with pytest.raises(ValueError, match=message):
        Rope(**options)


def test_the_scalings_are_those_of_the_op():
    assert set(softmax.SCALINGS) - {'none'} < set(ops.positions.SCALINGS)
