"""The denoising of calibration prompts, compared with a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.bundle.tensors import TensorSpec
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers.euler import Euler
from latentrt.sampling.samplers.steps import Steps
from latentrt_export.modules.module import Arrays
from latentrt_export.quantize.denoising import denoise_prompts
from latentrt_export.quantize.options import QuantizationOptions

INPUTS = (
    TensorSpec("sample", "float32", ("evaluations", 4, "height", "width")),
    TensorSpec("timestep", "float32", ("evaluations",)),
    TensorSpec("encoder_hidden_states", "float32", ("evaluations", "tokens", 8)),
)
OUTPUTS = (TensorSpec("noise_pred", "float32", ("evaluations", 4, "height", "width")),)
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.0])
def test_prompts_are_denoised_as_in_the_runtime(scale: float) -> None:
    """For a denoiser that is a formula; a guidance scale of at most 1 means none."""
    embeddings = np.random.default_rng(0).normal(size=(3, 77, 8)).astype(np.float32)
    conditionings: list[Arrays] = [{"encoder_hidden_states": each} for each in embeddings]
    timesteps: list[float] = []

    def run(feeds: Arrays) -> Arrays:
        timesteps.append(float(feeds["timestep"][0]))
        means = feeds["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
        return {"noise_pred": feeds["sample"] * np.float32(0.5) + means}

    options = QuantizationOptions(steps=4, guidance_scale=scale)
    found = denoise_prompts(run, INPUTS, OUTPUTS, conditionings, NOISE, (4, 8, 8), options)
    assert found.shape == (2, 4, 8, 8)
    assert timesteps == [999.0, 666.0, 333.0, 0.0] * 2, "the whole range of training timesteps"
    table = Euler.read({**NOISE, "timestep_spacing": "linspace"}).table(Steps(count=4))
    for seed, prompt in enumerate(embeddings[1:]):
        x = table.init_noise_sigma * Generator(seed).normal((4, 8, 8))[np.newaxis].astype(np.float64)
        for row in range(4):
            both = table.c_in[row] * np.concatenate([x, x])
            halves = np.asarray(run_formula(both, embeddings[0], prompt), np.float32)
            m = halves[:1] + np.float32(scale) * (halves[1:] - halves[:1]) if scale > 1 else halves[1:]
            y = table.p[row] * x + table.q[row] * m
            x = table.a[row] * x + table.d[row] * m + table.b[row, 0] * (table.u[row] * x + table.w[row] * y)
        # float32 against float64 over four steps.
        np.testing.assert_allclose(found[seed], x[0], rtol=0, atol=1e-5 * np.abs(x).max())


def run_formula(both: NDArray[np.float64], *embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    means = np.array([each.mean(dtype=np.float64) for each in embeddings])
    predicted: NDArray[np.float64] = both * 0.5 + means[:, None, None, None]
    return predicted
