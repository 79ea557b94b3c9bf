"""`latentrt schedule` with configurations that diffusers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.sampling import samplers
from latentrt.sampling.schedule_table import format_json
from tests.runtime.cli.test_schedule import printed


def save(name: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """Return a scheduler of diffusers, and the path of its saved configuration."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.save_config(folder)
    return scheduler, folder / "scheduler_config.json"


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
        ("LCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("EDMDPMSolverMultistepScheduler", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's arrays in diffusers
def test_a_saved_configuration_gives_diffusers_timesteps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, class_name: str, options: dict[str, Any]
) -> None:
    scheduler, config = save(class_name, tmp_path, **options)
    steps = 4
    rows = json.loads(printed(capsys, "--config", config, "--steps", steps, "--format", "json"))["rows"]
    made = samplers.schedule(class_name, json.loads(config.read_text()), steps)
    assert rows == json.loads(format_json(made))["rows"]
    scheduler.set_timesteps(steps)
    assert np.array_equal([row["t"] for row in rows], scheduler.timesteps.numpy().astype(np.float32))
