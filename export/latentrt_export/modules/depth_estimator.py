"""The depth estimator of depth to image as a traceable module: DPT (Ranftl et al. 2021, arXiv 2103.13413)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import DPTForDepthEstimation

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import ComponentModule, Shapes
from latentrt_export.modules.streamed import stand_in_weights

__all__ = ["DepthEstimator"]


class DepthEstimator(ComponentModule):
    """Preprocessed pixels of one size → relative inverse depth (near is large) at about that size.

    The size is fixed, because the hybrid estimators of the published checkpoints accept only one.
    """

    trace_shapes: ClassVar[Shapes] = {"batch": 2}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = ({"batch": 1}, {"batch": 3})

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        _drop_unused(model)
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = model.config.num_channels
        with torch.inference_mode(), stand_in_weights(model):  # for the shape alone
            depth = model(torch.zeros(1, channels, height, width)).predicted_depth
        self.inputs = (TensorSpec("pixels", "float32", ("batch", channels, height, width)),)
        self.outputs = (TensorSpec("predicted_depth", "float32", ("batch", *depth.shape[1:])),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(DPTForDepthEstimation, checkpoint / "depth_estimator", variant))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).predicted_depth  # type: ignore[no-any-return]

    def canonical_name(self, parameter: str) -> str:
        return parameter.removeprefix("model.")


def _drop_unused(model: Any) -> None:
    """Drop the weights of a checkpoint that do not affect the depth.

    These are the final norm of the transformer, of which only intermediate states are used, and the first fusion
    layer's residual unit, which has no features of another level to add.
    """
    model.dpt.layernorm = nn.Identity()
    del model.neck.fusion_stage.layers[0].residual_layer1
