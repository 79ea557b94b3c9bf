"""What will a run need next, and for which sizes?

It is loaded by a thread while the run is at something else (`latentrt.backends.submodules`). Sizes are those of the
axes that it will be fed: a backend that compiles for shapes compiles those and no others.
"""

from __future__ import annotations

from latentrt.backends.submodules import Submodules
from latentrt.bundle.manifest import Manifest
from latentrt.decode import autoencoder
from latentrt.request import Order
from latentrt.sampling.schedule import Schedule

__all__ = ["load_classifier", "load_decoder", "load_denoiser"]


def load_denoiser(submodules: Submodules, order: Order, manifest: Manifest, schedule: Schedule) -> None:
    """While the prompts are encoded, which are most likely of one chunk."""
    pictures, factor = len(order.seeds), manifest.latent_spaces["unet"].downscale
    sizes = {
        "evaluations": 2 * pictures if order.guided else pictures,
        "height": order.height // factor,
        "width": order.width // factor,
        "tokens": manifest.tokenizers["text_encoder"].length,
        "timesteps": len({*schedule.t.tolist()}),
    }
    submodules.load_ahead("unet", sizes)


def load_decoder(submodules: Submodules, order: Order, manifest: Manifest) -> None:
    """While the latents are denoised."""
    submodules.load_ahead(autoencoder.decoder_of(order), autoencoder.sizes_of(order, manifest))


def load_classifier(submodules: Submodules, order: Order) -> None:
    """While the latents are decoded, at the latest."""
    if order.safety != "off":
        sizes = {"images": len(order.seeds), "pixel_height": order.height, "pixel_width": order.width}
        submodules.load_ahead("safety_checker", sizes)
