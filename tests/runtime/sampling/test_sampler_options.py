from __future__ import annotations

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from tests.runtime.sampling.sampler_grid import ON_DISK, STABLE_DIFFUSION


def test_keys_of_other_schedulers_are_ignored() -> None:
    stray = {"shift": 3.0, "skip_prk_steps": "no such option here", "_diffusers_version": "0.6.0"}
    assert samplers.find("euler").read(ON_DISK | stray) == samplers.find("euler").read(ON_DISK)


def test_keys_marked_as_defaults_take_the_default() -> None:
    """As in diffusers: a default of the class that saved the configuration does not apply to another class."""
    config = {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert samplers.find("euler").read(config) == samplers.find("euler").read({})


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_karras_overrides_the_configuration_both_ways(name: str) -> None:
    plain, karras = ON_DISK | {"use_karras_sigmas": False}, ON_DISK | {"use_karras_sigmas": True}
    sigmas = {
        key: samplers.schedule(name, config, 8, karras=override).sigma.tolist()
        for key, config, override in [
            ("plain", plain, None),
            ("karras", karras, None),
            ("on", plain, True),
            ("off", karras, False),
        ]
    }
    assert sigmas["on"] == sigmas["karras"] != sigmas["plain"] == sigmas["off"]


def test_karras_false_has_no_effect_without_that_option() -> None:
    assert len(samplers.schedule("ddim", ON_DISK, 8, karras=False)) == 8


@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - {"ddim", "tcd", "vq_diffusion"}))
def test_eta_is_rejected_where_it_is_unused(name: str) -> None:
    with pytest.raises(RequestError, match=r"`eta`=0\.5"):
        samplers.schedule(name, {}, Steps(count=5, eta=0.5))
    samplers.schedule(name, {}, Steps(count=5, eta=0.0))  # the value of samplers without it


def test_rows_consume_as_much_noise_as_in_diffusers() -> None:
    assert samplers.schedule("ddim", ON_DISK, 4).noise_draws.tolist() == [0] * 4
    assert samplers.schedule("ddim", ON_DISK, Steps(count=4, eta=0.5)).noise_draws.tolist() == [1] * 4
    ancestral = samplers.schedule("euler_a", ON_DISK, 4)
    assert ancestral.noise_draws.tolist() == [1] * 4
    assert ancestral.s[-1] == 0
    assert samplers.schedule("dpm2_a", ON_DISK, 3).noise_draws.tolist() == [0, 1, 0, 1, 0]
    assert samplers.schedule("ddpm", ON_DISK | {"steps_offset": 0}, 3).noise_draws.tolist() == [1, 1, 0]
    assert samplers.schedule("lcm", ON_DISK, 3).noise_draws.tolist() == [1, 1, 0]


def test_memory_is_short() -> None:
    memory = {
        name: samplers.schedule(name, {}, 20).memory
        for name in samplers.SAMPLERS
        if name not in ("pndm", "vq_diffusion")
    }
    assert max(memory.values()) == 4
    assert memory["ddim"] == memory["euler"] == memory["dpm2"] == memory["flow_euler"] == 1
    assert memory["dpmpp_2m"] == memory["dpmpp_2s"] == memory["deis"] == memory["heun"] == 2
    assert memory["unipc"] == memory["sa_solver"] == 3
    assert memory["lms"] == memory["ipndm"] == 4
    assert samplers.schedule("pndm", ON_DISK, 20).memory == 5
    assert samplers.schedule("pndm", ON_DISK | {"skip_prk_steps": False}, 20).memory == 13


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_is_found_by_its_diffusers_class(name: str) -> None:
    sampler = samplers.find(name)
    assert samplers.find(sampler.class_name) is sampler


def test_options_override_the_configuration() -> None:
    config = ON_DISK | {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing", "solver_order"]}
    overridden = samplers.schedule("dpmpp_2m", config, 8, options={"timestep_spacing": "trailing", "solver_order": 3})
    expected = samplers.schedule("dpmpp_2m", STABLE_DIFFUSION | {"timestep_spacing": "trailing", "solver_order": 3}, 8)
    np.testing.assert_array_equal(overridden.b, expected.b)
    np.testing.assert_array_equal(overridden.t, expected.t)


def test_options_of_a_run_override_the_steps() -> None:
    overridden = samplers.schedule("euler", ON_DISK, 50, options={"timesteps": [900, 500, 100], "s_churn": 3.0})
    expected = samplers.schedule("euler", ON_DISK, Steps(count=3, timesteps=(900, 500, 100), s_churn=3.0))
    np.testing.assert_array_equal(overridden.s, expected.s)
    assert overridden.t.tolist() == [900, 500, 100]
