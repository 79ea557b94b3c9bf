"""Guidance beside diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentrt.sampling.guidance import guide


@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guidance_is_diffusers(scale: float, rescale: float) -> None:
    outputs = np.random.default_rng(0).standard_normal((6, 4, 9, 7)).astype(np.float32)
    negative, positive = torch.from_numpy(outputs).chunk(2)
    expected = negative + scale * (positive - negative)
    if rescale:
        expected = rescale_noise_cfg(expected, positive, guidance_rescale=rescale)
    # The same float32 operations in the same order; only the sum inside the standard deviation may be ordered
    # otherwise.
    np.testing.assert_allclose(guide(outputs, scale, rescale), expected.numpy(), rtol=0, atol=1e-6 * scale * 8)


def test_each_sample_is_rescaled_by_its_own_deviation() -> None:
    outputs = np.random.default_rng(1).standard_normal((4, 4, 8, 8)).astype(np.float32)
    outputs[3] *= 100
    alone = guide(outputs[[0, 2]], 7.5, 0.7)
    np.testing.assert_array_equal(guide(outputs, 7.5, 0.7)[:1], alone)
