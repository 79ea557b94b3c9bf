"""The configuration that is checked is the one of which a component is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPVisionModelWithProjection, DPTForDepthEstimation

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.checkpoints.component_config import make_library_config, read_component_config
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, NoEffect, check_keys
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.families import PIPELINES, plan_export
from latentrt_export.modules.streamed import read_parameter
from tests.export.skeleton import change_json, write_json, write_skeleton
from tests.tiny import depth_estimator, image_encoder, safety_checker, text_encoder

WORDS = {"<|startoftext|>": 98, "<|endoftext|>": 99} | {str(i): i for i in range(98)}
MODELS: dict[str, tuple[Any, Any]] = {
    "CLIPTextModel": (CLIPTextModel, lambda: text_encoder("sd1", WORDS, 1)),
    "CLIPVisionModelWithProjection": (CLIPVisionModelWithProjection, lambda: image_encoder("sd1")),
    "StableDiffusionSafetyChecker": (StableDiffusionSafetyChecker, lambda: safety_checker(strict=False)),
    "DPTForDepthEstimation": (DPTForDepthEstimation, depth_estimator),
}


def without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without that of the weights, which `from_pretrained` notes and nothing follows."""
    return {
        key: without_dtype(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "dtype"
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_component_is_built_as_transformers_builds_it(tmp_path: Path, name: str) -> None:
    library_class, make = MODELS[name]
    make().save_pretrained(tmp_path)
    expected = library_class.from_pretrained(tmp_path)
    loaded = load_pretrained(library_class, tmp_path, None)
    assert str(loaded) == str(expected.eval())
    found = loaded.state_dict(keep_vars=True)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(read_parameter(found[key]), tensor), key
    ignored = {"dtype", "architectures", "transformers_version", "_name_or_path", "output_hidden_states"}
    ours, theirs = (without_dtype(each.config.to_dict()) for each in (loaded, expected))
    no_effect = {key for key in theirs if ours.get(key) != theirs[key]} - ignored
    assert no_effect <= {key for key, handling in CONFIG_KEYS[name].items() if isinstance(handling, NoEffect)}


@pytest.mark.parametrize("name", MODELS)
def test_keys_that_no_class_has_do_not_reach_the_library(tmp_path: Path, name: str) -> None:
    """`num_labels` makes transformers build a list of so many labels."""
    library_class, make = MODELS[name]
    config = make().config.to_dict()
    nested = {key: {**value, "num_labels": 10**9} for key, value in config.items() if isinstance(value, dict)}
    write_json(tmp_path / "config.json", {**config, **nested, "num_labels": 10**9, "attn_implementation": "x"})
    found: Any = make_library_config(library_class, tmp_path)
    assert str(10**9) not in json.dumps(found.to_dict())
    assert found.num_labels == 2


def test_a_class_of_diffusers_reads_the_file(tmp_path: Path) -> None:
    assert make_library_config(UNet2DConditionModel, tmp_path) is None


@pytest.mark.parametrize(
    ("name", "key"), [("CLIPTextModel", "text_config"), ("CLIPVisionModelWithProjection", "vision_config")]
)
def test_an_encoder_in_the_configuration_of_a_whole_clip(tmp_path: Path, name: str, key: str) -> None:
    """As in transformers, whatever `model_type` says."""
    for model_type in ({"model_type": "clip"}, {"model_type": "clip_text_model"}, {}):
        write_json(tmp_path / "config.json", {**model_type, "hidden_size": 2**31, key: {"hidden_size": 32}})
        assert read_component_config(tmp_path, name) == {"hidden_size": 32}
        assert read_component_config(tmp_path, "StableDiffusionSafetyChecker")["hidden_size"] == 2**31
    write_json(tmp_path / "config.json", {key: [1]})
    with pytest.raises(CheckpointError, match=rf"has {key} \[1\], expected an object"):
        read_component_config(tmp_path, name)


def test_keys_left_to_the_defaults_of_diffusers(tmp_path: Path) -> None:
    """As diffusers reads them from a file; transformers has no such list."""
    vae = AutoencoderKL(sample_size=64, scaling_factor=0.5)
    vae.save_config(tmp_path)
    change_json(tmp_path / "config.json", _use_default_values=["scaling_factor"])
    expected = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path)).config
    assert (expected["scaling_factor"], expected["sample_size"]) == (0.18215, 64)
    found = read_component_config(tmp_path, None)
    assert "scaling_factor" not in found
    assert found["sample_size"] == 64
    assert read_component_config(tmp_path, "CLIPTextModel")["scaling_factor"] == 0.5

    folder = write_skeleton(tmp_path / "model")
    for file in ("unet/config.json", "vae/config.json"):
        change_json(folder / file, _use_default_values="scaling_factor")
        with pytest.raises(CheckpointError, match="has _use_default_values 'scaling_factor', expected a list of keys"):
            plan_export(open_checkpoint(folder, pipelines=PIPELINES))
        change_json(folder / file, _use_default_values=[])


def test_an_empty_key_hides_nothing(tmp_path: Path) -> None:
    folder = write_skeleton(tmp_path)
    config = json.loads((folder / "unet" / "config.json").read_text())
    write_json(folder / "unet" / "config.json", {"model_type": "clip", "": config, "in_channels": 2**31})
    with pytest.raises(CheckpointError, match="unet: its configuration has in_channels 2147483648"):
        plan_export(open_checkpoint(folder, pipelines=PIPELINES))


@pytest.mark.parametrize("key", ["transformers_weights", "configuration_files", "quantization_config"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_configuration_that_names_other_files(tmp_path: Path, key: str, *, inner: bool) -> None:
    folder = write_skeleton(tmp_path)
    path = folder / "text_encoder" / "config.json"
    config = {**json.loads(path.read_text()), key: "other.safetensors"}
    write_json(path, {"model_type": "clip", "text_config": config} if inner else config)
    with pytest.raises(CheckpointError, match=f"text_encoder: its configuration has {key} 'other.safetensors'"):
        plan_export(open_checkpoint(folder, pipelines=PIPELINES))


@pytest.mark.parametrize(
    ("component", "model_type"),
    [("text_encoder", "bert"), ("safety_checker", "siglip"), ("image_encoder", "siglip"), ("depth_estimator", "glpn")],
)
def test_a_component_of_another_kind(tmp_path: Path, component: str, model_type: str) -> None:
    folder = write_skeleton(tmp_path)
    (folder / component).mkdir(exist_ok=True)
    path = folder / component / "config.json"
    if not path.exists():
        write_json(path, {})
    change_json(path, model_type=model_type)
    with pytest.raises(CheckpointError, match=rf"has the model_type '{model_type}', expected"):
        open_checkpoint(folder, pipelines=PIPELINES)


@pytest.mark.parametrize("value", [[1], "resnet", 5])
def test_a_nested_configuration_of_another_form(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"depth: its configuration has backbone_config .*, expected an object"):
        list(check_keys("depth", "DPTForDepthEstimation", {"backbone_config": value}))


def test_a_nested_configuration_is_checked_by_its_own_class() -> None:
    with pytest.raises(CheckpointError, match="depth: its configuration has model_type 'resnet', expected 'bit'"):
        list(check_keys("depth", "DPTForDepthEstimation", {"backbone_config": {"model_type": "resnet"}}))
    with pytest.raises(CheckpointError, match="depth: its configuration has depths"):
        list(check_keys("depth", "DPTForDepthEstimation", {"backbone_config": {"depths": [10**6]}}))
    (warning,) = check_keys("depth", "DPTForDepthEstimation", {"backbone_config": {"num_labels": 10**9}})
    assert "'num_labels', which BitBackbone does not have" in warning
