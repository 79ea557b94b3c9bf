"""Which shapes is an engine built for? Said in pictures, meant in tensors.

A user says sizes, a number of pictures and a length of prompt; each submodule's inputs follow from how the pipeline
calls it (`latentrt.pipeline`, `latentrt.text.clip`):

- the text encoder gets the different prompts of one side, in chunks, so anything from one chunk up;
- the denoiser gets every picture, twice where there is guidance, and the chunks joined along `tokens`;
- the autoencoder's halves get one picture at a time;
- the safety classifier gets all pictures at once, in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from latentrt.bundle.manifest import Component, Manifest
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.record import ShapeRange
from latentrt.errors import RequestError

__all__ = [
    "Guidance",
    "PictureProfile",
    "Span",
    "check_merging",
    "component_profile",
    "parse_count",
    "parse_size",
    "picture_profile",
]

Guidance = Literal["on", "off", "both"]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A smallest, a most usual and a largest number."""

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, number: int) -> Span:
        """A span of one number."""
        return cls(min=number, opt=number, max=number)

    def times(self, factor: int) -> Span:
        """The span of the products."""
        return Span(min=self.min * factor, opt=self.opt * factor, max=self.max * factor)

    def __str__(self) -> str:
        if self.min == self.max:
            return str(self.opt)
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, kw_only=True)
class PictureProfile:
    """What will be asked of an engine.

    Attributes:
        width, height: of a picture, in pixels, each on its own.
        batch: pictures at once.
        chunks: of 75 tokens that a prompt may fill.
        guidance: whether there is classifier-free guidance, which doubles the denoiser's batch.
    """

    width: Span
    height: Span
    batch: Span
    chunks: Span
    guidance: Guidance

    def __str__(self) -> str:
        """In words, as in `256x256:512x512:1024x1024, batch 1:1:4`."""
        sizes = zip(
            (self.width.min, self.width.opt, self.width.max),
            (self.height.min, self.height.opt, self.height.max),
            strict=True,
        )
        words = [":".join(dict.fromkeys(f"{width}x{height}" for width, height in sizes)), f"batch {self.batch}"]
        words += [f"chunks {self.chunks}"] if self.chunks != Span.of(1) else []
        return ", ".join([*words, f"guidance {self.guidance}"])


def picture_profile(
    manifest: Manifest,
    *,
    size: str | None = None,
    batch: str = "1",
    chunks: str = "1",
    guidance: Guidance | None = None,
) -> PictureProfile:
    """Read what a user says of the pictures, and check it with what the bundle can draw.

    Args:
        size: `512x512` (width × height), a range `256..1024` or `512x512..1024x768`, or smallest, usual and largest,
            `256x256:512x512:1024x1024`; the bundle's default size if None.
        batch, chunks: `1`, `1..4` or `1:1:4`.
        guidance: as the bundle's default guidance scale has it, if None.

    Raises:
        RequestError: it is of another form, or the bundle cannot draw it.
    """
    defaults = manifest.defaults
    usual = (defaults.width, defaults.height)
    width, height = (Span.of(side) for side in usual) if size is None else parse_size(size, usual)
    for name, span in (("width", width), ("height", height)):
        _check_side(name, span, manifest)
    profile = PictureProfile(
        width=width,
        height=height,
        batch=parse_count("batch", batch),
        chunks=parse_count("chunks", chunks),
        guidance=guidance or ("on" if defaults.guidance_scale > 1 else "off"),
    )
    if profile.batch.max > manifest.limits.max_batch:
        raise RequestError(f"found a batch of {profile.batch.max}, this bundle's limit is {manifest.limits.max_batch}")
    return profile


def check_merging(component: Component, shapes: Mapping[str, ShapeRange]) -> None:
    """Refuse pictures whose merged tokens are more than TensorRT can bring into an order (`_MOST_RANKED`).

    Args:
        shapes: of the denoiser's inputs.

    Raises:
        RequestError: there are.
    """
    if component.token_merging is None:
        return
    # down_blocks.LEVEL.attentions.…, whose sides are halved so often. A model that merges on its way up alone does not
    # say how often there.
    levels = (block.split(".")[1] for block in component.token_merging.blocks if block.startswith("down_blocks."))
    level = int(next(levels, "0"))
    height, width = (-(-side // 2**level) for side in shapes["sample"].max[2:])
    if height * width > _MOST_RANKED:
        raise RequestError(
            f"found {height * width:,} tokens to merge in the largest picture, and TensorRT brings at most "
            f"{_MOST_RANKED:,} into an order; build for smaller pictures, or export without --token-merging"
        )


def parse_size(text: str, usual: tuple[int, int]) -> tuple[Span, Span]:
    """Width and height of `512`, `512x768`, `256..1024` or `min:opt:max`.

    Args:
        usual: width and height that a range is best at, where it holds them.

    Raises:
        RequestError: it is of another form.
    """
    low, best, high = _three(text, "size", _parse_sides, "512x512, a range 256..1024 or min:opt:max")
    spans = []
    for side in range(2):
        opt = best[side] if best else min(max(usual[side], low[side]), high[side])
        spans.append(_span("size", text, low[side], opt, high[side]))
    return spans[0], spans[1]


def parse_count(name: str, text: str) -> Span:
    """`1`, `1..4` or `1:1:4`; a range is best at its smallest.

    Raises:
        RequestError: it is of another form.
    """
    low, best, high = _three(text, name, _parse_number, "a number, a range 1..4 or min:opt:max as in 1:1:4")
    return _span(name, text, low, low if best is None else best, high)


def component_profile(
    name: str, component: Component, profile: PictureProfile, manifest: Manifest
) -> dict[str, ShapeRange]:
    """The shapes of a submodule's inputs.

    Returns:
        Input → its smallest, usual and largest shape.

    Raises:
        RequestError: it has an axis that no picture says anything of.
    """
    axes = _axes(name, profile, manifest)
    return {spec.name: _shape_range(name, spec, axes) for spec in component.inputs}


def _axes(name: str, profile: PictureProfile, manifest: Manifest) -> dict[str, Span]:
    """The named axes of one submodule."""
    factor, batch = manifest.side_multiple, profile.batch
    latent = {"height": _divided(profile.height, factor), "width": _divided(profile.width, factor)}
    match name:
        case "text_encoder":
            most = Span(min=1, opt=batch.opt * profile.chunks.opt, max=batch.max * profile.chunks.max)
            return {"chunks": most}
        case "unet":
            tokens = profile.chunks.times(manifest.tokenizers["text_encoder"].length)
            return {**latent, "evaluations": _denoised(batch, profile.guidance), "tokens": tokens}
        case "safety_checker":
            return {"images": batch, "pixel_height": profile.height, "pixel_width": profile.width}
        case _:
            return {**latent, "batch": Span.of(1)}


def _denoised(batch: Span, guidance: Guidance) -> Span:
    guided = batch.times(2)
    if guidance == "both":
        return Span(min=batch.min, opt=guided.opt, max=guided.max)
    return guided if guidance == "on" else batch


def _divided(span: Span, factor: int) -> Span:
    return Span(min=span.min // factor, opt=span.opt // factor, max=span.max // factor)


def _shape_range(component: str, spec: TensorSpec, axes: dict[str, Span]) -> ShapeRange:
    spans = [_axis_span(component, spec, axis, axes) for axis in spec.shape]
    return ShapeRange(
        min=tuple(span.min for span in spans),
        opt=tuple(span.opt for span in spans),
        max=tuple(span.max for span in spans),
    )


def _axis_span(component: str, spec: TensorSpec, axis: int | str, axes: dict[str, Span]) -> Span:
    if isinstance(axis, int):
        return Span.of(axis)
    factor, _, name = axis.rpartition("*")
    if name not in axes:
        raise RequestError(f"{component} has the input {spec}, and nothing says how long its axis {name} is")
    return axes[name].times(int(factor or 1))


def _check_side(name: str, span: Span, manifest: Manifest) -> None:
    limits, factor = manifest.limits, manifest.side_multiple
    for pixels in (span.min, span.opt, span.max):
        if not limits.min_side <= pixels <= limits.max_side:
            raise RequestError(
                f"found a {name} of {pixels} pixels, expected {limits.min_side} to {limits.max_side}, this bundle's "
                "limits"
            )
        if pixels % factor:
            raise RequestError(
                f"found a {name} of {pixels} pixels, expected a multiple of {factor}: {pixels // factor * factor} or "
                f"{(pixels // factor + 1) * factor}"
            )


# The largest k of TensorRT's TopK (its operators' documentation; TensorRT-RTX says so too).
_MOST_RANKED = 3840
_SIDES = re.compile(r"(\d+)(?:[x×](\d+))?")


def _parse_number(text: str) -> int:
    if not re.fullmatch(r"-?\d+", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _parse_sides(text: str) -> tuple[int, int]:
    found = _SIDES.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2] or found[1])


def _three(text: str, name: str, parse: Callable[[str], _T], expected: str) -> tuple[_T, _T | None, _T]:
    """Smallest, usual (None if not said) and largest."""
    try:
        if ".." in text:
            low, high = text.split("..")
            return parse(low), None, parse(high)
        parts = [parse(part) for part in text.split(":")]
        if len(parts) not in (1, 3):
            raise ValueError(text)
    except ValueError:
        raise RequestError(f"found the {name} {text!r}, expected {expected}") from None
    return parts[0], parts[len(parts) // 2], parts[-1]


def _span(name: str, text: str, low: int, best: int, high: int) -> Span:
    if not 1 <= low <= best <= high:
        raise RequestError(f"found the {name} {text!r}, expected at least 1 and smallest ≤ usual ≤ largest")
    return Span(min=low, opt=best, max=high)
