"""The custom sampler: without fresh noise it is Euler, with all of it Euler ancestral, and its images are right."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.sampler import stochastic_euler
from latentrt import Pipeline, Schedule
from latentrt.sampling import samplers

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "linspace",
}


def effects(table: Schedule) -> list[NDArray[np.float64]]:
    """The coefficients of x, of the model's output and of the noise, with y and h written out."""
    newest = table.b[:, 0]
    of_x = table.a + newest * (table.u + table.w * table.p)
    return [table.c_in, of_x, table.d + newest * table.w * table.q, table.s]


@pytest.mark.parametrize(("eta", "name"), [(0.0, "euler"), (1.0, "euler_a")])
def test_its_ends_are_samplers_of_the_field(eta: float, name: str) -> None:
    ours, theirs = stochastic_euler(12, eta), samplers.schedule(name, CONFIG, 12)
    for own, other in zip(effects(ours), effects(theirs), strict=True):
        # Theirs has sigmas rounded to float32, as diffusers does.
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-5 * np.abs(other).max())
    assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma, rel=1e-6)


def test_its_images_are_red_on_blue() -> None:
    pipeline = Pipeline.load()
    result = pipeline("a large red circle on a blue background", schedule=stochastic_euler(20, 0.5), seed=7)
    pixels = np.asarray(result.images[0]).astype(int)
    red, _, blue = pixels[28:36, 28:36].mean((0, 1))
    corner_red, _, corner_blue = pixels[:8, :8].mean((0, 1))
    assert red > blue + 80
    assert corner_blue > corner_red + 80
    assert result.records[0].given == ("schedule",)
