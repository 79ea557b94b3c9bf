"""Plans of depth-to-image and upscaling checkpoints, from their configurations alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from latentrt.bundle.manifest import Preprocessing
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.families import PIPELINES, plan_export, stable_diffusion
from latentrt_export.families.plan import ComponentPlan, ExportPlan
from tests.tiny import make_checkpoint


@pytest.fixture
def depth(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "sd2", task="depth-to-image", text_layers=1)


@pytest.fixture
def upscaler(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "sd2", task="upscaling", safety="none", text_layers=1)


@pytest.fixture
def latent_upscaler(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", task="latent-upscaling", text_layers=1)


def plan(folder: Path) -> ExportPlan:
    return plan_export(open_checkpoint(folder, pipelines=PIPELINES))


def find(folder: Path, name: str) -> ComponentPlan:
    return next(each for each in plan(folder).components if each.name == name)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_depth_to_image_checkpoint(depth: Path) -> None:
    assert plan(depth).tasks == ("depth-to-image",)
    estimator = find(depth, "depth_estimator")
    assert (estimator.role, estimator.sources) == ("depth-estimator", {"pixels": "image"})
    assert estimator.preprocessing == Preprocessing(
        height=64, width=64, resample="bilinear", mean=(0.5, 0.4, 0.6), std=(0.5, 0.4, 0.5)
    )


def test_a_new_form_of_preprocessing_and_its_defaults(depth: Path) -> None:
    path = depth / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "DPTImageProcessor", "size": {"height": 64, "width": 64}}))
    assert find(depth, "depth_estimator").preprocessing == Preprocessing(
        height=64, width=64, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feature_extractor_type", "CLIPFeatureExtractor"),
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
        ("do_pad", True),
        ("keep_aspect_ratio", True),
        ("ensure_multiple_of", 48),
        ("size", 32),
        ("size", "large"),
        ("resample", 9),
        ("image_mean", [0.5]),
    ],
)
def test_unsupported_preprocessing_is_refused(depth: Path, key: str, value: object) -> None:
    path = depth / "feature_extractor" / "preprocessor_config.json"
    change(path, **{key: value})
    word = {"feature_extractor_type": "image processor", "size": "size|resizes"}.get(key, key)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json.*({word})"):
        plan(depth)


def test_an_upscaling_checkpoint(upscaler: Path) -> None:
    made = plan(upscaler)
    assert made.tasks == ("upscaling",)
    assert find(upscaler, "unet").sources["class_labels"] == "noise-level"
    space, limits = made.latent_spaces["unet"], made.limits
    assert (space.downscale, space.scale) == (4, 0.08333)
    assert (limits.max_noise_level, limits.min_side, limits.max_side) == (350, 32, 2048)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("model_index.json", {"max_noise_level": 1000}, "max_noise_level 1000.*below 1000"),
        ("model_index.json", {"max_noise_level": "many"}, "max_noise_level 'many'"),
        ("model_index.json", {"watermarker": ["deepfloyd_if", "IFWatermarker"]}, "watermarker"),
        ("unet/config.json", {"num_class_embeds": 100}, "max_noise_level 350.*100"),
        ("unet/config.json", {"in_channels": 4}, "in_channels 4.*7"),
        ("vae/config.json", {"scaling_factor": 0.18215}, r"scaling_factor 0\.18215.*0\.08333"),
        ("low_res_scheduler/scheduler_config.json", {"num_train_timesteps": 200}, "max_noise_level 350.*200"),
        ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "made-up"}, "low_res_scheduler.*made-up"),
    ],
)
def test_impossible_upscalers_are_refused(upscaler: Path, file: str, values: dict[str, Any], reason: str) -> None:
    change(upscaler / file, **values)
    with pytest.raises(CheckpointError, match=reason):
        plan(upscaler)


def test_a_latent_upscaling_checkpoint(latent_upscaler: Path) -> None:
    made = plan(latent_upscaler)
    assert made.tasks == ("latent-upscaling",)
    sources = find(latent_upscaler, "unet").sources
    assert (sources["timestep"], sources["pooled"]) == ("c-noise", "text_encoder.pooled")
    assert find(latent_upscaler, "text_encoder").sources == {"input_ids": "tokens"}
    assert made.latent_spaces["unet"].side_multiple == 64
    assert (made.limits.min_side, made.limits.max_side, made.limits.max_clip_skip) == (128, 2048, 0)
    defaults = made.defaults
    assert (defaults.height, defaults.width, defaults.num_inference_steps, defaults.guidance_scale) == (
        1024,
        1024,
        75,
        9.0,
    )
    assert made.scheduler_config["prediction_type"] == "v_prediction", "that of the graph"
    assert made.deep_cache_branches == 0


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("unet/config.json", {"in_channels": 4}, "in_channels 4.*8"),
        ("unet/config.json", {"out_channels": 4}, "out_channels 4.*5"),
        ("unet/config.json", {"time_cond_proj_dim": None}, "time_cond_proj_dim None.*160"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
    ],
)
def test_impossible_latent_upscalers_are_refused(
    latent_upscaler: Path, file: str, values: dict[str, Any], reason: str
) -> None:
    change(latent_upscaler / file, **values)
    with pytest.raises(CheckpointError, match=reason):
        plan(latent_upscaler)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_defaults_are_those_of_diffusers_pipelines(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    expected = parameters["num_inference_steps"].default, parameters["guidance_scale"].default
    assert stable_diffusion._DEFAULTS.get(name, (50, 7.5)) == expected
