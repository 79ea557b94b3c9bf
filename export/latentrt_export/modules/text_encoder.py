"""The text encoder as a traceable module: CLIP's for Stable Diffusion 1.x, OpenCLIP's for 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, Case, Submodule

__all__ = ["TextEncoder"]


class TextEncoder(Submodule):
    """Token ids → hidden states.

    `clip_skip` counts layers from the end, one number per sample: 0 is the last layer, what the configured encoder
    returns; the final layer norm follows in any case (diffusers, `StableDiffusionPipeline.encode_prompt`).
    """

    traced: ClassVar[Case] = Case(batch=3)
    judged: ClassVar[tuple[Case, ...]] = (Case(batch=1), Case(batch=2), Case(batch=5))

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.length: int = config.max_position_embeddings
        self.layers: int = config.num_hidden_layers
        self.inputs = (
            TensorSpec("input_ids", "int64", ("batch", self.length)),
            TensorSpec("clip_skip", "int64", ("batch",)),
        )
        self.outputs = (TensorSpec("hidden_states", "float32", ("batch", self.length, config.hidden_size)),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        model = load_pretrained(CLIPTextModel, checkpoint / "text_encoder", variant)
        if getattr(model.config, "use_attention_mask", False):
            raise CheckpointError(
                "text_encoder: its configuration sets use_attention_mask, which Stable Diffusion 1.x and 2.x do not use"
            )
        return cls(model)

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        states = self.model(input_ids, output_hidden_states=True).hidden_states
        stacked = torch.stack(states, dim=1)  # (B, layers + 1, 77, D)
        samples = torch.arange(input_ids.shape[0], device=input_ids.device)
        chosen = stacked[samples, self.layers - clip_skip]  # (B, 77, D)
        return self._text_model().final_layer_norm(chosen)  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        activation = self.model.config.hidden_act
        return {
            "family": "stable-diffusion-1" if activation == "quick_gelu" else "stable-diffusion-2",
            "text_layers": self.layers,
        }

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        return {
            "input_ids": np.resize(known["input_ids"], (case.batch, self.length)),
            "clip_skip": np.arange(case.batch, dtype=np.int64) % min(3, self.layers),
        }

    def passes_on(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], known: Mapping[str, NDArray[Any]]
    ) -> Arrays:
        learnt = {"text_embeddings": outputs["hidden_states"]}
        if "calibration_ids" in known:
            ids = known["calibration_ids"]
            calls = self.torch_outputs({"input_ids": ids, "clip_skip": np.zeros(len(ids), np.int64)})
            learnt["calibration_embeddings"] = calls["hidden_states"]
        return learnt

    def canonical_name(self, parameter: str) -> str:
        name = parameter.removeprefix("model.")
        return name if name.startswith("text_model.") else f"text_model.{name}"

    def _text_model(self) -> Any:
        # transformers 5 dissolved the inner module that earlier versions, and every checkpoint, call text_model.
        return getattr(self.model, "text_model", self.model)
