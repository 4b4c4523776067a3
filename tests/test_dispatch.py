"""Choice among implementations: explicit ones run or raise, auto takes the platform's kernel, nothing falls back quietly."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from attnx import dispatch
from pallas_kernels import table

FORMS = {'reference': lambda x, *, scale=1: x * scale, 'xla': lambda x, *, scale=1: x * scale + 0}


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of an op `twice` that runs on CPU and refuses float16; another for CUDA that can't be imported."""
    module = types.ModuleType('fake_kernel')
    module.calls = []

    def twice(x, *, scale=1):
        module.calls.append(x.dtype)
        return x * scale

    module.twice = twice
    module.unsupported = lambda x, *, scale=1: 'float16 is not taken; use bfloat16' if x.dtype == jnp.float16 else None
    monkeypatch.setitem(sys.modules, 'fake_kernel', module)
    rows = (
        table.Kernel('twice', 'mosaic_cpu', 'fake_kernel', 'cpu', 'any'),
        table.Kernel('twice', 'mosaic_gpu', 'no_such_module', 'cuda', 'sm90'),
    )
    monkeypatch.setattr(table, 'KERNELS', rows)
    return module


def run(x, impl='auto', **kwargs):
    return dispatch.run('twice', impl, FORMS, (x,), kwargs)


def test_auto_takes_the_kernel_of_this_platform(kernel):
    assert jax.jit(run)(jnp.ones(3)).shape == (3,)
    assert kernel.calls


def test_auto_takes_xla_where_the_kernel_refuses(kernel):
    run(jnp.ones(3, jnp.float16))
    assert not kernel.calls


def test_static_arguments_stay_static(kernel):
    out = jax.jit(lambda x: run(x, scale=3))(jnp.ones(2))
    assert out.tolist() == [3.0, 3.0]
    assert jax.grad(lambda x: run(x, scale=3).sum())(jnp.ones(2)).tolist() == [3.0, 3.0]


def test_an_explicit_choice_runs_or_raises(kernel):
    run(jnp.ones(3), 'mosaic_cpu')
    assert kernel.calls
    with pytest.raises(ValueError, match='refuses this call: float16 is not taken; use bfloat16; these run: xla, reference'):
        run(jnp.ones(3, jnp.float16), 'mosaic_cpu')
    with pytest.raises(ValueError, match='no_such_module does not import'):
        run(jnp.ones(3), 'mosaic_gpu')
    with pytest.raises(ValueError, match="did you mean 'mosaic_gpu'"):
        run(jnp.ones(3), 'mosaic_gp')


def test_record_tells_every_reason(kernel):
    with dispatch.record() as calls:
        run(jnp.ones(3, jnp.float16))
    (call,) = calls
    assert {c.impl: c.reason is None for c in call.choices} == {
        'mosaic_cpu': False, 'mosaic_gpu': False, 'xla': True, 'reference': True,
    }  # fmt: skip
    assert call.chosen('cpu').impl == 'xla'


def test_target_brings_in_the_kernels_of_another_platform(kernel, monkeypatch):
    monkeypatch.setattr(table, 'KERNELS', (table.Kernel('twice', 'mosaic_tpu', 'fake_kernel', 'tpu', 'v5e'),))
    run(jnp.ones(3))
    assert not kernel.calls
    with dispatch.target('tpu'):
        jax.jit(lambda x: run(x)).trace(jnp.ones(3)).lower(lowering_platforms=('tpu',))
    assert kernel.calls


@pytest.mark.parametrize('name', ['retnet', 'gla', 'deltanet', 'gated_deltanet'])
def test_auto_takes_the_recurrent_kernels(name):
    from attnx import explanation

    calls = explanation.calls_of(name, width=256, length=256)
    call = next(c for c in calls if c.op in ('gated_linear', 'delta_rule'))
    assert call.chosen('cuda').impl == 'mosaic_gpu'


@pytest.mark.parametrize('impl', ['auto', 'mosaic_cpu'])
def test_a_kernel_has_the_forward_mode_of_xla(kernel, impl):
    """Its own rule serves gradients; forward mode is that of the xla form; what neither has names the form that does."""

    @jax.custom_vjp
    def twice(x, scale):
        return x * scale

    twice.defvjp(lambda x, scale: (x * scale, scale), lambda scale, g: (10 * g * scale, 0 * scale))
    kernel.twice = lambda x, *, scale: twice(x, scale)
    f = lambda x: run(jnp.sin(x), impl, scale=jnp.float32(3))
    x, dx = jnp.arange(3.0), jnp.array([1.0, 0.0, 2.0])
    for jvp in (jax.jvp, jax.jit(jax.jvp, static_argnums=0), lambda f, x, dx: jax.jvp(jax.jit(f), x, dx)):
        assert jnp.allclose(jvp(f, (x,), (dx,))[1], 3 * jnp.cos(x) * dx)
    for whole in (f, jax.jit(f), jax.checkpoint(f), jax.vmap(f)):
        got = jax.grad(lambda x, whole=whole: whole(x).sum())(x)
        assert jnp.allclose(got, 30 * jnp.cos(x))  # its own rule, which is off by ten
    for second in (jax.hessian(lambda x: f(x).sum()), jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())):
        with pytest.raises(TypeError, match="twice: impl 'mosaic_cpu' has first-order derivatives only; impl='reference' has"):
            jax.jit(second)(x)
