"""The options of one run of a sampler.

The configuration of a sampler comes with the checkpoint; these options come with each request. Their names are those of
the arguments of diffusers' `set_timesteps` and `step`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import MAX_TIMESTEPS
from latentrt.bundle.printable import quote
from latentrt.errors import RequestError

__all__ = ["Steps"]

Scalar = TypeVar("Scalar", bound=np.generic)

_RANGES: dict[str, tuple[float, float]] = {
    "eta": (0, 1),
    "s_churn": (0, math.inf),
    "s_tmin": (0, math.inf),
    "s_tmax": (0, math.inf),
    "s_noise": (0, 1e6),
    "strength": (0, 1),
    "mu": (-100, 100),
}
_WHOLE = {
    "count": (1, MAX_TIMESTEPS),
    "begin": (0, MAX_TIMESTEPS),
    "order": (1, 12),  # the history has as many arrays
    "original_inference_steps": (1, MAX_TIMESTEPS),
    "jump_length": (1, 1000),
    "jump_n_sample": (1, 100),
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The number of steps, their grid, and further options of a run.

    Attributes:
        count: the number of steps (`num_inference_steps`); replaced by that of `timesteps` or `sigmas` where given.
        begin: the number of steps to skip at the noisy end (image-to-image: `strength` 0.6 of 50 steps begins at 20).
            The columns alpha and sigma of the first row then say how much noise clean latents need.
        timesteps, sigmas: the grid, in place of the one that `count` and the configuration make; descending.
        mu: the logarithm of a flow's shift, for configurations with `use_dynamic_shifting`; larger images need more.
            `samplers.flow.calculate_mu` computes it from a number of image tokens.
        eta: the amount of fresh noise, 0 to 1; None takes the sampler's default (0 for DDIM, 0.3 for TCD).
        s_churn, s_tmin, s_tmax, s_noise: noise added at sigmas between `s_tmin` and `s_tmax` (Karras et al. 2022,
            algorithm 2).
        order: the order of the linear multistep method.
        original_inference_steps: the number of steps that a model was distilled on; None takes the configuration's.
        strength: of image-to-image with a distilled model (LCM, TCD), whose grid depends on it.
        jump_length, jump_n_sample: of RePaint: the length of a jump back, and the number of passes.
    """

    count: int
    begin: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None
    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    order: int = 4
    original_inference_steps: int | None = None
    strength: float = 1.0
    jump_length: int = 10
    jump_n_sample: int = 10

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= most:
                option = "num_inference_steps" if name == "count" else name
                raise RequestError(f"got `{option}`={quote(value)}, expected a whole number from {least} to {most}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if (value is None and name in optional) or (_is_number(value) and low <= value <= high):
                continue
            wanted = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
            raise RequestError(f"got `{name}`={quote(value)}, expected {wanted}")
        if self.begin >= self.count:
            raise RequestError(
                f"`begin`: got {self.begin} with {self.count} steps (`num_inference_steps`), expected at most "
                f"{self.count - 1}"
            )
        self._check_grid()

    def _check_grid(self) -> None:
        if self.timesteps is not None and self.sigmas is not None:
            raise RequestError("got `timesteps` and `sigmas`, expected at most one of them")
        for name in ("timesteps", "sigmas"):
            grid = getattr(self, name)
            if grid is None:
                continue
            if (
                not isinstance(grid, tuple)
                or not grid
                or not all(_is_number(each) and 0 <= each < 1e9 for each in grid)
            ):
                raise RequestError(
                    f"got `{name}`={quote(grid)}, expected a list of numbers from 0 to 1e9, such as [900, 500]"
                )
            if any(later >= earlier for earlier, later in itertools.pairwise(grid)):
                raise RequestError(f"got `{name}`={_abbreviate(grid)}, expected descending numbers")

    def skip(self, grid: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return the steps of a grid from `begin` on.

        Raises:
            RequestError: none is left.
        """
        if self.begin >= len(grid):
            raise RequestError(
                f"`begin`: got {self.begin}, but this grid has only {len(grid)} steps; expected at most {len(grid) - 1}"
            )
        return grid[self.begin :]

    def given(self) -> Iterator[str]:
        """Yield the names of the options that are set, except `count` and `begin`, which every sampler uses."""
        for field in fields(self):
            if field.name not in ("count", "begin") and getattr(self, field.name) != field.default:
                yield field.name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _abbreviate(grid: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{each:g}' for each in grid[:8])}{', …' if len(grid) > 8 else ''}]"
