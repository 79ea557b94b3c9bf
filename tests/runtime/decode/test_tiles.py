"""Overlapped tiles. That they are mixed as diffusers mixes its own is `tests/parity/decode/test_tiles.py`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from latentrt.decode.tiles import OVERLAP, decode_in_tiles, tiles

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def test_tiles_are_alike_and_overlap_by_a_quarter() -> None:
    assert tiles(64, 64) == (64, [0])
    assert tiles(3, 64) == (3, [0])
    assert tiles(112, 64) == (64, [0, 48])  # diffusers' stride
    assert tiles(128, 64) == (52, [0, 38, 76])
    for side in range(1, 300):
        size, starts = tiles(side, 16)
        assert size <= 16
        assert (starts[0], starts[-1] + size) == (0, side)
        overlaps = [before + size - after for before, after in pairwise(starts)]
        assert all(OVERLAP * size - 1 < overlap < size / 2 + 1 for overlap in overlaps)
        assert not overlaps or max(overlaps) - min(overlaps) <= 1


def test_one_tile_is_the_whole() -> None:
    shapes: list[tuple[int, ...]] = []

    def decode(feeds: Mapping[str, Floats]) -> Pixels:
        part = feeds["latents"]
        shapes.append(part.shape)
        return np.arange(part.shape[2] * part.shape[3] * 3, dtype=np.uint8).reshape(1, *part.shape[2:], 3)

    feeds = {"latents": np.zeros((1, 4, 8, 16), np.float32)}
    np.testing.assert_array_equal(decode_in_tiles(decode, feeds, most=16, factor=1), decode(feeds))
    assert shapes == [(1, 4, 8, 16)] * 2


def test_tiles_of_a_plain_field_leave_no_trace() -> None:
    """And all have one shape, in one piece of memory."""
    shapes = set()

    def decode(feeds: Mapping[str, Floats]) -> Pixels:
        part = feeds["latents"]
        assert part.flags.c_contiguous
        shapes.add(part.shape)
        return np.full((len(part), 2 * part.shape[2], 2 * part.shape[3], 3), 77, np.uint8)

    found = decode_in_tiles(decode, {"latents": np.zeros((2, 4, 21, 26), np.float32)}, most=8, factor=2)
    assert found.shape == (2, 42, 52, 3)
    assert (found == 77).all()
    assert shapes == {(2, 4, 7, 8)}


def test_a_tile_takes_its_region_of_an_image() -> None:
    def decode(feeds: Mapping[str, Floats]) -> Pixels:
        assert feeds["latents"].shape == (1, 4, 7, 8)
        return np.repeat(feeds["mask"].transpose(0, 2, 3, 1), 3, axis=3).astype(np.uint8)

    mask = np.random.default_rng(0).integers(0, 2, (1, 1, 42, 52)).astype(np.float32)
    found = decode_in_tiles(decode, {"latents": np.zeros((1, 4, 21, 26), np.float32), "mask": mask}, most=8, factor=2)
    np.testing.assert_array_equal(found[..., 0], mask[:, 0])
