"""Softmax attention, quadratic, in float64 NumPy, from the parameters of a mixer."""

import jax
import numpy as np
from flax import nnx

import attnx
from attnx.spec import Context, Dims

forward = jax.jit(lambda mixer, x, ctx: mixer(x, ctx).y)
extend = jax.jit(lambda mixer, x, ctx, state: tuple(mixer(x, ctx, state))[:2])


def run(mixer, x, **context):
    return forward(mixer, x, Context(**context))


def build(name, width=16, causal=True, max_length=32, **options):
    spec = attnx.get(name)
    dims = Dims(width=width, causal=causal, num_layers=2, max_length=max_length)
    config = spec.config(**options)
    return jax.jit(lambda: spec.build(config, dims, rngs=nnx.Rngs(0)))()


def like(mixer, other):
    """`other` with the projections of `mixer`."""
    for name in ('query', 'key', 'value', 'out'):
        setattr(other, name, getattr(mixer, name))
    return other


def inputs(width=16, length=12, batch=2):
    return np.random.default_rng(0).standard_normal((batch, length, width)).astype(np.float32)


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


def heads(x, linear, n):
    y = np.asarray(x, np.float64) @ kernel(linear)
    return y.reshape(*y.shape[:2], n, -1)


def rms(x, eps=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def turn(x, frequencies=None):
    """RoPE of [B, T, N, H], halves paired."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-np.arange(half) / half) if frequencies is None else frequencies
    angle = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def weights(q, k, visible, scale):
    """[B, N, T, S]; rows that see nothing are 0."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = np.where(visible, np.einsum('btnh,bsnh->bnts', q, k) * scale, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True)
    e = np.exp(logits - np.where(np.isfinite(top), top, 0))
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def attend(q, k, v, visible, scale=None):
    v = np.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return np.einsum('bnts,bsnh->btnh', weights(q, k, visible, scale or q.shape[-1] ** -0.5), v)


def causal(length):
    return np.tril(np.ones((length, length), bool))


def project(out, linear):
    return out.reshape(*out.shape[:2], -1) @ kernel(linear)
