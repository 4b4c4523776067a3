"""Benchmarks of the ops.

    python -m attnx.bench memory [--length=16384] [--heads=8] [--width=64] [--dtype=float32]

`memory`: temporary memory of the blockwise softmax attention against the quadratic form, as XLA's `memory_analysis` of
the compiled program gives it for this machine's backend. Nothing runs, so lengths that would not fit can be asked for.
"""

import argparse

import jax
import jax.numpy as jnp

from attnx.ops import masks
from attnx.ops.softmax_attention import xla


def quadratic(query, key, value, causal: bool):
    """Attention as textbooks write it, and the leanest form that XLA makes of it: no guards, no grouped heads."""
    T, S = query.shape[1], key.shape[1]
    logits = jnp.einsum('btnh,bsnh->bnts', query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones((T, S), bool), S - T), logits, -jnp.inf)
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(logits, -1).astype(value.dtype), value)


def blockwise(query, key, value, causal: bool):
    return xla(query, key, value, mask=masks.causal() if causal else None)


def temporary_bytes(form, causal: bool, backward: bool, length: int, heads: int = 8, width: int = 64, dtype='float32'):
    """Bytes of temporaries of the compiled forward, or forward and backward for gradients of all three inputs."""
    array = jax.ShapeDtypeStruct((1, length, heads, width), dtype)
    forward = lambda *qkv: form(*qkv, causal)
    both = lambda *qkv, cotangent: jax.vjp(forward, *qkv)[1](cotangent)
    lowered = (
        jax.jit(both).lower(array, array, array, cotangent=array) if backward else jax.jit(forward).lower(*[array] * 3)
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def memory(length: int = 16384, heads: int = 8, width: int = 64, dtype: str = 'float32') -> list[dict]:
    """One row for each of causal and full, forward and forward+backward."""
    rows = []
    for causal in (True, False):
        for backward in (False, True):
            sizes = {
                form.__name__: temporary_bytes(form, causal, backward, length, heads, width, dtype)
                for form in (quadratic, blockwise)
            }
            ratio = sizes['quadratic'] / sizes['blockwise']
            rows.append({'mask': 'causal' if causal else 'full', 'backward': backward, **sizes, 'ratio': ratio})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m attnx.bench', description='Benchmarks of the ops.')
    parser.add_argument('what', choices=['memory'])
    parser.add_argument('--length', type=int, default=16384)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    args = parser.parse_args(argv)
    print(
        f'Temporary memory, {jax.default_backend()}: B=1 T=S={args.length} N={args.heads} H={args.width} {args.dtype}'
    )
    print(f'{"mask":8}{"pass":20}{"quadratic MiB":>15}{"blockwise MiB":>15}{"ratio":>8}')
    for row in memory(args.length, args.heads, args.width, args.dtype):
        step = 'forward+backward' if row['backward'] else 'forward'
        sizes = ''.join(f'{row[name] / 2**20:15.1f}' for name in ('quadratic', 'blockwise'))
        print(f'{row["mask"]:8}{step:20}{sizes}{row["ratio"]:8.1f}')


if __name__ == '__main__':
    main()
