"""Opt-in choice of tiles by timing, pinned in a file so that a resumed run computes bit for bit what it did before.

    python -m pallas_kernels.softmax_attention.tune FILE B,T,N,K,H [B,T,N,K,H ...] [--causal]

times the candidates for each shape's head width on this GPU and writes the fastest to FILE. A program calls
`replay_or_tune(FILE, shapes)` before it traces anything: a file that exists is replayed, never tuned again.
"""

import functools
import itertools
import os
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_attention import mosaic_gpu, tiles


def candidates(H: int) -> list[tiles.Forward]:
    """Forward tiles that fit head width H, the table's first. (The backward kernel has one choice at each width.)"""
    table = tiles.forward(H, H)
    if H <= 64:
        sizes = itertools.product((2, 3), (64, 128), (2, 3))
    elif H <= 128:
        sizes = [(2, 128, 2), (2, 64, 2), (2, 64, 3)]
    else:
        sizes = [(2, 64, 2)]
    found = [table]
    for (consumers, keys, stages), turns in itertools.product(sizes, (True, False)):
        registers = (160, 32) if consumers == 3 else (240, 24)
        found.append(tiles.Forward(consumers, keys, stages, registers, turns, table.buffers))
    return list(dict.fromkeys(found))


def tune(shapes, causal: bool = False, timer=None) -> dict:
    """The fastest tiles for each head width among `shapes`, (B, T, N, K, H), by the time of the forward pass there.

    Args:
      timer: (compiled function, arguments) -> milliseconds.
    """
    if timer is None:
        from pallas_kernels.bench import timed_jax as timer
    mask = (lambda i: i.k <= i.q) if causal else None
    best: dict = {}
    for B, T, N, K, H in shapes:
        width = -(-H // 64) * 64
        keys = jax.random.split(jax.random.key(0), 3)
        args = [jax.random.normal(key, (B, T, heads, H), jnp.bfloat16) for key, heads in zip(keys, (N, K, K))]
        before, key = dict(tiles._pinned), tiles.name(tiles.Forward, width, width)
        programs = {}
        for choice in candidates(width):
            tiles.pin({**before, key: choice})
            try:
                f = functools.partial(mosaic_gpu.softmax_attention, mask=mask)
                programs[choice] = jax.jit(f).lower(*args).compile()
            except Exception as error:  # a candidate that does not compile is none
                print(f'{choice}: {type(error).__name__}: {str(error)[:200]}', file=sys.stderr)
            finally:
                tiles.pin(before)
        times = {choice: sorted(timer(program, args) for _ in range(3))[1] for choice, program in programs.items()}
        for choice, ms in times.items():
            print(f'{ms:8.3f} ms  {choice}', flush=True)
        best[key] = min(times, key=times.__getitem__)
    return best


def replay_or_tune(path: str, shapes, causal: bool = False) -> dict:
    """Pins the choices in the file at `path`; where there is none, tunes for `shapes` and writes it first."""
    if not os.path.exists(path):
        tiles.save(path, tune(shapes, causal))
    choices = tiles.load(path)
    tiles.pin(choices)
    return choices


def main(words):
    causal = '--causal' in words
    path, *shapes = [w for w in words if w != '--causal']
    tiles.save(path, tune([tuple(map(int, s.split(','))) for s in shapes], causal))


if __name__ == '__main__':
    main(sys.argv[1:])
