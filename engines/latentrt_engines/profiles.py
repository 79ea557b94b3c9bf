"""Optimization profiles: the shapes that an engine supports.

A user gives sizes, a number of images and a length of prompt. The shapes of a component's inputs are computed from the
names of their axes (`latentrt.bundle.manifest.InputSpec`), which the pipeline passes at once:

- `chunks`: the chunks of all different prompts, at least one;
- `evaluations`: every image, twice with guidance (three times for editing, which is guided by the image as well);
- `tokens`: the chunks of a prompt, joined;
- `batch`: one image at a time;
- `images`, `pixel_height`, `pixel_width`: all images of a request, in pixels;
- `height`, `width`: the sides of the latents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from latentrt.bundle.manifest import Component, Manifest
from latentrt.bundle.printable import quote
from latentrt.bundle.tensors import MAX_AXIS_SIZE, TensorSpec
from latentrt.engines.record import ShapeRange
from latentrt.errors import RequestError

__all__ = [
    "DimRange",
    "Guidance",
    "ImageProfile",
    "check_merging",
    "component_profile",
    "image_profile",
    "parse_count",
    "parse_size",
]

Guidance = Literal["on", "off", "both"]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class DimRange:
    """The minimum, the optimum and the maximum of a dimension."""

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, number: int) -> DimRange:
        """Return the range whose minimum, optimum and maximum are one number."""
        return cls(min=number, opt=number, max=number)

    def divided_by(self, divisor: int) -> DimRange:
        """Return the range divided by a divisor of its numbers."""
        return DimRange(min=self.min // divisor, opt=self.opt // divisor, max=self.max // divisor)

    def times(self, factor: int) -> DimRange:
        """Return the range multiplied by a factor."""
        return DimRange(min=self.min * factor, opt=self.opt * factor, max=self.max * factor)

    def __str__(self) -> str:
        if self.min == self.max:
            return str(self.opt)
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, kw_only=True)
class ImageProfile:
    """The requests that an engine supports.

    Attributes:
        width, height: the sides of an image in pixels, independent of one another.
        batch: the number of images at once.
        chunks: the number of chunks of 75 tokens in a prompt.
        guidance: whether there is classifier-free guidance, which multiplies the denoiser's evaluations.
    """

    width: DimRange
    height: DimRange
    batch: DimRange
    chunks: DimRange
    guidance: Guidance

    def __str__(self) -> str:
        """Format the profile, as in `256x256:512x512:1024x1024, batch 1:1:4`."""
        sizes = zip(
            (self.width.min, self.width.opt, self.width.max),
            (self.height.min, self.height.opt, self.height.max),
            strict=True,
        )
        parts = [":".join(dict.fromkeys(f"{width}x{height}" for width, height in sizes)), f"batch {self.batch}"]
        parts += [f"chunks {self.chunks}"] if self.chunks != DimRange.of(1) else []
        return ", ".join([*parts, f"guidance {self.guidance}"])


def image_profile(
    manifest: Manifest,
    *,
    size: str | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: str = "1",
    chunks: str = "1",
    guidance: Guidance | None = None,
) -> ImageProfile:
    """Parse a profile and check it against the bundle's limits.

    Args:
        size: `512x512` (width × height), a range `256..1024` or `512x512..1024x768`, or minimum, optimum and maximum,
            `256x256:512x512:1024x1024`; the bundle's default size if None.
        width, height: without `size`; the bundle's default if None.
        batch, chunks: `1`, `1..4` or `1:1:4`.
        guidance: `on`, `off` or `both`; None selects by the bundle's default guidance scale.

    Raises:
        RequestError: an argument has another form, or is beyond the bundle's limits.
    """
    defaults = manifest.defaults
    optimum = (defaults.width, defaults.height)
    if size is None:
        sizes = (DimRange.of(width or defaults.width), DimRange.of(height or defaults.height))
    else:
        sizes = parse_size(size, optimum)
    for name, sides in zip(("width", "height"), sizes, strict=True):
        _check_side(name if size is None else "size", name, sides, manifest)
    profile = ImageProfile(
        width=sizes[0],
        height=sizes[1],
        batch=parse_count("batch", batch),
        chunks=parse_count("chunks", chunks),
        guidance=guidance or ("on" if defaults.guidance_scale > 1 else "off"),
    )
    if profile.batch.max > manifest.limits.max_batch:
        raise RequestError(f"`batch`: got {profile.batch.max}, this bundle's limit is {manifest.limits.max_batch}")
    return profile


def check_merging(component: Component, shapes: Mapping[str, ShapeRange]) -> None:
    """Reject images with more tokens to merge than TensorRT's TopK can rank (`_MAX_RANKED`).

    Args:
        component: the denoiser; without token merging, every shape passes.
        shapes: the shapes of the denoiser's inputs.

    Raises:
        RequestError: the largest image has more tokens.
    """
    if component.token_merging is None:
        return
    # down_blocks.LEVEL.attentions.…: the sides are halved LEVEL times. The names of up blocks do not contain this.
    levels = (block.split(".")[1] for block in component.token_merging.blocks if block.startswith("down_blocks."))
    level = int(next(levels, "0"))
    latents = component.input_from("latents")
    assert latents is not None, "a component that merges tokens takes latents"
    height, width = (-(-side // 2**level) for side in shapes[latents.name].max[2:])
    if height * width > _MAX_RANKED:
        raise RequestError(
            f"got {height * width:,} tokens to merge in the largest image, expected at most {_MAX_RANKED:,}, which "
            "TensorRT can rank; build for smaller images, or export without --token-merging"
        )


def parse_size(text: str, optimum: tuple[int, int]) -> tuple[DimRange, DimRange]:
    """Parse the width and height of `512`, `512x768`, `256..1024` or `min:opt:max`.

    Args:
        optimum: the optimum (width, height) of a range without one, if the range includes it.

    Raises:
        RequestError: the text has another form.
    """
    low, best, high = _parse_range(text, "size", _parse_sides, "512x512, a range 256..1024 or min:opt:max")
    ranges = []
    for side in range(2):
        opt = best[side] if best else min(max(optimum[side], low[side]), high[side])
        ranges.append(_check_range("size", text, low[side], opt, high[side]))
    return ranges[0], ranges[1]


def parse_count(name: str, text: str) -> DimRange:
    """Parse `1`, `1..4` or `1:1:4`; the optimum of a range is its minimum.

    Raises:
        RequestError: the text has another form.
    """
    low, best, high = _parse_range(text, name, _parse_number, "a number, a range 1..4 or min:opt:max as in 1:1:4")
    return _check_range(name, text, low, low if best is None else best, high)


def component_profile(
    name: str, component: Component, profile: ImageProfile, manifest: Manifest
) -> dict[str, ShapeRange]:
    """Return the shapes of a component's inputs: input → minimum, optimum and maximum.

    Raises:
        RequestError: an input has an axis that a profile does not determine, or that is larger than `MAX_AXIS_SIZE`.
    """
    space = manifest.latent_spaces.get(name) or next(iter(manifest.latent_spaces.values()))
    guided = profile.batch.times(_IMAGE_GUIDED_EVALUATIONS if "edit" in manifest.tasks else _GUIDED_EVALUATIONS)
    ranges = {
        "batch": DimRange.of(1),
        "chunks": DimRange(
            min=1, opt=profile.batch.opt * profile.chunks.opt, max=profile.batch.max * profile.chunks.max
        ),
        "evaluations": {
            "on": guided,
            "off": profile.batch,
            "both": DimRange(min=profile.batch.min, opt=guided.opt, max=guided.max),
        }[profile.guidance],
        "height": profile.height.divided_by(space.downscale),
        "width": profile.width.divided_by(space.downscale),
        "images": profile.batch,
        "pixel_height": profile.height,
        "pixel_width": profile.width,
    }
    # An 8-bit input image can have any size, because the graph resizes it.
    low, high = manifest.limits.min_side, manifest.limits.max_side
    input_image = {
        "pixel_height": DimRange(min=low, opt=profile.height.opt, max=high),
        "pixel_width": DimRange(min=low, opt=profile.width.opt, max=high),
    }
    found = {}
    for spec in component.inputs:
        # Joined outputs have as many tokens.
        lengths = [manifest.tokenizers[maker].length for maker, _ in spec.made_by if maker in manifest.tokenizers]
        tokens = {"tokens": profile.chunks.times(lengths[0])} if lengths else {}
        sizes = input_image if spec.source == "image" and spec.dtype == "uint8" else {}
        found[spec.name] = _make_shape_range(name, spec, {**ranges, **sizes, **tokens})
    return found


def _make_shape_range(component: str, spec: TensorSpec, ranges: Mapping[str, DimRange]) -> ShapeRange:
    dims = [_make_dim_range(component, spec, axis, ranges) for axis in spec.shape]
    return ShapeRange(
        min=tuple(dim.min for dim in dims),
        opt=tuple(dim.opt for dim in dims),
        max=tuple(dim.max for dim in dims),
    )


def _make_dim_range(component: str, spec: TensorSpec, axis: int | str, ranges: Mapping[str, DimRange]) -> DimRange:
    if isinstance(axis, int):
        return DimRange.of(axis)
    factor, _, name = axis.rpartition("*")
    if name not in ranges:
        raise RequestError(
            f"{component} has the input {spec}, whose axis {name} a profile does not determine; expected one of "
            f"{', '.join(ranges)}"
        )
    sizes = ranges[name].times(int(factor or 1))
    if sizes.max > MAX_AXIS_SIZE:
        raise RequestError(
            f"{component} has the input {spec}, whose axis {name} would have {sizes.max:,} values, expected at most "
            f"{MAX_AXIS_SIZE:,}; build for fewer chunks or smaller images"
        )
    return sizes


def _check_side(option: str, name: str, sides: DimRange, manifest: Manifest) -> None:
    limits, factor = manifest.limits, manifest.side_multiple
    for pixels in (sides.min, sides.opt, sides.max):
        if not limits.min_side <= pixels <= limits.max_side:
            raise RequestError(
                f"`{option}`: got a {name} of {pixels}, expected {limits.min_side} to {limits.max_side} pixels, "
                "this bundle's limits"
            )
        if pixels % factor:
            raise RequestError(
                f"`{option}`: got a {name} of {pixels}, expected a multiple of {factor}: "
                f"{pixels // factor * factor} or {(pixels // factor + 1) * factor}"
            )


_GUIDED_EVALUATIONS = 2
_IMAGE_GUIDED_EVALUATIONS = 3
# The largest k of TensorRT's TopK (documentation of its operators; TensorRT-RTX reports the same limit).
_MAX_RANKED = 3840
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


def _parse_range(text: str, name: str, parse: Callable[[str], _T], expected: str) -> tuple[_T, _T | None, _T]:
    """Parse the minimum, the optimum (None if omitted) and the maximum of an option.

    Raises:
        RequestError: the text has another form.
    """
    try:
        if ".." in text:
            low, high = text.split("..")
            return parse(low), None, parse(high)
        parts = [parse(part) for part in text.split(":")]
        if len(parts) not in (1, 3):
            raise ValueError(text)
    except ValueError:
        raise RequestError(f"`{name}`: got {quote(text)}, expected {expected}") from None
    return parts[0], parts[len(parts) // 2], parts[-1]


def _check_range(name: str, text: str, low: int, best: int, high: int) -> DimRange:
    if not 1 <= low <= best <= high:
        raise RequestError(f"`{name}`: got {quote(text)}, expected at least 1 and minimum ≤ optimum ≤ maximum")
    return DimRange(min=low, opt=best, max=high)
