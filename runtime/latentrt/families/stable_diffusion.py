"""Stable Diffusion 1.x and 2.x: the tasks of their checkpoints that other families do not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.backends.session import Arrays, run
from latentrt.bundle.manifest import LOW_RES_SCHEDULER
from latentrt.errors import RequestError
from latentrt.families.latent_diffusion import LatentDiffusion, LatentDiffusionStage
from latentrt.families.tasks import (
    TEXT,
    Beginning,
    Edit,
    Floats,
    ImageToImage,
    Inpainting,
    Inputs,
    Origin,
    Side,
    Task,
)
from latentrt.images.feature_extractors import depth_to_latents, preprocess
from latentrt.images.inputs import default_height_width, image_to_pixels
from latentrt.request import Size
from latentrt.sampling.training_noise import training_alphas
from latentrt.text.clip import EncodedText
from latentrt.timings import measured

if TYPE_CHECKING:
    from latentrt.request import Request
    from latentrt.resolve import ResolvedRequest

__all__ = ["StableDiffusion"]

IMAGE_ENCODER, DEPTH_ESTIMATOR = "image_encoder", "depth_estimator"
# The denoiser's inputs: a noise level or an image embedding; the pooled text embedding.
CLASS_LABELS, POOLED = "class_labels", "pooled"


class DepthToImage(ImageToImage):
    """Image to image that keeps the depth of the input image, which is one extra channel for every evaluation.

    Source: diffusers' `StableDiffusionDepth2ImgPipeline`.
    """

    name = "depth-to-image"
    takes_latents = False
    takes_depth_map = True
    advice = "export a depth-to-image checkpoint"

    def components(self) -> list[str]:
        return [*super().components(), DEPTH_ESTIMATOR]

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        prepared = super().prepare(request, inputs, height, width)
        if prepared is None or request.start.depth_map is None:
            return prepared
        return replace(prepared, depth=self._to_latents(request.start.depth_map, height, width))

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        inputs: Inputs = request.prepared
        concat = {"": self._estimate(request) if inputs.depth is None else inputs.depth}
        begin_one = super().begin(request)
        return lambda origin: replace(begin_one(origin), concat=concat)

    @measured("image_encoding")
    def _estimate(self, request: ResolvedRequest) -> Floats:
        """Estimate the depth of the input image, float32 [1, H', W'] in −1 … 1 at the size of the latents."""
        inputs: Inputs = request.prepared
        preprocessing = self.stage.bundle.manifest.components[DEPTH_ESTIMATOR].preprocessing
        assert preprocessing is not None, "the manifest was checked"
        estimator = self.stage.components.session(DEPTH_ESTIMATOR)
        depth = run(estimator, pixels=preprocess(inputs.image, preprocessing))["predicted_depth"]
        self.stage.components.done_with(DEPTH_ESTIMATOR)
        return self._to_latents(depth, request.height, request.width)

    def _to_latents(self, depth: NDArray[Any], height: int, width: int) -> Floats:
        factor = self.stage.latent_space.downscale
        latents: Floats = depth_to_latents(depth, height, width, factor=factor)[0]
        return latents


class Enlarging(Task):
    """The base class of tasks whose result is a fixed number of times larger than the input image.

    Attributes:
        enlargement: the sides of the result over those of the input image.
    """

    takes_image = True
    enlargement: int

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        assert inputs is not None, "the task takes an image"
        space, times = self.stage.latent_space, self.enlargement
        sides = default_height_width(inputs.image, factor=space.downscale)
        height, width = (times * side for side in sides)
        for keyword, given, side in (("height", request.size.height, height), ("width", request.size.width, width)):
            if given not in (None, side):
                raise RequestError(
                    f"`{keyword}`: got {given}, expected {side}, {times} times that of `image` rounded down to a "
                    f"multiple of {space.downscale}; leave it out"
                )
        limits, multiple = self.stage.bundle.manifest.limits, space.side_multiple
        got = f"`image`: got {inputs.image.width} × {inputs.image.height} pixels"
        if not limits.min_side <= min(height, width) <= max(height, width) <= limits.max_side:
            raise RequestError(
                f"{got}, expected sides from {limits.min_side // times} to {limits.max_side // times}; resize it"
            )
        if height % multiple or width % multiple:
            raise RequestError(f"{got}, expected sides that are multiples of {multiple // times}; resize or crop it")
        return Size(height=height, width=width)

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        assert inputs is not None, "the task takes an image"
        factor, times = self.stage.latent_space.downscale, self.enlargement
        pixels = image_to_pixels(
            inputs.image, height // times, width // times, factor=factor, resample=Image.Resampling.BICUBIC
        )
        return replace(inputs, pixels=pixels)


class Upscaling(Enlarging):
    """Upscaling: the input image, with noise, is extra channels at the size of the latents.

    The level of that noise is a further input of the denoiser. The result is as many times larger than the input image
    as the decoder enlarges latents (4).

    Source: diffusers' `StableDiffusionUpscalePipeline`.
    """

    name = "upscaling"
    default_noise_level: ClassVar[int | None] = 20
    advice = "export an upscaler's checkpoint"

    def __init__(self, stage: LatentDiffusionStage) -> None:
        super().__init__(stage)
        self.enlargement = stage.latent_space.downscale

    def components(self) -> list[str]:
        return [*self.stage.text_encoders]  # the input image is not encoded

    def conditioning(self, request: ResolvedRequest) -> list[dict[str, dict[str, NDArray[Any]]]]:
        level = np.array(request.start.noise_level, np.int64)
        return [
            {name: {**inputs, CLASS_LABELS: level} for name, inputs in evaluations.items()}
            for evaluations in super().conditioning(request)
        ]

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        image: Floats = request.prepared.pixels[0]  # (3, H', W')
        level = request.start.noise_level
        assert level is not None, "the task has a default"
        alpha_bar = training_alphas(self.stage.bundle.manifest.schedulers[LOW_RES_SCHEDULER].config)[level]

        def begin_one(origin: Origin) -> Beginning:
            # Sampled in diffusers' order: noise of the image, then the latents.
            noise = origin.generator.normal(image.shape)
            noisy = np.asarray(np.sqrt(alpha_bar) * image + np.sqrt(1 - alpha_bar) * noise, np.float32)
            latents = request.schedule.first_latents(self.stage.noise(request, origin))
            return Beginning(latents=latents, concat={"": noisy})

        return begin_one


class LatentUpscaling(Enlarging):
    """Latent upscaling: the input image's latents, each repeated 2 × 2, are extra channels.

    The result is twice as large as the input image. A guidance scale of 0 replaces the prompt by the empty one.

    Source: diffusers' `StableDiffusionLatentUpscalePipeline`.
    """

    name = "latent-upscaling"
    advice = "export a latent upscaler's checkpoint"
    enlargement = 2

    def check(self, request: ResolvedRequest) -> None:
        super().check(request)
        for keyword, text, given in (
            ("prompt_embeds", "prompt", request.prompt.embeds),
            ("negative_prompt_embeds", "negative_prompt", request.prompt.negative_embeds),
        ):
            if given is not None:
                raise RequestError(
                    f"`{keyword}`: got embeddings, expected a text, of which a latent upscaler needs the pooled "
                    f"embedding too; use `{text}`"
                )

    def conditioning(self, request: ResolvedRequest) -> list[dict[str, dict[str, NDArray[Any]]]]:
        if request.guidance_scale == 0 and request.prompts is not None:
            request = replace(request, prompts=("",) * len(request.prompts))
        return super().conditioning(request)

    def text_inputs(self, request: ResolvedRequest, side: Side, text: EncodedText) -> dict[str, NDArray[Any]]:
        assert text.pooled is not None, "the encoder of a latent upscaler has that output"
        return {TEXT: text.embeddings, POOLED: text.pooled}

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        image, times = self.stage.encode(request.prepared.pixels), self.enlargement

        def begin_one(origin: Origin) -> Beginning:
            clean = self.stage.latent_space.normalize(image.sample(origin.generator))
            latents = request.schedule.first_latents(self.stage.noise(request, origin))
            return Beginning(latents=latents, concat={"": clean.repeat(times, axis=1).repeat(times, axis=2)})

        return begin_one


class ImageVariation(Task):
    """Variations of an image (Pinkney 2022): its CLIP embedding replaces the text's, zeros the negative prompt's."""

    name = "image-variation"
    takes_image = True
    takes_prompt = needs_prompt = False
    advice = "export a Stable Diffusion image variation checkpoint"

    def components(self) -> list[str]:
        return [IMAGE_ENCODER]

    def conditioning(self, request: ResolvedRequest) -> list[dict[str, dict[str, NDArray[Any]]]]:
        embedding = encode_image(self.stage, request.prepared)["image_embeds"]  # (1, width): one token
        sides = {"positive": embedding, "negative": np.zeros_like(embedding)}
        inputs = {name: {TEXT: sides[name]} for name in self.guidance(request).all_evaluations()}
        return [inputs for _ in request.seeds]


class Unclip(Task):
    """Stable unCLIP (Ramesh et al. 2022): a prompt, and the noised embedding of an image as class labels.

    Zeros replace the embedding in the negative evaluation.
    """

    name = "unclip"
    takes_image = True
    needs_prompt = False  # the default is the empty prompt, as in diffusers
    default_noise_level: ClassVar[int | None] = 0
    advice = "export a stable unCLIP checkpoint"

    def components(self) -> list[str]:
        return [*self.stage.text_encoders, IMAGE_ENCODER]

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        level = np.array([request.start.noise_level], np.int64)
        encoded = encode_image(self.stage, request.prepared, noise_level=level)
        (clean,), (scale,) = encoded["class_labels"], encoded["noise_scale"]  # (2 · width,), (width,)

        def begin_one(origin: Origin) -> Beginning:
            labels = clean.copy()  # the embedding, then the noise level
            labels[: scale.size] += scale * origin.generator.normal(scale.shape)  # sampled first, as in diffusers
            noise = self.stage.noise(request, origin)
            return Beginning(
                latents=request.schedule.first_latents(noise),
                inputs={"positive": {CLASS_LABELS: labels}, "negative": {CLASS_LABELS: np.zeros_like(labels)}},
            )

        return begin_one


@measured("image_encoding")
def encode_image(stage: LatentDiffusionStage, inputs: Inputs, **more: NDArray[Any]) -> Arrays:
    """Run CLIP's image encoder on the input image, of any size, as 8-bit pixels.

    Args:
        inputs: of the request.
        more: further inputs of the encoder, with a batch axis.

    Returns:
        Its outputs, with a batch axis of 1.
    """
    encoded = run(stage.components.session(IMAGE_ENCODER), pixels=np.asarray(inputs.image.image)[np.newaxis], **more)
    stage.components.done_with(IMAGE_ENCODER)
    return encoded


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x and 2.x."""

    task_classes = (
        Task,
        ImageToImage,
        DepthToImage,
        Upscaling,
        LatentUpscaling,
        Edit,
        Inpainting,
        ImageVariation,
        Unclip,
    )
