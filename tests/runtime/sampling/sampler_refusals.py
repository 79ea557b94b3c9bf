"""Which options of samplers are to be refused?"""

from __future__ import annotations

from typing import Any

from latentrt.sampling import samplers
from tests.runtime.sampling.sampler_grid import Case, combined
from tests.runtime.sampling.sampler_values import FLOW, STABLE_DIFFUSION

__all__ = ["REFUSED", "STRICTER", "refused"]

# What is refused here and not by diffusers, which goes on to NaN or passes over what it was told.
STRICTER = (
    "says nothing of the picture",
    "where a picture says nothing of it",
    "between which there is no slope",
    "the grid of UnCLIP has",
    "'fixed_large_log', which DDPMScheduler cannot honour",
    "says variance_type: 'learned'",
    "says variance_type: 'fixed_small', which UnCLIPScheduler cannot",
    "'sde-dpmsolver++', which DPMSolverMultistepInverseScheduler cannot honour",
    "along a flow sigma is at most 1",
    "found use_lu_lambdas and use_",
    "found use_flow_sigmas and other levels",
    "found timesteps and use_flow_sigmas",
    "found sigmas and use_",
    "a last level of zero",
    "two steps at the same noise level",
    "no table of finite numbers",
    "found shift_terminal and a single step",
    "found mu",
    "noise levels that rise",
    "at least 2: the grid has the highest and the lowest level",
    "but training has only up to",
    "steps, but",
    "found a step at timestep",
    "found begin",
    "trained_betas, expected",
    "within s_min … s_max",
    "says solver_order: 4",
)

BOTH = {"use_karras_sigmas": True, "use_beta_sigmas": True}
# What is to be refused, each beside nothing else.
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
    "karras_ve": [{"s_max": 1e9}],
}  # fmt: skip


def refused(name: str) -> list[Case]:
    """Combinations that are to be refused, each but for one thing as Stable Diffusion has it."""
    base = STABLE_DIFFUSION if hasattr(samplers.SAMPLERS[name], "beta_start") else {}
    return [combined(name, {"betas": base, "wrong": wrong}) for wrong in REFUSED.get(name, [])]
