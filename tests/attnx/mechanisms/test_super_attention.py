"""Optimised, efficient and super attention are multi-head attention with identities in place of projections."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close, positions_of


def full(mixer, identities):
    other = oracle.build('mha', num_heads=4, position=mixer.config.position)
    for name in ('query', 'key', 'value', 'out'):
        kernel = jnp.eye(16) if name in identities else getattr(mixer, name).kernel[...]
        getattr(other, name).kernel[...] = kernel
    return other


@pytest.mark.parametrize('position', ['rope', 'none'])
@pytest.mark.parametrize(
    ('layout', 'identities'), [('optimised', {'value'}), ('efficient', {'key', 'value'}), ('super', {'key', 'value'})]
)
def test_is_multi_head_attention_with_identities(layout, identities, position):
    """Super begins with W_a = 1."""
    mixer, x = oracle.build('super_attention', num_heads=4, layout=layout, position=position), oracle.inputs()
    close(oracle.run(mixer, x), oracle.run(full(mixer, identities), x), tolerances.FLOAT32)


def test_super_mixes_values_along_time_in_each_document():
    mixer, x = oracle.build('super_attention', num_heads=4, position='none'), oracle.inputs()
    table = np.random.default_rng(0).standard_normal((32, 32))
    mixer.align[...] = jnp.asarray(table, jnp.float32)
    q, k = oracle.heads(x, mixer.query, 4), x.reshape(*x.shape[:2], 4, 4).astype(np.float64)
    for cut in (0, 5):  # one document, then two
        value = np.concatenate([np.einsum('ts,bsnh->btnh', np.tril(table[:n, :n]), part)
                                for part in np.split(k, [cut], axis=1) if (n := part.shape[1])], axis=1)  # fmt: skip
        ids = np.where(np.arange(12) < cut, 1, 2)[None].repeat(2, axis=0).astype(np.int32)
        visible = oracle.causal(12) & (ids[0][:, None] == ids[0])
        context = {'segment_ids': ids, 'positions': positions_of(ids)} if cut else {}
        expected = oracle.project(oracle.attend(q, k, value, visible), mixer.out)
        close(oracle.run(mixer, x, **context), expected, tolerances.FLOAT32)


@pytest.mark.parametrize(('layout', 'position', 'kept'), [('efficient', 'none', 16), ('optimised', 'rope', 32)])
def test_cache_and_decoding(layout, position, kept):
    mixer, x = oracle.build('super_attention', num_heads=4, layout=layout, position=position), oracle.inputs()
    state = mixer.init_state(2, 12)
    assert sum(np.prod(a.shape[2:]) for a in state.arrays) == kept
    first, state = oracle.extend(mixer, x[:, :11], Context(), state)
    last, _ = oracle.extend(mixer, x[:, 11:], Context(), state)
    close(jnp.concatenate([first, last], axis=1), oracle.run(mixer, x), tolerances.FLOAT32)


def test_too_long_a_row_is_refused():
    mixer = oracle.build('super_attention', num_heads=4, max_length=8)
    with pytest.raises(ValueError, match='mixes 8 positions, was given 12'):
        oracle.run(mixer, oracle.inputs())
