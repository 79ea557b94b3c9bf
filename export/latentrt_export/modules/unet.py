"""The denoiser as a traceable module."""

from __future__ import annotations

import functools
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
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.families.compatibility import find_text_width
from latentrt_export.families.stable_diffusion import NOISE_LEVEL_WIDTH
from latentrt_export.modules import token_merging
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.quantize.denoising import denoise_prompts
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["GuidanceDistilledUNet", "ImageVariationUNet", "LatentUpscalerUNet", "UNet"]

# Embeddings of the input `class_labels`: a table by number, the sines of a number, a projection of a vector.
_CLASS_EMBEDDINGS = (None, "timestep", "projection")
# The layers before cross-attention: none, or a projection of the text.
_TEXT_PROJECTIONS = (None, "text_proj")
# diffusers passes skip sizes to the upsamplers only if a side is not a multiple of 2^num_upsamplers. With this value no
# side is, so that the traced graph always takes that branch, which is correct for every size.
_NO_SIDE_IS_A_MULTIPLE = 40


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
        return cls(model)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        return self.model(  # type: ignore[no-any-return]
            sample, timestep, encoder_hidden_states, class_labels=class_labels, return_dict=False
        )[0]

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
            sizes = {"evaluations": len(feeds["sample"])}
            labels = {spec.name: np.zeros(sized(spec, sizes), spec.dtype) for spec in self.inputs[3:]}
            return run({**feeds, "sample": np.concatenate([feeds["sample"], extra], axis=1), **labels})

        sample, timestep, text, *_ = self.inputs
        latents = TensorSpec(sample.name, sample.dtype, (sample.shape[0], config.out_channels, *sample.shape[2:]))
        inputs = (latents, timestep, text)
        arrays = {**gate_inputs, "calibration_embeddings": gate_inputs[text.name]}
        shape = (config.out_channels, height, width)
        return {"denoised": denoise_prompts(run_conditioned, inputs, self.outputs, text.name, arrays, shape, options)}

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
        self.width: int = model.config.time_cond_proj_dim
        self.inputs += (TensorSpec("guidance_weight", "float32", ("evaluations",)),)
        half = self.width // 2
        step = torch.log(torch.tensor(10000.0)) / (half - 1)
        self.frequencies: list[float] = torch.exp(torch.arange(half, dtype=torch.float32) * -step).tolist()

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance_weight: Tensor
    ) -> Tensor:
        angles = (guidance_weight * 1000)[:, None] * torch.tensor(self.frequencies)[None]
        condition = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        condition = functional.pad(condition, (0, self.width % 2))
        return self.model(  # type: ignore[no-any-return]
            sample, timestep, encoder_hidden_states, timestep_cond=condition, return_dict=False
        )[0]


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
        output: Tensor = self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=condition, return_dict=False
        )[0]
        return -output[:, :-1]
