"""Opt-in choice of tiles by timing, pinned in a file so that a resumed run computes bit for bit what it did before.

    python -m pallas_kernels.softmax_attention.tune FILE B,T,N,K,H [B,T,N,K,H ...] [--causal]

times the candidates for each shape's head width on this GPU and writes the fastest to FILE. A program calls
`replay_or_tune` before it traces anything: a file that exists is replayed, never tuned again. `attnx.train` does so with
`config.tune`.
"""

import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from pallas_kernels import elementwise as ew
from pallas_kernels.softmax_attention import mosaic_gpu, tiles


def candidates(call: tiles.Call) -> list[tiles.Forward]:
    """Forward tiles that fit a call, the table's first. (The backward kernel has one choice at each width.)"""
    before = tiles.pinned()
    tiles.pin(None)
    table = tiles.forward(call)
    tiles.pin(before)
    wide = max(call.H, call.Hv)
    if wide <= 64:
        sizes = itertools.product((2, 3), (64, 128), (2, 3))
    elif wide <= 128:
        sizes = [(2, 128, 2), (2, 64, 2), (2, 64, 3)]
    else:
        sizes = [(2, 64, 2)]
    found = [table]
    for (consumers, keys, stages), turns, share in itertools.product(sizes, (True, False), (0, 4)):
        registers = (160, 32) if consumers == 3 else (240, 24)
        polynomial = keys // share if share else 0
        found.append(tiles.Forward(consumers, keys, stages, registers, turns, table.buffers, polynomial))
    return list(dict.fromkeys(found))


def _causal(i):
    return i.k <= i.q + (i.k_len - i.q_len)


def _capped(s, i):
    return 30 * jnp.tanh(s / 30)


def tune(calls: Iterable[tiles.Call], timer: Callable | None = None) -> dict:
    """The fastest tiles for each class among `calls`, by the time of the forward pass of the largest call in it.

    A call with a mask is timed with a causal one, a call whose score needs the special function unit with a soft cap.

    Args:
      timer: (compiled function, arguments) -> milliseconds.
    """
    if timer is None:
        from pallas_kernels.bench import timed_jax as timer
    largest: dict = {}
    for call in calls:
        size = call.B * call.N * call.T * call.S * (call.H + call.Hv)
        largest[call.name] = max(largest.get(call.name, (0, call)), (size, call))
    best: dict = {}
    for key, (_, call) in sorted(largest.items()):
        B, T, S, N, K, H, Hv = call[:7]
        draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)
        args = draw(0, B, T, N, H), draw(1, B, S, K, H), draw(2, B, S, K, Hv)
        mask, score = _causal if call.masked else None, ew.as_score(_capped) if call.special else None
        before, programs = tiles.pinned(), {}
        for choice in candidates(call):
            tiles.pin({**before, key: choice})
            try:
                f = functools.partial(mosaic_gpu.softmax_attention, mask=mask, score=score)
                programs[choice] = jax.jit(f).lower(*args).compile()
            except Exception as error:  # a candidate that does not compile is none
                print(f'{choice}: {type(error).__name__}: {str(error)[:200]}', file=sys.stderr)
            finally:
                tiles.pin(before)
        if not programs:
            raise ValueError(f'{key}: no candidate compiles on this machine; tune on a Hopper GPU')
        times = {choice: sorted(timer(program, args) for _ in range(3))[1] for choice, program in programs.items()}
        for choice, ms in times.items():
            print(f'{ms:8.3f} ms  {choice}', flush=True)
        best[key] = min(times, key=times.__getitem__)
    return best


def replay_or_tune(path: str | os.PathLike, calls: Callable[[], Iterable[tiles.Call]], agreed=lambda text: text) -> dict:
    """Pins the choices in the file at `path`; where there is none, tunes for `calls()` and writes it first.

    Args:
      calls: gives the calls to tune for; see `tiles.asked`.
      agreed: text or None -> process 0's text, where several processes must choose the same.

    Raises:
      ValueError: the file is damaged.
    """
    path, first = pathlib.Path(path), jax.process_index() == 0
    text = path.read_text() if first and path.exists() else None
    text = agreed(text)
    if text is None:
        wanted = list(calls())
        text = agreed(tiles.to_json(tune(wanted)) if first else None)
        if first:
            draft = path.with_name(path.name + '.tmp')
            draft.write_text(text)
            draft.replace(path)
    choices = tiles.from_json(text, str(path))
    tiles.pin(choices)
    return choices


def main(words):
    causal = '--causal' in words
    path, *shapes = [w for w in words if w != '--causal']
    width = lambda H: -(-H // 64) * 64
    calls = [
        tiles.Call(B, T, T, N, K, width(H), width(H), causal) for B, T, N, K, H in (map(int, s.split(',')) for s in shapes)
    ]
    pathlib.Path(path).write_text(tiles.to_json(tune(calls)))


if __name__ == '__main__':
    main(sys.argv[1:])
