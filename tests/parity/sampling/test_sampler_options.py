"""The options of samplers against the signatures of diffusers' classes."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest

from latentrt.sampling import samplers
from latentrt.sampling.samplers.options import Sampler
from tests.parity.sampling import diffusers_oracle as oracle


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=lambda sampler: sampler.class_name)
def test_options_are_the_class_s_with_its_defaults(sampler: type[Sampler]) -> None:
    parameters = inspect.signature(oracle.class_named(sampler.class_name)).parameters
    expected = {
        key: tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
        for key, parameter in parameters.items()
        if key != "kwargs"  # of deprecated options
    }
    ours = {
        field.name: inspect.Parameter.empty if field.default is MISSING else field.default for field in fields(sampler)
    }
    assert ours == expected
