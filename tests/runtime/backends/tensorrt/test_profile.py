"""The shapes that an engine's profile covers, and the batch sizes among them."""

from __future__ import annotations

import pytest

from latentrt.backends.tensorrt.profile import batch_sizes
from latentrt.bundle.tensors import MAX_AXIS_SIZE
from latentrt.engines.record import EngineIdentity, EngineOptions, ShapeRange


def identity(**profile: ShapeRange) -> EngineIdentity:
    return EngineIdentity(
        component="unet",
        precision="float16",
        graph="0" * 64,
        weights=None,
        profile=profile,
        options=EngineOptions(),
        library="tensorrt",
        library_version="11.0",
        platform="linux-x86_64",
        compute_capabilities=("8.9",),
    )


def up_to(*sizes: int) -> ShapeRange:
    ones = (1,) * len(sizes)
    return ShapeRange(min=ones, opt=ones, max=sizes)


def test_the_batch_sizes_that_all_inputs_have() -> None:
    assert batch_sizes(identity(x=up_to(4, 9), y=up_to(3)), {"x": (1, 5), "y": (1,)}) == (1, 2, 3)


@pytest.mark.parametrize("shape", [(1, 10), (1,), (1, 5, 5)])
def test_no_batch_size_covers_another_shape(shape: tuple[int, ...]) -> None:
    assert batch_sizes(identity(x=up_to(4, 9)), {"x": shape}) == ()


def test_an_input_without_axes_has_no_batch_size() -> None:
    assert batch_sizes(identity(x=up_to()), {"x": (1,)}) == ()
    assert batch_sizes(identity(x=up_to(2), y=up_to()), {"x": (1,), "y": ()}) == (1, 2)


def test_the_largest_profile_lists_few_batch_sizes() -> None:
    assert batch_sizes(identity(x=up_to(MAX_AXIS_SIZE)), {"x": (1,)}) == tuple(range(1, 3073))
