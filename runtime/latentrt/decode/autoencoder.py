"""How do latents become pixels?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.bundle.manifest import Manifest
from latentrt.decode.tiles import decode_in_tiles, tiles
from latentrt.request import Order
from latentrt.sampling.schedule import Latents

__all__ = ["decode", "decoder_of", "sizes_of"]


def decoder_of(order: Order) -> str:
    """The component that makes an order's pixels."""
    return "preview_decoder" if order.approximation.decoder == "preview" else "vae_decoder"


def sizes_of(order: Order, manifest: Manifest) -> dict[str, int]:
    """The axes of what the decoder is fed at once, by their names."""
    sides = (
        order.height // manifest.latent_spaces["unet"].downscale,
        order.width // manifest.latent_spaces["unet"].downscale,
    )
    if order.approximation.decoder == "tiled":
        sides = tiles(sides[0], _largest_tile(manifest))[0], tiles(sides[1], _largest_tile(manifest))[0]
    return {"batch": 1, "height": sides[0], "width": sides[1]}


def decode(decoder: Session, order: Order, latents: Latents, manifest: Manifest) -> NDArray[np.uint8]:
    """Latents → uint8 [pictures, height, width, 3].

    One at a time, as the decoder's activations are the run's largest. In tiles, if the order says so, that are no
    larger than the pictures that the model was made for.
    """

    def pixels(one: Latents) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = run(decoder, latents=one)["pixels"]
        return found

    def in_tiles(one: Latents) -> NDArray[np.uint8]:
        return decode_in_tiles(
            pixels, one, most=_largest_tile(manifest), factor=manifest.latent_spaces["unet"].downscale
        )

    make = in_tiles if order.approximation.decoder == "tiled" else pixels
    return np.concatenate([make(image[np.newaxis]) for image in latents])


def _largest_tile(manifest: Manifest) -> int:
    """The side of the latents that the model was made for."""
    return min(manifest.defaults.height, manifest.defaults.width) // manifest.latent_spaces["unet"].downscale
