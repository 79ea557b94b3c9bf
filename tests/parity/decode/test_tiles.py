"""Overlapped tiles, compared with diffusers' blending and its tiled decode."""

from __future__ import annotations

from collections.abc import Mapping
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

CHECKPOINT = Path(__file__).parents[3] / "sample" / "checkpoint"
FACTOR = 4
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(vae: Any) -> NDArray[np.float32]:
    """Of an image with smooth fields and hard edges, of 160 × 96."""
    y, x = np.mgrid[0:96, 0:160] / 96
    planes = [np.sin(7 * x + 3 * y), np.sign(np.hypot(x - 0.8, y - 0.5) - 0.3), np.cos(5 * x * y)]
    pixels = torch.from_numpy(np.stack(planes)[None].astype(np.float32))
    with torch.inference_mode():
        found: NDArray[np.float32] = (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).numpy()
    return found


def quantize(decoded: torch.Tensor) -> Pixels:
    """Round to levels, as the end of the decoder's graph does."""
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
                # The decode of a tile is clamped here, and rounded to a level.
                vae.decode(scaled[:, :, top : top + size, left : left + width]).sample.clamp(-1, 1)
                for left in lefts
            ]
            strips.append(join(pieces, lefts, vae.blend_h, 3))
    expected = quantize(join(strips, tops, vae.blend_v, 2))
    session = open_session(Bundle.open(bundle_path()), "vae_decoder")
    found = decode_in_tiles(lambda feeds: session.run(feeds)["pixels"], {"latents": latents}, most=16, factor=FACTOR)
    assert found.shape == expected.shape == (1, 96, 160, 3)
    # Rounded once in each tile and once when they are mixed, and the graph is a level from torch here and there.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def join(pieces: list[torch.Tensor], starts: list[int], blend: Any, axis: int) -> torch.Tensor:
    found = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        overlap = found.shape[axis] - FACTOR * start
        mixed = blend(found, piece.clone(), overlap)
        found = torch.cat([found.narrow(axis, 0, FACTOR * start), mixed], axis)
    return found


def test_no_farther_from_the_whole_than_diffusers_tiles(vae: Any, latents: NDArray[np.float32]) -> None:
    session = open_session(Bundle.open(bundle_path()), "vae_decoder")

    def decode(feeds: Mapping[str, NDArray[np.float32]]) -> Pixels:
        return session.run(feeds)["pixels"]

    whole = decode({"latents": latents})
    found = decode_in_tiles(decode, {"latents": latents}, most=16, factor=FACTOR)
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 16, 16 * FACTOR, OVERLAP
    with torch.inference_mode():
        theirs = quantize(vae.tiled_decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample)
    ours, diffusers = (float(np.square(each.astype(float) - whole).mean()) for each in (found, theirs))
    assert 0 < ours < diffusers
