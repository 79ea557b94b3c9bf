"""How are latents decoded in overlapped tiles?

Tiles overlap by a quarter, and where they do their pixels are mixed linearly, as in diffusers' `tiled_decode` (of
`AutoencoderKL`). It is not the whole picture's decode: a tile's norms know the tile alone.

There a last tile has what is left over. Here all tiles are equally large and evenly spread, so that none sees less than
another, and so that a backend compiles one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["OVERLAP", "decode_in_tiles", "tiles"]

OVERLAP = 0.25

Pixels = NDArray[np.uint8]


def decode_in_tiles(
    decode: Callable[[NDArray[np.float32]], Pixels], latents: NDArray[np.float32], *, most: int, factor: int
) -> Pixels:
    """Decode tile by tile.

    Args:
        decode: latents (B, C, h, w) → pixels (B, factor · h, factor · w, 3).
        latents: (B, C, H, W).
        most: latents of a tile's side, at most.
        factor: pixels of a latent's side.

    Returns:
        (B, factor · H, factor · W, 3). What fits into one tile is what `decode` makes of it.
    """
    height, tops = tiles(latents.shape[2], most)
    width, lefts = tiles(latents.shape[3], most)
    strips = []
    for top in tops:
        rows = latents[:, :, top : top + height]
        pieces = [decode(np.ascontiguousarray(rows[..., left : left + width])) for left in lefts]
        strips.append(_joined([piece.astype(np.float32) for piece in pieces], [factor * left for left in lefts], 2))
    mixed = _joined(strips, [factor * top for top in tops], 1)
    return np.rint(mixed).astype(np.uint8)


def tiles(side: int, most: int) -> tuple[int, list[int]]:
    """The fewest tiles that cover a side and overlap by a quarter: their size, and where each begins."""
    for number in count(1):
        size = -(-side * 4 // (3 * number + 1))  # side = size · (number − (number − 1) · OVERLAP)
        if size <= most or size == 1:
            return size, [round(step * (side - size) / max(number - 1, 1)) for step in range(number)]
    raise AssertionError("some number of tiles is enough")


def _joined(pieces: list[NDArray[np.float32]], starts: list[int], axis: int) -> NDArray[np.float32]:
    """Pieces along an axis of (B, H, W, 3), mixed where they overlap: further in, more of the later one."""
    joined = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        overlap = joined.shape[axis] - start
        before, earlier = np.split(joined, [start], axis)
        later, behind = np.split(piece, [overlap], axis)
        share = np.arange(overlap, dtype=np.float32) / np.float32(overlap)
        share = share.reshape(-1, *[1] * (joined.ndim - axis - 1))
        joined = np.concatenate([before, earlier * (1 - share) + later * share, behind], axis)
    return joined
