"""Resolves a request: decides everything that it leaves open, and refuses what a bundle cannot do."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.printable import counted, quote
from latentrt.decode import safety
from latentrt.errors import RequestError
from latentrt.request import (
    OPTIONS,
    RANDOM_SEED,
    Acceleration,
    GuidanceOptions,
    Prompt,
    Request,
    Sampling,
    Size,
    Start,
    Whole,
    declared_options,
    flat_values,
)
from latentrt.sampling import samplers

if TYPE_CHECKING:
    from latentrt.bundle.manifest import LatentSpace, Limits, Manifest
    from latentrt.families import Family
    from latentrt.sampling.schedule import Schedule

__all__ = [
    "CUSTOM_SAMPLER",
    "MAX_REQUEST_BYTES",
    "MAX_SEED",
    "ResolvedRequest",
    "require_preview_decoder",
    "resolve",
]

MAX_SEED = 2**63 - 1
MAX_REQUEST_BYTES = 4 << 30
"""Largest memory that a request's own arrays may need; graphs and weights are not counted."""
CUSTOM_SAMPLER = "custom"
"""The name of the sampler where a request has a table of its own (`schedule`)."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ResolvedRequest(Request):
    """A request that a bundle can fulfil: every option is decided.

    Attributes:
        task: one of the bundle's, such as `text-to-image`.
        prompts: one text for each prompt; None where embeddings are given.
        negative_prompts: likewise; None too where there is none and zeros stand for its embeddings.
        prompts_2, negative_prompts_2: those of the second text encoder; None where they are the same.
        seeds: one for each image.
        schedule: the table of coefficients, built once.
        prepared: the family's preparation of the input image (`latentrt.families`).
        guidance_distilled: whether the guidance scale is an input of the denoiser.
    """

    task: str
    prompts: tuple[str, ...] | None
    negative_prompts: tuple[str, ...] | None
    seeds: tuple[int, ...]
    schedule: Schedule
    policy: safety.Policy
    prompts_2: tuple[str, ...] | None = None
    negative_prompts_2: tuple[str, ...] | None = None
    prepared: Any = None
    guidance_distilled: bool = False

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, seeds={quote(self.seeds)}, task={self.task!r})"

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is evaluated too, which diffusers calls `do_classifier_free_guidance`."""
        return self.guidance_scale > 1 and not self.guidance_distilled

    @property
    def height(self) -> int:
        """The height of the image in pixels."""
        return _decided(self.size.height)

    @property
    def width(self) -> int:
        """The width of the image in pixels."""
        return _decided(self.size.width)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return _decided(self.sampling.steps)

    @property
    def sampler(self) -> str:
        """Name of the sampler, as the caller spelled it."""
        return _decided(self.sampling.sampler)

    @property
    def guidance_scale(self) -> float:
        """The scale of classifier-free guidance; up to 1 there is none."""
        return _decided(self.guidance.scale)

    def prompt_of(self, image: int) -> int:
        """Return the index of an image's prompt."""
        return image // self.images_per_prompt


def _decided(value: T | None) -> T:
    assert value is not None, "a resolved request has every option decided"
    return value


def resolve(request: Request, manifest: Manifest, family: Family) -> ResolvedRequest:
    """Decide everything that a request leaves open.

    Raises:
        RequestError: an option has an impossible value, or the bundle cannot do it.
    """
    request = _check_values(request)
    _check_taken(request, family)
    task = family.task(request)
    if task not in manifest.tasks:
        raise RequestError(f"this bundle cannot do {task}, it does {', '.join(manifest.tasks)}; {family.advice(task)}")
    prompts, count = _prompts(request, manifest.limits, family)
    images_per_prompt = Whole(1, manifest.limits.max_batch)("num_images_per_prompt", request.images_per_prompt)
    images = count * images_per_prompt
    if images > manifest.limits.max_batch:
        raise RequestError(f"got {images} images in one request, this bundle's limit is {manifest.limits.max_batch}")
    inputs = family.load_inputs(request)
    size = family.size(request, inputs)
    height = _side("height", size.height, manifest.defaults.height, manifest.side_multiple, manifest.limits)
    width = _side("width", size.width, manifest.defaults.width, manifest.side_multiple, manifest.limits)
    _check_memory(images, height, width, family.latent_space)
    start = family.start(request, (images, *family.latent_space.shape(height, width)))
    sampling = _sampling(request, manifest, family)
    negatives = _negative_prompts(request, count, manifest)
    decided = ResolvedRequest(
        task=task,
        prompt=_prompt(request, count, manifest, family),
        prompts=prompts,
        negative_prompts=negatives,
        prompts_2=_second_prompts("prompt_2", request.prompt.text_2, prompts, manifest.limits),
        negative_prompts_2=_second_prompts("negative_prompt_2", request.prompt.negative_2, negatives, manifest.limits),
        size=Size(height=height, width=width),
        micro_conditioning=request.micro_conditioning,
        sampling=sampling,
        guidance=_guidance(request.guidance, manifest),
        start=start,
        acceleration=_acceleration(request.acceleration, manifest, family),
        images_per_prompt=images_per_prompt,
        seed=None,
        seeds=_seeds(request.seed, images),
        policy=safety.check_policy(manifest.safety if request.safety is None else request.safety),
        schedule=family.schedule(task, sampling, start),
        prepared=family.prepare(request, inputs, height, width),
        guidance_distilled=manifest.components[family.denoiser].input_from("guidance-weight") is not None,
    )
    family.check(decided)
    return decided


def _check_memory(images: int, height: int, width: int, space: LatentSpace) -> None:
    """Reject a request whose arrays would not fit into `MAX_REQUEST_BYTES`, before the first is made.

    Counted are the pixels of every image and their copy (uint8), one image as it is decoded (float32, four arrays), and
    ten arrays of latents (float32: the noise, the sampler's history, both evaluations).

    Raises:
        RequestError: it does not fit; the message has the size that it needs.
    """
    pixels, latents = height * width * 3, math.prod(space.shape(height, width))
    needed = images * pixels * 2 + pixels * 4 * 4 + images * latents * 4 * 10
    if needed > MAX_REQUEST_BYTES:
        raise RequestError(
            f"got {images} images of {width} × {height} pixels, which need {needed / 2**30:.1f} GiB, expected "
            f"{MAX_REQUEST_BYTES / 2**30:g} GiB at most; lower `height` and `width`, or ask for fewer images at once"
        )


def _check_values(request: Request) -> Request:
    """Return the request with plain Python values, each checked by its option."""
    values = flat_values(request)
    for keyword, value in values.items():
        if value is not None:
            values[keyword] = OPTIONS[keyword].check(keyword, value)
        elif OPTIONS[keyword].default is not None:
            values[keyword] = OPTIONS[keyword].check(keyword, value)  # raises: None is not one of its values
    return Request.of(**values)


def _check_taken(request: Request, family: Family) -> None:
    """Reject options that only other models take.

    Raises:
        RequestError: one is set; the message names it.
    """
    for keyword, value in flat_values(request).items():
        only = OPTIONS[keyword].only
        if only and value is not None and keyword not in family.options:
            raise RequestError(f"`{keyword}`: only {only} take it, and this bundle has no such model; leave it out")


def _prompts(request: Request, limits: Limits, family: Family) -> tuple[tuple[str, ...] | None, int]:
    prompt = request.prompt
    if prompt.text is None and prompt.embeds is None and not family.needs_prompt(request):
        return ("",), 1
    if prompt.text is None and prompt.embeds is None:
        raise RequestError("`prompt`: got none, expected a text or its embeddings")
    if prompt.text is not None and prompt.embeds is not None:
        raise RequestError("got both `prompt` and `prompt_embeds`, expected one of them")
    if prompt.text is None:
        # Anything but an array of embeddings is refused with its shape, as one prompt's.
        return None, max(len(prompt.embeds), 1) if np.ndim(prompt.embeds) == 3 else 1  # type: ignore[arg-type]
    prompts = _texts("prompt", prompt.text, limits)
    return prompts, len(prompts)


def _negative_prompts(request: Request, count: int, manifest: Manifest) -> tuple[str, ...] | None:
    prompt = request.prompt
    if prompt.negative_embeds is not None:
        if prompt.negative is not None:
            raise RequestError("got both `negative_prompt` and `negative_prompt_embeds`, expected at most one of them")
        return None
    if prompt.negative is None and manifest.defaults.force_zeros_for_empty_prompt:
        for keyword, given in (
            ("negative_prompt_2", prompt.negative_2),
            ("negative_pooled_prompt_embeds", prompt.negative_pooled_embeds),
        ):
            if given is not None:
                raise RequestError(
                    f"`{keyword}`: got a value without `negative_prompt`, for which this model takes zeros; give "
                    "`negative_prompt` too, which may be empty"
                )
        return None
    return _spread("negative_prompt", "" if prompt.negative is None else prompt.negative, count, manifest.limits)


def _second_prompts(
    keyword: str, value: object, first: tuple[str, ...] | None, limits: Limits
) -> tuple[str, ...] | None:
    """Return the texts of the second text encoder. A text that is empty, and no list, stands for the first one's."""
    if value is None or (isinstance(value, str) and not value):
        return None
    if first is None:
        other = keyword.removesuffix("_2")
        raise RequestError(f"got both `{keyword}` and `{other}_embeds`, expected at most one of them")
    return _spread(keyword, value, len(first), limits)


def _spread(keyword: str, value: object, count: int, limits: Limits) -> tuple[str, ...]:
    """Return one text for each prompt."""
    texts = _texts(keyword, value, limits)
    if len(texts) not in (1, count):
        raise RequestError(
            f"`{keyword}`: got {len(texts)} texts for {count} prompts, expected one for all or one for each"
        )
    return texts * count if len(texts) == 1 else texts


def _prompt(request: Request, count: int, manifest: Manifest, family: Family) -> Prompt:
    """Return the prompt with embeddings as float32 and `clip_skip` within the encoder's layers."""
    prompt, clip_skip = request.prompt, request.prompt.clip_skip
    if clip_skip is not None:
        clip_skip = Whole(0, manifest.limits.max_clip_skip)("clip_skip", clip_skip)
    width, pooled_width = family.embedding_width, family.pooled_width
    for keyword, given, pooled in (
        ("prompt_embeds", prompt.embeds, prompt.pooled_embeds),
        ("negative_prompt_embeds", prompt.negative_embeds, prompt.negative_pooled_embeds),
    ):
        if pooled_width is not None and given is not None and pooled is None:
            name = keyword.replace("prompt", "pooled_prompt")
            raise RequestError(f"`{keyword}`: got embeddings without `{name}`, which this model takes too; give both")
    return replace(
        prompt,
        clip_skip=clip_skip,
        embeds=_embeds("prompt_embeds", prompt.embeds, (count, None, width)),
        negative_embeds=_embeds("negative_prompt_embeds", prompt.negative_embeds, (count, None, width)),
        pooled_embeds=_embeds("pooled_prompt_embeds", prompt.pooled_embeds, (count, pooled_width)),
        negative_pooled_embeds=_embeds(
            "negative_pooled_prompt_embeds", prompt.negative_pooled_embeds, (count, pooled_width)
        ),
    )


def _texts(keyword: str, value: object, limits: Limits) -> tuple[str, ...]:
    """Return the texts of an argument, each of valid Unicode and within the limit of characters."""
    texts = value if isinstance(value, (list, tuple)) else (value,)
    if not texts:
        raise RequestError(f"`{keyword}`: got an empty list, expected a text or a list of texts")
    if len(texts) > limits.max_batch:
        raise RequestError(f"`{keyword}`: got {len(texts)} texts, this bundle's limit is {limits.max_batch} images")
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"`{keyword}`: got {type(text).__name__}, expected a text or a list of texts")
        if len(text) > limits.max_prompt_characters:
            raise RequestError(
                f"`{keyword}`: got a text of {len(text):,} characters, expected at most "
                f"{limits.max_prompt_characters:,}; shorten it"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RequestError(f"`{keyword}`: contains an unpaired surrogate; expected valid Unicode")
    return tuple(map(str, texts))


def _side(keyword: str, value: int | None, default: int, downscale: int, limits: Limits) -> int:
    side = default if value is None else value
    if side % downscale:
        low = side // downscale * downscale
        possible = [min(max(near, limits.min_side), limits.max_side) for near in (low, low + downscale)]
        nearest = " and ".join(map(str, dict.fromkeys(possible)))
        raise RequestError(f"`{keyword}`: got {side}, expected a multiple of {downscale}; the nearest: {nearest}")
    return Whole(limits.min_side, limits.max_side)(keyword, side)


def _sampling(request: Request, manifest: Manifest, family: Family) -> Sampling:
    sampling = request.sampling
    if sampling.schedule is not None:
        return _own_schedule(request, sampling.schedule, manifest.limits)
    sampler = family.scheduler.class_name if sampling.sampler is None else sampling.sampler
    if not isinstance(sampler, str):
        raise RequestError(f"`sampler`: got {quote(sampler)}, expected a name")
    samplers.find(sampler)
    options = _sampler_options(sampling.options)
    of_grid = samplers.steps_of_grid(sampler, options)
    if of_grid is not None and sampling.steps is not None:
        raise RequestError(
            f"`num_inference_steps`: got {sampling.steps} and a grid of {of_grid} steps, which both say how many there "
            "are; leave out `num_inference_steps`"
        )
    steps = manifest.defaults.num_inference_steps if sampling.steps is None else sampling.steps
    steps = Whole(1, manifest.limits.max_steps)("num_inference_steps", steps if of_grid is None else of_grid)
    return replace(sampling, sampler=sampler, options=options, steps=steps)


def _own_schedule(request: Request, schedule: object, limits: Limits) -> Sampling:
    """Return the sampling by a caller's own table.

    Raises:
        RequestError: it is no table, too long or begins with a row that looks back, or an option of a sampler is given
            with it.
    """
    from latentrt.sampling.schedule import Schedule

    if not isinstance(schedule, Schedule):
        raise RequestError(f"`schedule`: got {quote(schedule)}, expected a latentrt.Schedule")
    values = flat_values(request)
    for each in declared_options(Sampling):
        if each.keyword != "schedule" and values[each.keyword] is not None:
            raise RequestError(
                f"`{each.keyword}`: got {quote(values[each.keyword])} with `schedule`, whose rows decide that; leave "
                "one of them out"
            )
    if len(schedule) > limits.max_steps:
        raise RequestError(f"`schedule`: got {len(schedule)} rows, this bundle's limit is {limits.max_steps}")
    if schedule.looks_back_beyond(0):
        raise RequestError("`schedule`: a row uses history of rows before the first one; set its weights in b to 0")
    return Sampling(sampler=CUSTOM_SAMPLER, steps=len(schedule), schedule=schedule)


def _sampler_options(options: object) -> dict[str, Any]:
    """Return the options that override the bundle's configuration. They go into the image's metadata, hence JSON."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"`sampler_options`: got {quote(options)}, expected names and values")
    for name in ("begin", "strength"):
        if name in options:
            raise RequestError(f"`sampler_options`: got {quote(name)}; set `strength` itself, with `image`")
    if not all(map(_is_plain, options.values())):
        raise RequestError(f"`sampler_options`: got {quote(options)}, expected numbers, texts, and lists of them")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(each, (int, float, str)) for each in value)
    return value is None or (isinstance(value, (int, float, str)) and value == value)  # NaN is not


def _guidance(guidance: GuidanceOptions, manifest: Manifest) -> GuidanceOptions:
    if guidance.start > guidance.end:
        raise RequestError(
            f"`guidance_start`: got {guidance.start:g}, after `guidance_end` {guidance.end:g}; expected them in order"
        )
    return replace(guidance, scale=manifest.defaults.guidance_scale if guidance.scale is None else guidance.scale)


def _acceleration(acceleration: Acceleration, manifest: Manifest, family: Family) -> Acceleration:
    interval = acceleration.deep_cache
    if interval > 1 and "shallow_body" not in manifest.components[family.denoiser].parts:
        raise RequestError(
            f"`deep_cache`: got {interval}, and this bundle's denoiser has no shallow body; export it with one: "
            "latentrt export CHECKPOINT BUNDLE --deep-cache 0"
        )
    if acceleration.decoder == "preview":
        require_preview_decoder(manifest, "`decoder`: got preview")
    return acceleration


def require_preview_decoder(manifest: Manifest, got: str) -> None:
    """Require a preview decoder.

    Args:
        got: the beginning of the message, such as "`decoder`: got preview".

    Raises:
        RequestError: the bundle has none; the message has the command that exports one.
    """
    if not manifest.by_role("preview-decoder"):
        raise RequestError(
            f"{got}, and this bundle has no preview decoder; export it with one: latentrt export CHECKPOINT BUNDLE "
            "--preview-decoder FOLDER"
        )


def _seeds(seed: object, images: int) -> tuple[int, ...]:
    """Return the seed of each image. None and −1 stand for a random one.

    Raises:
        RequestError: a seed is out of range, or their number is not that of the images.
    """
    if seed is None:
        seed = RANDOM_SEED
    if isinstance(seed, (int, np.integer)):
        # The last image's is a seed too, so that it can be requested again.
        first = _seed(seed, MAX_SEED - images + 1)
        return tuple(range(first, first + images))
    listed = isinstance(seed, Sequence) and not isinstance(seed, (str, bytes))
    if not listed and not (isinstance(seed, np.ndarray) and seed.ndim == 1):
        raise _seed_error(seed, MAX_SEED)
    try:
        count = len(seed)  # type: ignore[arg-type]  # narrowed by `listed`
    except OverflowError:  # a range of 10³⁰ has no length
        count = MAX_SEED
    if count != images:
        got = f"{count} seeds" if count else "an empty range of seeds"
        raise RequestError(
            f"`seed`: got {got} for {counted(images, 'image')}, expected one number, or a seed for each image; "
            "`num_images_per_prompt` sets their number"
        )
    if isinstance(seed, range) and RANDOM_SEED in seed:
        raise _seed_error(seed, MAX_SEED)
    return tuple(_seed(each, MAX_SEED) for each in seed)  # type: ignore[attr-defined]  # narrowed by `listed`


def _seed(seed: object, largest: int) -> int:
    """Return a seed, a random one for −1."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not RANDOM_SEED <= seed <= largest:
        raise _seed_error(seed, largest)
    return secrets.randbelow(2**32) if seed == RANDOM_SEED else int(seed)


def _seed_error(seed: object, largest: int) -> RequestError:
    got = "an array" if isinstance(seed, np.ndarray) else quote(seed)
    return RequestError(
        f"`seed`: got {got}, expected a whole number from 0 to {largest}, {RANDOM_SEED} for a random one, or a list of "
        "them"
    )


def _embeds(keyword: str, value: NDArray[Any] | None, shape: tuple[int | None, ...]) -> NDArray[np.float32] | None:
    """Return embeddings as float32, of this shape; None stands for any number of tokens."""
    if value is None:
        return None
    fits = isinstance(value, np.ndarray) and value.ndim == len(shape)
    if not fits or any(side not in (None, own) for side, own in zip(shape, value.shape, strict=True)):
        got = getattr(value, "shape", type(value).__name__)
        expected = ", ".join("tokens" if side is None else str(side) for side in shape)
        raise RequestError(f"`{keyword}`: got {got}, expected a numpy array of shape ({expected})")
    return finite(keyword, value)


def check_latents(start: Start, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Return `latents` as float32, which must be finite and of this shape."""
    value = start.latents
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.shape != shape:
        got = getattr(value, "shape", type(value).__name__)
        raise RequestError(f"`latents`: got {got}, expected a numpy array of shape {shape}")
    return finite("latents", value)


def finite(keyword: str, value: NDArray[Any]) -> NDArray[np.float32]:
    """Return an array as float32.

    Raises:
        RequestError: it holds values that are not finite float32 numbers.
    """
    with np.errstate(over="ignore"):
        narrowed = value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else None
    if narrowed is None or not np.isfinite(narrowed).all():
        raise RequestError(f"`{keyword}`: got values that are not finite float32 numbers")
    return narrowed
