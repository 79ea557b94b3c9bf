"""The plan of an export: what a family makes of a checkpoint, decided from its configurations before any weight is
loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from latentrt.bundle.manifest import LatentSpace, Limits, Preprocessing, Role

__all__ = ["ComponentPlan", "ExportPlan"]


class ComponentPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one component is exported.

    Attributes:
        name: of the component in the bundle.
        role: of the component, for the manifest.
        module: module and class of the traceable torch module, below `latentrt_export.modules`.
        weights: the key of its weights in `Checkpoint.weights`.
        sources: the source of each input (`latentrt.bundle.manifest.InputSpec`).
        preprocessing: of its `image` input, where that is not the autoencoder's.
    """

    name: str
    role: Role
    module: str
    weights: str
    sources: dict[str, str]
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What a checkpoint becomes.

    Attributes:
        family, tasks: for the manifest.
        components: in the order of export: the outputs of earlier ones are gate inputs and calibration data of later
            ones.
        latent_spaces: by denoiser.
        tokenizers: component → the checkpoint's folder of its tokenizer.
        height, width: of an image by default, in pixels.
        limits: of requests.
        deep_cache_branches: the number of branches at which the denoiser can be split for DeepCache.
    """

    family: str
    tasks: tuple[str, ...]
    components: tuple[ComponentPlan, ...]
    latent_spaces: Mapping[str, LatentSpace]
    tokenizers: Mapping[str, str]
    height: int
    width: int
    limits: Limits
    deep_cache_branches: int
