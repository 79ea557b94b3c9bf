"""Which combinations of options are compared with diffusers?

Of the values in `sampler_values.py`, every two of every two options; `python -m tests.runtime.sampling.sampler_grid`
counts them.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from tests.runtime.sampling.pairwise import pairwise
from tests.runtime.sampling.sampler_values import OPTIONS

MOST = 60  # combinations of a sampler, where all of them would be more


@dataclass(frozen=True)
class Case:
    """A combination: a configuration and what is asked beside a number of steps."""

    name: str
    config: Mapping[str, Any]
    asked: Mapping[str, Any]

    @property
    def linear(self) -> bool:
        """Whether nothing is clipped, so that basis vectors say all."""
        return not any(self.config.get(key) for key in ("thresholding", "clip_sample", "clip_denoised"))

    def steps(self, count: int) -> Steps:
        """All that is asked; where a grid is given it decides how many."""
        for key, spare in (("timesteps", 0), ("sigmas", samplers.SAMPLERS[self.name].sigmas_end)):
            if self.asked.get(key):
                count = len(self.asked[key]) - spare
        asked = dict(self.asked)
        asked["begin"] = min(asked.get("begin", 0), count - 1)
        return Steps(count=count, **asked)


@functools.cache
def cases(name: str) -> tuple[Case, ...]:
    """The combinations of a sampler's options, always the same ones: all, or such that every two values meet."""
    options = OPTIONS[name]
    keys, values = list(options), list(options.values())
    if _size(values) <= MOST:
        chosen = list(itertools.product(*(range(len(each)) for each in values)))
    else:
        chosen = list(pairwise([len(each) for each in values], MOST, random.Random(0)))
    made = (combined(name, {key: options[key][i] for key, i in zip(keys, row, strict=True)}) for row in chosen)
    return tuple(made)


def _size(values: list[list[Any]]) -> int:
    size = 1
    for each in values:
        size *= len(each)
    return size


def combined(name: str, row: Mapping[str, Any]) -> Case:
    """A case of one value for each option."""
    known = {each.name for each in fields(samplers.SAMPLERS[name])}
    config: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for key, value in row.items():
        for each, wanted in value.items() if isinstance(value, dict) else [(key, value)]:
            if each in known:
                config[each] = wanted
            elif wanted is not None:
                asked[each] = wanted
    return Case(name, config, asked)


if __name__ == "__main__":
    counts = {name: len(cases(name)) for name in OPTIONS}
    print(*(f"{name} {count}" for name, count in counts.items()), f"together {sum(counts.values())}", sep="\n")
