"""A request: every option that a caller may set, defined once.

A `Request` is nested: what to show, how large, how to sample, how to guide, where to start. Each field is declared with
`option(...)`, which says how callers spell it (the keyword of `Pipeline.__call__`, diffusers' name where diffusers has
one, and the flag of `latentrt run`), what it means and which values it takes. The Python call, the command line and the
metadata record are generated from these declarations; nothing else lists the options.

This module imports nothing heavy: the command line reads it to print its help.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.migration import keyword_advice

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from latentrt.sampling.schedule import Schedule

    ImageSource = str | os.PathLike[str] | Image.Image | NDArray[Any]
    FloatArray = NDArray[np.float32]

__all__ = [
    "OPTIONS",
    "RANDOM_SEED",
    "Acceleration",
    "CallOptions",
    "GuidanceOptions",
    "MicroConditioning",
    "Option",
    "Prompt",
    "Request",
    "RequestOptions",
    "Sampling",
    "Size",
    "Start",
    "declared_options",
    "flat_values",
    "seed_of_generator",
]

RANDOM_SEED = -1
"""The seed that stands for a random one."""

Decoder = Literal["full", "preview", "tiled"]


class Check:
    """The values that an option takes."""

    kind = "text"  # what the command line reads

    def __call__(self, keyword: str, value: Any) -> Any:
        """Return the value as plain Python; raise RequestError for one that the option does not take."""
        return value


_MAX_WHOLE = 2**63 - 1


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Whole(Check):
    """Whole numbers from `low` to `high`; None: the bundle decides the upper bound."""

    low: int
    high: int | None = None
    kind = "int"

    def __call__(self, keyword: str, value: Any) -> int:
        if not _is_whole(value) or not self.low <= value <= (_MAX_WHOLE if self.high is None else self.high):
            expected = f"from {self.low} to {self.high}" if self.high is not None else f"of at least {self.low}"
            raise RequestError(f"`{keyword}`: got {quote(value)}, expected a whole number {expected}")
        return int(value)


@dataclass(frozen=True)
class Number(Check):
    """Finite numbers from `low` to `high`."""

    low: float
    high: float
    kind = "float"

    def __call__(self, keyword: str, value: Any) -> float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # Compared as it is: a large whole number is no float.
        if not number or not self.low <= value <= self.high:
            raise RequestError(f"`{keyword}`: got {quote(value)}, expected a number from {self.low:g} to {self.high:g}")
        return float(value)


@dataclass(frozen=True)
class OneOf(Check):
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, keyword: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise RequestError(f"`{keyword}`: got {quote(value)}, expected one of {', '.join(self.names)}")
        return str(value)


@dataclass(frozen=True)
class Share(Check):
    """Numbers between 0 and 1, both excluded."""

    kind = "float"

    def __call__(self, keyword: str, value: Any) -> float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 < value < 1:
            raise RequestError(f"`{keyword}`: got {quote(value)}, expected a number above 0 and below 1")
        return float(value)


@dataclass(frozen=True)
class Pair(Check):
    """Two whole numbers of pixels: a `size`, height and width, or a `position`, top and left."""

    kind: str

    def __call__(self, keyword: str, value: Any) -> tuple[int, int]:
        pair: Sequence[Any] = value if isinstance(value, (tuple, list)) else ()
        if len(pair) != 2 or not all(_is_whole(each) and 0 <= each <= _MAX_PIXELS for each in pair):
            names = "height, width" if self.kind == "size" else "top, left"
            raise RequestError(
                f"`{keyword}`: got {quote(value)}, expected ({names}), two whole numbers from 0 to {_MAX_PIXELS:,}"
            )
        return int(pair[0]), int(pair[1])


_MAX_PIXELS = 1_000_000  # a side of an image of training; float32 holds such numbers exactly


class Switch(Check):
    """True or False."""

    kind = "switch"

    def __call__(self, keyword: str, value: Any) -> bool:
        if type(value).__name__ not in ("bool", "bool_"):
            raise RequestError(f"`{keyword}`: got {quote(value)}, expected True or False")
        return bool(value)


class Pairs(Check):
    """Names and values."""

    kind = "pairs"


class File(Check):
    """An image: a path, and in Python a Pillow image or a numpy array as well."""

    kind = "path"


class InPython(Check):
    """Arrays, which only a caller in Python can give."""

    kind = "python"


@dataclass(frozen=True, kw_only=True)
class Option:
    """The spelling and the check of one option.

    Attributes:
        path: of the field in `Request`, such as ("sampling", "steps").
        keyword: in Python. flag: on the command line; None where it has none or the command spells it by hand.
        check: which values it takes. default: in the declaration; None leaves the value to the bundle.
        only: the models that take it, for a message; empty: all. A family lists those of its bundle (`Family.options`).
    """

    path: tuple[str, ...] = ()
    keyword: str
    flag: str | None
    help: str
    check: Check
    default: Any = None
    only: str = ""


def option(
    default: Any,
    keyword: str,
    flag: str | None,
    check: Check,
    help: str,  # noqa: A002  # click's word for it
    only: str = "",
) -> Any:
    """Declare a field of a request."""
    made = Option(keyword=keyword, flag=flag, check=check, help=help, default=default, only=only)
    return field(default=default, metadata={"option": made})


# The models that take an option, for messages.
_TWO_ENCODERS = "models with two text encoders, such as Stable Diffusion XL,"
_POOLED = "models with pooled text embeddings, such as Stable Diffusion XL,"
_SIZED = "Stable Diffusion XL models"
_TARGETED = "Stable Diffusion XL models other than refiners"
_SCORED = "Stable Diffusion XL refiners"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """The prompts, as text or as embeddings float32 [prompts, tokens, width] and pooled ones [prompts, width]."""

    text: str | Sequence[str] | None = option(
        None, "prompt", None, Check(), "A description of the image: one text or several."
    )
    text_2: str | Sequence[str] | None = option(
        None,
        "prompt_2",
        "--prompt-2",
        Check(),
        "Another prompt for the second text encoder. The same.",
        _TWO_ENCODERS,
    )
    negative: str | Sequence[str] | None = option(
        None,
        "negative_prompt",
        "--negative-prompt",
        Check(),
        "What to keep out of the image. Ignored without guidance.",
    )
    negative_2: str | Sequence[str] | None = option(
        None,
        "negative_prompt_2",
        "--negative-prompt-2",
        Check(),
        "Another negative prompt for the second text encoder. The same.",
        _TWO_ENCODERS,
    )
    embeds: NDArray[Any] | None = option(None, "prompt_embeds", None, InPython(), "Embeddings in place of the prompt.")
    negative_embeds: NDArray[Any] | None = option(
        None, "negative_prompt_embeds", None, InPython(), "Embeddings in place of the negative prompt."
    )
    pooled_embeds: NDArray[Any] | None = option(
        None, "pooled_prompt_embeds", None, InPython(), "Pooled embeddings in place of the prompt's.", _POOLED
    )
    negative_pooled_embeds: NDArray[Any] | None = option(
        None,
        "negative_pooled_prompt_embeds",
        None,
        InPython(),
        "Pooled embeddings in place of the negative prompt's.",
        _POOLED,
    )
    clip_skip: int | None = option(
        None, "clip_skip", "--clip-skip", Whole(0, 64), "Last layers of the text encoder to skip, for the prompt."
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Size:
    """The size of the image in pixels: multiples of the latent space's downscale, the bundle's default if None."""

    height: int | None = option(None, "height", "--height", Whole(1), "Height in pixels. The bundle's default.")
    width: int | None = option(None, "width", "--width", Whole(1), "Width in pixels. The bundle's default.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroConditioning:
    """The sizes and the crop that a denoiser takes as inputs (Podell et al. 2023, section 2.2).

    Sizes are height and width in pixels, crops top and left. A size that is None is that of the image.
    """

    original_size: tuple[int, int] | None = option(
        None,
        "original_size",
        "--original-size",
        Pair("size"),
        "Size of the image before it was scaled: small ones look blurred. The image's.",
        _SIZED,
    )
    crop: tuple[int, int] | None = option(
        None,
        "crops_coords_top_left",
        "--crops-coords-top-left",
        Pair("position"),
        "Top and left of the crop. 0,0 centers objects, and is the default.",
        _SIZED,
    )
    target_size: tuple[int, int] | None = option(
        None,
        "target_size",
        "--target-size",
        Pair("size"),
        "Size of the image after it was cropped. The image's.",
        _TARGETED,
    )
    negative_original_size: tuple[int, int] | None = option(
        None,
        "negative_original_size",
        "--negative-original-size",
        Pair("size"),
        "Original size to keep away from.",
        _SIZED,
    )
    negative_crop: tuple[int, int] | None = option(
        None,
        "negative_crops_coords_top_left",
        "--negative-crops-coords-top-left",
        Pair("position"),
        "Crop to keep away from.",
        _SIZED,
    )
    negative_target_size: tuple[int, int] | None = option(
        None,
        "negative_target_size",
        "--negative-target-size",
        Pair("size"),
        "Target size to keep away from.",
        _TARGETED,
    )
    aesthetic_score: float | None = option(
        None,
        "aesthetic_score",
        "--aesthetic-score",
        Number(-100, 100),
        "Aesthetic score to approach. 6 is the default.",
        _SCORED,
    )
    negative_aesthetic_score: float | None = option(
        None,
        "negative_aesthetic_score",
        "--negative-aesthetic-score",
        Number(-100, 100),
        "Aesthetic score to keep away from. 2.5 is the default.",
        _SCORED,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """The sampler and its steps; None takes the bundle's default."""

    steps: int | None = option(
        None, "num_inference_steps", "--steps", Whole(1), "Denoising steps. The bundle's default."
    )
    sampler: str | None = option(
        None,
        "sampler",
        "--sampler",
        Check(),
        "One of `latentrt samplers`, by any of its names. The bundle's scheduler.",
    )
    options: Mapping[str, Any] | None = option(
        None,
        "sampler_options",
        "--sampler-option",
        Pairs(),
        "Settings of the sampler by diffusers' names, such as solver_order=3.",
    )
    karras: bool | None = option(
        None, "karras", "--karras", Switch(), "Noise levels of Karras et al. 2022. The bundle's configuration."
    )
    eta: float | None = option(
        None, "eta", "--eta", Number(0, 1), "Fresh noise that DDIM (default 0) or TCD (0.3) adds, 0 to 1."
    )
    denoising_start: float | None = option(
        None,
        "denoising_start",
        "--denoising-start",
        Share(),
        "Share of the noise levels that `image`, or its latents, is past: it gets no noise, and only the rest is run.",
        _SIZED,
    )
    denoising_end: float | None = option(
        None,
        "denoising_end",
        "--denoising-end",
        Share(),
        "Share of the noise levels after which to stop; a refiner goes on from there.",
        _SIZED,
    )
    schedule: Schedule | None = option(
        None,
        "schedule",
        None,
        InPython(),
        "A table of coefficients (`latentrt.Schedule`) in place of a sampler and its options.",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class GuidanceOptions:
    """Classifier-free guidance (`latentrt.sampling.guidance`)."""

    scale: float | None = option(
        None, "guidance_scale", "--guidance-scale", Number(-1e4, 1e4), "Guidance scale; up to 1 disables guidance."
    )
    rescale: float = option(
        0.0, "guidance_rescale", "--guidance-rescale", Number(0, 1), "Restore the contrast of guided output, 0 to 1."
    )
    start: float = option(
        0.0, "guidance_start", "--guidance-start", Number(0, 1), "Share of the steps before which guidance is off."
    )
    end: float = option(
        1.0, "guidance_end", "--guidance-end", Number(0, 1), "Share of the steps after which guidance is off."
    )
    image_scale: float | None = option(
        None,
        "image_guidance_scale",
        "--image-guidance-scale",
        Number(1, 1e4),
        "Guidance towards the input image (InstructPix2Pix).",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """The start of sampling: noise, an image, or an image with a mask."""

    latents: NDArray[Any] | None = option(
        None, "latents", None, InPython(), "Standard normal noise [images, C, H, W] in place of the seed's."
    )
    image: ImageSource | None = option(None, "image", "--image", File(), "Input image: PNG, JPEG or WebP.")
    mask: ImageSource | None = option(
        None, "mask_image", "--mask", File(), "Mask of the input image: white is repainted, black is kept."
    )
    strength: float | None = option(
        None, "strength", "--strength", Number(0, 1), "How much of the input image to replace, 0 to 1."
    )
    noise_level: int | None = option(
        None,
        "noise_level",
        "--noise-level",
        Whole(0),
        "Noise added to the image before it is upscaled (default 20), or to its embedding (unCLIP, default 0).",
    )
    padding_mask_crop: int | None = option(
        None,
        "padding_mask_crop",
        "--padding-mask-crop",
        Whole(0, 1 << 20),
        "Repaint a crop around the mask with so many pixels of margin.",
    )
    depth_map: NDArray[Any] | None = option(
        None,
        "depth_map",
        None,
        InPython(),
        "Depth [H, W] in place of the estimated one (depth to image); near is large.",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Acceleration:
    """Work to skip at a cost in quality; nothing is skipped by default. docs/cpu.md has what each costs."""

    deep_cache: int = option(
        1,
        "deep_cache",
        "--deep-cache",
        Whole(1, 50),
        "Compute the denoiser's deep layers every N steps (a bundle exported with --deep-cache).",
    )
    decoder: Decoder = option(
        "full",
        "decoder",
        "--decoder",
        OneOf(("full", "preview", "tiled")),
        "full, preview (a bundle that has a preview decoder), or tiled (large images).",
    )


class CallOptions(TypedDict, total=False):
    """The keywords of `Pipeline.__call__` besides `prompt`, for editors and type checkers.

    They are those of the declarations, which a test compares, and `generator`, diffusers' way to give a seed.
    """

    prompt_2: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    prompt_embeds: NDArray[Any] | None
    negative_prompt_embeds: NDArray[Any] | None
    pooled_prompt_embeds: NDArray[Any] | None
    negative_pooled_prompt_embeds: NDArray[Any] | None
    clip_skip: int | None
    height: int | None
    width: int | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    num_inference_steps: int | None
    sampler: str | None
    sampler_options: Mapping[str, Any] | None
    karras: bool | None
    eta: float | None
    denoising_start: float | None
    denoising_end: float | None
    schedule: Schedule | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    image_guidance_scale: float | None
    latents: NDArray[Any] | None
    image: ImageSource | None
    mask_image: ImageSource | None
    strength: float | None
    noise_level: int | None
    padding_mask_crop: int | None
    depth_map: NDArray[Any] | None
    deep_cache: int
    decoder: Decoder
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    safety: str | None
    generator: object


class RequestOptions(CallOptions, total=False):
    """The keywords of `Request.of`."""

    prompt: str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Request:
    """A request for images. `Request.of` takes the keywords of `Pipeline.__call__`."""

    prompt: Prompt = field(default_factory=Prompt)
    size: Size = field(default_factory=Size)
    micro_conditioning: MicroConditioning = field(default_factory=MicroConditioning)
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    start: Start = field(default_factory=Start)
    acceleration: Acceleration = field(default_factory=Acceleration)
    images_per_prompt: int = option(1, "num_images_per_prompt", None, Whole(1), "Images for each prompt.")
    seed: int | Sequence[int] | None = option(
        None, "seed", None, Check(), "Image i takes seed + i; or a seed for each image. Random if omitted or -1."
    )
    safety: str | None = option(
        None,
        "safety",
        "--safety",
        Check(),
        "What to do with a flagged image: block, blur, report; off checks nothing. The bundle's policy.",
    )

    @classmethod
    def of(cls, **values: Unpack[RequestOptions]) -> Request:
        """Return the request of some keywords, diffusers' where diffusers has one.

        Args:
            generator: in place of `seed`, a generator or a list with one for each image (`seed_of_generator`).

        Raises:
            TypeError: a keyword is unknown.
            RequestError: `generator` is not understood.
        """
        groups: dict[str, dict[str, Any]] = {}
        for keyword, value in _replace_generator({**values}).items():
            if keyword not in OPTIONS:
                raise TypeError(_describe_unknown(keyword))
            *group, name = OPTIONS[keyword].path
            groups.setdefault(group[0] if group else "", {})[name] = value
        own = groups.pop("", {})
        nested = {name: _GROUPS[name](**values) for name, values in groups.items()}
        return cls(**own, **nested)

    def __repr__(self) -> str:
        """Return the options that are set, arrays by their shape."""
        values = flat_values(self)
        shown = [
            f"{keyword}={_abbreviate(values[keyword])}"
            for keyword, each in OPTIONS.items()
            if values[keyword] is not None and (each.default is None or values[keyword] != each.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def _abbreviate(value: Any) -> str:
    shape = getattr(value, "shape", getattr(value, "size", None))
    return quote(value) if shape is None else f"<{type(value).__name__} {shape}>"


def _describe_unknown(keyword: str) -> str:
    """Return the message about a keyword that no option has."""
    import difflib  # only on errors

    advice = keyword_advice(keyword) or "".join(difflib.get_close_matches(keyword, OPTIONS, n=1))
    if not advice:
        advice = "help(latentrt.Pipeline.__call__) lists them"
    elif advice.isidentifier():
        advice = f"did you mean {advice!r}?"
    return f"got an unexpected keyword {quote(keyword)}, expected one of the options of a request; {advice}"


def _replace_generator(values: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords with `seed` in place of `generator`."""
    generator = values.pop("generator", None)
    if generator is None:
        return values
    if values.get("seed") is not None:
        raise RequestError("got both `seed` and `generator`, expected one of them; leave out `generator`")
    several = isinstance(generator, (list, tuple))
    return {**values, "seed": [*map(seed_of_generator, generator)] if several else seed_of_generator(generator)}


def seed_of_generator(generator: Any) -> int:
    """Return the seed that a generator of another library stands for. torch and numpy are not imported for it.

    A torch.Generator stands for the seed that it was given, of which diffusers makes the same image with a generator on
    the CPU; it is not advanced. Of a numpy Generator or RandomState a seed is drawn, which does advance it.

    Raises:
        RequestError: it is neither, or numbers have been drawn from the torch.Generator, which then is at another
            point than its seed.
    """
    if callable(getattr(generator, "initial_seed", None)):
        seed = int(generator.initial_seed())
        fresh = type(generator)(device=generator.device).manual_seed(seed)
        if not generator.get_state().equal(fresh.get_state()):
            raise RequestError(
                f"`generator`: got a torch.Generator that was seeded with {seed} and used since, expected one that is "
                "at its seed, as its later numbers cannot be continued here; call manual_seed again, or give `seed`"
            )
        return seed & _MAX_WHOLE  # torch seeds of 64 bits; the noise depends on the lower 32 alone
    if hasattr(generator, "bit_generator"):  # numpy.random.Generator
        return int(generator.integers(_DRAWN_SEEDS))
    if callable(getattr(generator, "randint", None)) and callable(getattr(generator, "get_state", None)):
        return int(generator.randint(_DRAWN_SEEDS, dtype="uint32"))  # numpy.random.RandomState
    raise RequestError(
        f"`generator`: got {quote(generator)}, expected a torch.Generator, a numpy Generator or a list of them; "
        "give a whole number as `seed`"
    )


_DRAWN_SEEDS = 2**32


def flat_values(request: Request) -> dict[str, Any]:
    """Return the value of every option by its keyword."""
    values = {}
    for keyword, each in OPTIONS.items():
        value: Any = request
        for name in each.path:
            value = getattr(value, name)
        values[keyword] = value
    return values


def declared_options(cls: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield the options that a class of a request declares, those of its groups included."""
    for each in dataclasses.fields(cls):
        if "option" in each.metadata:
            yield dataclasses.replace(each.metadata["option"], path=(*path, each.name))
        else:
            yield from declared_options(_GROUPS[each.name], (*path, each.name))


_GROUPS: dict[str, type] = {
    "prompt": Prompt,
    "size": Size,
    "micro_conditioning": MicroConditioning,
    "sampling": Sampling,
    "guidance": GuidanceOptions,
    "start": Start,
    "acceleration": Acceleration,
}
# Every option by its keyword, in the order of the declarations.
OPTIONS: dict[str, Option] = {each.keyword: each for each in declared_options(Request)}
