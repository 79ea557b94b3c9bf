"""DPM-Solver++ multistep for EDM models (Lu et al. 2022, arXiv:2211.01095; Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.dpm_solver import Algorithm, check_final_sigma, multistep_weights, solver_step
from latentrt.sampling.samplers.edm import EDM
from latentrt.sampling.samplers.log_snr import NoiseGrid, step_orders
from latentrt.sampling.samplers.options import Thresholding
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import linspace_float32

__all__ = ["EDMDPMSolverMultistep"]


@dataclass(frozen=True, kw_only=True)
class EDMDPMSolverMultistep(Thresholding, EDM):
    """DPM-Solver++ with α = 1, so that λ = −log σ."""

    title: ClassVar[str] = "DPM-Solver++ multistep for EDM models"
    class_name: ClassVar[str] = "EDMDPMSolverMultistepScheduler"

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def table(self, steps: Steps) -> Schedule:
        check_final_sigma(self.algorithm_type, self.final_sigmas_type)
        algorithm: Algorithm = "sde-dpmsolver++" if self.algorithm_type == "sde-dpmsolver++" else "dpmsolver++"
        zero = self.final_sigmas_type == "zero"
        final = 0.0 if zero else np.float32(self.sigma_min)
        sigmas = np.append(self.sigmas(linspace_float32(0, 1, steps.count)), final)[steps.begin :]
        grid = NoiseGrid(sigmas, np.ones_like(sigmas), sigmas)
        order = step_orders(
            steps,
            len(sigmas) - 1,
            self.solver_order,
            lower_final=self.lower_order_final,
            first_at_end=self.euler_at_final or zero,
        )
        if algorithm == "sde-dpmsolver++" and np.any(order == 3):
            raise RequestError(
                "got `algorithm_type` 'sde-dpmsolver++' with `solver_order` 3, which has no formula for EDM models; "
                "set `solver_order` to 2"
            )
        h = grid.h
        step = solver_step(algorithm, grid.after(), h, np.ones_like(h), sigmas[1:] / sigmas[:-1])
        p, q = self.x0(sigmas[:-1])
        return Schedule.of(
            p=p,
            q=q,
            **self.limits(),
            a=step.x,
            b=multistep_weights(step, "heun" if self.solver_type == "heun" else "midpoint", h, order),
            s=step.noise,
            noise_draws=int(algorithm.startswith("sde")),
            **self.input_columns(sigmas[:-1]),
        )
