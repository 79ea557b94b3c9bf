"""The noise schedule of a model's training, read from a scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.samplers.ddim import DDIM

__all__ = ["select_training_config", "training_alphas"]

_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def select_training_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a scheduler's configuration that describe its training, without those of its sampler."""
    return {key: value for key, value in config.items() if key in _KEYS}


def training_alphas(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return ᾱ, the cumulative product of 1 − β, at each training timestep, float32 [T].

    Raises:
        RequestError: the configuration does not describe a noise schedule of Stable Diffusion.
    """
    noise = DDIM.read(select_training_config(config))
    return noise.alphas_cumprod(zero_snr=noise.rescale_betas_zero_snr)
