"""What is asked of a sampler for one run?

A sampler's own options come from a checkpoint and stay; these come with each request. Their names are those of the
arguments of diffusers' `set_timesteps` and `step`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

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
    "count": (1, None),
    "begin": (0, None),
    "order": (1, 12),  # each remembers another latent
    "original_inference_steps": (1, None),
    "jump_length": (1, 1000),
    "jump_n_sample": (1, 100),
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What to do, in how many steps, from where.

    Attributes:
        count: how many steps; where timesteps or sigmas are given, as many as those make.
        begin: how many of them to leave out at the noisy end (image to image: `strength` 0.6 of 50 steps begins at 20).
            The first row is then where the table's alpha and sigma place a clean latent.
        timesteps, sigmas: the grid itself, in place of the one that `count` and the configuration make; descending.
        mu: the logarithm of a flow's shift, where the configuration has `use_dynamic_shifting`: larger pictures want
            more. `samplers.flow.mu_of` gives it for a number of image tokens.
        eta: how much fresh noise, 0 to 1; None leaves it to the sampler (0 for DDIM, 0.3 for TCD).
        s_churn, s_tmin, s_tmax, s_noise: Karras et al. 2022, algorithm 2: noise that is added at levels between both.
        order: of the linear multistep method.
        original_inference_steps: how many steps a distilled model was trained on; None leaves it to the configuration.
        strength: of image to image with a distilled model (LCM, TCD), whose grid depends on it.
        jump_length, jump_n_sample: of RePaint: how many steps it goes back, and how often it goes forth.
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
            if not whole or value < least or (most is not None and value > most):
                shown = "num_inference_steps" if name == "count" else name
                wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
                raise RequestError(f"found {shown} {value!r}, expected a whole number {wanted}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if (value is None and name in optional) or (_is_number(value) and low <= value <= high):
                continue
            wanted = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
            raise RequestError(f"found {name} {value!r}, expected {wanted}")
        if self.begin >= self.count:
            raise RequestError(f"found begin {self.begin} of {self.count} steps, expected at most {self.count - 1}")
        self._check_grid()

    def _check_grid(self) -> None:
        if self.timesteps is not None and self.sigmas is not None:
            raise RequestError("found both timesteps and sigmas, expected at most one of them")
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
                    f"{name}: found {grid!r}, expected a list of numbers from 0 to 1e9, such as [900, 500]"
                )
            if any(later >= earlier for earlier, later in itertools.pairwise(grid)):
                raise RequestError(f"{name}: found {_shown(grid)}, expected them to descend")

    def rest(self, grid: NDArray[Scalar]) -> NDArray[Scalar]:
        """What of a grid's steps is left from `begin` on.

        Raises:
            RequestError: nothing would be left.
        """
        if self.begin >= len(grid):
            raise RequestError(f"found begin {self.begin} of the {len(grid)} steps that this grid has; begin earlier")
        return grid[self.begin :]

    def given(self) -> Iterator[str]:
        """The names of what was asked beyond a number of steps and a beginning, which every sampler takes."""
        for field in fields(self):
            if field.name not in ("count", "begin") and getattr(self, field.name) != field.default:
                yield field.name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(grid: tuple[float, ...]) -> str:
    return ", ".join(f"{each:g}" for each in grid[:8]) + (", …" if len(grid) > 8 else "")
