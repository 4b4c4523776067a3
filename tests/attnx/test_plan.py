"""The plan before a run, and the explanation of what runs."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attnx
from attnx import config as config_lib
from attnx import dispatch, plan
from attnx.models import ModelConfig, build
from attnx.nn import flat_axes, to_flat

ROOT = pathlib.Path(__file__).parent.parent.parent


def config_of(**fields):
    given = {'vocab_size': 64, 'width': 64, 'num_layers': 3, 'pattern': ('gla', 'gqa', 'sliding_window'), **fields}
    return config_lib.build(ModelConfig, given, 'config.model')


def test_counts_are_those_of_the_model():
    config = config_of(mixers={'sliding_window': {'kind': 'sliding_window', 'window': 16}})
    found = plan.plan(config, length=128, batch=2)
    model = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    assert found.parameters == sum(v.size for v in to_flat(model).values())
    assert not found.refused
    linear, full, window = found.layers
    assert linear.state_bytes_token == 0 and linear.state_bytes == 4 * (4 * 8 * 16 + 1)  # one matrix a head, and a segment id
    assert full.state_bytes_token == 4 * (2 * 2 * 16 + 1)  # K and V of two heads of 16, and a segment id
    assert window.state_bytes_token == 0 and window.state_bytes < full.state_bytes
    assert found.state_bytes == sum(layer.state_bytes for layer in found.layers)
    assert found.memory['optimizer'] == 2 * found.memory['parameters'] + 4 == 8 * found.parameters + 4  # and a count
    more = plan.plan(config_of(remat='full'), length=128, batch=2).memory['activations']
    assert 0 < more < found.memory['activations']


def test_a_token_pays_for_the_experts_that_it_visits():
    """Of attention and of the MLP: four fewer take off the products of four, and of their heads, and nothing else."""

    def flops(top_k):
        mixer = {'kind': 'moa', 'num_experts': 6, 'top_k': top_k, 'num_kv_heads': 2, 'head_dim': 8}
        config = config_of(pattern=('a',), mixers={'a': mixer}, mlp={'kind': 'moe', 'experts': 6, 'top_k': top_k, 'hidden': 16})
        made = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
        return plan.flops_per_token(config, flat_axes(made), to_flat(made), 32)

    matrices, pairs = 2 * 64 * 16 + 3 * 64 * 16, 4 * 2 * 8 * 32 / 2  # of an expert of each kind, of its heads
    assert flops(6) - flops(2) == 3 * 4 * (6 * matrices + 3 * pairs)


def test_everything_refused_is_listed():
    mixers = {'bad': {'kind': 'gqa', 'num_heads': 5, 'num_kv_heads': 5}}
    found = plan.plan(config_of(mixers=mixers, pattern=('gla', 'bad', 'agent')), length=64, batch=2)
    assert any('5 heads' in line for line in found.refused)
    assert any('bidirectional only' in line for line in found.refused)
    assert len(found.layers) == 1


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_record_says_what_runs(platform):
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    with dispatch.record() as calls:
        jax.eval_shape(lambda q: attnx.ops.softmax_attention(q, q, q), q)
    (call,) = calls
    chosen = call.chosen(platform)
    assert chosen.reason is None
    assert chosen.impl in attnx.explain('softmax_attention', q, q, q)


def test_explain():
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    text = attnx.explain('softmax_attention', q, q, q, mask=attnx.ops.masks.causal(), return_lse=True)
    assert 'on cpu: xla' in text and 'reference (any): runs' in text
    text = attnx.explain('gated_deltanet', width=96, num_heads=2, length=128)
    assert 'delta_rule' in text and 'short_conv' in text
    long = jax.ShapeDtypeStruct((1, 65536, 16, 128), jnp.bfloat16)
    assert '8 pieces of the sequence side by side' in attnx.explain('gated_linear', long, long, long)
    with pytest.raises(ValueError, match="did you mean 'gla'"):
        attnx.explain('glaa')
    with pytest.raises(ValueError, match="did you mean 'num_heads'"):
        attnx.explain('gla', num_head=2)


def test_an_unknown_implementation_is_refused():
    q = jnp.ones((1, 8, 1, 8))
    with pytest.raises(ValueError, match="unknown impl 'xlaa'; did you mean 'xla'"):
        attnx.ops.softmax_attention(q, q, q, impl='xlaa')


def test_command():
    command = [sys.executable, '-m', 'attnx.plan', '--config=configs/base.py', '--platform=cpu', '--config.steps=500']
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert out.returncode == 0, out.stderr
    for word in ('parameters', 'state/token', 'memory: total', 'softmax_attention: xla'):
        assert word in out.stdout
    out = subprocess.run([*command, '--config.model.pattern=("gated_deltane",)'], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 2
    assert "did you mean 'gated_deltanet'" in out.stderr
