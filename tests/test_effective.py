"""The law of effective fields catches what it is for: a mechanism whose config has fields of every kind."""

from tests import effective

PROBE = '''"""A running mean with too many fields, for a test."""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Recurrent
from attnx.spec import Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    power: float = 1.0  # used
    unread: bool = False  # ignored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    scale: float = 2.0  # used
    kind: str = 'plain'  # used
    ignored: int = 3  # read by nothing
    dead: float = 1.0  # computed with, but no result depends on it
    refused: int = 0  # any other value is refused
    slope: float = 1.0  # used by kind 'sloped' alone, and accepted without
    steps: int = 2  # used by kind 'sloped' alone, and refused without
    aux: bool = False  # only an auxiliary value tells
    inner: Inner = Inner()  # a config in a config

    def __post_init__(self):
        if self.kind not in ('plain', 'sloped'):
            raise ValueError('unknown kind; valid: plain, sloped')
        if self.refused or (self.steps != 2 and self.kind == 'plain'):
            raise ValueError('refused')


class Probe(Mixer):
    def __init__(self, config, dims, *, rngs):
        self.config, self.width = config, dims.width

    def init_state(self, batch, capacity, dtype=None):
        return Recurrent.init(jnp.zeros((batch, 1, 1, self.width), jnp.float32))

    def __call__(self, x, ctx, state=None):
        c = self.config
        jnp.sum(x * c.dead)
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        value = x[:, :, None] * c.scale**c.inner.power
        if c.kind == 'sloped':
            value = value * c.slope + c.steps
        ones = jnp.ones((*value.shape[:3], 1), value.dtype)
        y, memory = ops.gated_linear(ones, ones, value, initial_state=memory, segment_ids=ids)
        aux = {'size': jnp.mean(y)} if c.aux else {}
        return Output(y[:, :, 0], None if state is None else state.advance(memory, ids), aux)


SPEC = Spec(
    module=Probe,
    config=Config,
    paper='none',
    state='matrix',
    causal='causal',
    example=Config(),
    variants={'steps': {'kind': 'sloped'}},
)
'''


def test_finds_what_is_ignored(tmp_path, monkeypatch):
    folder = tmp_path / 'linear'
    folder.mkdir()
    (folder / 'probe.py').write_text(PROBE)
    monkeypatch.setenv('ATTNX_PATH', str(tmp_path))
    assert effective.ignored('probe') == ['ignored', 'dead', 'slope', 'inner.unread']
