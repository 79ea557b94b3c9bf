"""What may a user ask?

A `Request` is what was asked, with everything optional that has a default. `resolve` checks it against a bundle, once,
and returns an `Order` in which nothing is optional any more; the pipeline works from that alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import Limits, Manifest
from latentrt.decode import safety
from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.approximation import Approximation, Decoder, plain
from latentrt.sampling.sampler_request import karras_levels, sampler_name, sampler_options

__all__ = ["MAX_SEED", "Order", "Request", "resolve"]

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request for pictures, in diffusers' names where diffusers has one.

    Attributes:
        prompt: one text or several.
        negative_prompt: one for all, or one for each prompt; what to keep out. Ignored without guidance.
        height, width: in pixels; multiples of the bundle's factor (8). The bundle's own size if None.
        num_inference_steps: denoising steps. The bundle's default if None.
        guidance_scale: w of classifier-free guidance (Ho and Salimans 2022); up to 1 there is none. The bundle's
            default if None.
        guidance_rescale: φ of Lin et al. 2023, section 3.4; 0 leaves the guided output as it is.
        guidance_start, guidance_end, deep_cache, decoder: work to leave out, at a price
        (`latentrt.sampling.approximation`). num_images_per_prompt: pictures for each prompt.
        eta: how much fresh noise, 0 to 1, for samplers that take it (DDIM: 0 if None; TCD: 0.3).
        latents: float32 [pictures, channels, height / factor, width / factor] of standard normal noise, in place of the
            seed's.
        prompt_embeds: float32 [prompts, tokens, width of the encoder], in place of `prompt`.
        negative_prompt_embeds: the same for `negative_prompt`.
        clip_skip: how many of the encoder's last layers to leave out for the prompt.
        seed: picture i takes seed + i; or a seed for each picture. A random one if None; the result says which.
        sampler: one of `latentrt samplers`, by any of its names: `dpmpp_2m`, `DPM++ 2M Karras`, a diffusers class.
            The bundle's own scheduler if None.
        sampler_options: what goes before the bundle's scheduler configuration, by diffusers' names (`solver_order`,
            `use_beta_sigmas`, …), and arguments of a run (`timesteps`, `s_churn`, …;
            `latentrt.sampling.samplers.Steps`).
        karras: whether the noise levels are those of Karras et al. 2022; None leaves it to the bundle's configuration.
        safety: what is done with a flagged picture: `block`, `blur`, `report`; `off` asks nothing. The bundle's policy
            if None.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_cache: int = 1
    decoder: Decoder = "full"
    num_images_per_prompt: int = 1
    eta: float | None = None
    latents: NDArray[Any] | None = None
    prompt_embeds: NDArray[Any] | None = None
    negative_prompt_embeds: NDArray[Any] | None = None
    clip_skip: int | None = None
    seed: int | Sequence[int] | None = None
    sampler: str | None = None
    sampler_options: Mapping[str, Any] | None = None
    karras: bool | None = None
    safety: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A request that a bundle can fulfil: every value decided, texts and embeddings one for each prompt, seeds one for
    each picture."""

    prompts: tuple[str, ...] | None
    negative_prompts: tuple[str, ...] | None
    prompt_embeds: NDArray[np.float32] | None
    negative_prompt_embeds: NDArray[np.float32] | None
    images_per_prompt: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    approximation: Approximation
    eta: float | None
    clip_skip: int
    asked_clip_skip: int | None
    seeds: tuple[int, ...]
    latents: NDArray[np.float32] | None
    sampler: str
    sampler_options: Mapping[str, Any]
    karras: bool | None
    safety: safety.Policy

    @property
    def guided(self) -> bool:
        """Whether the model is also asked about the negative prompt (diffusers: `do_classifier_free_guidance`)."""
        return self.guidance_scale > 1


def resolve(request: Request, manifest: Manifest) -> Order:
    """Decide everything that a request leaves open, and refuse what the bundle cannot do.

    Raises:
        RequestError: what was found, what is possible.
    """
    prompts, count = _prompts(request)
    per_prompt = _whole("num_images_per_prompt", request.num_images_per_prompt, 1, manifest.limits.max_batch)
    pictures = count * per_prompt
    if pictures > manifest.limits.max_batch:
        raise RequestError(
            f"found {pictures} pictures in one request, this bundle draws at most {manifest.limits.max_batch} at once"
        )
    height = _side("height", request.height, manifest.defaults.height, manifest)
    width = _side("width", request.width, manifest.defaults.width, manifest)
    geometry = manifest.latent_spaces["unet"]
    latent_shape = (pictures, geometry.channels, height // geometry.downscale, width // geometry.downscale)
    sampler = sampler_name(manifest.schedulers["unet"].class_name if request.sampler is None else request.sampler)
    options = sampler_options(request.sampler_options)
    steps = _steps(request.num_inference_steps, samplers.steps_of_grid(sampler, options), manifest)
    scale = manifest.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return Order(
        prompts=prompts,
        negative_prompts=_negative_prompts(request, count),
        prompt_embeds=_embeds("prompt_embeds", request.prompt_embeds, count, manifest),
        negative_prompt_embeds=_embeds("negative_prompt_embeds", request.negative_prompt_embeds, count, manifest),
        images_per_prompt=per_prompt,
        height=height,
        width=width,
        steps=steps,
        guidance_scale=_number("guidance_scale", scale, -1e4, 1e4),
        guidance_rescale=_number("guidance_rescale", request.guidance_rescale, 0, 1),
        approximation=_approximation(request, manifest),
        eta=None if request.eta is None else _number("eta", request.eta, 0, 1),
        clip_skip=0
        if request.clip_skip is None
        else _whole("clip_skip", request.clip_skip, 0, manifest.limits.max_clip_skip),
        asked_clip_skip=request.clip_skip,
        seeds=_seeds(request.seed, pictures),
        latents=_latents(request.latents, latent_shape),
        sampler=sampler,
        sampler_options=options,
        karras=karras_levels(request.karras),
        safety=safety.check_policy(manifest.safety if request.safety is None else request.safety),
    )


def _approximation(request: Request, manifest: Manifest) -> Approximation:
    found = Approximation(
        guidance_start=plain(request.guidance_start),
        guidance_end=plain(request.guidance_end),
        deep_cache=plain(request.deep_cache),
        decoder=request.decoder,
    )
    found.check(manifest)
    return found


def _prompts(request: Request) -> tuple[tuple[str, ...] | None, int]:
    if (request.prompt is None) == (request.prompt_embeds is None):
        found = "neither" if request.prompt is None else "both"
        raise RequestError(f"found {found} of prompt and prompt_embeds, expected one of them")
    if request.prompt is None:
        # What is no array of embeddings is refused with its shape, as one prompt's.
        return None, max(len(request.prompt_embeds), 1) if np.ndim(request.prompt_embeds) == 3 else 1  # type: ignore[arg-type]
    prompts = _texts("prompt", request.prompt)
    return prompts, len(prompts)


def _negative_prompts(request: Request, count: int) -> tuple[str, ...] | None:
    if request.negative_prompt_embeds is not None:
        if request.negative_prompt is not None:
            raise RequestError("found both of negative_prompt and negative_prompt_embeds, expected at most one of them")
        return None
    texts = _texts("negative_prompt", "" if request.negative_prompt is None else request.negative_prompt)
    if len(texts) == 1:
        return texts * count
    if len(texts) != count:
        raise RequestError(
            f"found {len(texts)} negative prompts for {count} prompts, expected one for all or one for each"
        )
    return texts


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not texts:
        raise RequestError(f"{name}: found an empty list, expected a text or a list of texts")
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{name}: found {type(text).__name__}, expected a text or a list of texts")
        if not _is_unicode(text):
            raise RequestError(f"{name}: found half a surrogate pair, expected Unicode text")
    return tuple(map(str, texts))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _side(name: str, asked: int | None, default: int, manifest: Manifest) -> int:
    side = default if asked is None else asked
    limits, factor = manifest.limits, manifest.latent_spaces["unet"].downscale
    if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
        raise RequestError(f"{name}: found {side!r}, expected a whole number of pixels")
    if side % factor:
        near = _nearest(int(side), factor, limits)
        raise RequestError(f"{name}: found {side}, expected a multiple of {factor}; the nearest: {near}")
    return _whole(name, side, limits.min_side, limits.max_side)


def _nearest(side: int, factor: int, limits: Limits) -> str:
    low = side // factor * factor
    possible = [min(max(near, limits.min_side), limits.max_side) for near in (low, low + factor)]
    return " and ".join(map(str, dict.fromkeys(possible)))


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RequestError(f"{name}: found {value!r}, expected a whole number from {low} to {high}")
    return int(value)


def _number(name: str, value: object, low: float, high: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not low <= float(value) <= high
    ):
        raise RequestError(f"{name}: found {value!r}, expected a number from {low:g} to {high:g}")
    return float(value)


def _steps(asked: object, of_grid: int | None, manifest: Manifest) -> int:
    if of_grid is not None and asked is not None:
        raise RequestError(
            f"found num_inference_steps {asked!r} and a grid of {of_grid} steps, which say how many there are; leave "
            "out num_inference_steps"
        )
    steps = manifest.defaults.num_inference_steps if asked is None else asked
    return _whole("num_inference_steps", steps if of_grid is None else of_grid, 1, manifest.limits.max_steps)


def _seeds(seed: object, pictures: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (int, np.integer)):
        # The last picture's is a seed too, so that it can be asked for again.
        first = _whole("seed", seed, 0, MAX_SEED - pictures + 1)
        return tuple(range(first, first + pictures))
    if not isinstance(seed, (Sequence, np.ndarray)) or isinstance(seed, str):
        raise RequestError(f"seed: found {seed!r}, expected a whole number from 0 to {MAX_SEED}, or a list of them")
    if len(seed) != pictures:
        found = f"{len(seed)} seeds" if len(seed) else "an empty range of seeds"
        raise RequestError(f"found {found} for {pictures} pictures, expected one number, or a seed for each picture")
    return tuple(_whole("seed", each, 0, MAX_SEED) for each in seed)


def _embeds(name: str, value: NDArray[Any] | None, count: int, manifest: Manifest) -> NDArray[np.float32] | None:
    if value is None:
        return None
    width = manifest.components["text_encoder"].outputs[0].shape[-1]
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[0] != count or value.shape[2] != width:
        found = getattr(value, "shape", type(value).__name__)
        raise RequestError(f"{name}: found {found}, expected a numpy array of shape ({count}, tokens, {width})")
    return _finite(name, value)


def _latents(value: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.shape != shape:
        raise RequestError(
            f"latents: found {getattr(value, 'shape', type(value).__name__)}, expected a numpy array of shape {shape}"
        )
    return _finite("latents", value)


def _finite(name: str, value: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        narrowed = value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else None
    if narrowed is None or not np.isfinite(narrowed).all():
        raise RequestError(f"{name}: found values that are not finite float32 numbers")
    return narrowed
