"""Two tables: against its definition; one is compared, the other is read."""

import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_is_its_definition():
    mixer = oracle.build('decoupled_embeddings', vocab_size=9, top_k=3)
    tokens = np.random.default_rng(1).integers(0, 9, (2, 12))
    get = lambda p: np.asarray(p[...], np.float64)
    a, e = get(mixer.match_table)[tokens], get(mixer.content_table)[tokens]
    read = np.zeros(e.shape)
    for b, t in np.ndindex(2, 12):
        score = a[b, :t] @ a[b, t] * a.shape[-1] ** -0.5
        best = np.argsort(-score, kind='stable')[:3]
        w = np.exp(score[best])
        read[b, t] = (w / max(w.sum(), 1e-300)) @ e[b, best]
    hidden = np.concatenate([e * read, read, e], axis=-1) @ get(mixer.up.kernel) + get(mixer.up.bias)
    expected = np.maximum(hidden, 0) @ get(mixer.down.kernel)
    x = oracle.inputs()
    close(oracle.run(mixer, x, inputs={'tokens': tokens}), expected, tolerances.FLOAT32)
    tokens[0, 5] = 9
    assert np.isnan(np.asarray(oracle.run(mixer, x, inputs={'tokens': tokens}))[0, 5:]).all()
