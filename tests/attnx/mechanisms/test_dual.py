"""Dual attention against relations that are written out, and what it is without relational heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def symbols(mixer, x):
    library = np.asarray(mixer.symbols.library[...], np.float64)
    if mixer.symbols.query is None:
        return np.broadcast_to(library[: x.shape[1]], x.shape)
    n, (batch, length, width) = mixer.symbols.num_heads, x.shape
    query = x @ oracle.kernel(mixer.symbols.query) + np.asarray(mixer.symbols.query.bias[...])
    key = np.asarray(mixer.symbols.templates[...], np.float64).reshape(-1, n, width // n)
    logits = np.einsum('btnh,snh->btns', query.reshape(batch, length, n, -1), key) * (width // n) ** -0.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum('btns,snh->btnh', weights, library.reshape(key.shape)).reshape(x.shape)


def relational(mixer, x):
    """r_ij in full, then weighted."""
    r, n = mixer.config.relational_heads, mixer.relations
    q, k = (oracle.turn(oracle.heads(x, f, r)) for f in (mixer.attend_query, mixer.attend_key))
    weights = oracle.weights(q, k, oracle.causal(x.shape[1]), q.shape[-1] ** -0.5)
    sender = oracle.heads(x, mixer.relation_query, n)
    receiver = sender if mixer.relation_key is None else oracle.heads(x, mixer.relation_key, n)
    relation = np.einsum('bild,bjld->bijl', sender, receiver) * sender.shape[-1] ** -0.5
    if mixer.relation_key is None:
        close(relation, np.swapaxes(relation, 1, 2), tolerances.FLOAT64)
    if mixer.config.symbols == 'relative':
        reach, far = mixer.config.num_symbols, np.arange(x.shape[1]) - np.arange(x.shape[1])[:, None]
        library = oracle.heads(np.asarray(mixer.symbols.library[...], np.float64)[None], mixer.sender, r)[0]
        carried = np.einsum('bnij,ijnh->binh', weights, library[np.clip(far, -reach, reach) + reach])
    else:
        carried = np.einsum('bnij,bjnh->binh', weights, oracle.heads(symbols(mixer, x), mixer.sender, r))
    read = np.asarray(mixer.read[...], np.float64)
    out = carried + np.einsum('bnij,bijl,nlh->binh', weights, relation, read)
    return oracle.project(out, mixer.relation_out)


RELATIVE = {'symbols': 'relative', 'num_symbols': 3}


def test_symbols_of_distances_decode():
    mixer, x = oracle.build('dual', **RELATIVE), oracle.inputs()
    state, found = mixer.init_state(x.shape[0], x.shape[1]), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 12)):
        y, state = oracle.extend(mixer, x[:, part], Context(), state)
        found.append(y)
    close(jnp.concatenate(found, axis=1), oracle.run(mixer, x), tolerances.FLOAT32)


@pytest.mark.parametrize(
    'fields', [{}, {'symmetric': True, 'num_relations': 4}, {'symbols': 'positional'}, RELATIVE], ids=lambda f: ','.join(f)
)
def test_is_its_definition(fields):
    fields = fields if 'symbols' in fields else {'num_symbols': 5, **fields}
    mixer, x = oracle.build('dual', **fields), oracle.inputs()
    q, k, v = (oracle.heads(x, f, 2) for f in (mixer.query, mixer.key, mixer.value))
    sensory = oracle.project(oracle.attend(oracle.turn(q), oracle.turn(k), v, oracle.causal(x.shape[1])), mixer.out)
    close(oracle.run(mixer, x), np.concatenate([sensory, relational(mixer, x)], axis=-1), tolerances.FLOAT32)


@pytest.mark.parametrize('fields', [{'num_symbols': 5}, RELATIVE], ids=['symbolic', 'relative'])
def test_a_retriever_is_shared(fields):
    first, own = (oracle.build('dual', **fields) for _ in range(2))
    reader, x = oracle.build('dual', retriever='shared', symbols=fields.get('symbols', 'symbolic')), oracle.inputs()
    first.symbols.library[...] = 2 * first.symbols.library[...]
    published = jax.jit(lambda mixer, x: mixer(x, Context()).shared)(first, x)
    for name in ('query', 'key', 'value', 'out', 'relation_query', 'relation_key', 'sender', 'attend_query', 'attend_key',
                 'read', 'relation_out'):  # fmt: skip
        setattr(own, name, getattr(reader, name))
    own.symbols = first.symbols
    close(oracle.run(reader, x, shared=published), oracle.run(own, x), tolerances.FLOAT32)
    other = oracle.build('dual', retriever='shared', symbols='positional')
    with pytest.raises(ValueError, match="symbols 'positional': the shared retriever has"):
        oracle.run(other, x, shared=published)


def test_without_relational_heads_it_is_multi_head_attention():
    mixer, x = oracle.build('dual', sensory_heads=4, relational_heads=0), oracle.inputs()
    full = oracle.build('mha', num_heads=4)
    for name in ('query', 'key', 'value', 'out'):
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)


def test_relational_heads_carry_no_features():
    """A rotation of the input that the four projections undo changes nothing where symbols are muted."""
    mixer, x = oracle.build('dual', sensory_heads=0, relational_heads=4), oracle.inputs()
    mixer.sender.kernel[...] = jnp.zeros_like(mixer.sender.kernel[...])
    before = oracle.run(mixer, x)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0]
    for f in (mixer.attend_query, mixer.attend_key, mixer.relation_query, mixer.relation_key):
        f.kernel[...] = jnp.asarray(turn.T @ oracle.kernel(f), jnp.float32)
    close(oracle.run(mixer, (x @ turn).astype(np.float32)), before, tolerances.FLOAT32)


def test_bad_number_of_relations():
    with pytest.raises(ValueError, match='num_relations 3 does not divide'):
        oracle.build('dual', num_relations=3)
