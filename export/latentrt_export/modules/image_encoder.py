"""CLIP's image encoder as a traceable module: input images of any size → embeddings, for image variation and unCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from latentrt.bundle.tensors import TensorSpec
from latentrt.sampling.training_noise import training_alphas
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import PreprocessorConfig, read_preprocessor_config
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.clip_preprocessing import ClipPreprocessing
from latentrt_export.modules.module import ComponentModule, Shapes

__all__ = ["ImageEncoder", "NoisedImageEncoder"]


class _ClipEncoder(ComponentModule):
    """CLIP's vision tower and projection behind its preprocessing, which is float32 for every precision of weights."""

    trace_shapes: ClassVar[Shapes] = {"batch": 2, "pixel_height": 320, "pixel_width": 256}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "pixel_height": 64, "pixel_width": 64},
        {"batch": 3, "pixel_height": 456, "pixel_width": 520},
        {"batch": 2, "pixel_height": 513, "pixel_width": 200},
    )

    def __init__(self, model: Any, preprocessing: PreprocessorConfig) -> None:
        super().__init__()
        self.preprocessing = ClipPreprocessing(preprocessing)
        self.model = model
        # torch's fused attention exports guards (IsNaN, Where) for masks; this model has no mask
        model.set_attn_implementation("eager")
        self.width: int = model.config.projection_dim
        self.inputs = (TensorSpec("pixels", "uint8", ("batch", "pixel_height", "pixel_width", 3)),)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the embeddings [batch, width] of uint8 pixels [batch, height, width, 3]."""
        seen = self.preprocessing(pixels).to(self.model.visual_projection.weight.dtype)
        return self.model(seen).image_embeds  # type: ignore[no-any-return]

    def canonical_name(self, parameter: str) -> str:
        return parameter.removeprefix("model.")


class ImageEncoder(_ClipEncoder):
    """Pixels of any size → `image_embeds`, the projected embedding of each image."""

    def __init__(self, model: Any, preprocessing: PreprocessorConfig) -> None:
        super().__init__(model, preprocessing)
        self.outputs = (TensorSpec("image_embeds", "float32", ("batch", self.width)),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(*_load_encoder(checkpoint, variant)).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.embed(pixels)


class NoisedImageEncoder(_ClipEncoder):
    """Pixels and a noise level → the distribution of the noised embedding, stable unCLIP's class labels.

    diffusers normalises the embedding, adds noise z by the noising scheduler, reverts the normalisation, and appends
    the sines of the noise level (`StableUnCLIPImg2ImgPipeline.noise_image_embeddings`). With the normalizer's μ and s
    the result is μ + √ᾱ · (e − μ) + √(1 − ᾱ) · s · z, so the outputs are

    - `class_labels`: float32 [batch, 2 · width], that sum at z = 0, then the sines;
    - `noise_scale`: float32 [batch, width], the factor of z.

    Args:
        model, preprocessing: as for `ImageEncoder`.
        normalizer: the mean and standard deviation of the embeddings in the denoiser's training.
        noising: the configuration of the noising scheduler.

    Raises:
        RequestError: the noising scheduler's noise schedule is not supported.
    """

    def __init__(self, model: Any, preprocessing: PreprocessorConfig, normalizer: Any, noising: dict[str, Any]) -> None:
        super().__init__(model, preprocessing)
        self.normalizer = normalizer
        self.alphas_cumprod = training_alphas(noising).tolist()
        self.inputs += (TensorSpec("noise_level", "int64", ("batch",)),)
        self.outputs = (
            TensorSpec("class_labels", "float32", ("batch", 2 * self.width)),
            TensorSpec("noise_scale", "float32", ("batch", self.width)),
        )

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        model, preprocessing = _load_encoder(checkpoint, variant)
        normalizer = load_pretrained(StableUnCLIPImageNormalizer, checkpoint / "image_normalizer", variant)
        noising = read_object(checkpoint / "image_noising_scheduler" / "scheduler_config.json")
        return cls(model, preprocessing, normalizer, noising).eval()

    def forward(self, pixels: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = torch.tensor(self.alphas_cumprod, dtype=torch.float32)
        signal, noise = (
            table.index_select(0, noise_level)[:, None] for table in _split_signal_and_noise(alphas_cumprod)
        )
        center, scale = self.normalizer.mean, self.normalizer.std
        mean = (self.embed(pixels) - center) * signal + center
        sines = get_timestep_embedding(noise_level, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([mean, sines.to(mean.dtype)], dim=1), noise * scale

    def canonical_name(self, parameter: str) -> str:
        return super().canonical_name(parameter).removeprefix("normalizer.")


def _load_encoder(checkpoint: Path, variant: str | None) -> tuple[Any, PreprocessorConfig]:
    preprocessing = read_preprocessor_config(checkpoint / "feature_extractor" / "preprocessor_config.json")
    return load_pretrained(CLIPVisionModelWithProjection, checkpoint / "image_encoder", variant), preprocessing


def _split_signal_and_noise(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Return √ᾱ and √(1 − ᾱ), the factors of signal and noise at each noise level: float32 [T] each."""
    return alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
