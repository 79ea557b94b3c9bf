"""PNDM: pseudo numerical methods for diffusion models (Liu et al. 2022, https://arxiv.org/abs/2202.09778).

Formula 9 carries a latent from one timestep to another along a given ε. The outputs of several evaluations are
averaged first: after Adams and Bashforth, and at the start either not at all (Katherine Crowson's PLMS,
`skip_prk_steps`) or after Runge and Kutta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["PNDM"]

ADAMS_BASHFORTH = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
RUNGE_KUTTA = {3: 1 / 6, 2: 1 / 3, 1: 1 / 3, 0: 1 / 6}
WARM_UP_STEPS = 3  # of four evaluations each


class _Row(NamedTuple):
    """One evaluation: the model is told `told`; then formula 9 goes from `start` to `end`.

    It goes from the latent of `back` rows ago, with the outputs of j rows ago weighted by `weights[j]`.
    """

    told: int
    start: int
    end: int
    weights: dict[int, float]
    back: int = 0


@dataclass(frozen=True, kw_only=True)
class PNDM(TrainedSampler):
    """The model's outputs are remembered: diffusers averages them as they are, then reads ε off the average."""

    title: ClassVar[str] = "PNDM (Liu et al. 2022)"
    class_name: ClassVar[str] = "PNDMScheduler"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: sigmas.Spacing = "leading"
    steps_offset: StepsOffset = 0
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod()
        final = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        rows = self._rows(steps)
        told, start, end = (np.array([row[i] for row in rows]) for i in range(3))
        gain_x, gain_m = self._transfer(
            sigmas.at_timesteps(alpha_bar, start, final), sigmas.at_timesteps(alpha_bar, end, final)
        )
        a, e, b = _columns(rows, gain_x, gain_m)
        here = sigmas.at_timesteps(alpha_bar, told, final)
        return Schedule.of(t=told, p=0.0, q=1.0, a=a, e=e, b=b, alpha=np.sqrt(here), sigma=np.sqrt(1 - here))

    def evaluations(self, count: int) -> int:
        if self.skip_prk_steps:
            return count + (count > 1)
        return count + 3 * WARM_UP_STEPS

    def _rows(self, steps: Steps) -> list[_Row]:
        count = steps.count
        grid = self.whole_timesteps(steps, self.timestep_spacing, self.steps_offset).tolist()
        step = self.num_train_timesteps // count
        if self.skip_prk_steps:
            return list(_plms(grid, step))
        if len(grid) <= WARM_UP_STEPS:
            raise RequestError(
                f"found {len(grid)} steps, but the Runge-Kutta warm-up of PNDM needs at least {WARM_UP_STEPS + 1}; "
                "ask for more, or set skip_prk_steps in the scheduler's configuration"
            )
        return list(_runge_kutta(grid, step))

    def _transfer(self, here: NDArray[np.float64], there: NDArray[np.float64]) -> prediction.Pair:
        """Formula 9 as the pair (A, B) of A·x + B·m, from ᾱ `here` to ᾱ `there`."""
        along_epsilon = (here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there))
        p, q = prediction.epsilon(self.prediction_type, np.sqrt(here), np.sqrt(1 - here))
        return np.sqrt(there / here) + along_epsilon * p, along_epsilon * q


def _plms(grid: list[int], step: int) -> Iterator[_Row]:
    """The first step is taken twice, the second time along the mean of both ends' outputs.

    Only the first of the two is remembered.
    """
    yield _Row(grid[0], grid[0], grid[0] - step, {0: 1})
    for told in grid[1:2]:
        yield _Row(told, told + step, told, {0: 1 / 2, 1: 1 / 2}, back=1)
    yield from _multistep(grid[1:], step, kept=[0], index=2)


def _runge_kutta(grid: list[int], step: int) -> Iterator[_Row]:
    """Three steps of the classical method, of whose outputs the first of each four are remembered."""
    for early, late in pairwise(grid[: WARM_UP_STEPS + 1]):
        middle = late + step // 2
        yield _Row(early, early, early - step // 2, {0: 1})
        yield _Row(middle, early, middle, {0: 1}, back=1)
        yield _Row(middle, early, late, {0: 1}, back=2)
        yield _Row(late, early, late, RUNGE_KUTTA, back=3)
    yield from _multistep(grid[WARM_UP_STEPS:], step, kept=[0, 4, 8], index=4 * WARM_UP_STEPS)


def _multistep(grid: list[int], step: int, kept: list[int], index: int) -> Iterator[_Row]:
    """The Adams-Bashforth method, from row `index` on, over this row's output and the last three that were kept."""
    for k, told in enumerate(grid, index):
        kept = [*kept, k][-len(ADAMS_BASHFORTH) :]
        weights = ADAMS_BASHFORTH[len(kept) - 1]
        yield _Row(told, told, told - step, {k - j: weight for j, weight in zip(reversed(kept), weights, strict=True)})


def _columns(
    rows: list[_Row], gain_x: NDArray[np.float64], gain_m: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The columns a, e and b of rows that are A·(the latent `back` rows ago) + B·(the weighted outputs)."""
    a, e = np.zeros((2, len(rows)))
    b = np.zeros((len(rows), 1 + max(max(row.weights) for row in rows)))
    for k, row in enumerate(rows):
        for j, weight in row.weights.items():
            b[k, j] = gain_m[k] * weight
        if row.back == 0:
            a[k] = gain_x[k]
        elif row.back == 1:
            e[k] = gain_x[k]
        else:
            # x_{k−1} = A·x + B·h_{k−2} was made of the latent x that is wanted, so x = (x_{k−1} − B·h_{k−2}) / A.
            e[k] = gain_x[k] / gain_x[k - 2]
            b[k, 2] -= e[k] * gain_m[k - 2]
    return a, e, b
