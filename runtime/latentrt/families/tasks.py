"""Tasks: which input images each takes, at which size, and how one image begins (latents before the first row, extra
channels of the denoiser's input, what follows each row).

Here are those that several families have; a family's own module has its own, and lists all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.errors import RequestError
from latentrt.families.family import Pixels
from latentrt.images.inputs import (
    InpaintingInputs,
    LoadedImage,
    LoadedLatents,
    apply_overlay,
    default_height_width,
    image_to_pixels,
    prepare_inpainting,
)
from latentrt.request import Prompt, Size, declared_options
from latentrt.sampling.guidance import ClassifierFree, Guidance, ImageAndText, Unguided
from latentrt.sampling.noise import Generator
from latentrt.text.clip import EncodedText

if TYPE_CHECKING:
    from latentrt.families.latent_diffusion import LatentDiffusionStage
    from latentrt.request import Request
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.loop import Sample
    from latentrt.sampling.schedule import Latents

__all__ = ["TEXT", "Beginning", "Edit", "Floats", "ImageToImage", "Inpainting", "Inputs", "Origin", "Side", "Task"]

TEXT = "encoder_hidden_states"
"""The denoiser's input of text embeddings, or of an image embedding."""
ENCODER = "vae_encoder"
"""The component that encodes input images."""

Floats = NDArray[np.float32]
Side = Literal["positive", "negative"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Input images of a request.

    Attributes:
        source, mask: as loaded.
        pixels: float32 [1, 3, H, W] in −1 … 1, once the size is known.
        inpainting: mask and masked pixels, where there is a mask.
        depth: float32 [1, H', W'] in −1 … 1 at the size of the latents, where `depth_map` was given.
    """

    source: LoadedImage | LoadedLatents
    mask: LoadedImage | None = None
    pixels: Floats | None = None
    inpainting: InpaintingInputs | None = None
    depth: Floats | None = None

    @property
    def image(self) -> LoadedImage:
        """The input image of a task that takes no latents in its place."""
        assert isinstance(self.source, LoadedImage), "others were refused"
        return self.source


@dataclass(frozen=True, kw_only=True, eq=False)
class Beginning:
    """The start of one image's sampling.

    Attributes:
        latents: before the first row, float32 [C, H, W].
        inputs: of the denoiser, in addition to those of `Task.conditioning`: by evaluation, by name.
        concat: channels after the latents' own, float32 [C', H, W], by evaluation; `""` stands for all others.
        after_row: called with the sample after each row.
    """

    latents: Latents
    inputs: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    concat: Mapping[str, Floats] = field(default_factory=dict)
    after_row: Callable[[Sample], None] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Where one image's numbers come from.

    Attributes:
        index: of the image in its request.
        generator: of its seed.
        noise: the caller's, float32 [C, H, W]; None to sample it.
    """

    index: int
    generator: Generator
    noise: Latents | None


class Task:
    """Text to image, and the base class of the other tasks.

    Attributes:
        takes_image, takes_mask: whether the task needs these inputs; it rejects all others.
        takes_prompt, needs_prompt: whether the task accepts a prompt, and whether it rejects a request without one.
        takes_depth_map: whether the task accepts a depth map beside the image.
        takes_latents: whether the task accepts an image as latents, and `denoising_start`.
        default_strength: that of diffusers' pipeline for the task; None: the task has no strength.
        default_noise_level: that of diffusers' pipeline; None: the task has no noise level.
        advice: the remedy for a bundle that does not support the task.
    """

    name: ClassVar[str] = "text-to-image"
    takes_image: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False
    takes_prompt: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    takes_depth_map: ClassVar[bool] = False
    takes_latents: ClassVar[bool] = False
    default_strength: ClassVar[float | None] = None
    default_noise_level: ClassVar[int | None] = None
    advice: ClassVar[str] = "give `image`, and `mask_image` for inpainting"

    def __init__(self, stage: LatentDiffusionStage) -> None:
        self.stage = stage

    def components(self) -> list[str]:
        """Return the components that `conditioning` and `begin` run."""
        return [*self.stage.text_encoders, *([ENCODER] if self.takes_image else [])]

    def check(self, request: ResolvedRequest) -> None:
        """Reject options that this task does not have.

        Raises:
            RequestError: the message names the option.
        """
        if request.guidance.image_scale is not None:
            raise RequestError("`image_guidance_scale`: only InstructPix2Pix models have it; leave it out")
        self.check_start(request)
        for each in declared_options(Prompt):
            if not self.takes_prompt and getattr(request.prompt, each.path[-1]) is not None:
                raise RequestError(f"`{each.keyword}`: {self.name} takes an image and no prompt; leave it out")

    def check_start(self, request: ResolvedRequest) -> None:
        """Reject a share of the noise levels to begin at where no image is past it.

        Raises:
            RequestError: `denoising_start` is set.
        """
        if request.sampling.denoising_start is not None and not self.takes_latents:
            raise RequestError(
                f"`denoising_start`: {self.name} begins with noise; give `image`, possibly as latents "
                "(`output_type` latent), or leave it out"
            )

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        """Return the size of the result as given by the request or its input image; None for an open side."""
        return request.size

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        """Return the inputs at the size of the result."""
        return inputs

    def guidance(self, request: ResolvedRequest) -> Guidance:
        """Return the guidance strategy of a request."""
        options = request.guidance
        if not request.guided:
            return Unguided()
        return ClassifierFree(
            scale=request.guidance_scale, rescale=options.rescale, start=options.start, end=options.end
        )

    def conditioning(self, request: ResolvedRequest) -> list[dict[str, dict[str, NDArray[Any]]]]:
        """Return the denoiser's inputs except latents and timestep, of each image: by evaluation, by name."""
        sides: dict[str, Side] = {
            name: "positive" if name == "positive" else "negative" for name in self.guidance(request).all_evaluations()
        }
        return [
            {name: self.text_inputs(request, side, texts[side]) for name, side in sides.items()}
            for texts in self.stage.encode_prompts(request)
        ]

    def text_inputs(self, request: ResolvedRequest, side: Side, text: EncodedText) -> dict[str, NDArray[Any]]:
        """Return the denoiser's inputs for an encoded prompt or negative prompt, by name."""
        return {TEXT: text.embeddings}

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        """Return a function that makes the `Beginning` of one image."""
        return lambda origin: Beginning(latents=request.schedule.first_latents(self.stage.noise(request, origin)))

    def decoder_images(self, request: ResolvedRequest) -> dict[str, Floats]:
        """Return the inputs of a decoder that keeps a part of an image, by source, float32 [1, C, H, W].

        By default it keeps nothing: its mask is 1 everywhere.
        """
        sides = request.height, request.width
        return {"image": np.zeros((1, 3, *sides), np.float32), "mask": np.ones((1, 1, *sides), np.float32)}

    def compose(self, request: ResolvedRequest, pixels: Pixels) -> Pixels:
        """Insert checked pixels into the image that they are a region of."""
        return pixels


class ImageToImage(Task):
    """Image to image (Meng et al. 2022, SDEdit): sampling starts from the noised latents of an image."""

    name = "image-to-image"
    takes_image = takes_latents = True
    default_strength: ClassVar[float | None] = 0.8
    advice = "export a bundle with an encoder, or leave `image` out"

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        assert inputs is not None, "the task takes an image"
        if isinstance(inputs.source, LoadedLatents):
            return self.stage.size_of(inputs.source, request.size)
        factor = self.stage.latent_space.downscale
        given, limits = request.size, self.stage.bundle.manifest.limits
        height, width = default_height_width(inputs.image, given.height, given.width, factor=factor)
        sides = [side for side, own in ((height, given.height), (width, given.width)) if own is None]
        if not all(limits.min_side <= side <= limits.max_side for side in sides):
            raise RequestError(
                f"`image`: got {inputs.image.width} × {inputs.image.height} pixels, expected sides from "
                f"{limits.min_side} to {limits.max_side}; resize it, or give `height` and `width`"
            )
        # A requested size is checked later as it is; that of the image is rounded down.
        return Size(height=given.height or height, width=given.width or width)

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        assert inputs is not None, "the task takes an image"
        if isinstance(inputs.source, LoadedLatents):
            return inputs
        factor = self.stage.latent_space.downscale
        return replace(inputs, pixels=image_to_pixels(inputs.image, height, width, factor=factor))

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        sample = self.stage.image_latents(request.prepared)

        def begin_one(origin: Origin) -> Beginning:
            clean = sample(origin)
            if request.sampling.denoising_start is not None:
                return Beginning(latents=clean)
            return Beginning(latents=request.schedule.first_latents(self.stage.noise(request, origin), clean))

        return begin_one


class Edit(ImageToImage):
    """InstructPix2Pix (Brooks et al. 2023): the image's latents are extra channels, with a guidance scale of their own.

    They are the mode of the distribution and not scaled, as in diffusers' pipeline.
    """

    name = "edit"
    takes_latents = False
    default_strength: ClassVar[float | None] = None
    default_image_scale: ClassVar[float] = 1.5
    advice = "export an InstructPix2Pix checkpoint"

    def check(self, request: ResolvedRequest) -> None:
        self.check_start(request)
        if request.acceleration.deep_cache > 1:
            raise RequestError("`deep_cache`: InstructPix2Pix models do not support it; leave it out")
        for keyword, changed in (
            ("guidance_rescale", request.guidance.rescale != 0),
            ("guidance_start", request.guidance.start != 0),
            ("guidance_end", request.guidance.end != 1),
        ):
            if changed:
                raise RequestError(f"`{keyword}`: InstructPix2Pix models do not support it; leave it out")

    def guidance(self, request: ResolvedRequest) -> Guidance:
        if not request.guided:
            return Unguided()
        scale = request.guidance.image_scale
        return ImageAndText(
            scale=request.guidance_scale, image_scale=self.default_image_scale if scale is None else scale
        )

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        image = self.stage.encode(request.prepared.pixels).mean
        concat = {"": image, "unconditional": np.zeros_like(image)}
        return lambda origin: Beginning(
            latents=request.schedule.first_latents(self.stage.noise(request, origin)), concat=concat
        )


class Inpainting(Task):
    """Inpainting: by extra channels where the denoiser has them (9 channels), else by blending after each row (4).

    Blending keeps the input image at the noise level of the next row (Lugmayr et al. 2022, without resampling).
    """

    name = "inpainting"
    takes_image = takes_mask = takes_latents = True
    default_strength: ClassVar[float | None] = 1.0
    advice = "use the bundle of a Stable Diffusion or an inpainting checkpoint, or leave `mask_image` out"

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        assert inputs is not None, "the task takes an image"
        source = inputs.source
        return request.size if isinstance(source, LoadedImage) else self.stage.size_of(source, request.size)

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        assert inputs is not None, "the task takes an image"
        assert inputs.mask is not None, "the task takes a mask"
        margin, factor = request.start.padding_mask_crop, self.stage.latent_space.downscale
        image = inputs.source
        if isinstance(image, LoadedLatents):
            if self.stage.extra_channels or margin is not None:
                given = "`padding_mask_crop`" if margin is not None else "a model with channels for the masked image"
                raise RequestError(f"`image`: got latents with {given}, which needs pixels; give an image")
            image = image.as_pixels(height, width)  # of which nothing is used
        prepared = prepare_inpainting(image, inputs.mask, height, width, factor=factor, padding_mask_crop=margin)
        pixels = prepared.pixels if image is inputs.source else None
        return replace(inputs, pixels=pixels, inpainting=prepared)

    def begin(self, request: ResolvedRequest) -> Callable[[Origin], Beginning]:
        inputs: Inputs = request.prepared
        assert inputs.inpainting is not None, "prepared"
        sample = self.stage.image_latents(inputs)
        masked = None
        if isinstance(inputs.source, LoadedImage):
            masked = self.stage.encode(inputs.inpainting.masked_pixels)
        mask, schedule = inputs.inpainting.latent_mask[0], request.schedule
        blends, from_noise = self.stage.extra_channels == 0, request.start.strength == 1
        adds_noise = request.sampling.denoising_start is None

        def begin_one(origin: Origin) -> Beginning:
            # Sampled in diffusers' order: image, noise, masked image, each only where diffusers samples it.
            clean = sample(origin) if blends or not from_noise else None
            noise = self.stage.noise(request, origin)
            kept = None if masked is None else self.stage.latent_space.normalize(masked.sample(origin.generator))
            if adds_noise:
                latents = schedule.first_latents(noise, None if from_noise else clean)
            else:
                assert clean is not None, "not from noise, as `denoising_start` excludes a strength"
                latents = clean
            if not blends:
                assert kept is not None, "latents are refused"
                return Beginning(latents=latents, concat={"": np.concatenate([mask, kept])})
            assert clean is not None, "blended, so it was encoded"
            return Beginning(latents=latents, after_row=functools.partial(_blend, clean, noise, mask))

        return begin_one

    def decoder_images(self, request: ResolvedRequest) -> dict[str, Floats]:
        inputs: Inputs = request.prepared
        assert inputs.inpainting is not None, "prepared"
        if inputs.pixels is None:  # latents were given
            return super().decoder_images(request)
        return {"image": inputs.pixels, "mask": inputs.inpainting.mask}

    def compose(self, request: ResolvedRequest, pixels: Pixels) -> Pixels:
        inputs: Inputs = request.prepared
        assert inputs.inpainting is not None, "prepared"
        region = inputs.inpainting.region
        if region is None or inputs.mask is None:
            return pixels
        images = [Image.fromarray(each) for each in pixels]
        return np.stack([np.asarray(apply_overlay(image, inputs.image, inputs.mask, region)) for image in images])


def _blend(clean: Latents, noise: Latents, mask: Floats, sample: Sample) -> None:
    """Keep the input image where the mask [1, H, W] is 0, at the noise level of the next row."""
    kept = clean if sample.done else sample.schedule.first_latents(noise, clean, row=sample.row)
    sample.latents = (1 - mask) * kept + mask * sample.latents
