"""Text encoders as traceable modules: CLIP's for Stable Diffusion 1.x, OpenCLIP's for 2.x, one of each for XL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.tokenizer import read_length
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import ComponentModule, Shapes

__all__ = ["PenultimateTextEncoder", "PooledTextEncoder", "ProjectedTextEncoder", "TextEncoder"]


class TextEncoder(ComponentModule):
    """Token ids → hidden states.

    `clip_skip` counts layers from the end, one number per chunk: 0 is the last layer, the output of the encoder as
    configured; the final layer norm always follows (diffusers, `StableDiffusionPipeline.encode_prompt`).

    Args:
        model: transformers' model, of the class `library_class`.
        length: the number of tokens of a chunk, at most that of the model's positions; None: as many.

    Attributes:
        component, tokenizer: the folders of the weights and of the tokenizer in a checkpoint.
    """

    component: ClassVar[str] = "text_encoder"
    tokenizer: ClassVar[str] = "tokenizer"
    library_class: ClassVar[Any] = CLIPTextModel
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
        model = load_pretrained(cls.library_class, checkpoint / cls.component, variant)
        if getattr(model.config, "use_attention_mask", False):
            raise CheckpointError(
                f"{cls.component}: its configuration sets use_attention_mask, which Stable Diffusion does not use"
            )
        return cls(model, read_length(checkpoint, cls.tokenizer, cls.component))

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


class PenultimateTextEncoder(TextEncoder):
    """Token ids → hidden states before the last layer, without the final layer norm.

    `clip_skip` counts from there: 0 is the input of the last layer. The last layer and the norm, which nothing reads,
    are left out.

    Source: diffusers, `StableDiffusionXLPipeline.encode_prompt`.
    """

    def __init__(self, model: Any, length: int | None = None) -> None:
        super().__init__(model, length)
        text_model = self._find_text_model()
        del text_model.encoder.layers[-1]
        text_model.final_layer_norm = torch.nn.Identity()

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        states = self.model(input_ids, output_hidden_states=True, return_dict=True).hidden_states
        return self._choose(states, clip_skip)

    def _choose(self, states: Sequence[Tensor], clip_skip: Tensor) -> Tensor:
        """Return the states before the last layer and `clip_skip` further ones.

        Args:
            states: the input of each layer, and possibly the output of the last.
        """
        stacked = torch.stack([*states[: self.layers]], dim=1)  # (B, layers, 77, D)
        rows = torch.arange(clip_skip.shape[0], device=clip_skip.device)
        return stacked[rows, self.layers - 1 - clip_skip]  # (B, 77, D)


class ProjectedTextEncoder(PenultimateTextEncoder):
    """Token ids → hidden states before the last layer, and the projection of the pooled output (the end token's)."""

    component: ClassVar[str] = "text_encoder_2"
    tokenizer: ClassVar[str] = "tokenizer_2"
    library_class: ClassVar[Any] = CLIPTextModelWithProjection

    def __init__(self, model: Any, length: int | None = None) -> None:
        TextEncoder.__init__(self, model, length)  # the pooled output reads the last layer and the norm
        self.outputs += (TensorSpec("pooled", "float32", ("chunks", model.config.projection_dim)),)

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        encoded = self.model(input_ids, output_hidden_states=True, return_dict=True)
        return self._choose(encoded.hidden_states, clip_skip), encoded.text_embeds

    def canonical_name(self, parameter: str) -> str:
        name = parameter.removeprefix("model.")
        return name if name.startswith("text_projection.") else super().canonical_name(parameter)
