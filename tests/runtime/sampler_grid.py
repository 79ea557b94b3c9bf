"""Which combinations of options are compared with diffusers?

To add a sampler, add its options to `OPTIONS`: those that change its numbers, with the values to be combined. A value
may be a dict: several keys at once. Names are keys of a configuration and, where a sampler has no such key, attributes
of `Steps`.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from latentrt import samplers
from latentrt.samplers import Steps

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

BETAS: list[Any] = [STABLE_DIFFUSION, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
SPACING = {"timestep_spacing": ["leading", "linspace", "trailing"], "steps_offset": [0, 1]}
BEGIN = {"begin": [0, 0, 2]}
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

MOST = 60  # combinations of a sampler, where all of them would be more


@dataclass(frozen=True)
class Case:
    """A combination: a configuration and what is asked beside a number of steps."""

    name: str
    config: Mapping[str, Any]
    asked: Mapping[str, Any]

    @property
    def linear(self) -> bool:
        """Whether nothing is clipped, so that basis vectors say all."""
        return not any(self.config.get(key) for key in ("thresholding", "clip_sample", "clip_denoised"))

    def steps(self, count: int) -> Steps:
        """All that is asked; where a grid is given it decides how many."""
        for key, spare in (("timesteps", 0), ("sigmas", samplers.SAMPLERS[self.name].sigmas_end)):
            if self.asked.get(key):
                count = len(self.asked[key]) - spare
        asked = dict(self.asked)
        asked["begin"] = min(asked.get("begin", 0), count - 1)
        return Steps(count=count, **asked)


@functools.cache
def cases(name: str) -> tuple[Case, ...]:
    """The combinations of a sampler's options, always the same ones: all, or such that every two values meet."""
    options = OPTIONS[name]
    keys, values = list(options), list(options.values())
    if _size(values) <= MOST:
        chosen = list(itertools.product(*(range(len(each)) for each in values)))
    else:
        chosen = list(_pairwise([len(each) for each in values], random.Random(0)))
    made = (_case(name, {key: options[key][i] for key, i in zip(keys, row, strict=True)}) for row in chosen)
    return tuple(made)


def refused(name: str) -> list[Case]:
    """Combinations that are to be refused, each but for one thing as Stable Diffusion has it."""
    base = STABLE_DIFFUSION if hasattr(samplers.SAMPLERS[name], "beta_start") else {}
    return [_case(name, {"betas": base, "wrong": wrong}) for wrong in REFUSED.get(name, [])]


def _size(values: list[list[Any]]) -> int:
    size = 1
    for each in values:
        size *= len(each)
    return size


def _case(name: str, row: Mapping[str, Any]) -> Case:
    known = {each.name for each in fields(samplers.SAMPLERS[name])}
    config: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for key, value in row.items():
        for each, wanted in value.items() if isinstance(value, dict) else [(key, value)]:
            if each in known:
                config[each] = wanted
            elif wanted is not None:
                asked[each] = wanted
    return Case(name, config, asked)


def _pairwise(sizes: list[int], rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Rows such that every pair of values of every two options is in one, and at least `MOST` of them: greedily, the
    best of some random ones."""
    pairs = itertools.combinations(range(len(sizes)), 2)
    open_pairs = {(a, i, b, j) for a, b in pairs for i in range(sizes[a]) for j in range(sizes[b])}
    for count in itertools.count():
        if not open_pairs and count >= MOST:
            return
        candidates = [tuple(rng.randrange(size) for size in sizes) for _ in range(40)]
        if open_pairs:
            a, i, b, j = min(open_pairs)
            forced = [(*row[:a], i, *row[a + 1 :]) for row in candidates]
            candidates = [(*row[:b], j, *row[b + 1 :]) for row in forced]
        best = max(candidates, key=lambda row: len(open_pairs & _pairs(row)))
        open_pairs -= _pairs(best)
        yield best


def _pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}
