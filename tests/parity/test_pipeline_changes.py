"""Images of a checkpoint whose configurations diffusers' pipeline changes, or that hold what JSON cannot.

The graphs are those of one export; its manifest is given the schedulers and defaults that an export of the changed
checkpoint has.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch

from latentrt import Bundle, Pipeline
from latentrt.bundle.manifest import SchedulerRecord, encode_manifest
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.families import PIPELINES, plan_export
from tests.exported import Exported
from tests.parity.pipelines import IGNORED_WARNINGS, PROMPT, assert_close, input_image, input_mask, run_oracle
from tests.tiny import SCHEDULERS

pytestmark = IGNORED_WARNINGS

# `...`: the key is missing.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_sample": ("DDIMScheduler", {"clip_sample": True}),
    "clip_sample_missing": ("DDIMScheduler", {"clip_sample": ...}),
    "ddpm": ("DDPMScheduler", {"clip_sample": True}),
    "steps_offset": ("DDIMScheduler", {"steps_offset": 0}),
    "infinity": ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -float("inf")}),
    "index": ("EulerAncestralDiscreteScheduler", {"_class_name": "PNDMScheduler"}),
}


def reconfigure(model: Exported, folder: Path, name: str, changes: dict[str, Any]) -> tuple[Path, Pipeline]:
    """Return a copy of a checkpoint with another scheduler, and the pipeline of its bundle."""
    checkpoint = folder / "checkpoint"
    shutil.copytree(model.checkpoint, checkpoint)
    config = {**SCHEDULERS["sd1"], "_class_name": name, **changes}
    replace_json(checkpoint / "scheduler" / "scheduler_config.json", {k: v for k, v in config.items() if v is not ...})
    index = json.loads((checkpoint / "model_index.json").read_text())
    replace_json(checkpoint / "model_index.json", {**index, "scheduler": ["diffusers", name]})
    opened = open_checkpoint(checkpoint, pipelines=PIPELINES)
    plan = plan_export(opened)
    record = SchedulerRecord.of(opened.scheduler_class, plan.scheduler_config, plan.scheduler_changes)
    bundle = folder / "bundle"
    shutil.copytree(model.bundle, bundle)
    manifest = msgspec.structs.replace(Bundle.open(bundle).manifest, schedulers={"unet": record})
    (bundle / "bundle.json").unlink()
    (bundle / "bundle.json").write_bytes(encode_manifest(manifest))
    return checkpoint, Pipeline.load(bundle)


def replace_json(path: Path, value: Any) -> None:
    path.unlink()
    path.write_text(json.dumps(value))


def compare(checkpoint: Path, pipeline: Pipeline, oracle_class: str, call: dict[str, Any]) -> None:
    """Compare with diffusers' pipeline as it is made from the checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = getattr(diffusers, oracle_class).from_pretrained(checkpoint, safety_checker=None)
    oracle.set_progress_bar_config(disable=True)
    latents, pixels = run_oracle(oracle, generator=torch.Generator().manual_seed(7), prompt=PROMPT, **call)
    ours = {"prompt": PROMPT, "seed": 7, "safety": "off", **call}
    assert_close(pipeline, ours, latents, pixels)


SLOW = {"clip_sample_missing", "ddpm"}  # like the others, and read as diffusers does in tests/export/families


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CONFIGS]
)
def test_images_equal_those_of_diffusers_pipeline(sd1: Exported, tmp_path: Path, case: str) -> None:
    checkpoint, pipeline = reconfigure(sd1, tmp_path, *CONFIGS[case])
    call: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64}
    compare(checkpoint, pipeline, "StableDiffusionPipeline", call)


@pytest.mark.parametrize(
    ("oracle", "more"),
    [
        ("StableDiffusionImg2ImgPipeline", {}),
        ("StableDiffusionInpaintPipeline", {"mask_image": input_mask(64, 64), "strength": 1.0}),
    ],
)
def test_each_task_follows_its_own_pipeline(sd1: Exported, tmp_path: Path, oracle: str, more: dict[str, Any]) -> None:
    """Image to image does not clip here, and inpainting does."""
    checkpoint, pipeline = reconfigure(sd1, tmp_path, "DDIMScheduler", {"clip_sample": True})
    compare(checkpoint, pipeline, oracle, {"image": input_image(64, 64), "num_inference_steps": 3, **more})
