"""Stable Diffusion 1.x and 2.x: component names, conditioning and tasks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.decode import autoencoder
from latentrt.errors import RequestError
from latentrt.families.family import Family, Pixels, Stage
from latentrt.images.inputs import (
    InpaintingInputs,
    LoadedImage,
    apply_overlay,
    default_height_width,
    image_to_pixels,
    load_image,
    prepare_inpainting,
)
from latentrt.images.metadata import InputRecord
from latentrt.request import Size
from latentrt.resolve import check_latents
from latentrt.sampling import samplers
from latentrt.sampling.denoiser import Conditioning
from latentrt.sampling.guidance import ClassifierFree, Guidance, ImageAndText, Unguided
from latentrt.sampling.loop import Sample
from latentrt.sampling.noise import Generator
from latentrt.text.clip import PromptEncoder
from latentrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle
    from latentrt.request import Request, Sampling, Start
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.schedule import Latents, Schedule

__all__ = ["StableDiffusion"]

TEXT_ENCODER, DENOISER = "text_encoder", "unet"
ENCODER, DECODER, PREVIEW_DECODER = "vae_encoder", "vae_decoder", "preview_decoder"
CLASSIFIER = "safety_checker"
TEXT = "encoder_hidden_states"  # the denoiser's input of text embeddings

Floats = NDArray[np.float32]

# diffusers' own, of the pipeline of the task.
_DEFAULT_STRENGTH = {"image-to-image": 0.8, "inpainting": 1.0}
_DEFAULT_IMAGE_SCALE = 1.5


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    def __init__(self, bundle: Bundle, components: Components) -> None:
        super().__init__(bundle, components)
        self.stages = (LatentDiffusion(bundle, components, DENOISER),)
        width = bundle.manifest.components[TEXT_ENCODER].outputs[0].shape[-1]
        assert isinstance(width, int), "the manifest was checked"
        self.embedding_width = width

    def task(self, request: Request) -> str:
        if request.start.mask is not None:
            return "inpainting"
        if request.start.image is None:
            return "text-to-image"
        return "edit" if "edit" in self.bundle.manifest.tasks else "image-to-image"

    def advice(self, task: str) -> str:
        tasks = self.bundle.manifest.tasks
        if task == "text-to-image":
            return f"give `image`{' and `mask_image`' if 'inpainting' in tasks else ''}"
        return super().advice(task)

    def load_inputs(self, request: Request) -> tuple[LoadedImage, LoadedImage | None] | None:
        start = request.start
        if start.image is None:
            for keyword, value in (("mask_image", start.mask), ("strength", start.strength)):
                if value is not None:
                    raise RequestError(f"`{keyword}`: got a value without `image`; give an image too")
        if start.padding_mask_crop is not None and start.mask is None:
            raise RequestError("`padding_mask_crop`: got a value without `mask_image`; give a mask too")
        if start.image is None:
            return None
        mask = None if start.mask is None else load_image(start.mask, "mask_image")
        return load_image(start.image, "image"), mask

    def size(self, request: Request, inputs: tuple[LoadedImage, LoadedImage | None] | None) -> Size:
        if inputs is None or inputs[1] is not None:
            return request.size  # inpainting takes the bundle's size, as diffusers does
        height, width = default_height_width(
            inputs[0], request.size.height, request.size.width, factor=self.latent_space.downscale
        )
        return Size(height=request.size.height or height, width=request.size.width or width)

    def prepare(
        self, request: Request, inputs: tuple[LoadedImage, LoadedImage | None] | None, height: int, width: int
    ) -> Inputs | None:
        if inputs is None:
            return None
        image, mask = inputs
        if mask is None:
            return Inputs(image=image, pixels=image_to_pixels(image, height, width, factor=self.latent_space.downscale))
        inpainting = prepare_inpainting(
            image,
            mask,
            height,
            width,
            factor=self.latent_space.downscale,
            padding_mask_crop=request.start.padding_mask_crop,
        )
        return Inputs(image=image, mask=mask, pixels=inpainting.pixels, inpainting=inpainting)

    def start(self, request: Request, shape: tuple[int, ...]) -> Start:
        task, strength = self.task(request), request.start.strength
        if task == "edit" and strength is not None:
            raise RequestError(
                f"`strength`: got {strength}, but this model edits images, it does not blend; leave it out"
            )
        if strength is None and task in _DEFAULT_STRENGTH:
            strength = _DEFAULT_STRENGTH[task]
        return replace(request.start, latents=check_latents(request.start, shape), strength=strength)

    def schedule(self, sampling: Sampling, start: Start) -> Schedule:
        sampler, count = sampling.sampler or self.scheduler.class_name, sampling.steps or 1
        samplers.check_suits(sampler, self.scheduler.class_name)
        begin = 0
        if start.strength is not None:
            # diffusers, `StableDiffusionImg2ImgPipeline.get_timesteps`
            begin = count - min(int(count * start.strength), count)
            if begin == count:
                raise RequestError(
                    f"`strength`: got {start.strength:g}, which leaves no step of {count}; raise it, or "
                    "`num_inference_steps`"
                )
        steps = samplers.Steps(count=count, begin=begin, eta=sampling.eta)
        return samplers.schedule(
            sampler, self.scheduler.config, steps, karras=sampling.karras, options=sampling.options
        )

    def check(self, request: ResolvedRequest) -> None:
        if request.guidance.image_scale is not None and request.task != "edit":
            raise RequestError(
                "`image_guidance_scale`: got a value, but only InstructPix2Pix models have it; leave it out"
            )
        if request.task == "edit" and request.acceleration.deep_cache > 1:
            raise RequestError("`deep_cache`: not supported with InstructPix2Pix models; leave it out")
        placement = self.components.placements.get(DENOISER)
        interval = request.acceleration.deep_cache
        if interval > 1 and placement is not None and not placement.reuses_features:
            raise RequestError(
                f"`deep_cache`: got {interval}, which needs the split denoiser, and {placement.title} runs it whole; "
                "use `device` cpu or openvino"
            )

    def files(self, request: ResolvedRequest) -> list[str]:
        needed = [TEXT_ENCODER, DENOISER, self._decoder(request)]
        if request.prepared is not None:
            needed.append(ENCODER)
        if request.policy != "off":
            needed.append(CLASSIFIER)
        tokenizer = self.bundle.manifest.tokenizers[TEXT_ENCODER]
        return [tokenizer.file, *self.bundle.files_of(needed)]

    def prefetch_first(self, request: ResolvedRequest) -> None:
        images = len(request.seeds)
        height, width = self.latent_space.shape(request.height, request.width)[1:]
        sizes = {
            "evaluations": images * len(_guidance(request).evaluations(0, len(request.schedule))),
            "height": height,
            "width": width,
            "tokens": self.bundle.manifest.tokenizers[TEXT_ENCODER].length,  # most prompts fill one chunk
            "timesteps": len({*request.schedule.t.tolist()}),
        }
        self.components.prefetch(DENOISER, sizes)

    def prefetch_last(self, request: ResolvedRequest) -> None:
        latents = self.latent_space.shape(request.height, request.width)[1:]
        self.components.prefetch(
            self._decoder(request), autoencoder.sizes((latents[0], latents[1]), self._largest_tile(request))
        )
        if request.policy != "off":
            sizes = {"images": len(request.seeds), "pixel_height": request.height, "pixel_width": request.width}
            self.components.prefetch(CLASSIFIER, sizes)

    def finish(self, request: ResolvedRequest, latents: Latents) -> Pixels:
        name = self._decoder(request)
        decoder = autoencoder.open_decoder(self.bundle, self.components, name)
        pixels = autoencoder.decode(
            decoder, latents, downscale=self.latent_space.downscale, largest_tile=self._largest_tile(request)
        )
        self.components.done_with(name)
        return pixels

    def input_records(self, request: ResolvedRequest) -> dict[str, InputRecord]:
        inputs: Inputs | None = request.prepared
        if inputs is None:
            return {}
        images = {"image": inputs.image} | ({} if inputs.mask is None else {"mask_image": inputs.mask})
        return {name: InputRecord(digest=each.digest, parameters=each.parameters) for name, each in images.items()}

    def compose(self, request: ResolvedRequest, pixels: Pixels) -> Pixels:
        inputs: Inputs | None = request.prepared
        if inputs is None or inputs.mask is None or inputs.inpainting is None or inputs.inpainting.region is None:
            return pixels
        images = [Image.fromarray(each) for each in pixels]
        region = inputs.inpainting.region
        return np.stack([np.asarray(apply_overlay(image, inputs.image, inputs.mask, region)) for image in images])

    def classifier(self) -> str | None:
        return CLASSIFIER if CLASSIFIER in self.bundle.manifest.components else None

    def _decoder(self, request: ResolvedRequest) -> str:
        return PREVIEW_DECODER if request.acceleration.decoder == "preview" else DECODER

    def _largest_tile(self, request: ResolvedRequest) -> int | None:
        """Return the side, in latents, that the model was trained for, where the image is to be decoded in tiles."""
        if request.acceleration.decoder != "tiled":
            return None
        defaults = self.bundle.manifest.defaults
        return min(defaults.height, defaults.width) // self.latent_space.downscale


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Input images of a request, prepared at its size.

    Attributes:
        pixels: float32 [1, 3, H, W] in −1 … 1.
        inpainting: mask and masked pixels, where there is a mask.
    """

    image: LoadedImage
    mask: LoadedImage | None = None
    pixels: Floats
    inpainting: InpaintingInputs | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Beginning:
    """Where one image begins: latents before the first row, extra channels, and what follows each row.

    Attributes:
        concat: float32 [C', H, W] by evaluation; `""` is for all others.
    """

    latents: Latents
    concat: Mapping[str, Floats] = field(default_factory=dict)
    after_row: Callable[[Sample], None] | None = None


class LatentDiffusion(Stage):
    """The denoiser with its text conditioning."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        record = self.bundle.manifest.tokenizers[TEXT_ENCODER]
        return Tokenizer.from_json(self.bundle.read(record.file), record)

    @property
    def _extra_channels(self) -> int:
        """Channels of the denoiser's input beside the latents."""
        (latents,) = (spec for spec in self.bundle.manifest.components[DENOISER].inputs if spec.source == "latents")
        channels = latents.shape[1]
        assert isinstance(channels, int), "the manifest was checked"
        return channels - self.latent_space.channels

    def begin(self, request: ResolvedRequest) -> list[Sample]:
        texts = self._encode_prompts(request)
        guidance = _guidance(request)
        begin_one = self._beginning(request)
        samples = []
        for image, (seed, text) in enumerate(zip(request.seeds, texts, strict=True)):
            generator = Generator(seed)
            shape = self.latent_space.shape(request.height, request.width)
            given = None if request.start.latents is None else request.start.latents[image]
            beginning = begin_one(generator, given)
            conditioning = {
                name: Conditioning(
                    {TEXT: text["positive" if name == "positive" else "negative"]},
                    beginning.concat.get(name, beginning.concat.get("")),
                )
                for name in guidance.all_evaluations()
            }
            samples.append(
                Sample(
                    request.schedule,
                    beginning.latents,
                    conditioning,
                    guidance,
                    functools.partial(generator.normal, shape),
                    deep_cache=request.acceleration.deep_cache,
                    after_row=beginning.after_row,
                )
            )
        return samples

    def _beginning(self, request: ResolvedRequest) -> Callable[[Generator, Latents | None], Beginning]:
        """Return what begins one image of a request, from its generator and the given noise."""
        shape, schedule = self.latent_space.shape(request.height, request.width), request.schedule

        def noise(generator: Generator, given: Latents | None) -> Latents:
            return generator.normal(shape) if given is None else given

        if request.task == "text-to-image":
            return lambda generator, given: Beginning(latents=schedule.first_latents(noise(generator, given)))
        inputs: Inputs = request.prepared
        encoder = self.components.session(ENCODER)
        image = autoencoder.encode(encoder, inputs.pixels)
        masked = None
        if inputs.inpainting is not None:
            masked = autoencoder.encode(encoder, inputs.inpainting.masked_pixels)
        self.components.done_with(ENCODER)
        scale = np.float32(self.latent_space.scale)

        def image_to_image(generator: Generator, given: Latents | None) -> Beginning:
            clean = image.sample(generator) * scale
            return Beginning(latents=schedule.first_latents(noise(generator, given), clean))

        def edit(generator: Generator, given: Latents | None) -> Beginning:
            """InstructPix2Pix (Brooks et al. 2023): the image's mode as extra channels, zeros without it."""
            first = schedule.first_latents(noise(generator, given))
            return Beginning(latents=first, concat={"": image.mean, "unconditional": np.zeros_like(image.mean)})

        def inpaint(generator: Generator, given: Latents | None) -> Beginning:
            """Inpainting, in the order in which diffusers draws: image, noise, masked image."""
            assert inputs.inpainting is not None and masked is not None  # noqa: PT018
            mask, blends, full = inputs.inpainting.latent_mask[0], not self._extra_channels, request.start.strength == 1
            clean = image.sample(generator) * scale if blends or not full else None
            standard = noise(generator, given)
            first = schedule.first_latents(standard, None if full else clean)
            kept = masked.sample(generator) * scale
            if not blends:
                return Beginning(latents=first, concat={"": np.concatenate([mask, kept])})
            assert clean is not None, "encoded, as the result is blended with it"
            return Beginning(latents=first, after_row=functools.partial(_blend, clean, standard, mask))

        return {"image-to-image": image_to_image, "edit": edit, "inpainting": inpaint}[request.task]

    def _encode_prompts(self, request: ResolvedRequest) -> list[dict[str, Floats]]:
        """Return the text embeddings of each image, [tokens, width], by evaluation.

        A prompt and its negative prompt have the same number of chunks: the shorter is filled up. Prompts of different
        numbers of chunks are not: filling up would change an image with the company it is in.
        """
        encoder = PromptEncoder(self._tokenizer, lambda: self.components.session(TEXT_ENCODER))
        count = len(request.seeds) // request.images_per_prompt
        sides = ["negative", "positive"] if request.guided else ["positive"]
        chunks = [max(_chunks(request, side, prompt, encoder) for side in sides) for prompt in range(count)]
        encoded: list[dict[str, Floats]] = [{} for _ in range(count)]
        for length in dict.fromkeys(chunks):
            prompts = [prompt for prompt in range(count) if chunks[prompt] == length]
            for side in reversed(sides):
                given, texts = _side(request, side)
                if given is not None:
                    embeddings = [given[prompt] for prompt in prompts]
                else:
                    assert texts is not None, "a resolved request has embeddings or texts"
                    skip = (request.prompt.clip_skip or 0) if side == "positive" else 0  # as diffusers does
                    embeddings = encoder.encode([texts[prompt] for prompt in prompts], length, skip)
                for prompt, each in zip(prompts, embeddings, strict=True):
                    encoded[prompt][side] = each
        for each in encoded:
            _check_lengths(each, request)
        self.components.done_with(TEXT_ENCODER)
        return [encoded[request.prompt_of(image)] for image in range(len(request.seeds))]


def _blend(clean: Latents, noise: Latents, mask: Floats, sample: Sample) -> None:
    """Keep the input image where the mask [1, H, W] is 0, at the noise level of the next row."""
    kept = clean if sample.done else sample.schedule.first_latents(noise, clean, row=sample.row)
    sample.latents = (1 - mask) * kept + mask * sample.latents


def _guidance(request: ResolvedRequest) -> Guidance:
    options = request.guidance
    if not request.guided:
        return Unguided()
    if request.task == "edit":
        image_scale = _DEFAULT_IMAGE_SCALE if options.image_scale is None else options.image_scale
        return ImageAndText(scale=request.guidance_scale, image_scale=image_scale)
    return ClassifierFree(scale=request.guidance_scale, rescale=options.rescale, start=options.start, end=options.end)


def _side(request: ResolvedRequest, side: str) -> tuple[Floats | None, tuple[str, ...] | None]:
    if side == "positive":
        return request.prompt.embeds, request.prompts
    return request.prompt.negative_embeds, request.negative_prompts


def _chunks(request: ResolvedRequest, side: str, prompt: int, encoder: PromptEncoder) -> int:
    given, texts = _side(request, side)
    if given is not None:
        tokens: int = given.shape[1]
        return math.ceil(tokens / encoder.chunk_tokens)
    assert texts is not None, "a resolved request has embeddings or texts"
    return encoder.chunks(texts[prompt])


def _check_lengths(encoded: dict[str, Floats], request: ResolvedRequest) -> None:
    positive, negative = encoded["positive"], encoded.get("negative", encoded["positive"])
    if positive.shape == negative.shape:
        return
    if request.prompt.negative_embeds is None:
        raise RequestError(
            f"`prompt_embeds`: got {positive.shape[0]} tokens, and the negative prompt has {negative.shape[0]}; "
            "expected as many, or `negative_prompt_embeds` of the same shape"
        )
    raise RequestError(
        f"`negative_prompt_embeds`: got {negative.shape[0]} tokens, expected {positive.shape[0]} as in the prompt"
    )
