"""RePaint: inpainting with a model that was not trained for it (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865).

What does not fit in a table stands here beside it. After each row the known part of the picture, noised like the rest,
is put in by a mask; and every few steps it goes some back, by adding the noise again, and down once more, so that both
parts come to fit. `inpaint` does all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Latents, Recurrence, Schedule

__all__ = ["RePaint", "inpaint"]


@dataclass(frozen=True, kw_only=True)
class RePaint(TrainedSampler):
    """The table has a row for each model evaluation, and what it says is of the unknown part: DDIM's step with η."""

    title: ClassVar[str] = "RePaint (Lugmayr et al. 2022); inpainting with any model"
    class_name: ClassVar[str] = "RePaintScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"jump_length", "jump_n_sample"})
    exception: ClassVar[str] = "it needs a mask and steps back; `latentrt.sampling.samplers.repaint.inpaint` runs it"

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"  # type: ignore[assignment]  # more than its base
    eta: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    clip_sample: bool = True

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod()
        t = np.array([told for told, _ in self.visits(steps)])
        here = sigmas.at_timesteps(alpha_bar, t, 1.0)
        there = sigmas.at_timesteps(alpha_bar, t - self._stride(steps), 1.0)
        added = self.eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
        alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
        p, q = prediction.x0("epsilon", alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            limit=1.0 if self.clip_sample else np.inf,
            a=0.0,
            d=np.sqrt(1 - there - added**2),
            b=np.sqrt(there)[:, np.newaxis],
            s=np.where(t > 0, added, 0),
            noise_draws=1,
            alpha=alpha,
            sigma=sigma,
        )

    def evaluations(self, count: int) -> int:
        return len(self.visits(Steps(count=min(count, self.num_train_timesteps))))

    def visits(self, steps: Steps) -> list[tuple[int, list[int]]]:
        """Each row's timestep, and those from which it steps back after the row (figure 3 and appendix B)."""
        stride = self._stride(steps)
        jumps = dict.fromkeys(range(0, steps.count - steps.jump_length, steps.jump_length), steps.jump_n_sample - 1)
        rows: list[tuple[int, list[int]]] = []
        t = steps.count - steps.begin
        while t >= 1:
            t -= 1
            rows.append((t * stride, []))
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                rows[-1][1].extend((t + i) * stride for i in range(steps.jump_length))
                t += steps.jump_length
        return rows

    def _stride(self, steps: Steps) -> int:
        return self.num_train_timesteps // steps.count


def inpaint(
    sampler: RePaint,
    steps: Steps,
    latents: Latents,
    original: Latents,
    mask: NDArray[np.float32],
    model: Callable[[np.float32, Latents], Latents],
    noise: Callable[[], Latents],
) -> Generator[Latents, None, None]:
    """Run RePaint, yielding the latents after each row and its steps back.

    Args:
        sampler, steps: what to run.
        latents: standard normal noise, float32 [batch, channels, height, width].
        original: the picture, of the same shape.
        mask: 1 where the original is kept and 0 where it is painted, of a shape that broadcasts to the latents'.
        model: timestep and latents → ε.
        noise: the next draw of standard normal noise in the latents' shape.
    """
    schedule, betas = sampler.schedule(steps), sampler.betas()
    alpha_bar, recurrence = sampler.alphas_cumprod(), Recurrence(schedule)
    stride = sampler.num_train_timesteps // steps.count
    for k, (told, backs) in enumerate(sampler.visits(steps)):
        z = noise()
        unknown = recurrence.step(k, latents, model(schedule.t[k], latents), z)
        there = alpha_bar[told - stride] if told >= stride else np.float32(1)
        known = np.sqrt(there) * original + np.sqrt(1 - there) * z
        latents = mask * known + (1 - mask) * unknown
        for back in backs:
            for beta in betas[back : back + stride]:
                latents = np.sqrt(1 - beta) * latents + np.sqrt(beta) * noise()
        yield latents
