"""Which values of which options are combined, to be compared with diffusers?

To add a sampler, add its options to `OPTIONS`: those that change its numbers, with the values to be combined. A value
may be a dict: several keys at once. Names are keys of a configuration and, where a sampler has no such key, attributes
of `Steps`.
"""

from __future__ import annotations

from typing import Any

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

BETAS: list[Any] = [STABLE_DIFFUSION, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
SPACING: dict[str, list[Any]] = {"timestep_spacing": ["leading", "linspace", "trailing"], "steps_offset": [0, 1]}
BEGIN: dict[str, list[Any]] = {"begin": [0, 0, 2]}
RESPACED: list[Any] = [{}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
THREE: list[Any] = ["epsilon", "v_prediction", "sample"]
THRESHOLD: list[Any] = [{}, {}, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6}]
CLIP: list[Any] = [{"clip_sample": False}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.8}]
CHURN: list[Any] = [{}, {}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.003}, {"s_churn": 900.0}]
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True, "mu": 0.7}
LEVELS: list[Any] = [*RESPACED, FLOW]
ALGORITHMS: list[Any] = [
    {"algorithm_type": "dpmsolver++"},
    {"algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
]
ORDERS: list[Any] = [1, 2, 3]
SOLVERS: list[Any] = ["midpoint", "heun"]
FINAL: list[Any] = ["zero", "sigma_min"]
DISTILLED: dict[str, list[Any]] = {
    "betas": BETAS,
    "prediction_type": THREE,
    "original": [{}, {"original_inference_steps": 100}],
    "rescale_betas_zero_snr": [False, True],
    "clip": CLIP,
    "threshold": THRESHOLD,
    "timestep_scaling": [10.0, 2.0],
    "run": [{}, {}, {"strength": 0.6}, {"timesteps": (999, 499, 259, 99)}],
    **BEGIN,
}
FLOW_MATCH: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 1200],
    "shift": [1.0, 3.0],
    "shift_terminal": [None, 0.1],
    "dynamic": [{}, DYNAMIC, DYNAMIC | {"time_shift_type": "linear"}],
    "respaced": RESPACED,
    "invert_sigmas": [False, False, True],
    "grid": [{}, {}, {}, {"sigmas": (1.0, 0.7, 0.2)}, {"timesteps": (1000.0, 600.0, 50.0)}],
    **BEGIN,
}

OPTIONS: dict[str, dict[str, list[Any]]] = {
    "ddim": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [False, True],
        "eta": [0.0, 0.5, 1.0],
        "clip": CLIP,
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "ddim_inverse": {
        "betas": BETAS,
        "timestep_spacing": ["leading", "trailing"],
        "steps_offset": [0, 1],
        "prediction_type": THREE,
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [False, True],
        "clip": CLIP,
    },
    "ddpm": {
        "betas": [*BETAS, {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}],
        **SPACING,
        "prediction_type": THREE,
        "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
        "rescale_betas_zero_snr": [False, True],
        "clip": CLIP,
        "threshold": THRESHOLD,
        "timesteps": [None, None, (999, 500, 20)],
        **BEGIN,
    },
    "pndm": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": ["epsilon", "v_prediction"],
        "set_alpha_to_one": [True, False],
        "skip_prk_steps": [True, False],
    },
    "euler": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": [*THREE, "original_sample"],
        "rescale_betas_zero_snr": [False, True],
        "final_sigmas_type": FINAL,
        "interpolation_type": ["linear", "log_linear"],
        "timestep_type": ["discrete", "continuous"],
        "respaced": RESPACED,
        "ends": [{}, {"sigma_min": 0.1}, {"sigma_max": 10.0}],
        "churn": CHURN,
        "grid": [{}, {}, {}, {"timesteps": (999.0, 500.5, 20.0)}, {"sigmas": (14.0, 3.0, 0.5, 0.0)}],
        **BEGIN,
    },
    "euler_a": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": ["epsilon", "v_prediction"],
        "rescale_betas_zero_snr": [False, True],
        **BEGIN,
    },
    "heun": {
        "betas": [*BETAS, {"beta_schedule": "exp"}],
        **SPACING,
        "prediction_type": THREE,
        "respaced": RESPACED,
        "clip": CLIP,
        "timesteps": [None, None, (999.0, 500.5, 20.0)],
        **BEGIN,
    },
    "dpm2": {"betas": BETAS, **SPACING, "prediction_type": THREE[:2], "respaced": RESPACED, **BEGIN},
    "dpm2_a": {"betas": BETAS, **SPACING, "prediction_type": THREE[:2], "respaced": RESPACED, **BEGIN},
    "lms": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "respaced": RESPACED,
        "order": [4, 3, 2, 1],
    },
    "dpmpp_sde": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE[:2],
        "respaced": RESPACED,
        "s_noise": [1.0, 0.7],
        **BEGIN,
    },
    "dpmpp_2m": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "rescale_betas_zero_snr": [False, True],
        "levels": [*LEVELS, FLOW | DYNAMIC, {"use_lu_lambdas": True}, {"timesteps": (999, 500, 20)}],
        "algorithm": ALGORITHMS,
        "solver_type": [*SOLVERS, "bh2"],
        "solver_order": [2, 3, 1],
        "euler_at_final": [False, True],
        "lower_order_final": [True, False],
        "lambda_min_clipped": [-float("inf"), -float("inf"), -2.0],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "dpmpp_2m_inverse": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "levels": LEVELS,
        "algorithm_type": ["dpmsolver++", "dpmsolver"],
        "solver_type": SOLVERS,
        "solver_order": ORDERS,
        "euler_at_final": [False, True],
        "lower_order_final": [True, False],
        "lambda_min_clipped": [-float("inf"), -2.0],
        "threshold": THRESHOLD,
    },
    "dpmpp_2s": {
        "betas": BETAS,
        "prediction_type": THREE,
        "levels": [*LEVELS, FLOW | DYNAMIC, {"timesteps": (999, 500, 20)}],
        "algorithm": [*ALGORITHMS[:5], {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"}],
        "solver_type": SOLVERS,
        "solver_order": ORDERS,
        "lower_order_final": [True, False],
        "lambda_min_clipped": [-float("inf"), -2.0],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "deis": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "levels": [*LEVELS, FLOW | DYNAMIC],
        "solver_order": ORDERS,
        "lower_order_final": [True, False],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "unipc": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "rescale_betas_zero_snr": [False, True],
        "levels": [
            *LEVELS,
            FLOW | DYNAMIC,
            FLOW | {"shift_terminal": 0.1},
            FLOW | {"sigmas": (1.0, 0.6, 0.2)},
            FLOW | {"use_karras_sigmas": True},
        ],
        "unknown": [{}, {"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "predict_x0": False}],
        "solver_type": ["bh1", "bh2", "heun"],
        "solver_order": [2, 3, 1],
        "lower_order_final": [True, True, False],
        "disable_corrector": [[], [0, 2]],
        "ends": [{}, {"sigma_min": 0.1, "sigma_max": 10.0}],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "sa_solver": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "levels": LEVELS,
        "algorithm_type": ["data_prediction", "data_prediction", "noise_prediction"],
        "predictor_order": [2, 1, 3],
        "corrector_order": [2, 1, 3, 4],
        "lower_order_final": [True, False],
        "lambda_min_clipped": [-float("inf"), -2.0],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "lcm": DISTILLED,
    "tcd": DISTILLED | {"eta": [None, 0.0, 0.7], "clip": [{}], "threshold": [{}]},
    "unclip": {"num_train_timesteps": [1000, 100], "prediction_type": ["epsilon", "sample"], "clip": CLIP, **BEGIN},
    "repaint": {
        "betas": [*BETAS, {"beta_schedule": "sigmoid"}],
        "eta": [0.0, 0.5, 1.0],
        "clip": [{"clip_sample": False}, {"clip_sample": True}],
        "jumps": [{}, {"jump_length": 3, "jump_n_sample": 2}],
    },
    "ipndm": {"num_train_timesteps": [1000, 10], "trained_betas": [None, None, [1.0, 0.8, 0.5, 0.2]], **BEGIN},
    "consistency": {
        "num_train_timesteps": [40, 151],
        "ends": [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0}],
        "s_noise": [1.0, 0.8],
        "rho": [7.0, 3.0],
        "clip": [{"clip_denoised": False}, {"clip_denoised": True}],
        "timesteps": [None, None, (30, 17, 2)],
        **BEGIN,
    },
    "edm_euler": {
        "ends": [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0}],
        "sigma_schedule": ["karras", "exponential"],
        "prediction_type": ["epsilon", "v_prediction"],
        "rho": [7.0, 3.0],
        "final_sigmas_type": FINAL,
        "churn": CHURN,
        **BEGIN,
    },
    "edm_dpmpp_2m": {
        "ends": [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0}],
        "sigma_schedule": ["karras", "exponential"],
        "prediction_type": ["epsilon", "v_prediction"],
        "rho": [7.0, 3.0],
        "final_sigmas_type": FINAL,
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
        "solver_type": SOLVERS,
        "solver_order": ORDERS,
        "euler_at_final": [False, True],
        "lower_order_final": [True, False],
        "threshold": THRESHOLD,
        **BEGIN,
    },
    "flow_euler": FLOW_MATCH | {"stochastic_sampling": [False, True]},
    "flow_heun": {"num_train_timesteps": [1000, 200], "shift": [1.0, 3.0], "churn": CHURN, **BEGIN},
    "flow_lcm": FLOW_MATCH,
    "karras_ve": {
        "ends": [{}, {"sigma_min": 0.1, "sigma_max": 20.0}],
        "churn": [{}, {"s_churn": 20.0, "s_noise": 1.1}, {"s_min": 0.5, "s_max": 500.0}],
    },
    "sde_ve": {"ends": [{}, {"sigma_min": 0.1, "sigma_max": 50.0}], "sampling_eps": [1e-5, 1e-3], **BEGIN},
    "sde_vp": {"betas": [{}, {"beta_min": 0.2, "beta_max": 12.0}], "sampling_eps": [1e-3, 1e-2], **BEGIN},
}
