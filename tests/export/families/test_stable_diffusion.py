"""The plan of a Stable Diffusion export: its tasks, and models that are rejected before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.families import plan_export
from tests.export.skeleton import CONFIGS, open_skeleton, write_json, write_skeleton
from tests.tiny import model_index


def write_unet(folder: Path, pipeline: str = "StableDiffusionPipeline", **settings: object) -> Path:
    write_skeleton(folder)
    write_json(folder / "model_index.json", {**model_index("sd1", with_safety=True), "_class_name": pipeline})
    write_json(folder / "unet" / "config.json", {**CONFIGS["unet"], **settings})
    return folder


@pytest.mark.parametrize(
    ("pipeline", "channels", "task"),
    [
        ("StableDiffusionPipeline", 4, "text-to-image"),
        ("StableDiffusionInpaintPipeline", 9, "inpainting"),
        ("StableDiffusionInstructPix2PixPipeline", 8, "edit"),
    ],
)
def test_the_task_follows_from_the_class_and_the_channels(
    tmp_path: Path, pipeline: str, channels: int, task: str
) -> None:
    plan = plan_export(open_skeleton(write_unet(tmp_path / "model", pipeline, in_channels=channels)))
    assert plan.tasks[0] == task


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"in_channels": 5}, "in_channels 5, expected 4 or 9"),
        ({"out_channels": 8}, "out_channels 8, expected 4"),
        ({"sample_size": None}, "sample_size None"),
    ],
)
def test_an_unsupported_unet_is_rejected(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    checkpoint = open_skeleton(write_unet(tmp_path / "model", **settings))
    with pytest.raises(CheckpointError, match=expected):
        plan_export(checkpoint)
