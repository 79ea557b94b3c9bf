"""The denoiser as a traceable module."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from latentrt.bundle.manifest import PartName, TokenMerging
from latentrt.bundle.printable import quote
from latentrt.bundle.tensors import TensorSpec, sized
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.component_config import read_component_config
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.families.compatibility import DEFAULT_PROJECTION_DIM, find_text_width
from latentrt_export.families.stable_diffusion import NOISE_LEVEL_WIDTH
from latentrt_export.modules import token_merging
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.quantize.denoising import denoise_prompts
from latentrt_export.quantize.options import QuantizationOptions

__all__ = [
    "GuidanceDistilledUNet",
    "GuidanceDistilledXLUNet",
    "ImageVariationUNet",
    "LatentUpscalerUNet",
    "UNet",
    "XLUNet",
]

# Embeddings of the input `class_labels`: a table by number, the sines of a number, a projection of a vector.
_CLASS_EMBEDDINGS = (None, "timestep", "projection")
# The layers before cross-attention: none, or a projection of the text.
_TEXT_PROJECTIONS = (None, "text_proj")
# diffusers passes skip sizes to the upsamplers only if a side is not a multiple of 2^num_upsamplers. With this value no
# side is, so that the traced graph always takes that branch, which is correct for every size.
_NO_SIDE_IS_A_MULTIPLE = 40
# The values of a refiner's micro-conditioning, and the scores of diffusers' pipelines for prompt and negative prompt.
_REFINER_IDS, _AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 5, 6.0, 2.5


class UNet(ComponentModule):
    """Noisy latents, timesteps and text embeddings → the model output (epsilon or v, as the checkpoint was trained).

    The latents may be followed by channels of the conditioning (inpainting: mask and masked image; editing: the image;
    upscaling: the low-resolution image), and `class_labels` by a noise level or an image embedding.
    """

    float32_inputs: ClassVar[frozenset[str]] = frozenset({"timestep"})
    loop_invariant_inputs: ClassVar[Mapping[str, PartName]] = {
        "timestep": "time_embedding",
        "encoder_hidden_states": "cross_attention_kv",
    }
    is_quantized: ClassVar[bool] = True
    # Configuration keys that must be unset: they add inputs or layers that no supported model of this kind has.
    unset: ClassVar[tuple[str, ...]] = ("addition_embed_type", "time_cond_proj_dim", "timestep_post_act")
    trace_shapes: ClassVar[Shapes] = {"evaluations": 2, "height": 16, "width": 24, "tokens": 77}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"evaluations": 2, "height": 16, "width": 16, "tokens": 77},
        {"evaluations": 3, "height": 17, "width": 15, "tokens": 77},
        {"evaluations": 1, "height": 65, "width": 57, "tokens": 154},
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.num_upsamplers = _NO_SIDE_IS_A_MULTIPLE
        for upsampler in (each for each in model.modules() if isinstance(each, Upsample2D)):
            assert upsampler.use_conv and upsampler.norm is None, "those of diffusers' UNet blocks"  # noqa: PT018
            upsampler.forward = functools.partial(_upsample, upsampler)
        config = model.config
        self.inputs = (
            TensorSpec("sample", "float32", ("evaluations", config.in_channels, "height", "width")),
            TensorSpec("timestep", "float32", ("evaluations",)),
            TensorSpec("encoder_hidden_states", "float32", ("evaluations", "tokens", find_text_width(config))),
        )
        if config.class_embed_type == "projection":
            width = config.projection_class_embeddings_input_dim
            self.inputs += (TensorSpec("class_labels", "float32", ("evaluations", width)),)
        elif config.class_embed_type is not None or config.num_class_embeds is not None:
            self.inputs += (TensorSpec("class_labels", "int64", ("evaluations",)),)
        self.outputs = (TensorSpec("noise_pred", "float32", ("evaluations", config.out_channels, "height", "width")),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(cls._load_model(checkpoint, variant))

    @classmethod
    def _load_model(cls, checkpoint: Path, variant: str | None) -> Any:
        """Load the model, and check that it has no inputs or layers that this class does not give it."""
        model = load_pretrained(UNet2DConditionModel, checkpoint / "unet", variant)
        for key in cls.unset:
            if getattr(model.config, key, None) is not None:
                raise CheckpointError(
                    f"unet: its configuration has {key} {quote(getattr(model.config, key))}, expected none; such a "
                    "model is not supported"
                )
        for key, supported in (
            ("class_embed_type", _CLASS_EMBEDDINGS),
            ("encoder_hid_dim_type", _TEXT_PROJECTIONS),
        ):
            if (found := model.config[key]) not in supported:
                raise CheckpointError(
                    f"unet: its configuration has {key} {quote(found)}, expected one of "
                    f"{', '.join(map(repr, supported))}"
                )
        return model

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        return self._predict(sample, timestep, encoder_hidden_states, class_labels=class_labels)

    def _predict(self, sample: Tensor, timestep: Tensor, text: Tensor, **conditions: Any) -> Tensor:
        """Evaluate the model.

        Args:
            sample, timestep, text: its inputs in every pipeline.
            conditions: further arguments of `UNet2DConditionModel.forward`.
        """
        return self.model(sample, timestep, text, return_dict=False, **conditions)[0]  # type: ignore[no-any-return]

    def merge_tokens(self, ratio: float) -> TokenMerging:
        return token_merging.install(self.model, ratio)

    def matchings(self) -> Arrays:
        return token_merging.read_matchings(self.model)

    def forced(self, matchings: Arrays) -> AbstractContextManager[None]:
        return token_merging.force_matchings(self.model, matchings)

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Denoise the calibration prompts with guidance against the empty prompt, at the bundle's default size.

        The conditioning's channels are those of an encoded image; class labels are 0.
        """
        config = self.model.config
        height, width = gate_inputs["latent_size"].tolist()
        extra = gate_inputs["latents"][:1, np.arange(config.in_channels - config.out_channels) % config.out_channels]
        extra = np.resize(extra, (2, extra.shape[1], height, width))

        def run_conditioned(feeds: Arrays) -> Arrays:
            return run({**feeds, "sample": np.concatenate([feeds["sample"], extra], axis=1)})

        sample, *others = self.inputs
        latents = TensorSpec(sample.name, sample.dtype, (sample.shape[0], config.out_channels, *sample.shape[2:]))
        return {
            "denoised": denoise_prompts(
                run_conditioned,
                (latents, *others),
                self.outputs,
                self._list_conditionings(gate_inputs, options),
                json.loads(str(gate_inputs["noise_schedule"])),
                (config.out_channels, height, width),
                options,
            )
        }

    def _list_conditionings(
        self, gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> list[Arrays]:
        """Return the inputs of calibration beside latents and timestep, without a batch axis: those of the empty
        prompt, then those of each prompt."""
        _, _, text, *others = self.inputs
        labels = {spec.name: np.zeros(sized(spec, {"evaluations": 1})[1:], spec.dtype) for spec in others}
        return [{text.name: embedding, **labels} for embedding in gate_inputs[text.name]]

    def canonical_name(self, parameter: str) -> str:
        return parameter.removeprefix("model.")


def _upsample(upsampler: Any, hidden_states: Tensor, output_size: Any) -> Tensor:
    """Resize to the size of the skip connection, then convolve; in place of `Upsample2D.forward`.

    diffusers' method also compares the number of output elements with 2^31, by a division of sizes that `torch.export`
    cannot express: it would trace the model a second time, with Dynamo.
    """
    resized = functional.interpolate(hidden_states, size=output_size, mode="nearest")
    return upsampler.conv(resized)  # type: ignore[no-any-return]


class ImageVariationUNet(UNet):
    """A denoiser that attends to one image embedding in place of text: `encoder_hidden_states` has a single token."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        sample, timestep, embedding, *rest = self.inputs
        one = TensorSpec(embedding.name, embedding.dtype, (embedding.shape[0], 1, embedding.shape[2]))
        self.inputs = (sample, timestep, one, *rest)

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Denoise the calibration images, with an embedding of zeros as the unconditional one."""
        name = self.inputs[2].name
        embeddings = gate_inputs[name][:, np.newaxis]  # (images, 1, width)
        guided = np.concatenate([np.zeros_like(embeddings[:1]), embeddings])
        return super().calibrate(run, {**gate_inputs, name: guided}, options)


class GuidanceDistilledUNet(UNet):
    """A denoiser with guidance distilled into it (Meng et al. 2023; Luo et al. 2023, LCM): the scale is an input.

    `guidance_weight` is w = `guidance_scale` − 1. Its sines and cosines, in float32, are the condition of the time
    embedding (diffusers, `StableDiffusionPipeline.get_guidance_scale_embedding`).
    """

    float32_inputs: ClassVar[frozenset[str]] = frozenset({"timestep", "guidance_weight"})
    loop_invariant_inputs: ClassVar[Mapping[str, PartName]] = {
        **UNet.loop_invariant_inputs,
        "guidance_weight": "time_embedding",
    }
    is_quantized: ClassVar[bool] = False  # calibration guides by two evaluations
    unset: ClassVar[tuple[str, ...]] = ("addition_embed_type", "timestep_post_act")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.guidance = _GuidanceEmbedding(model.config.time_cond_proj_dim)
        self.inputs += (TensorSpec("guidance_weight", "float32", ("evaluations",)),)

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance_weight: Tensor
    ) -> Tensor:
        condition = self.guidance.embed(guidance_weight)
        return self._predict(sample, timestep, encoder_hidden_states, timestep_cond=condition)


class _GuidanceEmbedding:
    """The sines and cosines of a guidance weight.

    Args:
        width: the number of values.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        half = width // 2
        step = torch.log(torch.tensor(10000.0)) / (half - 1)
        self._frequencies: list[float] = torch.exp(torch.arange(half, dtype=torch.float32) * -step).tolist()

    def embed(self, weights: Tensor) -> Tensor:
        """Embed weights (B,) → (B, width), in float32."""
        angles = (weights * 1000)[:, None] * torch.tensor(self._frequencies)[None]
        embedded = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return functional.pad(embedded, (0, self._width % 2))


class XLUNet(UNet):
    """The denoiser of Stable Diffusion XL, which also takes the pooled text and micro-conditioning.

    `text_embeds` is the pooled output of the second text encoder, and `time_ids` the micro-conditioning: sizes in
    pixels, or for a refiner sizes and an aesthetic score (`latentrt.bundle.manifest.InputSpec`).
    """

    # Numbers of pixels exceed what half holds exactly, and their sines lose all their precision in it.
    float32_inputs: ClassVar[frozenset[str]] = frozenset({"timestep", "text_embeds", "time_ids"})
    loop_invariant_inputs: ClassVar[Mapping[str, PartName]] = {
        **UNet.loop_invariant_inputs,
        "text_embeds": "time_embedding",
        "time_ids": "time_embedding",
    }
    unset: ClassVar[tuple[str, ...]] = (
        "class_embed_type",
        "num_class_embeds",
        "time_cond_proj_dim",
        "timestep_post_act",
    )

    def __init__(self, model: Any, pooled: int) -> None:
        """Wrap a UNet2DConditionModel.

        Args:
            model: the model.
            pooled: the width of the pooled text, which the model's configuration does not have.
        """
        super().__init__(model)
        config = model.config
        ids = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        self.inputs += (
            TensorSpec("text_embeds", "float32", ("evaluations", pooled)),
            TensorSpec("time_ids", "float32", ("evaluations", ids)),
        )

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(cls._load_model(checkpoint, variant), read_pooled_width(checkpoint))

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self._predict(sample, timestep, encoder_hidden_states, added_cond_kwargs=added)

    def _list_conditionings(
        self, gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> list[Arrays]:
        """Return the conditioning of each prompt, the empty one first, for an uncropped image of the default size."""
        texts, pooled = (gate_inputs[name].copy() for name in ("encoder_hidden_states", "text_embeds"))
        if options.force_zeros_for_empty_prompt:
            texts[0] = pooled[0] = 0
        (ids,) = self.inputs[4].shape[1:]
        rows = np.tile(gate_inputs["time_ids"], (len(texts), 1))
        if ids == _REFINER_IDS:
            rows = rows[:, :_REFINER_IDS]
            rows[:, -1], rows[0, -1] = _AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE
        return [
            {"encoder_hidden_states": text, "text_embeds": vector, "time_ids": row}
            for text, vector, row in zip(texts, pooled, rows, strict=True)
        ]


class GuidanceDistilledXLUNet(XLUNet):
    """A denoiser of Stable Diffusion XL with guidance distilled into it, as `GuidanceDistilledUNet`."""

    float32_inputs: ClassVar[frozenset[str]] = XLUNet.float32_inputs | {"guidance_weight"}
    loop_invariant_inputs: ClassVar[Mapping[str, PartName]] = {
        **XLUNet.loop_invariant_inputs,
        "guidance_weight": "time_embedding",
    }
    is_quantized: ClassVar[bool] = False  # calibration guides by two evaluations
    unset: ClassVar[tuple[str, ...]] = ("class_embed_type", "num_class_embeds", "timestep_post_act")

    def __init__(self, model: Any, pooled: int) -> None:
        super().__init__(model, pooled)
        self.guidance = _GuidanceEmbedding(model.config.time_cond_proj_dim)
        self.inputs += (TensorSpec("guidance_weight", "float32", ("evaluations",)),)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        guidance_weight: Tensor,
    ) -> Tensor:
        return self._predict(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=self.guidance.embed(guidance_weight),
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
        )


def read_pooled_width(checkpoint: Path) -> int:
    """Read the width of the pooled text from the configuration of the second text encoder of a checkpoint."""
    config = read_component_config(checkpoint / "text_encoder_2", "CLIPTextModelWithProjection")
    width: int = config.get("projection_dim", DEFAULT_PROJECTION_DIM)
    return width


class LatentUpscalerUNet(UNet):
    """The denoiser of `StableDiffusionLatentUpscalePipeline`, at a time of ln(σ) / 4, conditioned on the pooled text.

    With the preconditioning of Karras et al. 2022 (table 1, σ_data = 1) x0 = x / (σ² + 1) + σ / √(σ² + 1) · F, so the
    model's output F is −v. The graph returns v. The last channel of F, a variance that the pipeline drops, is left out.
    """

    is_quantized: ClassVar[bool] = False  # calibration has neither c_noise nor a pooled text
    unset: ClassVar[tuple[str, ...]] = ("addition_embed_type",)
    # Without odd sides: its three downsamplers do not pad.
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"evaluations": 2, "height": 16, "width": 16, "tokens": 77},
        {"evaluations": 3, "height": 24, "width": 16, "tokens": 77},
        {"evaluations": 1, "height": 64, "width": 56, "tokens": 154},
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        width = model.config.time_cond_proj_dim - NOISE_LEVEL_WIDTH
        self.inputs += (TensorSpec("pooled", "float32", ("evaluations", width)),)
        (output,) = self.outputs
        batch, channels, *sides = output.shape
        assert isinstance(channels, int), "the configuration's out_channels"
        self.outputs = (TensorSpec(output.name, output.dtype, (batch, channels - 1, *sides)),)

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled: Tensor
    ) -> Tensor:
        # The embedding of a noise level of 0 of the input image: its cosines, then its sines.
        level = pooled.new_ones(pooled.shape[0], NOISE_LEVEL_WIDTH // 2)
        condition = torch.cat([level, torch.zeros_like(level), pooled], dim=1)
        output = self._predict(sample, timestep, encoder_hidden_states, timestep_cond=condition)
        return -output[:, :-1]
