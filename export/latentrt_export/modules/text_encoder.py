"""The text encoder as a traceable module: CLIP's for Stable Diffusion 1.x, OpenCLIP's for 2.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import CLIPTextModel

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.tokenizer import read_length
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import ComponentModule, Shapes

__all__ = ["PooledTextEncoder", "TextEncoder"]


class TextEncoder(ComponentModule):
    """Token ids → hidden states.

    `clip_skip` counts layers from the end, one number per chunk: 0 is the last layer, the output of the encoder as
    configured; the final layer norm always follows (diffusers, `StableDiffusionPipeline.encode_prompt`).

    Args:
        model: transformers' CLIPTextModel.
        length: the number of tokens of a chunk, at most that of the model's positions; None: as many.
    """

    trace_shapes: ClassVar[Shapes] = {"chunks": 3}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = ({"chunks": 1}, {"chunks": 2}, {"chunks": 5})

    def __init__(self, model: Any, length: int | None = None) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.layers: int = config.num_hidden_layers
        length = length or config.max_position_embeddings
        self.inputs = (
            TensorSpec("input_ids", "int64", ("chunks", length)),
            TensorSpec("clip_skip", "int64", ("chunks",)),
        )
        self.outputs = (TensorSpec("hidden_states", "float32", ("chunks", length, config.hidden_size)),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        model = load_pretrained(CLIPTextModel, checkpoint / "text_encoder", variant)
        if getattr(model.config, "use_attention_mask", False):
            raise CheckpointError(
                "text_encoder: its configuration sets use_attention_mask, which Stable Diffusion 1.x and 2.x do not use"
            )
        return cls(model, read_length(checkpoint))

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        states = self.model(input_ids, output_hidden_states=True, return_dict=True).hidden_states
        stacked = torch.stack(states, dim=1)  # (B, layers + 1, 77, D)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        chosen = stacked[rows, self.layers - clip_skip]  # (B, 77, D)
        return self._find_text_model().final_layer_norm(chosen)  # type: ignore[no-any-return]

    def canonical_name(self, parameter: str) -> str:
        name = parameter.removeprefix("model.")
        return name if name.startswith("text_model.") else f"text_model.{name}"

    def _find_text_model(self) -> Any:
        # transformers 5 removed the inner module `text_model` of earlier versions and of every checkpoint.
        return getattr(self.model, "text_model", self.model)


class PooledTextEncoder(TextEncoder):
    """Token ids → hidden states before the final layer norm, and the pooled output, which is that of the end token.

    Source: diffusers, `StableDiffusionLatentUpscalePipeline.encode_prompt`.
    """

    def __init__(self, model: Any, length: int | None = None) -> None:
        super().__init__(model, length)
        self.inputs = self.inputs[:1]
        self.outputs += (TensorSpec("pooled", "float32", ("chunks", model.config.hidden_size)),)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        encoded = self.model(input_ids, output_hidden_states=True, return_dict=True)
        return encoded.hidden_states[-1], encoded.pooler_output
