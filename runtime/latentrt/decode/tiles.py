"""Decodes latents in overlapping tiles.

Tiles overlap by a quarter, and pixels in the overlap are blended linearly, as in diffusers' `tiled_decode` (of
`AutoencoderKL`). The result differs from decoding the image whole: a tile's norms are computed from the tile alone.

In diffusers the last tile of a row is smaller. Here all tiles are equally large and evenly spaced, so that none has
less context than another and a backend compiles one shape.
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
    """Decode latents tile by tile.

    Args:
        decode: decodes one tile, float32 [B, C, h, w], to uint8 [B, factor · h, factor · w, 3].
        latents: float32 [B, C, H, W].
        most: upper limit of a tile's side, in latents.
        factor: pixels per latent along each side.

    Returns:
        uint8 [B, factor · H, factor · W, 3]; exactly the result of `decode` where one tile covers the image.
    """
    height, tops = tiles(latents.shape[2], most)
    width, lefts = tiles(latents.shape[3], most)
    strips = []
    for top in tops:
        rows = latents[:, :, top : top + height]
        pieces = [decode(np.ascontiguousarray(rows[..., left : left + width])) for left in lefts]
        strips.append(_blend([piece.astype(np.float32) for piece in pieces], [factor * left for left in lefts], 2))
    blended = _blend(strips, [factor * top for top in tops], 1)
    return np.rint(blended).astype(np.uint8)


def tiles(side: int, most: int) -> tuple[int, list[int]]:
    """Return the size of the tiles that cover a side, as few as possible overlapping by a quarter, and their starts.

    Args:
        side: in latents.
        most: upper limit of a tile's size, in latents.
    """
    for number in count(1):
        size = -(-side * 4 // (3 * number + 1))  # side = size · (number − (number − 1) · OVERLAP)
        if size <= most or size == 1:
            return size, [round(step * (side - size) / max(number - 1, 1)) for step in range(number)]
    raise AssertionError("some number of tiles is enough")


def _blend(pieces: list[NDArray[np.float32]], starts: list[int], axis: int) -> NDArray[np.float32]:
    """Join pieces along an axis of [B, H, W, 3]; in an overlap the weight of the later one grows linearly from 0."""
    joined = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        overlap = joined.shape[axis] - start
        before, earlier = np.split(joined, [start], axis)
        later, after = np.split(piece, [overlap], axis)
        weight = np.arange(overlap, dtype=np.float32) / np.float32(overlap)
        weight = weight.reshape(-1, *[1] * (joined.ndim - axis - 1))
        joined = np.concatenate([before, earlier * (1 - weight) + later * weight, after], axis)
    return joined
