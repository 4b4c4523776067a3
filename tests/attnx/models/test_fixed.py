"""A fixed sequence beside the rows: plain attention where a row is that sequence; decoding, packing, refusals."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from attnx import models
from tests import tolerances
from tests.laws import close

TEXT = 'abca'
ROW = np.frombuffer((3 * TEXT).encode(), np.uint8).astype(np.int32)[None]
OTHER = np.array([[100, 101, 102, 103, 104, 105, 97, 98, 99, 97, 97, 97]], np.int32)
forward = jax.jit(lambda model, tokens, **given: model(tokens, **given))


@functools.cache
def build(fixed=TEXT, pattern=('static', 'gqa'), **fields):
    static = {'kind': 'static_queries', 'num_heads': 2, 'num_kv_heads': 1, 'source': 'fixed'}
    mixers = {'static': static, 'gqa': {'kind': 'gqa', 'num_heads': 2, 'num_kv_heads': 1}}
    mixers = {name: mixers[name] for name in pattern}
    config = models.ModelConfig(
        vocab_size=110, width=16, num_layers=4, pattern=pattern, mixers=mixers, fixed=fixed, max_length=12, **fields
    )
    return jax.jit(lambda: models.build(config, rngs=nnx.Rngs(0)))()


def test_beside_itself_a_row_is_mixed_by_plain_attention():
    plain = build('', ('gqa', 'gqa'))
    close(forward(build(), ROW).logits, forward(plain, ROW).logits, tolerances.FLOAT32)
    assert np.abs(forward(build(), OTHER).logits - forward(plain, OTHER).logits).max() > 0.1


def test_decoding_and_packing():
    model, tokens = build('noise'), np.concatenate([ROW, OTHER])
    whole, at = forward(model, tokens).logits, np.arange(12)[None].repeat(2, 0)
    state, found = model.init_state(2, 12), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 12)):
        out = forward(model, tokens[:, part], positions=at[:, part], state=state)
        state, found = out.state, [*found, out.logits]
    close(np.concatenate(found, axis=1), whole, tolerances.FLOAT32)
    ids = np.array([[1] * 5 + [2] * 7, [0] * 4 + [1] * 8], np.int32)
    where = np.concatenate([np.r_[0:5, 0:7][None], np.r_[[0] * 4, 0:8][None]])
    packed = forward(model, tokens, positions=where, segment_ids=ids).logits
    padded = np.concatenate([tokens[:1, 5:], 0 * tokens[:1, :5]], axis=1)
    real = np.array([[1] * 7 + [0] * 5], np.int32)
    close(packed[0, 5:], forward(model, padded, segment_ids=real, positions=at[:1]).logits[0, :7], tolerances.FLOAT32)


def test_bad_input():
    with pytest.raises(ValueError, match='no layer reads it'):
        models.ModelConfig(vocab_size=110, fixed=TEXT).layers()
    with pytest.raises(ValueError, match="reads 'fixed', which no earlier layer"):
        build('')
    with pytest.raises(ValueError, match='one is 122; the vocabulary is 0…109'):
        build('abz')
    with pytest.raises(ValueError, match=r'kind is .encoder_decoder.'):
        models.ModelConfig(vocab_size=110, kind='encoder_decoder', fixed=TEXT)
    with pytest.raises(ValueError, match='with a state: give positions'):
        build()(ROW[:, :2], state=build().init_state(1, 4))
