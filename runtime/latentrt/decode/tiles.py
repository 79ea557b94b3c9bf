"""Decodes latents in overlapping tiles.

Tiles overlap by a quarter, and pixels in the overlap are blended linearly, as in diffusers' `tiled_decode` (of
`AutoencoderKL`). The result differs from decoding the image whole: a tile's norms are computed from the tile alone.

In diffusers the last tile of a row is smaller. Here all tiles are equally large and evenly spaced, so that none has
less context than another and a backend compiles one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import numpy as np
from numpy.typing import NDArray

__all__ = ["OVERLAP", "decode_in_tiles", "tiles"]

OVERLAP = 0.25

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def decode_in_tiles(
    decode: Callable[[Mapping[str, Floats]], Pixels], feeds: Mapping[str, Floats], *, most: int, factor: int
) -> Pixels:
    """Decode latents tile by tile.

    Args:
        decode: decodes one tile, `latents` float32 [B, C, h, w] and its region of the other feeds, to uint8
            [B, factor · h, factor · w, 3].
        feeds: `latents`, float32 [B, C, H, W], and others of a whole multiple of their height and width, such as
            images of [B, 3, factor · H, factor · W].
        most: upper limit of a tile's side, in latents.
        factor: pixels per latent along each side.

    Returns:
        uint8 [B, factor · H, factor · W, 3]; exactly the result of `decode` where one tile covers the image.
    """
    rows, columns = feeds["latents"].shape[2:]
    height, tops = tiles(rows, most)
    width, lefts = tiles(columns, most)

    def crop(array: Floats, top: int, left: int) -> Floats:
        scale = array.shape[2] // rows
        bottom, right = scale * (top + height), scale * (left + width)
        return np.ascontiguousarray(array[:, :, scale * top : bottom, scale * left : right])

    strips = []
    for top in tops:
        pieces = [decode({name: crop(array, top, left) for name, array in feeds.items()}) for left in lefts]
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
