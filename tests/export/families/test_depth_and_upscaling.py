"""Plans of depth-to-image and upscaling checkpoints, from their configurations alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from transformers import DPTConfig
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from latentrt.bundle.manifest import Preprocessing
from latentrt.errors import CheckpointError
from latentrt.images.feature_extractors import preprocess
from latentrt.images.inputs import load_image
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.families import PIPELINES, plan_export, stable_diffusion
from latentrt_export.families.plan import ComponentPlan, ExportPlan
from tests.export.skeleton import change_json, write_json, write_skeleton, write_weights
from tests.tiny import DEPTH_PREPROCESSOR, make_checkpoint, model_index


@pytest.fixture
def depth(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "sd2", task="depth-to-image", text_layers=1)


@pytest.fixture
def upscaler(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "sd2", task="upscaling", safety="none", text_layers=1)


@pytest.fixture
def latent_upscaler(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", task="latent-upscaling", text_layers=1)


def write_depth_skeleton(
    folder: Path, preprocessor: dict[str, Any] | None = None, estimator: dict[str, Any] | None = None
) -> Path:
    """Write a depth-to-image checkpoint of four numbers a component, whose configurations have these keys."""
    write_skeleton(folder, safety=False)
    write_json(folder / "model_index.json", model_index("sd2", with_safety=False, task="depth-to-image"))
    change_json(folder / "unet" / "config.json", in_channels=5)
    config = {"image_size": 64, **(estimator or {})}
    write_json(
        folder / "depth_estimator" / "config.json", {key: value for key, value in config.items() if value is not ...}
    )
    write_weights(folder / "depth_estimator" / "model.safetensors")
    path = folder / "feature_extractor" / "preprocessor_config.json"
    write_json(path, {**DEPTH_PREPROCESSOR, **(preprocessor or {})})
    return folder


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
        ("feature_extractor_type", None),
        ("feature_extractor_type", {}),
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
        ("do_pad", True),
        ("keep_aspect_ratio", True),
        ("rescale_factor", 0),
        ("rescale_factor", float("inf")),
        ("rescale_factor", 10**400),
        ("ensure_multiple_of", 48),
        ("ensure_multiple_of", 0),
        ("ensure_multiple_of", 0.5),
        ("ensure_multiple_of", True),
        ("size", 32),
        ("size", "large"),
        ("size", True),
        ("resample", 9),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, float("inf"), 0.5]),
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", [0.5, 0.5, float("inf")]),
    ],
)
def test_unsupported_preprocessing_is_refused(tmp_path: Path, key: str, value: object) -> None:
    depth = write_depth_skeleton(tmp_path)
    path = depth / "feature_extractor" / "preprocessor_config.json"
    change(path, **{key: value})
    word = {"feature_extractor_type": "image processor", "size": "size|resizes"}.get(key, key)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json.*({word})"):
        plan(depth)


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({"ensure_multiple_of": 32}, 64),
        ({"ensure_multiple_of": 32, "size": {"height": 64, "width": 96}}, [64, 96]),
        ({"feature_extractor_type": "DPTImageProcessorFast", "size": [48, 64]}, [48, 64]),
        ({"feature_extractor_type": "DPTFeatureExtractor", "image_processor_type": "DPTImageProcessor"}, 64),
    ],
)
def test_preprocessing_is_that_of_transformers(tmp_path: Path, preprocessor: dict[str, Any], size: object) -> None:
    folder = write_depth_skeleton(tmp_path, preprocessor, {"image_size": size})
    found = find(folder, "depth_estimator").preprocessing
    assert found is not None
    oracle = DPTImageProcessorPil.from_pretrained(folder / "feature_extractor")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    expected = oracle(images=image, return_tensors="np").pixel_values
    assert np.array_equal(preprocess(load_image(image), found), expected)  # bit for bit, as both resize with Pillow


def test_an_estimators_size_is_384_by_default(tmp_path: Path) -> None:
    assert DPTConfig().image_size == 384
    estimator = find(write_depth_skeleton(tmp_path, {"size": 384}, {"image_size": ...}), "depth_estimator")
    assert estimator.preprocessing is not None
    assert (estimator.preprocessing.height, estimator.preprocessing.width) == (384, 384)


@pytest.mark.parametrize("size", [32, [64, 32], [64], ..., None, 0, -64, True, "64", {"height": 64}, [64, None], 2**30])
def test_an_estimator_of_another_size_or_none_is_refused(tmp_path: Path, size: object) -> None:
    folder = write_depth_skeleton(tmp_path, estimator={"image_size": size})
    with pytest.raises(CheckpointError, match=r"depth estimator|depth_estimator: its configuration has image_size"):
        plan(folder)


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


@pytest.mark.parametrize("name", stable_diffusion.PIPELINES)
def test_the_defaults_are_those_of_diffusers_pipelines(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    expected = parameters["num_inference_steps"].default, parameters["guidance_scale"].default
    assert stable_diffusion._DEFAULTS.get(name, (50, 7.5)) == expected
