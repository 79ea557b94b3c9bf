"""Where do diffusers' schedulers need more than a loop of `step`, to be looked at from outside?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["BrownianPath", "descents", "levels", "noised", "run_karras_ve"]

Vectors = NDArray[Any]


def descents(timesteps: torch.Tensor) -> torch.Tensor:
    """RePaint's timesteps without those that it steps back to, at which the model is not asked."""
    last = torch.cat([timesteps[:1] + 1, timesteps[:-1]])
    falling: torch.Tensor = timesteps[timesteps < last]
    return falling


def run_karras_ve(
    made: Any, x: Any, model: Callable[[int, Vectors], Vectors], draw: Callable[[], Any]
) -> Iterator[tuple[Vectors, Vectors]]:
    """diffusers' pipeline of this scheduler, but for the 1/2 that it adds to what it shows the model."""
    module, last = sys.modules[type(made).__module__], len(made.timesteps) - 1
    k, shown = 0, np.zeros(0)
    for i, t in enumerate(made.timesteps):
        sigma, following = made.schedule[t], made.schedule[t - 1] if t > 0 else torch.zeros(())
        with mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: draw()):
            raised, sigma_hat = made.add_noise_to_input(x, sigma)
        # The table adds a step's noise with the row before.
        if k:
            yield shown, raised.numpy()
        shown = (raised / 2).numpy()
        output = torch.from_numpy(model(k, shown)) * (sigma_hat / 2)
        stepped, slope = made.step(output, sigma_hat, following, raised, return_dict=False)
        k += 1
        if i == last:
            yield shown, stepped.numpy()
            return
        yield shown, stepped.numpy()
        shown = (stepped / 2).numpy()
        output = torch.from_numpy(model(k, shown)) * (following / 2)
        x = made.step_correct(output, sigma_hat, following, raised, stepped, slope, return_dict=False)[0]
        k += 1


class BrownianPath:
    """In place of `BrownianTreeNoiseSampler`: a path of fresh draws, from which any increment can be read off again."""

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        self._draw = draw
        self._known: list[tuple[float, torch.Tensor]] = []

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = float(sigma), float(sigma_next)
        if not self._known or abs(self._known[0][0] - start) > 1e-9 * start:
            self._known = [(start, torch.zeros(()))]
        at, value = self._known[-1]
        value = value + self._draw() * abs(at - end) ** 0.5
        self._known.append((end, value))
        increment: torch.Tensor = value / abs(start - end) ** 0.5
        return increment


def levels(made: Any, rows: int, begin: int = 0) -> Vectors | None:
    """Noise per signal at every row, float64 of the constants that diffusers rounds to float32; None where a class
    keeps them elsewhere."""
    name = type(made).__name__
    if name in ("KarrasVeScheduler", "IPNDMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"):
        return None
    if name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        return None
    if name == "HeunDiscreteScheduler" or name == "FlowMatchHeunDiscreteScheduler":
        first = np.asarray(made.sigmas[2 * begin :][: rows + 1], np.float64)
        grid = np.concatenate([first[:1], np.repeat(first[1::2], 2)])[:rows]
    elif hasattr(made, "sigmas"):
        grid = np.asarray(made.sigmas[begin:][:rows], np.float64)
    else:
        t = made.timesteps[begin:]
        if name == "DDIMInverseScheduler":
            t = torch.clamp(t - made.config.num_train_timesteps // made.num_inference_steps, max=len(made.betas) - 1)
        alpha_bar = np.asarray(made.alphas_cumprod[t.clamp(min=0)], np.float64)
        if name == "DDIMInverseScheduler":
            alpha_bar = np.where(t.numpy() >= 0, alpha_bar, float(made.initial_alpha_cumprod))
        with np.errstate(divide="ignore"):  # zero SNR
            return np.sqrt((1 - alpha_bar) / alpha_bar)
    flow = name.startswith("FlowMatch") or made.config.get("use_flow_sigmas")
    with np.errstate(divide="ignore"):
        return grid / (1 - grid) if flow else grid


def noised(made: Any, row: int, clean: float, noise: float) -> float | None:
    """Where diffusers puts a clean latent at a row, with noise; None where the class does not say."""
    name, order = type(made).__name__, getattr(made, "order", 1)
    if name in ("RePaintScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler") or (order == 2 and row % 2):
        return None  # nothing begins at a second stage, and diffusers has no level for it
    if hasattr(made, "set_begin_index"):
        made._step_index = None
        made.set_begin_index(row)
    elif int((made.timesteps == made.timesteps[row]).sum()) > 1:
        return None  # looked up by its timestep, of which there are several
    place = getattr(made, "scale_noise", None) or getattr(made, "add_noise", None)
    if place is None:
        return None
    latents, draw = (torch.tensor([[each]], dtype=torch.float64) for each in (clean, noise))
    told = made.timesteps[row]
    result = place(latents, told[None], draw) if hasattr(made, "scale_noise") else place(latents, draw, told[None])
    return float(result)
