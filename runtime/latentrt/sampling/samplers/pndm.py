"""PNDM: pseudo numerical methods for diffusion models (Liu et al. 2022, https://arxiv.org/abs/2202.09778).

Formula 9 transfers latents from one timestep to another along a given ε. The outputs of several evaluations are
averaged first, after Adams-Bashforth; the first steps are Runge-Kutta, or with `skip_prk_steps` of lower order
(Katherine Crowson's PLMS).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.multistep import ADAMS_BASHFORTH
from latentrt.sampling.samplers.options import StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, alpha_bar_at

__all__ = ["PNDM"]

RUNGE_KUTTA = {3: 1 / 6, 2: 1 / 3, 1: 1 / 3, 0: 1 / 6}
WARM_UP_STEPS = 3  # of four evaluations each


class _Row(NamedTuple):
    """One evaluation at timestep `t`, and a transfer from timestep `start` to `end` by formula 9.

    The transfer starts from the latents of `back` rows ago, with the outputs of j rows ago weighted by `weights[j]`.
    """

    t: int
    start: int
    end: int
    weights: dict[int, float]
    back: int = 0


@dataclass(frozen=True, kw_only=True)
class PNDM(TrainedSampler):
    """The history holds model outputs: diffusers averages them as they are, and computes ε from the average."""

    title: ClassVar[str] = "PNDM (Liu et al. 2022)"
    class_name: ClassVar[str] = "PNDMScheduler"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: StepsOffset = 0
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod()
        final = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        rows = self._rows(steps)
        t, start, end = (np.array([row[i] for row in rows]) for i in range(3))
        gain_x, gain_m = self._transfer(alpha_bar_at(alpha_bar, start, final), alpha_bar_at(alpha_bar, end, final))
        a, e, b = _columns(rows, gain_x, gain_m)
        alpha_bar_t = alpha_bar_at(alpha_bar, t, final)
        return Schedule.of(t=t, p=0.0, q=1.0, a=a, e=e, b=b, alpha=np.sqrt(alpha_bar_t), sigma=np.sqrt(1 - alpha_bar_t))

    def evaluations(self, count: int) -> int:
        if self.skip_prk_steps:
            return count + (count > 1)
        return count + 3 * WARM_UP_STEPS

    def _rows(self, steps: Steps) -> list[_Row]:
        step = self.num_train_timesteps // steps.count
        if self.skip_prk_steps:
            whole = self.whole_timesteps(replace(steps, begin=0), self.timestep_spacing, self.steps_offset).tolist()
            return list(_plms([*whole[:2], *whole[1:]][steps.begin :], step))
        grid = self.whole_timesteps(steps, self.timestep_spacing, self.steps_offset).tolist()
        if len(grid) <= WARM_UP_STEPS:
            raise RequestError(
                f"got {len(grid)} steps (`num_inference_steps`), but PNDM's Runge-Kutta warm-up needs at least "
                f"{WARM_UP_STEPS + 1}; use more, or set `skip_prk_steps`"
            )
        return list(_runge_kutta(grid, step))

    def _transfer(self, start: NDArray[np.float64], end: NDArray[np.float64]) -> prediction.Pair:
        """Return formula 9 as the pair (A, B) of A·x + B·m, from ᾱ `start` to ᾱ `end`."""
        gain_epsilon = (start - end) / (start * np.sqrt(1 - end) + np.sqrt(start * (1 - start) * end))
        p, q = prediction.epsilon(self.prediction_type, np.sqrt(start), np.sqrt(1 - start))
        return np.sqrt(end / start) + gain_epsilon * p, gain_epsilon * q


def _plms(timesteps: list[int], step: int) -> Iterator[_Row]:
    """Yield the rows of PLMS: the first step twice, the second time along the mean of the outputs at both its ends.

    Only the first of the two outputs enters the history. `timesteps` has the second one twice. A run that begins in the
    middle takes what is left of that list, as diffusers does: two timesteps then share the first step, and each later
    row starts from latents that belong to the timestep before its own.
    """
    yield _Row(timesteps[0], timesteps[0], timesteps[0] - step, {0: 1})
    for t in timesteps[1:2]:
        yield _Row(t, t + step, t, {0: 1 / 2, 1: 1 / 2}, back=1)
    yield from _multistep(timesteps[2:], step, kept=[0], index=2)


def _runge_kutta(grid: list[int], step: int) -> Iterator[_Row]:
    """Yield the rows of three classical Runge-Kutta steps, of four evaluations each, and of Adams-Bashforth steps.

    The first output of each four enters the history.
    """
    for early, late in pairwise(grid[: WARM_UP_STEPS + 1]):
        middle = late + step // 2
        yield _Row(early, early, early - step // 2, {0: 1})
        yield _Row(middle, early, middle, {0: 1}, back=1)
        yield _Row(middle, early, late, {0: 1}, back=2)
        yield _Row(late, early, late, RUNGE_KUTTA, back=3)
    yield from _multistep(grid[WARM_UP_STEPS:], step, kept=[0, 4, 8], index=4 * WARM_UP_STEPS)


def _multistep(grid: list[int], step: int, kept: list[int], index: int) -> Iterator[_Row]:
    """Yield the Adams-Bashforth rows from row `index` on, over the last four outputs; at first those of rows `kept`."""
    for k, t in enumerate(grid, index):
        kept = [*kept, k][-len(ADAMS_BASHFORTH) :]
        weights = ADAMS_BASHFORTH[len(kept) - 1]
        yield _Row(t, t, t - step, {k - j: weight for j, weight in zip(reversed(kept), weights, strict=True)})


def _columns(
    rows: list[_Row], gain_x: NDArray[np.float64], gain_m: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the columns a, e and b of rows that are A·(the latents `back` rows ago) + B·(the weighted outputs)."""
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
            # x_{k−1} = A·x + B·h_{k−2} follows from the latents x needed here, so x = (x_{k−1} − B·h_{k−2}) / A.
            e[k] = gain_x[k] / gain_x[k - 2]
            b[k, 2] -= e[k] * gain_m[k - 2]
    return a, e, b
