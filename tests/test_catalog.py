"""The catalogue finds files by name, filters them, and keeps what is generated fresh."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import attnx
from attnx import catalog, generated

ROOT = pathlib.Path(__file__).parent.parent


def run(*args, **env):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=600
    )


def test_names_and_filters():
    assert attnx.get('gla').paper == '2312.06635'
    assert 'gla' in attnx.list(family='linear')
    assert set(attnx.list(has='decode')) < set(attnx.list())
    assert all(catalog.entry(n).state == 'kv' for n in attnx.list(has='kv'))
    assert [e.name for e in catalog.select(paper='2312.06635')] == ['gla']
    assert 'gla' in [e.name for e in catalog.select(search='decays per key channel')]
    assert not set(attnx.list()) & set(attnx.ops.__all__), 'explain() takes the name of an op or of a mechanism'


@pytest.mark.parametrize(
    'given, mechanism, option',
    [
        ({'paper': '2411.07176'}, 'cog', 'normalizers.signed'),
        ({'paper': 'replacing softmax'}, 'relu_attention', 'normalizers.relu'),
        ({'search': 'negative weights'}, 'cog', None),
        ({'paper': '2510.11602'}, 'static_queries', 'feature_maps.taylor'),
        ({'paper': '2010.04245'}, None, 'softmax.Options.qk_norm'),
        ({'paper': 'off by one'}, None, 'softmax.Options.off_by_one'),
        ({'search': 'window sinks'}, None, 'masks.global_window'),
        ({'paper': '2408.00118'}, None, 'scores.softcap'),
        ({'paper': '2410.11842'}, 'moh', 'interop.convert'),
        ({'paper': 'pit one against many'}, 'mhe', None),
        ({'paper': 'object-level attention transformer'}, None, 'models.pointer'),
        ({'paper': '2312.04455'}, None, 'models.buckets'),
        ({'paper': '2009.09672'}, None, 'step.Config.mask_heads'),
        ({'paper': '2309.00071'}, None, 'softmax.Rope.scaling'),
        ({'paper': 'arXiv:2410.11842v3'}, 'moh', 'interop.convert'),
        ({'paper': 'https://arxiv.org/abs/2410.11842'}, 'moh', 'interop.convert'),
        ({'paper': 'Cog Attention: negative weights'}, 'cog', None),  # names that people use, punctuation, plurals
        ({'paper': 'mixture of heads'}, 'moh', None),
        ({'paper': 'CoPE'}, 'cope', None),
        ({'paper': 'SHA-RNN'}, 'sha_rnn', None),
        ({'paper': 'UoE'}, 'smha', None),
        ({'paper': 'peripheral language models'}, 'mla', None),
        ({'paper': 'Gaussian Adaptive Attention Is All You Need: Robust Contextual'}, 'gaussian_adaptive', None),
        ({'paper': 'X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV Compression'}, 'mla', None),
    ],
)
def test_papers_and_words_find_mechanisms_and_options(given, mechanism, option):
    assert mechanism is None or mechanism in [e.name for e in catalog.select(**given)]
    found = {o.name: o for o in catalog.find_options(**given)}
    assert option is None or option in found
    assert 'scores.alibi' not in {o.name for o in catalog.find_options(paper='OAT')}, 'words are not found inside others'


def test_what_the_catalogue_shows_can_be_used():
    """Snippets of mechanisms build; those of masks and scores are names that the options take."""
    from attnx import config as config_lib
    from attnx.nn import softmax

    for e in catalog.scan().values():
        given = ast.literal_eval(e.snippet)
        assert given.pop('kind') == e.name
        config_lib.build(attnx.get(e.name).config, given)
    uses = {o.name: o.use for o in catalog.options()}
    assert uses['masks.window'] == "masks = (('window', size),)" and uses['scores.alibi'] == "scores = (('alibi',),)"
    assert {f'masks.{m}' for m in softmax.MASKS} | {f'scores.{s}' for s in softmax.SCORES} <= set(uses)


@pytest.mark.parametrize(
    'call, expected',
    [
        (lambda: attnx.get('gated_deltane'), "did you mean 'gated_deltanet'"),
        (lambda: attnx.list(family='linaer'), "did you mean 'linear'"),
        (lambda: attnx.list(has='decod'), "did you mean 'decode'"),
        (lambda: attnx.nothing, 'attnx has no attribute'),
    ],
)
def test_unknown_names_say_the_nearest(call, expected):
    with pytest.raises((ValueError, AttributeError), match=expected):
        call()


def test_generated_files_are_fresh():
    assert generated.stale() == [], 'python -m attnx.catalog --write renews them'


def test_command_prints_without_importing_jax():
    code = 'import sys; from attnx.catalog import main; main([]); print("jax" in sys.modules, file=sys.stderr)'
    out = run('-c', code)
    assert 'gated_deltanet' in out.stdout
    assert out.stderr.strip() == 'False'
    assert run('-m', 'attnx.catalog', '--family', 'nothing').returncode == 2
    out = run('-m', 'attnx.catalog', '--paper', '2309.17453')  # options alone
    assert out.returncode == 0 and 'masks.global_window' in out.stdout and 'softmax.Options.sinks' in out.stdout


THROW_AWAY = '''"""A leaky mean of past tokens, for a test.

Equation: s_t = decay s_{t-1} + x_t W;  y_t = s_t.
Paper: none; a throw-away mechanism.
Differs: is in no paper.
Cost: O(T) time in plain XLA; decode keeps M numbers.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent
from attnx.spec import Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    log_decay: float = -0.5  # of the state, a token


class LeakyMean(Mixer):
    def __init__(self, config, dims, *, rngs):
        self.config, self.width = config, dims.width
        self.value = Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        return Recurrent.init(jnp.zeros((batch, 1, 1, self.width), jnp.float32))

    def __call__(self, x, ctx, state=None):
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        value = self.value(x)[:, :, None]
        ones = jnp.ones((*value.shape[:3], 1), value.dtype)
        decay = jnp.full((1,), self.config.log_decay)
        y, memory = ops.gated_linear(ones, ones, value, decay, initial_state=memory, segment_ids=ids, impl=ctx.impl)
        return Output(y[:, :, 0], None if state is None else state.advance(memory, ids))


SPEC = Spec(
    module=LeakyMean, config=Config, paper='none', ops=('gated_linear',), state='matrix', causal='causal', example=Config()
)
'''


@pytest.mark.slow
def test_one_file_gets_every_law(tmp_path):
    """A mechanism is one file: nothing else is edited, and all laws run on it; a leak in it is caught."""
    folder = tmp_path / 'linear'
    folder.mkdir()
    file = folder / 'leaky_mean.py'
    file.write_text(THROW_AWAY)
    laws = ('-m', 'pytest', 'tests/test_contract.py', '-k', 'leaky_mean', '-p', 'no:cacheprovider')
    out = run(*laws, ATTNX_PATH=str(tmp_path))
    assert out.returncode == 0, out.stdout[-3000:]
    assert '25 passed, 1 skipped' in out.stdout  # the golden file is of this repository's own mechanisms
    file.write_text(THROW_AWAY.replace('segment_ids=ids,', 'segment_ids=None,'))
    out = run(*laws, ATTNX_PATH=str(tmp_path))
    assert out.returncode == 1
    assert 'FAILED tests/test_contract.py::test_packing[leaky_mean]' in out.stdout
