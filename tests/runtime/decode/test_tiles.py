"""Overlapped tiles, beside diffusers' blending and its tiled decode."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from latentrt import Bundle
from latentrt.backends.onnxruntime import open_session
from latentrt.bundle.sample import bundle_path
from latentrt.decode.tiles import OVERLAP, decode_in_tiles, tiles

CHECKPOINT = Path(__file__).parent.parent.parent / "sample" / "checkpoint"
FACTOR = 4
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(vae: Any) -> NDArray[np.float32]:
    """Of a picture with smooth fields and hard edges, of 160 × 96."""
    y, x = np.mgrid[0:96, 0:160] / 96
    planes = [np.sin(7 * x + 3 * y), np.sign(np.hypot(x - 0.8, y - 0.5) - 0.3), np.cos(5 * x * y)]
    pixels = torch.from_numpy(np.stack(planes)[None].astype(np.float32))
    with torch.inference_mode():
        found: NDArray[np.float32] = (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).numpy()
    return found


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


def quantised(decoded: torch.Tensor) -> Pixels:
    """As our decoder's graph ends."""
    pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_they_are_mixed_as_diffusers_mixes(vae: Any, latents: NDArray[np.float32]) -> None:
    """Its own two functions on the same tiles: each row of tiles by `blend_h`, then the rows by `blend_v`."""
    scaled = torch.from_numpy(latents) / vae.config.scaling_factor
    (size, tops), (width, lefts) = tiles(24, 16), tiles(40, 16)
    strips = []
    with torch.inference_mode():
        for top in tops:
            pieces = [
                # What a tile's decode gives has been clamped here, and is rounded to a level.
                vae.decode(scaled[:, :, top : top + size, left : left + width]).sample.clamp(-1, 1)
                for left in lefts
            ]
            strips.append(joined(pieces, lefts, vae.blend_h, 3))
    expected = quantised(joined(strips, tops, vae.blend_v, 2))
    session = open_session(Bundle.open(bundle_path()), "vae_decoder")
    found = decode_in_tiles(lambda part: session.run({"latents": part})["pixels"], latents, most=16, factor=FACTOR)
    assert found.shape == expected.shape == (1, 96, 160, 3)
    # Rounded once in each tile and once when they are mixed, and the graph is a level from torch here and there.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def joined(pieces: list[torch.Tensor], starts: list[int], blend: Any, axis: int) -> torch.Tensor:
    found = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        overlap = found.shape[axis] - FACTOR * start
        mixed = blend(found, piece.clone(), overlap)
        found = torch.cat([found.narrow(axis, 0, FACTOR * start), mixed], axis)
    return found


def test_no_farther_from_the_whole_than_diffusers_tiles(vae: Any, latents: NDArray[np.float32]) -> None:
    session = open_session(Bundle.open(bundle_path()), "vae_decoder")

    def decode(part: NDArray[np.float32]) -> Pixels:
        return session.run({"latents": part})["pixels"]

    whole = decode(latents)
    found = decode_in_tiles(decode, latents, most=16, factor=FACTOR)
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 16, 16 * FACTOR, OVERLAP
    with torch.inference_mode():
        theirs = quantised(vae.tiled_decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample)
    ours, diffusers = (float(np.square(each.astype(float) - whole).mean()) for each in (found, theirs))
    assert 0 < ours < diffusers


def test_one_tile_is_the_whole() -> None:
    asked: list[tuple[int, ...]] = []

    def decode(part: NDArray[np.float32]) -> Pixels:
        asked.append(part.shape)
        return np.arange(part.shape[2] * part.shape[3] * 3, dtype=np.uint8).reshape(1, *part.shape[2:], 3)

    latents = np.zeros((1, 4, 8, 16), np.float32)
    np.testing.assert_array_equal(decode_in_tiles(decode, latents, most=16, factor=1), decode(latents))
    assert asked == [(1, 4, 8, 16)] * 2


def test_tiles_of_a_plain_field_leave_no_trace() -> None:
    """And all have one shape, in one piece of memory."""
    asked = set()

    def decode(part: NDArray[np.float32]) -> Pixels:
        assert part.flags.c_contiguous
        asked.add(part.shape)
        return np.full((len(part), 2 * part.shape[2], 2 * part.shape[3], 3), 77, np.uint8)

    found = decode_in_tiles(decode, np.zeros((2, 4, 21, 26), np.float32), most=8, factor=2)
    assert found.shape == (2, 42, 52, 3)
    assert (found == 77).all()
    assert asked == {(2, 4, 7, 8)}
