"""Position codes: sinusoids to add, rotations of queries and keys (RoPE) in one or more dimensions, and their scalings.

Rotations are angles first, `rope_frequencies` times positions, and one `rotate` after: `rope` and `axial_rope` are the
usual compositions. Angles are float32 or wider whatever x is; bfloat16 can't tell positions apart beyond 256.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attnx import dispatch

SCALINGS = ('linear', 'ntk', 'dynamic', 'yarn')


def sinusoidal(positions, width: int, *, base: float = 10000.0, dtype=jnp.float32):
    """Fixed sinusoids: channel 2n holds sin(p base^(-2n/width)), channel 2n+1 the cosine.

    Args:
      positions: [...], any numbers.
      width: even.

    Returns:
      [..., width]. Paper: 1706.03762.
    """
    angles = _angles(positions, rope_frequencies(width, base).inverse)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], width).astype(dtype)


def gaussian(count: int, width: int, sigma: float = 2.0) -> np.ndarray:
    """A table of places, float64 [count, width], rows of about length 1 whose products fall as exp(-(i - j)² / (2 sigma²)).

    They are the eigenvectors of that matrix times the roots of its eigenvalues: exact where width >= count or the further
    eigenvalues vanish. Paper: 2407.13335, which fits such a table by gradient descent.
    """
    if count < 1 or width < 1 or sigma <= 0:
        raise ValueError(f'gaussian: count {count} and width {width} must be at least 1, sigma {sigma} positive')
    far = np.arange(count)[:, None] - np.arange(count)
    values, vectors = np.linalg.eigh(np.exp(-(far**2) / (2 * sigma**2)))
    table = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :width]
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))


class Scaling(NamedTuple):
    """How RoPE is stretched to contexts `factor` times longer than the `original_length` it was trained on.

    kind 'linear' divides positions (2306.15595); 'ntk' raises the base so that the slowest pair alone is stretched by
    the whole factor; 'dynamic' does so by the present length once it exceeds the original one; 'yarn' stretches pairs
    that turn less than `slow` times over the original length, leaves those that turn more than `fast` times, and
    multiplies cos and sin by 0.1 ln(factor) + 1, or by `attention_factor` if given (2309.00071).
    """

    kind: str
    factor: float
    original_length: int = 0
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None


class Frequencies(NamedTuple):
    """inverse: radians per position of each pair, [R/2] (NumPy, float64). factor: multiplies cos and sin."""

    inverse: np.ndarray
    factor: float = 1.0


def rope_frequencies(
    rotary_dim: int, base: float = 10000.0, *, scaling: Scaling | None = None, length: int | None = None
) -> Frequencies:
    """θ_n = base^(-2n/R), n < R/2, stretched by `scaling`.

    Args:
      rotary_dim: R, even: how many channels of a head turn.
      scaling: a `Scaling`; None leaves θ as it is, and so does factor 1 for every kind.
      length: the present context length, for 'dynamic' only. Keys cached under another length were turned by other
        angles: with a cache fix the length or cache keys before rotation.

    Raises:
      ValueError: R is odd or not positive, base is not above 1, the scaling is unknown or lacks its original or present
        length.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f'rope: rotary_dim is {rotary_dim}, expected a positive even number')
    if base <= 1:
        raise ValueError(f'rope: base is {base}, expected more than 1')
    inverse = lambda base: base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling is None:
        return Frequencies(inverse(base))
    kind, factor, original, fast, slow, attention_factor = scaling
    if kind not in SCALINGS:
        raise ValueError(f'rope: unknown scaling {kind!r}; {dispatch.nearest(kind, SCALINGS)}')
    if factor < 1:
        raise ValueError(f'rope: scaling factor is {factor}, expected at least 1')
    if kind in ('dynamic', 'yarn') and original < 1:
        raise ValueError(f'rope: {kind} scaling has original_length {original}, expected the length trained on')
    if kind == 'linear':
        return Frequencies(inverse(base) / factor)
    # R = 2 has one pair, the fastest and the slowest at once: the base does not matter to it.
    raised = lambda factor: base * factor ** (rotary_dim / max(rotary_dim - 2, 1))
    if kind == 'ntk':
        return Frequencies(inverse(raised(factor)))
    if kind == 'dynamic':
        if length is None:
            raise ValueError('rope: dynamic scaling needs length, the present context length')
        stretch = factor * length / original - (factor - 1)
        return Frequencies(inverse(raised(stretch) if length > original else base))
    if factor == 1:
        return Frequencies(inverse(base), 1.0 if attention_factor is None else attention_factor)
    turns = lambda count: rotary_dim * math.log(original / (2 * math.pi * count)) / (2 * math.log(base))
    low, high = max(math.floor(turns(fast)), 0), min(math.ceil(turns(slow)), rotary_dim - 1)
    high = high + 0.001 if high == low else high
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    stretched = inverse(base) * (ramp / factor + 1 - ramp)
    return Frequencies(stretched, 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor)


def _angles(positions, inverse, dtype=jnp.float32):
    return jnp.asarray(positions, dtype)[..., None] * jnp.asarray(inverse, dtype)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def rotate(x, angles, *, interleaved: bool = False, factor: float = 1.0):
    """Turns pairs of x's channels by angles; channels beyond 2 angles.shape[-1] pass as they are.

    Args:
      x: [B, T, N, H].
      angles: [B, T, R/2] for all heads or [B, T, N, R/2]; leading dimensions may be 1. R <= H.
      interleaved: pairs are (2n, 2n+1); else (n, n + R/2), as in LLaMA weights. Weights trained on one do not fit the
        other.
      factor: multiplies cos and sin.

    Returns:
      [B, T, N, H] in x's dtype; the turn is computed in float32 or wider.
    """
    if angles.ndim == 3:
        angles = angles[:, :, None]
    rotary = 2 * angles.shape[-1]
    if x.ndim != 4 or angles.ndim != 4 or rotary > x.shape[-1]:
        raise ValueError(
            f'rotate: x has shape {x.shape}, expected [B, T, N, H] with H at least {rotary} for these angles'
        )
    dtype = _wide(x)
    cos, sin = (factor * f(angles).astype(dtype) for f in (jnp.cos, jnp.sin))
    turning, still = x[..., :rotary].astype(dtype), x[..., rotary:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), still], axis=-1) if still.shape[-1] else turned.astype(x.dtype)


def rope(
    x,
    positions,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    length: int | None = None,
):
    """Rotary position embedding: pair n of channels turned by p θ_n, so that q·k depends on the difference of
    positions.

    Args:
      x: queries or keys [B, T, N, H].
      positions: [B, T] or [T].
      rotary_dim: R <= H, even; the other channels carry no position. None is H.
      base, scaling, length: see `rope_frequencies`.
      interleaved: see `rotate`.

    Returns:
      [B, T, N, H] in x's dtype. Paper: 2104.09864.
    """
    positions = _check('rope', x, positions, 'B T')
    frequencies = rope_frequencies(_rotary(x, rotary_dim), base, scaling=scaling, length=length)
    angles = _angles(positions, frequencies.inverse, _wide(x))
    return rotate(x, angles, interleaved=interleaved, factor=frequencies.factor)


def axial_rope(
    x,
    coordinates,
    *,
    base: float = 100.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    sections: tuple[int, ...] | None = None,
    shared: bool = False,
):
    """RoPE over n coordinates: the pairs are dealt to the axes in turn, so that q·k depends on each axis's difference.

    Args:
      x: [B, T, N, H].
      coordinates: [B, T, n] or [T, n]: (row, column) of an image's patch, (time, row, column) of a video's.
      base: 100 is usual for images.
      sections: pairs per axis, adding up to R/2; None deals them equally.
      shared: False gives each axis the whole range of frequencies, base^(-m/pairs) for m < pairs (2403.13298); True
        cuts one range of R/2 into sections, so that equal coordinates are plain RoPE (M-RoPE, 2409.12191).

    Returns:
      [B, T, N, H] in x's dtype.
    """
    coordinates = _check('axial_rope', x, coordinates, 'B T n')
    rotary, axes = _rotary(x, rotary_dim), coordinates.shape[-1]
    if sections is None:
        if rotary % (2 * axes):
            pairs = f'rotary_dim {rotary} has {rotary // 2} pairs'
            raise ValueError(f'axial_rope: {pairs}, expected a multiple of the {axes} axes, or sections')
        sections = (rotary // 2 // axes,) * axes
    if len(sections) != axes or 2 * sum(sections) != rotary or min(sections) < 0:
        raise ValueError(f'axial_rope: sections {sections}, expected {axes} counts adding up to {rotary // 2} pairs')
    ranges = [rope_frequencies(2 * pairs, base).inverse for pairs in sections if pairs]
    inverse = rope_frequencies(rotary, base).inverse if shared else np.concatenate(ranges)
    axis = np.repeat(np.arange(axes), sections)
    angles = jnp.asarray(coordinates, _wide(x))[..., axis] * jnp.asarray(inverse, _wide(x))
    return rotate(x, angles, interleaved=interleaved)


def mixed_rope(x, coordinates, frequencies, *, interleaved: bool = False):
    """RoPE with learned directions: pair m of head h turns by the sum over axes of frequencies_ahm coordinate_a.

    Args:
      x: [B, T, N, H].
      coordinates: [B, T, n] or [T, n].
      frequencies: radians per unit, [n, N, R/2]. Axial RoPE is the case of one axis per pair.

    Paper: 2403.13298.
    """
    coordinates = _check('mixed_rope', x, coordinates, 'B T n')
    wanted = (coordinates.shape[-1], x.shape[2])
    if frequencies.ndim != 3 or frequencies.shape[:2] != wanted:
        raise ValueError(
            f'mixed_rope: frequencies has shape {frequencies.shape}, expected [n, N, R/2] = {(*wanted, "R/2")}'
        )
    coordinates, frequencies = (jnp.asarray(a, _wide(x)) for a in (coordinates, frequencies))
    angles = jnp.einsum('btx,xnr->btnr', coordinates, frequencies, precision='highest')
    return rotate(x, angles, interleaved=interleaved)


def lrpe(x, positions, frequencies):
    """Linearised relative positions, H -> 2H: [x cos(p θ), x sin(p θ)], so that q·k becomes sum_h q_h k_h cos((i - j)
    θ_h).

    Unlike a rotation it turns each channel alone, and fits linear attention's features.

    Args:
      x: [B, T, N, H].
      positions: [B, T] or [T].
      frequencies: radians per position [N, H].

    Paper: 2307.09270, 2307.14995.
    """
    positions = _check('lrpe', x, positions, 'B T')
    if frequencies.shape != x.shape[2:]:
        raise ValueError(f'lrpe: frequencies has shape {frequencies.shape}, expected [N, H] = {x.shape[2:]}')
    angles = jnp.asarray(positions, _wide(x))[..., None, None] * jnp.asarray(frequencies, _wide(x))
    wide = x.astype(_wide(x))
    return jnp.concatenate([wide * jnp.cos(angles), wide * jnp.sin(angles)], axis=-1).astype(x.dtype)


def reflect(x, normals):
    """Each head mirrored at the plane of a vector: x - 2 n (n·x) / |n|², an orthogonal map that may be learned.

    With a rotation after it, it is LRPE's orthogonal type: the rotation turns pairs of a learned basis, not of channels.

    Args:
      x: [B, T, N, H].
      normals: [N, H], any length but 0.

    Paper: 2307.09270.
    """
    _fits('reflect', x, normals, 'normals')
    wide, normals = x.astype(_wide(x)), normals.astype(_wide(x))
    normals = normals / jnp.linalg.norm(normals, axis=-1, keepdims=True)
    along = jnp.einsum('btnh,nh->btn', wide, normals, precision='highest')
    return (wide - 2 * along[..., None] * normals).astype(x.dtype)


def permute(x, positions, permutations):
    """Powers of permutations, LRPE's third type: channel h of the token at p is its channel π_n^p(h), so that q·k depends
    on the difference of positions, as of rotations.

    Args:
      x: [B, T, N, H].
      positions: [B, T] or [T], integers >= 0.
      permutations: NumPy int [N, H], each row a permutation of 0 … H - 1.

    Paper: 2307.09270.
    """
    positions, permutations = _check('permute', x, positions, 'B T'), np.asarray(permutations)
    _fits('permute', x, permutations, 'permutations')
    if not jnp.issubdtype(positions.dtype, jnp.integer) or (np.sort(permutations) != np.arange(x.shape[-1])).any():
        raise ValueError('permute: expected integer positions, and rows that hold every channel once')
    # Along its cycle a channel moves on by p: π^p(h) = ring[first + (place + p) mod length], h = ring[first + place].
    ring, first, place, length = (np.zeros(permutations.shape, np.int32) for _ in range(4))
    for n, row in enumerate(permutations):
        seen = []
        for h in range(len(row)):
            begin = len(seen)
            while h not in seen:
                place[n, h], ring[n, len(seen)] = len(seen) - begin, h
                seen.append(h)
                h = row[h]
            first[n, seen[begin:]], length[n, seen[begin:]] = begin, len(seen) - begin
    moved = first + (place + positions[..., None, None]) % length  # [B, T, N, H]
    source = jnp.take_along_axis(jnp.broadcast_to(ring, moved.shape), moved, axis=-1)
    return jnp.take_along_axis(x, jnp.broadcast_to(source, x.shape), axis=-1)


def _fits(name, x, given, what):
    if x.ndim != 4 or given.shape != x.shape[2:]:
        raise ValueError(f'{name}: {what} has shape {given.shape}, expected [N, H] = {x.shape[2:]}')


def _rotary(x, rotary_dim):
    rotary = x.shape[-1] if rotary_dim is None else rotary_dim
    if not 0 < rotary <= x.shape[-1] or rotary % 2:
        raise ValueError(f'rope: rotary_dim is {rotary}, expected an even number up to the head width {x.shape[-1]}')
    return rotary


def _check(name, x, positions, letters):
    """Positions with a batch dimension, [B or 1, T, ...]."""
    letters, positions = letters.split(), jnp.asarray(positions)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'{name}: x has shape {x.shape} and dtype {x.dtype}, expected floating [B, T, N, H]')
    whole = positions[None] if positions.ndim == len(letters) - 1 else positions
    if whole.ndim != len(letters) or whole.shape[1] != x.shape[1] or whole.shape[0] not in (1, x.shape[0]):
        what = 'positions' if len(letters) == 2 else 'coordinates'
        layout = f'[{", ".join(letters)}] with B, T = {x.shape[:2]}'
        raise ValueError(f'{name}: {what} has shape {positions.shape}, expected {layout}')
    return whole
