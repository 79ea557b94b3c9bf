"""Model families: the conversion of each family's checkpoints to the components of a bundle.

A family is a module with `PIPELINES`, the diffusers pipeline classes it exports, `REFUSALS`, its reasons for not
exporting others, and `plan_export(checkpoint)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from latentrt_export.checkpoints.checkpoint import Checkpoint, PipelineClass
from latentrt_export.families import stable_diffusion, stable_diffusion_xl
from latentrt_export.families.plan import ExportPlan

__all__ = ["PIPELINES", "REFUSALS", "Family", "plan_export"]


class Family(Protocol):
    """A module below `latentrt_export.families`."""

    PIPELINES: Mapping[str, PipelineClass]
    REFUSALS: Mapping[str, str]

    def plan_export(self, checkpoint: Checkpoint) -> ExportPlan:
        """Plan the export of a checkpoint from its configurations."""


_FAMILIES: tuple[Family, ...] = (stable_diffusion, stable_diffusion_xl)
PIPELINES: Mapping[str, PipelineClass] = {
    name: pipeline for family in _FAMILIES for name, pipeline in family.PIPELINES.items()
}
REFUSALS: Mapping[str, str] = {name: reason for family in _FAMILIES for name, reason in family.REFUSALS.items()}


def plan_export(checkpoint: Checkpoint) -> ExportPlan:
    """Plan the export of a checkpoint, by the family of its pipeline class.

    Raises:
        CheckpointError: the family does not support this model.
    """
    family = next(family for family in _FAMILIES if checkpoint.pipeline_class in family.PIPELINES)
    return family.plan_export(checkpoint)
