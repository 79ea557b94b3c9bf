"""Stable Diffusion 1.x and 2.x: components, roles and input sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.bundle.manifest import Role

__all__ = ["COMPONENTS", "ComponentExport"]


@dataclass(frozen=True, kw_only=True)
class ComponentExport:
    """How a component of a bundle is made.

    Attributes:
        module: module and class of the traceable torch module, below `latentrt_export.modules`.
        folder: the checkpoint's folder with its weights.
        role: the component's role in the manifest.
        sources: the source of each of its inputs, by the input's name.
    """

    module: str
    folder: str
    role: Role
    sources: Mapping[str, str]


# In the order of export: the outputs of earlier components are gate inputs and calibration data of later ones.
COMPONENTS = {
    "text_encoder": ComponentExport(
        module="text_encoder:TextEncoder",
        folder="text_encoder",
        role="text-encoder",
        sources={"input_ids": "tokens", "clip_skip": "option:clip_skip"},
    ),
    "vae_encoder": ComponentExport(module="vae:VaeEncoder", folder="vae", role="encoder", sources={"pixels": "image"}),
    "unet": ComponentExport(
        module="unet:UNet",
        folder="unet",
        role="denoiser",
        sources={
            "sample": "latents",
            "timestep": "timestep",
            "encoder_hidden_states": "text_encoder.hidden_states",
        },
    ),
    "vae_decoder": ComponentExport(
        module="vae:VaeDecoder", folder="vae", role="decoder", sources={"latents": "latents"}
    ),
    "preview_decoder": ComponentExport(
        module="preview_decoder:PreviewDecoder",
        folder="preview_decoder",
        role="preview-decoder",
        sources={"latents": "latents"},
    ),
    "safety_checker": ComponentExport(
        module="safety_checker:SafetyChecker",
        folder="safety_checker",
        role="classifier",
        sources={"pixels": "images"},
    ),
}
