"""The plan of an export, which a family makes from a checkpoint's configurations before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from latentrt.bundle.manifest import ConfigChange, Defaults, LatentSpace, Limits, Preprocessing, Role

__all__ = ["ComponentPlan", "ExportPlan"]


class ComponentPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of one component's export.

    Attributes:
        name: the component's name in the bundle.
        role: the component's role in the manifest.
        module: module and class of the traceable torch module, below `latentrt_export.modules`.
        weights: the key of its weights in `Checkpoint.weights`.
        sources: the source of each input (`latentrt.bundle.manifest.InputSpec`).
        preprocessing: the preprocessing of its `image` input, if it differs from the autoencoder's.
    """

    name: str
    role: Role
    module: str
    weights: str
    sources: dict[str, str]
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The plan of a checkpoint's export.

    Attributes:
        family, tasks: the bundle's family and tasks in the manifest.
        components: the components in the order of export: the outputs of earlier ones are gate inputs and calibration
            data of later ones.
        latent_spaces: denoiser → its latent space.
        tokenizers: component → the checkpoint's folder of its tokenizer.
        scheduler_config: the scheduler's configuration; its `prediction_type` is that of the graph's output, which may
            differ from the checkpoint's.
        scheduler_changes: the changes that diffusers' pipelines make to the scheduler's configuration.
        defaults: the values for requests that omit them.
        limits: the limits of requests.
        deep_cache_branches: the number of branches at which the denoiser can be split for DeepCache.
        warnings: warnings about the configurations, for the user.
        unclassified: the reason for which a bundle without a safety checker has none, a clause of the warning.
    """

    family: str
    tasks: tuple[str, ...]
    components: tuple[ComponentPlan, ...]
    latent_spaces: Mapping[str, LatentSpace]
    tokenizers: Mapping[str, str]
    scheduler_config: Mapping[str, Any]
    scheduler_changes: tuple[ConfigChange, ...]
    defaults: Defaults
    limits: Limits
    deep_cache_branches: int
    warnings: tuple[str, ...]
    unclassified: str = "the checkpoint has no safety checker"
