"""A single file, made of a tiny checkpoint by the inverse conversion (`tests/ldm.py`), gives that checkpoint back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.ldm_layout import SUBMODULES
from latentrt_export.checkpoints.single_file import PredictionType, detect, unpack
from tests.ldm import Family, write_single_file
from tests.tiny import make_checkpoint

FAMILIES: dict[Family, str] = {"sd1": "stable-diffusion-1", "sd2": "stable-diffusion-2"}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", family)


@pytest.fixture(scope="module")
def file(folder: Path, family: Family) -> Path:
    return write_single_file(folder, folder.parent / "model.safetensors", family)


@pytest.fixture(scope="module")
def sd1_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd1-only")
    return write_single_file(make_checkpoint(folder / "checkpoint"), folder / "model.safetensors", "sd1")


def test_weights_come_back_bit_for_bit(folder: Path, file: Path, tmp_path: Path) -> None:
    unpack(file, tmp_path, config=folder)
    for submodule, layout in SUBMODULES.items():
        original, found = (load_file(one / submodule / layout.file) for one in (folder, tmp_path))
        original.pop("text_model.embeddings.position_ids", None)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], weight) for name, weight in original.items())


def test_the_folder_loads_as_a_checkpoint(folder: Path, file: Path, tmp_path: Path) -> None:
    unpack(file, tmp_path, config=folder)
    for library_class, submodule in (
        (UNet2DConditionModel, "unet"),
        (AutoencoderKL, "vae"),
        (CLIPTextModel, "text_encoder"),
    ):
        _, report = library_class.from_pretrained(tmp_path / submodule, use_safetensors=True, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert (tmp_path / "tokenizer" / "vocab.json").read_bytes() == (folder / "tokenizer" / "vocab.json").read_bytes()


def test_half_weights_stay_half(sd1_file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({name: weight.half() for name, weight in load_file(sd1_file).items()}, half)
    unpack(half, tmp_path / "folder", config=sd1_file.parent / "checkpoint")
    for submodule, layout in SUBMODULES.items():
        weights = load_file(tmp_path / "folder" / submodule / layout.file)
        assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_the_family_is_in_the_header(file: Path, family: Family) -> None:
    found = detect(file)
    assert (found.family, found.prediction_type, found.licence) == (FAMILIES[family], None, None)


def test_metadata_is_read(folder: Path, family: Family, tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "v", "modelspec.license": "CreativeML Open RAIL-M"}
    found = detect(write_single_file(folder, tmp_path / "model.safetensors", family, metadata))
    assert (found.prediction_type, found.licence) == ("v_prediction", "CreativeML Open RAIL-M")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.prediction_type": "v_prediction"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"modelspec.prediction_type": "sample"}, None),
    ],
)
def test_metadata_says_what_is_predicted(metadata: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    weights = {f"{UNET}input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3), "first_stage_model.x": torch.zeros(1)}
    save_file({**weights, "cond_stage_model.model.x": torch.zeros(1)}, tmp_path / "header.safetensors", metadata)
    assert detect(tmp_path / "header.safetensors").prediction_type == expected


@pytest.mark.parametrize(
    ("family", "chosen", "scheduler", "sample_size"),
    [
        ("sd1", None, ("PNDMScheduler", "epsilon"), 64),
        ("sd1", "v_prediction", ("PNDMScheduler", "v_prediction"), 64),
        ("sd2", "epsilon", ("PNDMScheduler", "epsilon"), 64),
        ("sd2", "v_prediction", ("DDIMScheduler", "v_prediction"), 96),
    ],
    indirect=["family"],
)
def test_shipped_settings_follow_the_prediction_type(
    file: Path,
    chosen: PredictionType | None,
    scheduler: tuple[str, str],
    sample_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "latentrt_export.checkpoints.single_file.convert", lambda submodule, weights, config: {}
    )  # tiny weights
    unpack(file, tmp_path, prediction_type=chosen)
    found, unet, index = (
        json.loads((tmp_path / name).read_text())
        for name in ("scheduler/scheduler_config.json", "unet/config.json", "model_index.json")
    )
    assert (found["_class_name"], found["prediction_type"]) == scheduler
    assert index["scheduler"] == ["diffusers", scheduler[0]]
    assert unet["sample_size"] == sample_size


@pytest.mark.parametrize("family", ["sd2"], indirect=True)
def test_an_unknown_prediction_type_is_asked_for(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not say what its UNet predicts; pass --prediction-type epsilon"):
        unpack(file, tmp_path)


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
def test_a_foreign_prediction_type_in_a_configuration_is_refused(folder: Path, file: Path, tmp_path: Path) -> None:
    config = shutil.copytree(folder, tmp_path / "config")
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "flow_prediction"}))
    with pytest.raises(CheckpointError, match="prediction_type is flow_prediction"):
        unpack(file, tmp_path / "folder", config=config)


def header(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    path = tmp_path / "header.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


STEM = f"{UNET}input_blocks.0.0.weight"
FOUR = {STEM: (1, 4, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (FOUR | {"conditioner.embedders.1.model.ln_final.bias": (1,)}, "looks like Stable Diffusion XL"),
        (FOUR | {"conditioner.embedders.0.model.ln_final.bias": (1,)}, "the refiner of Stable Diffusion XL"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "looks like Stable Diffusion 3"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "looks like Flux"),
        ({STEM: (1, 9, 3, 3)}, "a model for inpainting, with 9 input channels"),
        ({STEM: (1, 8, 3, 3)}, "a model for InstructPix2Pix, with 8 input channels"),
        ({STEM: (1, 6, 3, 3)}, "a model for another task, with 6 input channels"),
        (FOUR | {f"{UNET}label_emb.0.0.weight": (1,)}, r"conditioned on a class \(unCLIP, or an upscaler\)"),
        (FOUR, "a UNet without its text encoder"),
        (FOUR | {"cond_stage_model.model.x": (1,)}, "a checkpoint without its autoencoder"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (1,)}, "looks like a LoRA"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (1,)}, "looks like a LoRA"),
        ({"control_model.input_blocks.0.0.weight": (1,)}, "looks like a ControlNet"),
        ({"first_stage_model.encoder.conv_in.weight": (1,)}, "looks like an autoencoder alone"),
        ({"encoder.down.0.block.0.conv1.weight": (1,)}, "looks like an autoencoder alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "a submodule in diffusers' layout, .* folder"),
        ({"emb_params": (1,)}, "looks like a textual inversion"),
        ({"weight": (1,)}, r"something else \(its first tensor is weight\)"),
    ],
)
def test_what_is_no_checkpoint_is_refused(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{message}; expected a whole Stable Diffusion 1"):
        detect(header(tmp_path, shapes))


def test_eight_bit_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "eight.safetensors"
    names = (STEM, "cond_stage_model.transformer.weight", "first_stage_model.weight")
    save_file({name: torch.zeros(1, 4, dtype=torch.float8_e4m3fn) for name in names}, path)
    with pytest.raises(CheckpointError, match="as F8_E4M3, expected one of BF16, F16"):
        detect(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model's{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"is a pickle.*convert it first"):
        detect(path)


def test_the_command_that_converts_a_pickle_works(sd1_file: Path, tmp_path: Path) -> None:
    weights = load_file(sd1_file)
    path = tmp_path / "a model's.ckpt"
    torch.save({"state_dict": weights, "global_step": 3}, path)
    with pytest.raises(CheckpointError) as refusal:
        detect(path)
    command = str(refusal.value).splitlines()[-1].strip()
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True, timeout=60)
    converted = load_file(path.with_suffix(".safetensors"))
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kept", [0, 5, 4000])
def test_a_truncated_file_is_refused(kept: int, sd1_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(sd1_file.read_bytes()[:kept] if kept < 4000 else sd1_file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is missing, truncated or no safetensors file"):
        detect(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        detect(tmp_path / "none.safetensors")


def test_an_architecture_of_another_size_is_refused(sd1_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_encoder: .* are missing, .*needs a configuration of its own"):
        unpack(sd1_file, tmp_path)


def test_a_configuration_that_describes_nothing_is_refused(sd1_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        unpack(sd1_file, tmp_path / "folder", config=tmp_path)


def test_a_folder_that_cannot_be_written_is_an_export_error(sd1_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be unpacked into"):
        unpack(sd1_file, tmp_path / "file", config=sd1_file.parent / "checkpoint")
