from __future__ import annotations

import math

import msgspec
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.sampler_facts import REQUIRED, cost, endings, evaluations, options, shown
from latentrt.sampling.samplers import SAMPLERS, find


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_ending_is_said_of_those_that_take_it(name: str) -> None:
    said = endings(SAMPLERS[name])
    for ending in ("_karras", "_exponential", "_beta"):
        if ending in said:
            assert samplers.choose(name + ending).name == name
        else:
            with pytest.raises(RequestError):
                samplers.choose(name + ending)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_said_of_an_option_is_so(name: str) -> None:
    sampler = SAMPLERS[name]
    facts = options(sampler)
    required = {fact.name: 8 for fact in facts if fact.default is REQUIRED}
    assert required == ({"num_vec_classes": 8} if name == "vq_diffusion" else {})
    for fact in facts:
        assert fact.values, fact.name
        # Each choice can be made, and nothing else where all of them are listed.
        for choice in fact.choices or ():
            assert getattr(sampler.read({**required, fact.name: choice}), fact.name) == choice
        if fact.choices is not None:
            assert fact.default in fact.choices
            with pytest.raises(RequestError):
                sampler.read({**required, fact.name: "none of these"})


def test_possible_values_in_words() -> None:
    said = {fact.name: fact.values for sampler in SAMPLERS.values() for fact in options(sampler)}
    assert said["num_train_timesteps"] == "a whole number of at least 2"
    assert said["dynamic_thresholding_ratio"] == "a number above 0 and at most 1"
    assert said["shift_terminal"] == "a number of at least 0 and below 1 or null"
    assert said["trained_betas"] == "numbers (2 or more) or null"
    assert said["clip_sample"] == "true or false"
    assert said["final_sigmas_type"] == '"zero" or "sigma_min"'
    assert said["predictor_order"] == "1 or 2 or 3 or 4"


def test_a_default_as_it_is_written() -> None:
    assert shown(REQUIRED) == "required"
    assert (shown(math.inf), shown(-math.inf)) == ("Infinity", "-Infinity")
    assert (shown(0.5), shown(None), shown("zero"), shown(True), shown(())) == ("0.5", "null", '"zero"', "true", "[]")
    for sampler in SAMPLERS.values():
        for fact in options(sampler):
            if "Infinity" not in shown(fact.default) and fact.default is not REQUIRED:
                assert msgspec.json.decode(shown(fact.default)) == (fact.default if fact.default != () else [])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].exception])
def test_the_cost_is_what_a_table_has_rows(name: str) -> None:
    for count in (4, 20):
        assert evaluations(SAMPLERS[name], count) == len(samplers.schedule(name, {}, count))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("euler", "1"),
        ("heun", "2 (last step 1)"),
        ("dpm2_a", "2 (last step 1)"),
        ("sde_ve", "2"),
        ("pndm", "1, and 9 more in a run"),
        ("repaint", "5.5 in 20 steps, 8.2 in 50"),
        ("vq_diffusion", "1"),
    ],
)
def test_the_cost_in_words(name: str, words: str) -> None:
    assert cost(find(name)) == words
