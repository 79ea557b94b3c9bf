"""Euler's method for EDM models (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.edm import EDM
from latentrt.sampling.samplers.euler import euler_columns
from latentrt.sampling.samplers.k_diffusion import add_churn
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["EDMEuler"]


@dataclass(frozen=True, kw_only=True)
class EDMEuler(EDM):
    """x' = x̂ + (σ' − σ̂)(x̂ − x0) / σ̂, where x̂ is x with noise added up to σ̂ (`s_churn`)."""

    title: ClassVar[str] = "Euler for EDM models (Karras et al. 2022)"
    class_name: ClassVar[str] = "EDMEulerScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"s_churn", "s_tmin", "s_tmax", "s_noise"})

    def table(self, steps: Steps) -> Schedule:
        grid = self.sigmas(np.linspace(0, 1, steps.count))
        sigmas = np.append(grid, 0.0 if self.final_sigmas_type == "zero" else grid[-1])[steps.begin :]
        sigma_hat = add_churn(sigmas[:-1], steps, steps.count)
        p, q = self.x0(sigma_hat)
        return Schedule.of(p=p, q=q, **euler_columns(sigmas, sigma_hat, p, steps), **self.input_columns(sigmas[:-1]))
