"""torch's own generators, given as diffusers' pipelines take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latentrt import Pipeline, Request, RequestError
from latentrt.sampling.noise import Generator

CALL: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler_a", "output_type": "latent"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load("sample", device="cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_gives_the_image_of_its_seed(pipeline: Pipeline) -> None:
    """test_text_to_image.py shows that the image of a seed is diffusers' with a generator of that seed."""
    generator = seeded(7)
    for _ in range(2):  # it is not advanced
        found = pipeline("a red circle", generator=generator, **CALL)
        assert found.seeds == (7,)
        np.testing.assert_array_equal(found.images, pipeline("a red circle", seed=7, **CALL).images)


def test_a_list_has_one_for_each_image(pipeline: Pipeline) -> None:
    found = pipeline("a red circle", generator=[seeded(7), seeded(3)], num_images_per_prompt=2, **CALL)
    assert found.seeds == (7, 3)
    with pytest.raises(RequestError, match="got 2 seeds for 1 image"):
        pipeline("a red circle", generator=[seeded(7), seeded(3)], **CALL)


def test_a_generator_that_was_used_is_refused(pipeline: Pipeline) -> None:
    """diffusers would continue its numbers, of which another image follows than of its seed."""
    used = seeded(7)
    torch.randn(4, generator=used)
    with pytest.raises(RequestError, match="seeded with 7 and used since"):
        pipeline("a red circle", generator=used, **CALL)
    used.manual_seed(7)
    assert pipeline("a red circle", generator=used, **CALL).seeds == (7,)


def test_a_fresh_generator_has_torchs_default_seed(pipeline: Pipeline) -> None:
    fresh = torch.Generator()
    assert pipeline("a red circle", generator=fresh, **CALL).seeds == (fresh.initial_seed(),)


def test_a_seed_of_64_bits_gives_torchs_noise() -> None:
    """`torch.Generator.seed` makes such seeds, of which torch's generator on the CPU uses the lower 32 bits."""
    large = seeded(2**64 - 12345)
    seed = Request.of(generator=large).seed
    assert isinstance(seed, int)
    assert 0 <= seed < 2**63
    np.testing.assert_array_equal(Generator(seed).normal((4, 16, 16)), torch.randn(4, 16, 16, generator=large).numpy())
