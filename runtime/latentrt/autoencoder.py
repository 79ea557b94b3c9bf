"""How do latents become pixels?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentrt.manifest import Manifest
from latentrt.request import Order
from latentrt.schedule import Latents
from latentrt.session import Session, run
from latentrt.tiling import decode_in_tiles

__all__ = ["decode", "decoder_of"]


def decoder_of(order: Order) -> str:
    """The component that makes an order's pixels."""
    return "preview_decoder" if order.approximation.decoder == "preview" else "vae_decoder"


def decode(decoder: Session, order: Order, latents: Latents, manifest: Manifest) -> NDArray[np.uint8]:
    """Latents → uint8 [pictures, height, width, 3].

    One at a time, as the decoder's activations are the run's largest. In tiles, if the order says so, that are no
    larger than the pictures that the model was made for.
    """

    def pixels(one: Latents) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = run(decoder, latents=one)["pixels"]
        return found

    def in_tiles(one: Latents) -> NDArray[np.uint8]:
        factor = manifest.latents.factor
        most = min(manifest.defaults.height, manifest.defaults.width) // factor
        return decode_in_tiles(pixels, one, most=most, factor=factor)

    make = in_tiles if order.approximation.decoder == "tiled" else pixels
    return np.concatenate([make(image[np.newaxis]) for image in latents])
