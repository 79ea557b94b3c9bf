"""The safety classifier as a traceable module: finished pixels → scores, verdict and cosines.

The verdict is that of diffusers' `StableDiffusionSafetyChecker`, including its rounding to three decimals. The image is
not modified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.preprocessor_config import PreprocessorConfig, check_crop, read_preprocessor_config
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.clip_preprocessing import ClipPreprocessing
from latentrt_export.modules.module import ComponentModule, Shapes

__all__ = ["SafetyChecker"]

Verdict = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class SafetyChecker(ComponentModule):
    """Pixels of any size → concept scores, special-care scores, whether the image is flagged, and the cosines.

    An image is flagged if any concept score is above zero. Preprocessing and cosines are float32 for every precision
    of the weights.
    """

    trace_shapes: ClassVar[Shapes] = {"images": 2, "pixel_height": 320, "pixel_width": 256}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"images": 1, "pixel_height": 64, "pixel_width": 64},
        {"images": 3, "pixel_height": 456, "pixel_width": 520},
        {"images": 2, "pixel_height": 513, "pixel_width": 200},
    )

    def __init__(self, checker: Any, preprocessing: PreprocessorConfig) -> None:
        super().__init__()
        self.preprocessing = ClipPreprocessing(preprocessing)
        self.vision_model = checker.vision_model
        self.visual_projection = checker.visual_projection
        self.concept_embeds = checker.concept_embeds
        self.concept_embeds_weights = checker.concept_embeds_weights
        self.special_care_embeds = checker.special_care_embeds
        self.special_care_embeds_weights = checker.special_care_embeds_weights
        concepts, special_care = ("images", len(self.concept_embeds)), ("images", len(self.special_care_embeds))
        self.inputs = (TensorSpec("pixels", "uint8", ("images", "pixel_height", "pixel_width", 3)),)
        self.outputs = (
            TensorSpec("concept_scores", "float32", concepts),
            TensorSpec("special_care_scores", "float32", special_care),
            TensorSpec("flagged", "bool", ("images",)),
            TensorSpec("concept_cosines", "float32", concepts),
            TensorSpec("special_care_cosines", "float32", special_care),
        )

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        """Load from a checkpoint with `safety_checker` and `feature_extractor`, or from a classifier's own folder."""
        whole = (checkpoint / "safety_checker").is_dir()
        model_folder = checkpoint / "safety_checker" if whole else checkpoint
        processor_folder = checkpoint / "feature_extractor" if whole else checkpoint
        preprocessing = read_preprocessor_config(processor_folder / "preprocessor_config.json")
        checker = load_pretrained(StableDiffusionSafetyChecker, model_folder, variant)
        check_crop(preprocessing, checker.config.vision_config.image_size, processor_folder)
        # torch's fused attention exports guards (IsNaN, Where) for masks; this model has no mask
        checker.vision_model.set_attn_implementation("eager")
        return cls(checker, preprocessing).eval()

    def forward(self, pixels: Tensor) -> Verdict:
        seen = self.preprocessing(pixels).to(self.visual_projection.weight.dtype)
        image_embeds = self.visual_projection(self.vision_model(seen).pooler_output)
        special_care_cosines = _compute_cosines(image_embeds, self.special_care_embeds)
        concept_cosines = _compute_cosines(image_embeds, self.concept_embeds)
        concept_scores, special_care_scores = _compute_scores(
            concept_cosines - self.concept_embeds_weights.float(),
            special_care_cosines - self.special_care_embeds_weights.float(),
        )
        flagged = concept_scores.amax(dim=1) > 0
        return concept_scores, special_care_scores, flagged, concept_cosines, special_care_cosines

    def canonical_name(self, parameter: str) -> str:
        # transformers 5 removed the inner module of the vision tower, which checkpoints' names contain
        outer, inner = "vision_model.", "vision_model.vision_model."
        if parameter.startswith(outer) and not parameter.startswith(inner):
            return inner + parameter.removeprefix(outer)
        return parameter


def _compute_cosines(image_embeds: Tensor, concept_embeds: Tensor) -> Tensor:
    """Return the cosine of each image's embedding with each concept's: float32 [images, concepts]."""
    images, concepts = (nn.functional.normalize(embeds.float()) for embeds in (image_embeds, concept_embeds))
    return torch.matmul(images, concepts.transpose(0, 1))


def _compute_scores(concept_margins: Tensor, special_care_margins: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores for the margins of the cosines over their thresholds: float32 [images, 17] and [images, 3].

    The first special-care concept with a positive score raises the special-care scores after it and all concept
    scores by 0.01, so special-care concepts are computed one after the other.
    """
    adjustment = torch.zeros_like(special_care_margins[:, :1])
    special_care = []
    for margin in torch.split(special_care_margins, 1, dim=1):
        special_care.append(_round(margin + adjustment))
        adjustment = torch.where(special_care[-1] > 0, 0.01, adjustment)
    return _round(concept_margins + adjustment), torch.cat(special_care, dim=1)


def _round(scores: Tensor) -> Tensor:
    """Round to three decimals, half to even, like numpy's `round(…, 3)` in float32; a margin up to 0.0005 becomes 0."""
    return torch.round(scores * 1000) / 1000
