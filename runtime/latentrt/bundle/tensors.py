"""Tensor signatures: names, dtypes and shapes with named axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from latentrt.errors import FeedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MAX_AXES", "MAX_AXIS_SIZE", "DType", "TensorSpec", "axis_sizes", "check_feeds", "sized"]

DType = Literal["float16", "float32", "uint8", "int64", "bool"]
MAX_AXES = 8
"""Largest number of axes of a tensor."""
MAX_AXIS_SIZE = 1 << 20
"""Largest size of an axis: images, pixels, channels and tokens alike."""
AxisName = Annotated[str, msgspec.Meta(max_length=64)]
AxisSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_AXIS_SIZE)]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph.

    A dimension is a number, the name of a free axis (`batch`, `height`), or a multiple of one (`8*height`).
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    dtype: DType
    shape: Annotated[tuple[AxisSize | AxisName, ...], msgspec.Meta(max_length=MAX_AXES)]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Reject feeds that do not match a graph's signature.

    Args:
        specs: the graph's inputs.
        feeds: an array for each of them. Axes of one name must have one size across all inputs, and an axis such as
            `8*height` eight times the size of `height`.

    Raises:
        FeedError: an input is missing or unknown, or a dtype or shape differs from the signature.
    """
    wanted, given = [spec.name for spec in specs], list(feeds)
    if set(wanted) != set(given):
        raise FeedError(f"got inputs {sorted(given)}, expected {sorted(wanted)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        _check_feed(spec, feeds[spec.name], sizes)


def _check_feed(spec: TensorSpec, array: NDArray[np.generic], sizes: dict[str, int]) -> None:
    if array.dtype.name != spec.dtype:
        raise FeedError(f"input {spec.name}: got {array.dtype.name}, expected {spec.dtype}")
    if array.ndim != len(spec.shape):
        raise FeedError(f"input {spec.name}: got shape {array.shape}, expected {len(spec.shape)} axes as in {spec}")
    for size, axis in zip(array.shape, spec.shape, strict=True):
        expected = axis
        if isinstance(axis, str):
            factor, _, name = axis.rpartition("*")
            expected = int(factor or 1) * sizes.setdefault(name, size // int(factor or 1))
        if size != expected or size == 0:
            raise FeedError(f"input {spec.name}: got shape {array.shape}, but axis {axis} of {spec} is {expected}")


def axis_sizes(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the size of each named axis, from the shapes of the inputs.

    Args:
        specs: the graph's inputs. shapes: of each of them, checked with `check_feeds`.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        for size, axis in zip(shapes[spec.name], spec.shape, strict=True):
            if isinstance(axis, str):
                factor, _, name = axis.rpartition("*")
                sizes[name] = size // int(factor or 1)
    return sizes


def sized(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a tensor whose named axes have these sizes."""
    shape = []
    for axis in spec.shape:
        if isinstance(axis, int):
            shape.append(axis)
            continue
        factor, _, name = axis.rpartition("*")
        shape.append(int(factor or 1) * sizes[name])
    return tuple(shape)
