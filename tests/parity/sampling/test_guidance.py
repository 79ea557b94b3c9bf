"""Guidance, compared with diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentrt.sampling.guidance import ClassifierFree


@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guidance_is_diffusers(scale: float, rescale: float) -> None:
    negative, positive = np.random.default_rng(0).standard_normal((2, 3, 4, 9, 7), dtype=np.float32)
    negative[2] *= 100  # each sample is rescaled by its own deviation
    theirs = torch.from_numpy(negative) + scale * torch.from_numpy(positive - negative)
    if rescale:
        theirs = rescale_noise_cfg(theirs, torch.from_numpy(positive), guidance_rescale=rescale)
    strategy = ClassifierFree(scale=scale, rescale=rescale)
    for sample, expected in enumerate(theirs.numpy()):
        found = strategy.combine([negative[sample], positive[sample]])
        # The same float32 operations in the same order; only the sum inside the standard deviation may be ordered
        # otherwise.
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
