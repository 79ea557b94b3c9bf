"""Which bundle comes with the package?

A small Stable Diffusion model that draws coloured shapes, 64 × 64, so that a fresh installation can draw at once and
tests have pictures that mean something. Its model card says how it was made and what it cannot do. The modules here are
what it takes to tell how well it draws: prompts that it never saw, and a judge that reads its pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentrt.bundle.manifest import Manifest

__all__ = ["PROMPTS", "bundle_path", "is_sample_model"]

# Weights that a picture is not drawn with.
_BESIDE = ("safety_checker/", "preview_decoder/")
# What `latentrt demo` draws.
PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star on a black background",
    "a big green heart on a white background",
    "a purple triangle on a yellow background",
    "a white cross on a red background",
    "an orange square on the left on a green background",
    "a small black circle at the top on an orange background",
    "a green star left of a blue square",
    "a large red heart above a small white circle on a black background",
    "a yellow triangle below a purple square on a white background",
    "a white star to the right of an orange cross on a purple background",
    "a small blue circle on the left of a big black heart, yellow background",
)


def bundle_path() -> Path:
    """The folder of the sample bundle, which `Pipeline.load()` opens when it is told no other."""
    return Path(__file__).parent.with_name("sample_bundle")


def is_sample_model(manifest: Manifest) -> bool:
    """Whether a bundle was made of the sample model, in whichever precision: its weight files had the same hashes. The
    classifier and the decoder for previews may be others, or missing."""
    from latentrt.bundle.bundle import Bundle

    def drawing(weights: dict[str, str]) -> dict[str, str]:
        return {name: digest for name, digest in weights.items() if not name.startswith(_BESIDE)}

    return drawing(manifest.source.weights) == drawing(Bundle.open(bundle_path()).manifest.source.weights)
