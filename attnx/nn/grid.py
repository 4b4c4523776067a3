"""Tokens as points of a line or a grid that belong to documents."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from attnx.nn.state import starts


def place(ids: jax.Array, grid: int = 0) -> tuple[jax.Array, jax.Array]:
    """(row, column) of each token inside its document, int32 [B, T]; without a grid all stand in row 0.

    Args:
      ids: int32 [B, T], documents; tokens of one stand together, row by row.
      grid: tokens in a row of the grid; 0: a line.
    """
    offset = jnp.arange(ids.shape[1]) - starts(ids)
    return (offset // grid, offset % grid) if grid else (jnp.zeros_like(offset), offset)


def neighbours(
    x: jax.Array, ids: jax.Array, back: int, ahead: int, grid: int = 0
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The tokens around each token, offset by offset, zero where there is none in the document.

    Args:
      x: [B, T, D].
      ids: int32 [B, T], documents; 0 is padding, nobody's neighbour.
      back, ahead: how far to look along the line; on a grid, along both of its dimensions, rows first.

    Yields:
      (x at the offset [B, T, D], which of them exist: bool [B, T, 1]).
    """
    length = x.shape[1]
    _, column = place(ids, grid)
    index, reach = jnp.arange(length), range(-back, ahead + 1)
    for row in reach if grid else (0,):
        for step in reach:
            offset = row * grid + step
            there = (index + offset >= 0) & (index + offset < length)
            inside = there & (jnp.roll(ids, -offset, axis=1) == ids) & (ids > 0)
            if grid:
                inside = inside & (column + step >= 0) & (column + step < grid)
            inside = inside[:, :, None]
            yield jnp.where(inside, jnp.roll(x, -offset, axis=1), 0), inside
