"""The denoiser as a traceable module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from latentrt.bundle.gate_inputs import tiled
from latentrt.bundle.manifest import PartName, TokenMerging
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules import token_merging
from latentrt_export.modules.module import Arrays, Case, Submodule
from latentrt_export.quantize.denoising import denoise_prompts
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["UNet"]

# What an SD 1.x or 2.x text-to-image UNet leaves unset, and a graph of it would silently ignore.
_UNSET = (
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "num_class_embeds",
    "timestep_post_act",
)
# diffusers hands skip sizes to the upsamplers only where a side is not a multiple of 2^num_upsamplers. With this many
# no side ever is, so the traced graph always takes that branch, which is right for every size.
_NO_SIDE_IS_A_MULTIPLE = 40


class UNet(Submodule):
    """Noisy latents, timesteps and text embeddings → the model output (epsilon or v, as the checkpoint was trained)."""

    float32_inputs: ClassVar[frozenset[str]] = frozenset({"timestep"})
    alone: ClassVar[Mapping[str, PartName]] = {"timestep": "timestep", "encoder_hidden_states": "prompt"}
    quantized: ClassVar[bool] = True
    traced: ClassVar[Case] = Case(batch=2, height=16, width=24)
    judged: ClassVar[tuple[Case, ...]] = (
        Case(batch=2, height=16, width=16),
        Case(batch=3, height=17, width=15),
        Case(batch=1, height=65, width=57, tokens=154),
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.num_upsamplers = _NO_SIDE_IS_A_MULTIPLE
        channels = model.config.in_channels
        latents = ("batch", channels, "height", "width")
        self.inputs = (
            TensorSpec("sample", "float32", latents),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", model.config.cross_attention_dim)),
        )
        self.outputs = (TensorSpec("noise_pred", "float32", latents),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        model = load_pretrained(UNet2DConditionModel, checkpoint / "unet", variant)
        for key in _UNSET:
            if getattr(model.config, key, None) is not None:
                raise CheckpointError(
                    f"unet: its configuration sets {key}, which no Stable Diffusion 1.x or 2.x text-to-image model has"
                )
        if model.config.in_channels != model.config.out_channels:
            raise CheckpointError(
                f"unet: it takes {model.config.in_channels} channels and gives {model.config.out_channels}; that is an "
                "inpainting, depth or upscaling model, and only text-to-image models can be exported"
            )
        if model.config.sample_size is None:
            raise CheckpointError(
                "unet: its configuration does not say sample_size, the latents' side it was trained at"
            )
        return cls(model)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]  # type: ignore[no-any-return]

    def merge_tokens(self, ratio: float) -> TokenMerging:
        return token_merging.install(self.model, ratio)

    def choices(self) -> Arrays:
        return token_merging.decided(self.model)

    def told(self, choices: Arrays) -> AbstractContextManager[None]:
        return token_merging.told(self.model, choices)

    def facts(self) -> dict[str, Any]:
        size = self.model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"latent_channels": self.model.config.in_channels, "latent_height": height, "latent_width": width}

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        """Encoded pictures with the noise of some timesteps, beside encoded prompts."""
        # (B,): from nearly all noise to nearly none
        timestep = np.resize(np.array([981.0, 21.0, 401.0, 801.0], np.float32), case.batch)
        alpha_bar = known["alphas_cumprod"][timestep.astype(np.int64)][:, None, None, None]
        clean = tiled(known["latents"], case.batch, case.height, case.width)
        noise = rng.standard_normal(clean.shape)
        noisy = np.sqrt(alpha_bar) * clean + np.sqrt(1 - alpha_bar) * noise
        text = known["text_embeddings"]  # (P, 77, D)
        wanted = (case.batch, case.tokens // text.shape[1], *text.shape[1:])
        return {
            "sample": noisy.astype(np.float32),
            "timestep": timestep,
            "encoder_hidden_states": np.resize(text, wanted).reshape(case.batch, case.tokens, -1),
        }

    def calibrate(
        self, run: Callable[[Arrays], Arrays], known: Mapping[str, NDArray[Any]], quantizing: QuantizationOptions
    ) -> Arrays:
        """Whole runs of the calibration's prompts, each guided away from the empty one, at the size it was trained
        for."""
        facts = self.facts()
        shape = (facts["latent_channels"], facts["latent_height"], facts["latent_width"])
        return {"denoised": denoise_prompts(run, known, shape, quantizing)}

    def canonical_name(self, parameter: str) -> str:
        return parameter.removeprefix("model.")
