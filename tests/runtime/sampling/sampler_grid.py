"""The combinations of options with which samplers are tested.

To add a sampler, add its options to `OPTIONS`: those that change its numbers, with the values to be combined. A value
may be a dict of several keys. Names are keys of a configuration or, where a sampler has no such key, attributes of
`Steps`. Every two values of every two options meet; `python -m tests.runtime.sampling.sampler_grid` counts the cases.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# scheduler_config.json of Stable Diffusion 1.5 on disk.
ON_DISK = STABLE_DIFFUSION | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

BETAS: list[Any] = [STABLE_DIFFUSION, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
SPACING: dict[str, list[Any]] = {"timestep_spacing": ["leading", "linspace", "trailing"], "steps_offset": [0, 1]}
BEGIN: dict[str, list[Any]] = {"begin": [0, 0, 2]}
SPACINGS: list[Any] = [{}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
THREE: list[Any] = ["epsilon", "v_prediction", "sample"]
THRESHOLD: list[Any] = [{}, {}, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6}]
CLIP: list[Any] = [{"clip_sample": False}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.8}]
CHURN: list[Any] = [{}, {}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.003}, {"s_churn": 900.0}]
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True, "mu": 0.7}
SPACINGS_AND_FLOW: list[Any] = [*SPACINGS, FLOW]
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
    "spacing": SPACINGS,
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
        "spacing": SPACINGS,
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
        "spacing": SPACINGS,
        "clip": CLIP,
        "timesteps": [None, None, (999.0, 500.5, 20.0)],
        **BEGIN,
    },
    "dpm2": {"betas": BETAS, **SPACING, "prediction_type": THREE[:2], "spacing": SPACINGS, **BEGIN},
    "dpm2_a": {"betas": BETAS, **SPACING, "prediction_type": THREE[:2], "spacing": SPACINGS, **BEGIN},
    "lms": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "spacing": SPACINGS,
        "order": [4, 3, 2, 1],
    },
    "dpmpp_sde": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE[:2],
        "spacing": SPACINGS,
        "s_noise": [1.0, 0.7],
        **BEGIN,
    },
    "dpmpp_2m": {
        "betas": BETAS,
        **SPACING,
        "prediction_type": THREE,
        "rescale_betas_zero_snr": [False, True],
        "spacing": [*SPACINGS_AND_FLOW, FLOW | DYNAMIC, {"use_lu_lambdas": True}, {"timesteps": (999, 500, 20)}],
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
        "spacing": SPACINGS_AND_FLOW,
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
        "spacing": [*SPACINGS_AND_FLOW, FLOW | DYNAMIC, {"timesteps": (999, 500, 20)}],
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
        "spacing": [*SPACINGS_AND_FLOW, FLOW | DYNAMIC],
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
        "spacing": [
            *SPACINGS_AND_FLOW,
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
        "spacing": SPACINGS_AND_FLOW,
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

# The samplers of models trained with a discrete noise schedule, and those that generate images.
TRAINED = [name for name in OPTIONS if hasattr(samplers.SAMPLERS[name], "beta_start")]
ORDINARY = [name for name in TRAINED if "inverse" not in name and name != "repaint"]

MAX_CASES = 60  # of a sampler, unless fewer are all of them


@dataclass(frozen=True)
class Case:
    """A combination of options: a configuration and the options of a run."""

    name: str
    config: Mapping[str, Any]
    run_options: Mapping[str, Any]

    @property
    def linear(self) -> bool:
        """Whether nothing is clipped, so that basis vectors determine the table."""
        return not any(self.config.get(key) for key in ("thresholding", "clip_sample", "clip_denoised"))

    def steps(self, count: int) -> Steps:
        """Return the options of a run of `count` steps, or of as many as its grid has."""
        for key, ends in (("timesteps", 0), ("sigmas", samplers.SAMPLERS[self.name].sigmas_end)):
            if self.run_options.get(key):
                count = len(self.run_options[key]) - ends
        options = dict(self.run_options)
        options["begin"] = min(options.get("begin", 0), count - 1)
        return Steps(count=count, **options)


@functools.cache
def cases(name: str) -> tuple[Case, ...]:
    """Return combinations of a sampler's options, always the same: all, or a set with every pair of values."""
    options = OPTIONS[name]
    keys, values = list(options), list(options.values())
    if _size(values) <= MAX_CASES:
        chosen = list(itertools.product(*(range(len(each)) for each in values)))
    else:
        chosen = list(_pairwise([len(each) for each in values], MAX_CASES, random.Random(0)))
    made = (combine(name, {key: options[key][i] for key, i in zip(keys, row, strict=True)}) for row in chosen)
    return tuple(made)


def _size(values: list[list[Any]]) -> int:
    size = 1
    for each in values:
        size *= len(each)
    return size


def combine(name: str, row: Mapping[str, Any]) -> Case:
    """Return the case of one value for each option."""
    known = {each.name for each in fields(samplers.SAMPLERS[name])}
    config: dict[str, Any] = {}
    run_options: dict[str, Any] = {}
    for key, value in row.items():
        for each, setting in value.items() if isinstance(value, dict) else [(key, value)]:
            if each in known:
                config[each] = setting
            elif setting is not None:
                run_options[each] = setting
    return Case(name, config, run_options)


def _pairwise(sizes: list[int], least: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Yield at least `least` rows that together have every pair of values of every two options.

    Rows are chosen greedily, each the best of some random ones.
    """
    pairs = itertools.combinations(range(len(sizes)), 2)
    open_pairs = {(a, i, b, j) for a, b in pairs for i in range(sizes[a]) for j in range(sizes[b])}
    for count in itertools.count():
        if not open_pairs and count >= least:
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


if __name__ == "__main__":
    counts = {name: len(cases(name)) for name in OPTIONS}
    print(*(f"{name} {count}" for name, count in counts.items()), f"together {sum(counts.values())}", sep="\n")
