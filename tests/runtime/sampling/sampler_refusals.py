"""Combinations of options that are errors."""

from __future__ import annotations

from typing import Any

from latentrt.sampling import samplers
from tests.runtime.sampling.sampler_grid import FLOW, STABLE_DIFFUSION, Case, combine

__all__ = ["REFUSED", "refused"]

BOTH = {"use_karras_sigmas": True, "use_beta_sigmas": True}
# Each on its own is an error.
REFUSED: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"beta_schedule": "sigmoid"}, {"timestep_spacing": "leadng"}, {"s_churn": 1.0}],
    "ddim_inverse": [{"timestep_spacing": "linspace"}],
    "ddpm": [{"variance_type": "fixed_large_log"}, {"variance_type": "learned"}, {"timesteps": (20, 500)},
             {"timesteps": (1000, 500)}],
    "pndm": [{"prediction_type": "sample"}],
    "euler": [BOTH, {"use_karras_sigmas": True, "timesteps": (999.0, 20.0)}, {"timestep_spacing": "x"},
              {"timesteps": (999.0,), "sigmas": (14.0, 0.0)}, {"interpolation_type": "cubic"}],
    "euler_a": [{"prediction_type": "sample"}],
    "heun": [BOTH, {"use_beta_sigmas": True, "timesteps": (999.0, 20.0)}, {"beta_schedule": "laplace"}],
    "dpm2": [BOTH, {"prediction_type": "sample"}],
    "dpm2_a": [BOTH, {"prediction_type": "sample"}],
    "lms": [BOTH, {"beta_schedule": "exp"}],
    "dpmpp_sde": [BOTH, {"prediction_type": "sample"}],
    "dpmpp_2m": [
        BOTH, {"algorithm_type": "dpmsolver"}, {"algorithm_type": "sde-dpmsolver"}, {"algorithm_type": "deis"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "unipc"}, {"solver_type": "rk4"}, {"solver_order": 4}, {"mu": 0.7},
        {"use_lu_lambdas": True, "timesteps": (999, 20)}, FLOW | {"timesteps": (999, 20)}, FLOW | BOTH,
        FLOW | {"use_karras_sigmas": True}, {"prediction_type": "x0"}, {"final_sigmas_type": "one"},
        FLOW | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, FLOW | {"use_lu_lambdas": True},
    ],
    "dpmpp_2m_inverse": [BOTH, {"algorithm_type": "sde-dpmsolver++"}, FLOW | {"use_beta_sigmas": True}],
    "dpmpp_2s": [
        BOTH, {"algorithm_type": "dpmsolver"}, {"algorithm_type": "deis"}, {"algorithm_type": "sde-dpmsolver"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
        FLOW | {"timesteps": (999, 20)}, FLOW | {"use_exponential_sigmas": True}, {"mu": 0.7},
    ],
    "deis": [BOTH, {"algorithm_type": "unipc"}, {"solver_type": "rk4"}, {"mu": 0.7},
             FLOW | {"use_karras_sigmas": True}],
    "unipc": [
        BOTH, {"shift_terminal": 0.1}, {"sigmas": (1.0, 0.5)}, FLOW | {"use_dynamic_shifting": True}, {"mu": 0.7},
        {"lower_order_final": False}, {"predict_x0": False}, FLOW | {"use_beta_sigmas": True},
        FLOW | {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    ],
    "sa_solver": [BOTH, {"algorithm_type": "noise_prediction", "thresholding": True}, FLOW | {"use_beta_sigmas": True},
                  FLOW | {"algorithm_type": "noise_prediction"}],
    "lcm": [{"original_inference_steps": 2000}, {"original_inference_steps": 3}, {"timesteps": (1000, 1)},
            {"timesteps": (1, 500)}],
    "tcd": [{"num_train_timesteps": 40}, {"original_inference_steps": 3}, {"timesteps": (1000, 1)}],
    "unclip": [{"prediction_type": "v_prediction"}, {"variance_type": "fixed_small"}, {"beta_schedule": "linear"}],
    "repaint": [{"beta_schedule": "laplace"}],
    "ipndm": [{"trained_betas": [1.0, 0.5]}],
    "consistency": [{"timesteps": (40, 1)}, {"timesteps": (1, 2)}],
    "edm_euler": [{"prediction_type": "sample"}, {"sigma_schedule": "linear"}, {"final_sigmas_type": "x"}],
    "edm_dpmpp_2m": [{"prediction_type": "sample"}, {"algorithm_type": "deis"}, {"algorithm_type": "dpmsolver"},
                     {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": False}],
    "flow_euler": [BOTH, {"use_dynamic_shifting": True}, {"mu": 0.7}, {"time_shift_type": "cubic"}],
    "flow_lcm": [BOTH, {"use_dynamic_shifting": True}, {"mu": 0.7}],
    "flow_heun": [{"timesteps": (500.0, 20.0)}, {"mu": 0.7}],
    "karras_ve": [{"s_max": 1e9}],
    "sde_ve": [{"timesteps": (1.0, 0.5)}],
    "sde_vp": [{"timesteps": (1.0, 0.5)}],
}  # fmt: skip


def refused(name: str) -> list[Case]:
    """Return the cases that are errors, otherwise configured as Stable Diffusion."""
    base = STABLE_DIFFUSION if hasattr(samplers.SAMPLERS[name], "beta_start") else {}
    return [combine(name, {"betas": base, "wrong": wrong}) for wrong in REFUSED[name]]
