"""Agent attention: its definition on lines and grids, and one set of agents per document."""

import jax
import numpy as np
import pytest

from attnx import models
from attnx.nn import to_flat
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def make(**options):
    mixer = oracle.build('agent', causal=False, **{'num_heads': 4, 'coarse': 3, 'fine': 5, **options})
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: v + 0.2 * rng.standard_normal(v.shape).astype(v.dtype), mixer)


def resize(table, *sizes):
    """Bilinear, edges not aligned, [N, n, …] -> [N, n, *sizes]."""
    return np.asarray(jax.image.resize(table, (*table.shape[:2], *sizes), 'linear', antialias=False), np.float64)


def expected(mixer, x, rows, columns):
    """One document on a grid of rows x columns; rows = 0: on a line."""
    p = {k: np.asarray(v) for k, v in to_flat(mixer).items()}
    config, (batch, length, _) = mixer.config, x.shape
    n, agents = config.num_heads, config.num_agents
    q, k, v = (oracle.heads(x, f, n) for f in (mixer.query, mixer.key, mixer.value))
    cut = lambda size, count: [slice(j * size // count, -(-(j + 1) * size // count)) for j in range(count)]
    if rows:
        side, image = int(agents**0.5), q.reshape(batch, rows, columns, n, -1)
        pooled = [image[:, r, c].mean(axis=(1, 2)) for r in cut(rows, side) for c in cut(columns, side)]
    else:
        pooled = [q[:, s].mean(axis=1) for s in cut(length, agents)]
    pooled = np.stack(pooled, axis=1)

    def bias(name):
        if not rows:
            return resize(p[f'{name}_0'], length) + resize(p[f'{name}_1'], length)
        whole = resize(p[f'{name}_0'], rows, columns)
        whole = whole + resize(p[f'{name}_1'], rows)[..., None] + resize(p[f'{name}_2'], columns)[:, :, None]
        return whole.reshape(n, agents, length)

    def weights(q, k, bias):
        logits = np.einsum('btnh,bsnh->bnts', q, k) * q.shape[-1] ** -0.5 + bias
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    read = np.einsum('bnas,bsnh->banh', weights(pooled, k, bias('read')), v)
    out = np.einsum('bnta,banh->btnh', weights(q, pooled, bias('tell').swapaxes(1, 2)), read).reshape(x.shape)
    value, kernel, reach = v.reshape(x.shape), p['conv_kernel'], config.conv // 2
    if rows:
        image = np.pad(value.reshape(batch, rows, columns, -1), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        near = [image[:, r : r + rows, c : c + columns] for r in range(config.conv) for c in range(config.conv)]
    else:
        line = np.pad(value, ((0, 0), (reach, reach), (0, 0)))
        near = [line[:, c : c + length] for c in range(config.conv)]
    out = out + sum(w * a.reshape(x.shape) for w, a in zip(kernel, near)) + p['conv_bias']
    return out @ oracle.kernel(mixer.out) + p['out/bias']


@pytest.mark.quick('5-12')
@pytest.mark.parametrize(('agents', 'length'), [(5, 12), (1, 12), (7, 3)])
def test_is_its_definition_on_a_line(agents, length):
    mixer, x = make(num_agents=agents), oracle.inputs(length=length)
    close(oracle.run(mixer, x), expected(mixer, x, 0, 0), tolerances.FLOAT32)


@pytest.mark.quick('4-3-5')
@pytest.mark.parametrize(('agents', 'rows', 'columns'), [(4, 3, 5), (9, 5, 4)])
def test_is_its_definition_on_a_grid(agents, rows, columns):
    mixer, x = make(num_agents=agents, grid=columns), oracle.inputs(length=rows * columns)
    close(oracle.run(mixer, x), expected(mixer, x, rows, columns), tolerances.FLOAT32)


def test_documents_have_their_own_agents_and_too_many_are_not_hidden():
    x = oracle.inputs(length=20, batch=1)
    mixer = make(num_agents=4, grid=3, documents=2)
    ids = np.array([[0] * 2 + [5] * 9 + [7] * 6 + [9] * 3], np.int32)
    y = np.asarray(oracle.run(mixer, x, segment_ids=ids))
    close(y[:, 2:11], expected(mixer, x[:, 2:11], 3, 3), tolerances.FLOAT32)
    close(y[:, 11:17], expected(mixer, x[:, 11:17], 2, 3), tolerances.FLOAT32)
    assert np.isfinite(y[:, :17]).all() and np.isnan(y[:, 17:]).all()


def test_more_documents_than_it_keeps_are_refused_before_training():
    two = {'kind': 'agent', 'documents': 2}
    config = models.ModelConfig(kind='encoder', pattern=('agent',), overrides={1: 'two'}, mixers={'two': two})
    config.check_packing(1)
    with pytest.raises(ValueError, match=r'layer 0 \(agent\) keeps 1 .* up to 2'):
        config.check_packing(2)
    models.ModelConfig(kind='encoder', pattern=('two',), mixers={'two': two}).check_packing(2)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='square'):
        make(num_agents=5, grid=4)
    with pytest.raises(ValueError, match='odd'):
        make(conv=2)
