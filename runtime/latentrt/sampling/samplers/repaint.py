"""RePaint: inpainting with a model not trained for it (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865).

The table denoises the unknown part. `inpaint` also does what no table can: after each row it replaces the known part of
the image, noised to the same level, and every few steps it goes back to a higher noise level and denoises again, which
harmonises both parts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Latents, Recurrence, Schedule
from latentrt.sampling.sigmas import alpha_bar_at

__all__ = ["RePaint", "inpaint"]


@dataclass(frozen=True, kw_only=True)
class RePaint(TrainedSampler):
    """DDIM's step with η, of the unknown part."""

    title: ClassVar[str] = "RePaint (Lugmayr et al. 2022); inpainting with any model"
    class_name: ClassVar[str] = "RePaintScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"jump_length", "jump_n_sample"})
    unsupported_reason: ClassVar[str] = "it needs a mask and jumps; use latentrt.sampling.samplers.repaint.inpaint"

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"  # type: ignore[assignment]  # more than its base
    eta: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    clip_sample: bool = True

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod()
        t = np.array([timestep for timestep, _ in self.visits(steps)])
        alpha_bar_t = alpha_bar_at(alpha_bar, t, 1.0)
        alpha_bar_prev = alpha_bar_at(alpha_bar, t - self._stride(steps), 1.0)
        noise = self.eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0("epsilon", alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            limit=1.0 if self.clip_sample else np.inf,
            a=0.0,
            d=np.sqrt(1 - alpha_bar_prev - noise**2),
            b=np.sqrt(alpha_bar_prev)[:, np.newaxis],
            s=np.where(t > 0, noise, 0),
            noise_draws=1,
            alpha=alpha,
            sigma=sigma,
        )

    def evaluations(self, count: int) -> int:
        return len(self.visits(Steps(count=min(count, self.num_train_timesteps))))

    def visits(self, steps: Steps) -> list[tuple[int, list[int]]]:
        """Return each row's timestep, and the timesteps whose noise is added again after it (figure 3, appendix B)."""
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
    """Run RePaint and yield the latents after each row and its jump back.

    Args:
        sampler, steps: the sampler and the options of the run.
        latents: standard normal noise, float32 [..., channels, height, width].
        original: the latents of the image, of the same shape.
        mask: 1 where the original is kept and 0 where it is painted, of a shape that broadcasts to the latents'.
        model: timestep and latents → ε.
        noise: returns the next standard normal noise, of the latents' shape.
    """
    schedule, betas = sampler.schedule(steps), sampler.betas()
    alpha_bar, recurrence = sampler.alphas_cumprod(), Recurrence(schedule)
    stride = sampler.num_train_timesteps // steps.count
    for k, (t, jump) in enumerate(sampler.visits(steps)):
        z = noise()
        unknown = recurrence.step(k, latents, model(schedule.t[k], latents), z)
        alpha_bar_prev = alpha_bar[t - stride] if t >= stride else np.float32(1)
        known = np.sqrt(alpha_bar_prev) * original + np.sqrt(1 - alpha_bar_prev) * z
        latents = mask * known + (1 - mask) * unknown
        for start in jump:
            for beta in betas[start : start + stride]:
                latents = np.sqrt(1 - beta) * latents + np.sqrt(beta) * noise()
        yield latents
