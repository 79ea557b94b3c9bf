"""The autoencoder: latents to pixels and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.decode.slices import SlicedDecoder
from latentrt.decode.tiles import decode_in_tiles, tiles

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle
    from latentrt.sampling.noise import Generator

__all__ = ["LatentDistribution", "decode", "encode", "open_decoder", "sizes"]

Latents = NDArray[np.float32]


def open_decoder(bundle: Bundle, components: Components, name: str) -> Session:
    """Return the session of a decoder, which runs in slices if its placement is sliced."""
    if not components.placements[name].sliced:
        return components.session(name)
    record = bundle.manifest.components[name]
    return SlicedDecoder(
        record.inputs,
        record.outputs,
        record.parts,
        lambda part: components.session(name, part),
        lambda part: components.release(name, part),
    )


def sizes(latents: tuple[int, int], largest_tile: int | None) -> dict[str, int]:
    """Return the sizes of the decoder's named axes for one call.

    Args:
        latents: height and width of the latents.
        largest_tile: as for `decode`.
    """
    height, width = latents
    if largest_tile is not None:
        height, width = tiles(height, largest_tile)[0], tiles(width, largest_tile)[0]
    return {"batch": 1, "height": height, "width": width}


def decode(
    decoder: Session,
    latents: Latents,
    *,
    downscale: int,
    largest_tile: int | None = None,
    images: Mapping[str, NDArray[np.float32]] | None = None,
) -> NDArray[np.uint8]:
    """Decode latents, float32 [B, C, h, w], to pixels, uint8 [B, height, width, 3].

    Images are decoded one at a time, as the decoder's activations are the largest of a run.

    Args:
        downscale: pixels per latent along each side.
        largest_tile: decode in overlapping tiles of at most this many latents a side; None decodes the image whole.
        images: the decoder's further inputs by name, the same for all latents, float32 [1, C', height, width].
    """

    def pixels(feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
        decoded: NDArray[np.uint8] = run(decoder, **feeds)["pixels"]
        return decoded

    def decode_one(feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
        if largest_tile is None:
            return pixels(feeds)
        return decode_in_tiles(pixels, feeds, most=largest_tile, factor=downscale)

    return np.concatenate([decode_one({"latents": image[np.newaxis], **(images or {})}) for image in latents])


@dataclass(frozen=True, eq=False)
class LatentDistribution:
    """The distribution of an image's latents, each float32 [C, H/8, W/8], not scaled.

    Attributes:
        logvar: None for an encoder whose latents are not random (diffusers' `AutoencoderTiny`).
    """

    mean: Latents
    logvar: Latents | None

    def sample(self, generator: Generator) -> Latents:
        """Sample latents, float32 [C, H/8, W/8], as diffusers' `retrieve_latents(…, generator)` does.

        Latents that are not random draw nothing from the generator.
        """
        if self.logvar is None:
            return self.mean
        noise = np.exp(np.float32(0.5) * self.logvar) * generator.normal(self.mean.shape)
        return np.asarray(self.mean + noise, np.float32)


def encode(encoder: Session, pixels: NDArray[np.float32]) -> LatentDistribution:
    """Encode an image into the distribution of its latents.

    Args:
        pixels: float32 [1, 3, H, W] in −1 … 1.
    """
    outputs = run(encoder, pixels=pixels)
    return LatentDistribution(outputs["mean"][0], outputs["logvar"][0] if "logvar" in outputs else None)
