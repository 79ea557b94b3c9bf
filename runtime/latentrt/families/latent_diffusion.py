"""Latent diffusion with a UNet and CLIP (Rombach et al. 2022): what the families of Stable Diffusion share beside
their tasks: the stage with its text encoders, the decoder and the classifier.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.tensors import TensorSpec, sized
from latentrt.decode import autoencoder
from latentrt.errors import BundleError, RequestError
from latentrt.families.family import Family, Pixels, Stage
from latentrt.families.tasks import ENCODER, TEXT, Floats, Inputs, Origin, Side, Task
from latentrt.images.inputs import LoadedLatents, is_latents, load_image, load_latents
from latentrt.images.metadata import InputRecord
from latentrt.request import Size, Whole
from latentrt.resolve import MAX_REQUEST_BYTES, check_latents
from latentrt.sampling import samplers
from latentrt.sampling.denoiser import Conditioning
from latentrt.sampling.loop import Sample
from latentrt.sampling.noise import Generator
from latentrt.text.clip import EncodedText, PromptEncoder, join
from latentrt.text.tokenizer import Tokenizer, open_tokenizer
from latentrt.timings import measured

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle
    from latentrt.bundle.manifest import Role
    from latentrt.request import Request, Sampling, Start
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.schedule import Latents, Schedule

__all__ = ["DENOISER", "LatentDiffusion", "LatentDiffusionStage", "find_width"]

DENOISER, CLASSIFIER = "unet", "safety_checker"
DECODER, PREVIEW_DECODER = "vae_decoder", "preview_decoder"


class LatentDiffusion(Family):
    """The base class of the families.

    Attributes:
        task_classes: of the family; of those that fit a request's inputs, the first that the bundle supports is its
            task.
    """

    task_classes: ClassVar[tuple[type[Task], ...]]

    def __init__(self, bundle: Bundle, components: Components) -> None:
        super().__init__(bundle, components)
        _check_roles(bundle)
        self._stage = LatentDiffusionStage(bundle, components, DENOISER)
        self.stages = (self._stage,)
        self._tasks = {cls.name: cls(self._stage) for cls in self.task_classes}
        self._stage.tasks = self._tasks
        self.embedding_width = find_width(bundle, TEXT, 3)

    def task(self, request: Request) -> str:
        given = request.start.image is not None, request.start.mask is not None
        fitting = [name for name, task in self._tasks.items() if (task.takes_image, task.takes_mask) == given]
        able = [name for name in fitting if name in self.bundle.manifest.tasks]
        if not fitting:
            raise RequestError("`mask_image`: got a mask without `image`; give an image too")
        return (able or fitting)[0]

    def advice(self, task: str) -> str:
        return self._tasks[task].advice

    def needs_prompt(self, request: Request) -> bool:
        return self._tasks[self.task(request)].needs_prompt

    def load_inputs(self, request: Request) -> Inputs | None:
        start = request.start
        if start.padding_mask_crop is not None and start.mask is None:
            raise RequestError("`padding_mask_crop`: got a value without `mask_image`; give a mask too")
        if start.image is None:
            return None
        mask = None if start.mask is None else load_image(start.mask, "mask_image")
        if is_latents(start.image) and self._tasks[self.task(request)].takes_latents:
            return Inputs(source=load_latents(start.image, self.latent_space.channels), mask=mask)
        return Inputs(source=load_image(start.image, "image"), mask=mask)

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        return self._tasks[self.task(request)].size(request, inputs)

    def prepare(self, request: Request, inputs: Inputs | None, height: int, width: int) -> Inputs | None:
        return self._tasks[self.task(request)].prepare(request, inputs, height, width)

    def start(self, request: Request, shape: tuple[int, ...]) -> Start:
        task, strength = self._tasks[self.task(request)], request.start.strength
        if strength is not None and task.default_strength is None:
            with_image = "" if task.takes_image else " without `image`"
            raise RequestError(
                f"`strength`: got {strength:g}{with_image}, which {task.name} does not take; leave it out"
            )
        if request.sampling.denoising_start is not None:
            if strength is not None:
                raise RequestError("got both `strength` and `denoising_start`, expected one of them")
        elif strength is None:
            strength = task.default_strength
        image, images = request.start.image, shape[0]
        if is_latents(image) and len(image) not in (1, images):
            raise RequestError(
                f"`image`: got latents of {len(image)} images, expected 1, or {images} as in the request"
            )
        if request.start.depth_map is not None and not task.takes_depth_map:
            raise RequestError(f"`depth_map`: {task.name} does not take a depth map; leave it out")
        latents, noise_level = check_latents(request.start, shape), self._noise_level(task, request.start.noise_level)
        return replace(request.start, latents=latents, strength=strength, noise_level=noise_level)

    def _noise_level(self, task: Task, given: int | None) -> int | None:
        if given is None:
            return task.default_noise_level
        if task.default_noise_level is None:
            raise RequestError(f"`noise_level`: got {given}, which {task.name} does not take; leave it out")
        return Whole(0, self.bundle.manifest.limits.max_noise_level)("noise_level", given)

    def schedule(self, task: str, sampling: Sampling, start: Start) -> Schedule:
        if sampling.schedule is None:
            schedule = self._sampler_schedule(task, sampling, start)
        elif start.strength in (None, 1):
            schedule = sampling.schedule
        else:
            raise RequestError(
                f"`strength`: got {start.strength:g} with `schedule`, all of whose rows are run; shorten the table "
                "instead, and set `strength` to 1"
            )
        sources = {spec.source for spec in self.bundle.manifest.components[DENOISER].inputs}
        return schedule.with_c_noise() if "c-noise" in sources else schedule

    def _sampler_schedule(self, task: str, sampling: Sampling, start: Start) -> Schedule:
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
        config = self.scheduler.config_for(task, samplers.find(sampler).class_name)

        def make(begin: int) -> Schedule:
            steps = samplers.Steps(count=count, begin=begin, eta=sampling.eta)
            return samplers.schedule(sampler, config, steps, karras=sampling.karras, options=sampling.options)

        if sampling.denoising_start is None and sampling.denoising_end is None:
            return make(begin)
        timesteps = {**config, **(sampling.options or {})}.get("num_train_timesteps", _TRAINING_TIMESTEPS)
        return _select_noise_levels(make, begin, count, timesteps, sampling)

    def check(self, request: ResolvedRequest) -> None:
        self._tasks[request.task].check(request)
        if request.guidance_distilled:
            _check_distilled(request)
        placement = self.components.placements.get(DENOISER)
        interval = request.acceleration.deep_cache
        if interval > 1 and placement is not None and not placement.reuses_features:
            raise RequestError(
                f"`deep_cache`: got {interval}, which needs the split denoiser, and {placement.title} runs it whole; "
                "use `device` cpu or openvino"
            )

    def check_prompts(self, request: ResolvedRequest) -> None:
        if self._tasks[request.task].takes_prompt:
            self._stage.count_chunks(request)

    def files(self, request: ResolvedRequest) -> list[str]:
        needed = [*self._tasks[request.task].components(), DENOISER, self._decoder(request)]
        if request.policy != "off":
            needed.append(CLASSIFIER)
        tokenizers = [record.file for name, record in self.bundle.manifest.tokenizers.items() if name in needed]
        return [*tokenizers, *self.bundle.files_of(needed)]

    def batch_sizes(self, request: ResolvedRequest) -> tuple[int, ...] | None:
        placement = self.components.placements[DENOISER]
        if placement.backend not in ("tensorrt", "tensorrt_rtx"):
            return None
        session, sizes = self.components.session(DENOISER), self._denoiser_sizes(request)
        ready = session.batch_sizes({spec.name: sized(spec, sizes) for spec in session.inputs})
        evaluations = sizes["evaluations"] // len(request.seeds)
        return None if ready is None else tuple(sorted({size // evaluations for size in ready} - {0}))

    def prefetch_first(self, request: ResolvedRequest) -> None:
        self.components.prefetch(DENOISER, self._denoiser_sizes(request))

    def _denoiser_sizes(self, request: ResolvedRequest) -> dict[str, int]:
        """Return the sizes of the denoiser's named axes for a request."""
        height, width = self.latent_space.shape(request.height, request.width)[1:]
        tokenizer = next((self.bundle.manifest.tokenizers[name] for name in self._stage.text_encoders), None)
        return {
            "evaluations": len(request.seeds)
            * len(self._tasks[request.task].guidance(request).evaluations(0, len(request.schedule))),
            "height": height,
            "width": width,
            "tokens": 1 if tokenizer is None else tokenizer.length,  # most prompts fill one chunk
            "timesteps": len({*request.schedule.t.tolist()}),
        }

    def prefetch_last(self, request: ResolvedRequest) -> None:
        latents = self.latent_space.shape(request.height, request.width)[1:]
        decoder = self._decoder(request)
        self.components.prefetch(decoder, autoencoder.sizes((latents[0], latents[1]), self._largest_tile(request)))
        if request.policy != "off":
            sizes = {"images": len(request.seeds), "pixel_height": request.height, "pixel_width": request.width}
            self.components.prefetch(CLASSIFIER, sizes)

    def finish(self, request: ResolvedRequest, latents: Latents) -> Pixels:
        name = self._decoder(request)
        decoder = autoencoder.open_decoder(self.bundle, self.components, name)
        further = [spec for spec in self.bundle.manifest.components[name].inputs if spec.source != "latents"]
        images = self._tasks[request.task].decoder_images(request) if further else {}
        pixels = autoencoder.decode(
            decoder,
            latents,
            downscale=self.latent_space.downscale,
            largest_tile=self._largest_tile(request),
            images={spec.name: images[spec.source] for spec in further},
        )
        self.components.done_with(name)
        return pixels

    def input_records(self, request: ResolvedRequest, index: int) -> dict[str, InputRecord]:
        inputs: Inputs | None = request.prepared
        if inputs is None:
            return {}
        records = {}
        for name, each in (("image", inputs.source), ("mask_image", inputs.mask)):
            if isinstance(each, LoadedLatents):
                records[name] = InputRecord(digest=each.digests[index % len(each.digests)])
            elif each is not None:
                records[name] = InputRecord(digest=each.digest, parameters=each.parameters)
        return records

    def compose(self, request: ResolvedRequest, pixels: Pixels) -> Pixels:
        return self._tasks[request.task].compose(request, pixels)

    def classifier(self) -> str | None:
        return CLASSIFIER if CLASSIFIER in self.bundle.manifest.components else None

    def _decoder(self, request: ResolvedRequest) -> str:
        return PREVIEW_DECODER if request.acceleration.decoder == "preview" else DECODER

    def _largest_tile(self, request: ResolvedRequest) -> int | None:
        """Return the side that the model was trained for, in latents, if the request wants tiles; else None."""
        if request.acceleration.decoder != "tiled":
            return None
        defaults = self.bundle.manifest.defaults
        return min(defaults.height, defaults.width) // self.latent_space.downscale


_TRAINING_TIMESTEPS = 1000  # the default of diffusers' schedulers


def _select_noise_levels(
    make: Callable[[int], Schedule], begin: int, count: int, training_timesteps: int, sampling: Sampling
) -> Schedule:
    """Return the rows of a schedule between `denoising_start` and `denoising_end`.

    Source: diffusers, `StableDiffusionXLImg2ImgPipeline.get_timesteps` and `__call__`, "Apply denoising_end".

    Args:
        make: builds the table from a step on.
        begin: the step that the strength leaves to begin at.
        count: of all steps.
        training_timesteps: of the scheduler.

    Raises:
        RequestError: no row is left, or the sampler cannot begin at the first one.
    """

    def cutoff(share: float) -> int:
        return round(training_timesteps - share * training_timesteps)

    start, end = sampling.denoising_start, sampling.denoising_end
    if start is not None and end is not None and start >= end:
        raise RequestError(f"`denoising_start`: got {start:g}, expected less than `denoising_end` {end:g}")
    if start is not None:
        whole = make(0)
        left = int(np.count_nonzero(whole.t < cutoff(start)))
        two_stages = count > 1 and len(whole) - len(make(1)) == 2
        if two_stages and left % 2 == 0:
            left += 1  # the second row of a step is not run without its first
        if left == 0:
            raise _no_step("denoising_start", start, count)
        begin = (len(whole) - left) // (2 if two_stages else 1)
        if begin >= count or not np.array_equal(make(begin).t, whole.t[-left:]):
            raise RequestError(
                f"`denoising_start`: got {start:g} with a `sampler` that needs earlier steps to begin there; choose "
                "another, or set PNDM's option skip_prk_steps"
            )
    schedule = make(begin)
    if end is not None:
        rows = int(np.count_nonzero(schedule.t >= cutoff(end)))
        if rows == 0:
            raise _no_step("denoising_end", end, count)
        schedule = schedule.ending_at(rows)
    return schedule


def _no_step(keyword: str, share: float, count: int) -> RequestError:
    change = "lower" if keyword == "denoising_start" else "raise"
    return RequestError(
        f"`{keyword}`: got {share:g}, which leaves no step of {count}; {change} it, or raise `num_inference_steps`"
    )


def _check_roles(bundle: Bundle) -> None:
    """Require the two components that every task needs.

    Raises:
        BundleError: one is missing, or has another role.
    """
    roles: dict[str, Role] = {DENOISER: "denoiser", DECODER: "decoder"}
    for name, role in roles.items():
        if name not in bundle.manifest.by_role(role):
            raise BundleError(
                f"{bundle.folder}: got the components {', '.join(bundle.manifest.components)}, expected {name} with "
                f"the role {role}; export the bundle again"
            )


def find_width(bundle: Bundle, name: str, axes: int) -> int:
    """Return the size of the last axis of an input of the denoiser.

    Raises:
        BundleError: the denoiser has no such input.
    """
    for spec in bundle.manifest.components[DENOISER].inputs:
        if spec.name == name and len(spec.shape) == axes and isinstance(width := spec.shape[-1], int):
            return width
    raise BundleError(
        f"{bundle.folder}: {DENOISER} has no input {name}, expected one of {axes} axes, the last a number; export the "
        "bundle again"
    )


def _check_distilled(request: ResolvedRequest) -> None:
    """Reject options of guidance by two evaluations, which a distilled denoiser does not need.

    A negative prompt is ignored, as in diffusers.

    Raises:
        RequestError: such an option is set.
    """
    guidance = request.guidance
    for keyword, changed in (
        ("guidance_rescale", guidance.rescale != 0),
        ("guidance_start", guidance.start != 0),
        ("guidance_end", guidance.end != 1),
    ):
        if changed:
            raise RequestError(f"`{keyword}`: a model with distilled guidance does not support it; leave it out")


class LatentDiffusionStage(Stage):
    """The denoiser with its text conditioning.

    Attributes:
        text_encoders: components whose embeddings of a prompt the denoiser takes, joined in this order; none for a
            denoiser that takes an image embedding.
    """

    tasks: Mapping[str, Task]

    def __init__(self, bundle: Bundle, components: Components, name: str) -> None:
        super().__init__(bundle, components, name)
        encoders = bundle.manifest.by_role("text-encoder")
        made_by = (maker for spec in bundle.manifest.components[name].inputs for maker, _ in spec.made_by)
        self.text_encoders = tuple(maker for maker in dict.fromkeys(made_by) if maker in encoders)

    @functools.cached_property
    def _tokenizers(self) -> tuple[Tokenizer, ...]:
        return tuple(open_tokenizer(self.bundle, name) for name in self.text_encoders)

    @functools.cached_property
    def extra_channels(self) -> int:
        """Number of channels of the denoiser's input after the latents' own."""
        (latents,) = (spec for spec in self.bundle.manifest.components[DENOISER].inputs if spec.source == "latents")
        channels = latents.shape[1]
        assert isinstance(channels, int), "the manifest was checked"
        return channels - self.latent_space.channels

    def begin(self, request: ResolvedRequest) -> list[Sample]:
        task = self.tasks[request.task]
        conditionings, guidance = task.conditioning(request), task.guidance(request)
        begin_one = task.begin(request)
        self.components.done_with(ENCODER)
        weights = self._guidance_weights(request)
        samples = []
        for image, (seed, conditioning) in enumerate(zip(request.seeds, conditionings, strict=True)):
            generator = Generator(seed)
            noise = None if request.start.latents is None else request.start.latents[image]
            beginning = begin_one(Origin(index=image, generator=generator, noise=noise))
            samples.append(
                Sample(
                    request.schedule,
                    beginning.latents,
                    {
                        name: Conditioning(
                            {**inputs, **weights, **beginning.inputs.get(name, {})},
                            beginning.concat.get(name, beginning.concat.get("")),
                        )
                        for name, inputs in conditioning.items()
                    },
                    guidance,
                    functools.partial(generator.normal, beginning.latents.shape),
                    deep_cache=request.acceleration.deep_cache,
                    after_row=beginning.after_row,
                )
            )
        return samples

    def _guidance_weights(self, request: ResolvedRequest) -> dict[str, NDArray[np.float32]]:
        """Return w = guidance scale − 1 by the name of the denoiser's input, where it has one."""
        spec = self.bundle.manifest.components[DENOISER].input_from("guidance-weight")
        # Subtracted in double precision, as in diffusers: the denoiser takes the sines of 1000 · w.
        return {} if spec is None else {spec.name: np.array(request.guidance_scale - 1, np.float32)}

    def noise(self, request: ResolvedRequest, origin: Origin) -> Latents:
        """Return the standard normal noise that an image starts from: the caller's, or sampled from its seed."""
        if origin.noise is not None:
            return origin.noise
        return origin.generator.normal(self.latent_space.shape(request.height, request.width))

    def size_of(self, latents: LoadedLatents, given: Size) -> Size:
        """Return the size of the image of latents.

        Raises:
            RequestError: another one was given.
        """
        height, width = (side * self.latent_space.downscale for side in latents.values.shape[2:])
        for keyword, side, own in (("height", given.height, height), ("width", given.width, width)):
            if side not in (None, own):
                raise RequestError(f"`{keyword}`: got {side}, expected {own}, that of the latents; leave it out")
        return Size(height=height, width=width)

    def image_latents(self, inputs: Inputs) -> Callable[[Origin], Latents]:
        """Return a function that samples the latents of the input image, in the sampling loop's scale."""
        if isinstance(inputs.source, LoadedLatents):
            given = inputs.source.values
            return lambda origin: given[origin.index % len(given)]
        assert inputs.pixels is not None, "prepared"
        image = self.encode(inputs.pixels)
        return lambda origin: self.latent_space.normalize(image.sample(origin.generator))

    @measured("image_encoding")
    def encode(self, pixels: Floats) -> autoencoder.LatentDistribution:
        """Encode pixels, float32 [1, 3, H, W] in −1 … 1."""
        return autoencoder.encode(self.components.session(ENCODER), pixels)

    @measured("text_encoding")
    def count_chunks(self, request: ResolvedRequest) -> tuple[tuple[PromptEncoder, ...], list[int]]:
        """Return the encoders of a request's prompts, which have tokenised them, and the number of chunks of each.

        Raises:
            RequestError: a prompt has too many tokens, or all together need too much memory.
        """
        most = self.bundle.manifest.limits.max_prompt_chunks
        encoders = tuple(
            PromptEncoder(tokenizer, functools.partial(self.components.session, name), most)
            for name, tokenizer in zip(self.text_encoders, self._tokenizers, strict=True)
        )
        prompts = range(len(request.seeds) // request.images_per_prompt)
        counts = ([_count_chunks(request, side, each, encoders, most) for side in _sides(request)] for each in prompts)
        chunks = list(map(max, counts))
        self._check_memory(request, sum(chunks) * encoders[0].chunk_tokens)
        return encoders, chunks

    def _check_memory(self, request: ResolvedRequest, tokens: int) -> None:
        """Reject prompts whose embeddings, with keys and values of cross-attention, would not fit into
        `MAX_REQUEST_BYTES`.

        Keys and values are kept for each evaluation, and once more as a batch.

        Raises:
            RequestError: they would not; the message has the size that they need.
        """
        record, placement = self.bundle.manifest.components[self.name], self.components.placements.get(self.name)
        arrays: list[TensorSpec] = [spec for spec in record.inputs if spec.name == TEXT]
        if placement is not None and placement.split:
            arrays += 2 * [spec for spec in record.parts["cross_attention_kv"].outputs if "tokens" in spec.shape]
        token_bytes = sum(4 * math.prod(side for side in spec.shape if isinstance(side, int)) for spec in arrays)
        evaluations = len(self.tasks[request.task].guidance(request).all_evaluations())
        needed = evaluations * request.images_per_prompt * tokens * token_bytes
        if needed > MAX_REQUEST_BYTES:
            raise RequestError(
                f"got prompts of {tokens:,} tokens for {request.images_per_prompt} images each, whose embeddings need "
                f"{needed / 2**30:.1f} GiB, expected {MAX_REQUEST_BYTES / 2**30:g} GiB at most; shorten them, or ask "
                "for fewer images at once"
            )

    @measured("text_encoding")
    def encode_prompts(self, request: ResolvedRequest) -> list[dict[Side, EncodedText]]:
        """Return the text embeddings of each image as `positive` and, with guidance, `negative`.

        A prompt and its negative prompt are padded to the same number of chunks. Different prompts are not, as padding
        would make an image depend on the other prompts of its batch.

        Raises:
            RequestError: a prompt has too many tokens, or given embeddings another number than the other prompt.
        """
        encoders, chunks = self.count_chunks(request)
        sides = _sides(request)
        parts: list[dict[Side, list[EncodedText]]] = [{side: [] for side in sides} for _ in chunks]
        for place, (name, encoder) in enumerate(zip(self.text_encoders, encoders, strict=True)):
            for length in dict.fromkeys(chunks):
                prompts = [prompt for prompt, count in enumerate(chunks) if count == length]
                for side in reversed(sides):
                    texts = _select_texts(request, side, place)
                    if texts is None:
                        continue
                    skip = (request.prompt.clip_skip or 0) if side == "positive" else 0  # as diffusers does
                    found = encoder.encode([texts[prompt] for prompt in prompts], length, skip)
                    for prompt, each in zip(prompts, found, strict=True):
                        parts[prompt][side].append(each)
            self.components.done_with(name)
        encoded = [_complete(request, prompt, by_side) for prompt, by_side in enumerate(parts)]
        for completed in encoded:
            _check_lengths(completed, request)
        return [encoded[request.prompt_of(image)] for image in range(len(request.seeds))]


def _sides(request: ResolvedRequest) -> list[Side]:
    return ["negative", "positive"] if request.guided else ["positive"]


def _select_texts(request: ResolvedRequest, side: Side, encoder: int) -> tuple[str, ...] | None:
    """Return the texts of the `positive` or `negative` prompts for an encoder; None where there are none."""
    if side == "positive":
        texts, second = request.prompts, request.prompts_2
    else:
        texts, second = request.negative_prompts, request.negative_prompts_2
    return second if encoder == 1 and second is not None else texts


def _select_embeddings(request: ResolvedRequest, side: Side) -> tuple[Floats | None, Floats | None]:
    """Return the given embeddings of the `positive` or `negative` prompts, and the pooled ones."""
    prompt = request.prompt
    if side == "positive":
        return prompt.embeds, prompt.pooled_embeds
    return prompt.negative_embeds, prompt.negative_pooled_embeds


def _complete(
    request: ResolvedRequest, prompt: int, by_side: Mapping[Side, Sequence[EncodedText]]
) -> dict[Side, EncodedText]:
    """Return the embeddings of a prompt and its negative prompt: of all encoders together, given ones, or zeros."""
    complete: dict[Side, EncodedText] = {}
    for side in sorted(by_side, reverse=True):  # the positive one first, as zeros have its shape
        given, pooled = _select_embeddings(request, side)
        if given is not None:
            text = EncodedText(given[prompt])
        elif by_side[side]:
            text = join(by_side[side])
        else:
            like = complete["positive"]
            text = EncodedText(
                np.zeros_like(like.embeddings), None if like.pooled is None else np.zeros_like(like.pooled)
            )
        complete[side] = text if pooled is None else text._replace(pooled=pooled[prompt])
    return complete


def _count_chunks(
    request: ResolvedRequest, side: Side, prompt: int, encoders: Sequence[PromptEncoder], most: int
) -> int:
    """Return the number of chunks of a prompt or its negative prompt: the most of any encoder; 0 of zeros.

    Raises:
        RequestError: there are more than `most`; the message names the argument.
    """
    keyword = "prompt" if side == "positive" else "negative_prompt"
    given, _ = _select_embeddings(request, side)
    if given is not None:
        tokens: int = given.shape[1]
        length = encoders[0].chunk_tokens
        if tokens > most * length:
            raise RequestError(f"`{keyword}_embeds`: got {tokens:,} tokens, expected at most {most * length:,}")
        return math.ceil(tokens / length)
    counts = [0]
    for place, encoder in enumerate(encoders):
        texts = _select_texts(request, side, place)
        own = texts is not _select_texts(request, side, 0)
        try:
            counts += [] if texts is None else [encoder.chunks(texts[prompt])]
        except RequestError as error:
            raise RequestError(f"`{keyword}_2`: {error}" if own else f"`{keyword}`: {error}") from None
    return max(counts)


def _check_lengths(encoded: Mapping[Side, EncodedText], request: ResolvedRequest) -> None:
    positive, negative = encoded["positive"].embeddings, encoded.get("negative", encoded["positive"]).embeddings
    if positive.shape == negative.shape:
        return
    if request.prompt.negative_embeds is None:
        raise RequestError(
            f"`prompt_embeds`: got {positive.shape[0]} tokens, expected {negative.shape[0]} as in the negative prompt, "
            "or `negative_prompt_embeds` of the same shape"
        )
    raise RequestError(
        f"`negative_prompt_embeds`: got {negative.shape[0]} tokens, expected {positive.shape[0]} as in the prompt"
    )
