"""How a scheduler's configuration is read."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from latentrt.sampling.samplers.options import Sampler
from tests.runtime.sampling import diffusers_oracle as oracle
from tests.runtime.sampling.sampler_values import STABLE_DIFFUSION
from tests.runtime.sampling.test_samplers import ON_DISK

# Parameters of the diffusers classes that are no options: UniPC's default is a list, DDIM inverse's stands for others.
SPARE = {"kwargs"}


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=lambda sampler: sampler.class_name)
def test_options_are_the_class_s_with_its_defaults(sampler: type[Sampler]) -> None:
    parameters = inspect.signature(oracle.class_named(sampler.class_name)).parameters
    expected = {
        key: tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
        for key, parameter in parameters.items()
        if key not in SPARE
    }
    found = {
        field.name: inspect.Parameter.empty if field.default is MISSING else field.default for field in fields(sampler)
    }
    assert found == expected


def test_keys_of_other_schedulers_are_ignored() -> None:
    stray = {"shift": 3.0, "skip_prk_steps": "no such option here", "_diffusers_version": "0.6.0"}
    assert samplers.find("euler").read(ON_DISK | stray) == samplers.find("euler").read(ON_DISK)


def test_keys_that_were_left_to_the_default_are_the_default() -> None:
    """As diffusers has it: a class that took a default does not hand it on to another class."""
    config = {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert samplers.find("euler").read(config) == samplers.find("euler").read({})


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_karras_overrides_the_configuration_both_ways(name: str) -> None:
    plain, karras = ON_DISK | {"use_karras_sigmas": False}, ON_DISK | {"use_karras_sigmas": True}
    levels = {
        key: samplers.schedule(name, config, 8, karras=override).sigma.tolist()
        for key, config, override in [
            ("plain", plain, None),
            ("karras", karras, None),
            ("on", plain, True),
            ("off", karras, False),
        ]
    }
    assert levels["on"] == levels["karras"] != levels["plain"] == levels["off"]


def test_karras_false_asks_nothing_of_a_sampler_without_it() -> None:
    assert len(samplers.schedule("ddim", ON_DISK, 8, karras=False)) == 8


@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - {"ddim", "tcd", "vq_diffusion"}))
def test_eta_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=r"found eta 0\.5 with \w+, which takes none; leave it out, or use another"):
        samplers.schedule(name, {}, Steps(count=5, eta=0.5))
    samplers.schedule(name, {}, Steps(count=5, eta=0.0))  # which is what it means to take none


def test_draws_are_counted_as_diffusers_draws() -> None:
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
def test_a_sampler_goes_by_both_names(name: str) -> None:
    sampler = samplers.find(name)
    assert samplers.find(sampler.class_name) is sampler


def test_options_go_before_the_configuration() -> None:
    config = ON_DISK | {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing", "solver_order"]}
    asked = samplers.schedule("dpmpp_2m", config, 8, options={"timestep_spacing": "trailing", "solver_order": 3})
    meant = samplers.schedule("dpmpp_2m", STABLE_DIFFUSION | {"timestep_spacing": "trailing", "solver_order": 3}, 8)
    np.testing.assert_array_equal(asked.b, meant.b)
    np.testing.assert_array_equal(asked.t, meant.t)


def test_options_of_a_run_go_before_the_steps() -> None:
    asked = samplers.schedule("euler", ON_DISK, 50, options={"timesteps": [900, 500, 100], "s_churn": 3.0})
    meant = samplers.schedule("euler", ON_DISK, Steps(count=3, timesteps=(900, 500, 100), s_churn=3.0))
    np.testing.assert_array_equal(asked.s, meant.s)
    assert asked.t.tolist() == [900, 500, 100]
