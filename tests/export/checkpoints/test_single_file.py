"""A single file, made of a tiny checkpoint by the inverse conversion (`tests/ldm.py`), gives that checkpoint back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.conversion import TEXT_ENCODER, UNET, VAE
from latentrt_export.checkpoints.single_file import FAMILIES, PredictionType, detect, unpack
from latentrt_export.families import PIPELINES, stable_diffusion
from tests.ldm import write_single_file
from tests.tiny import Family, make_checkpoint

NAMES: dict[Literal["sd1", "sd2"], str] = {"sd1": "stable-diffusion-1", "sd2": "stable-diffusion-2"}
COMPONENTS = {"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE}


@pytest.fixture(scope="module", params=NAMES)
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


def test_weights_are_those_of_the_checkpoint(folder: Path, file: Path, tmp_path: Path) -> None:
    unpack(file, tmp_path, config=folder)
    for component, layout in COMPONENTS.items():
        original, found = (load_file(one / component / layout.file) for one in (folder, tmp_path))
        original.pop("text_model.embeddings.position_ids", None)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], weight) for name, weight in original.items())


def test_without_its_autoencoder(folder: Path, file: Path, tmp_path: Path) -> None:
    kept = {name: weight for name, weight in load_file(file).items() if not name.startswith("first_stage_model.")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="`vae`"):
        unpack(tmp_path / "model.safetensors", tmp_path / "none", config=folder)
    unpack(tmp_path / "model.safetensors", tmp_path / "out", config=folder, with_vae=False)
    assert (tmp_path / "out" / "unet" / COMPONENTS["unet"].file).is_file()
    assert [path.name for path in (tmp_path / "out" / "vae").iterdir()] == ["config.json"]


def test_the_folder_loads_as_a_checkpoint(folder: Path, file: Path, tmp_path: Path) -> None:
    unpack(file, tmp_path, config=folder)
    for library_class, component in (
        (UNet2DConditionModel, "unet"),
        (AutoencoderKL, "vae"),
        (CLIPTextModel, "text_encoder"),
    ):
        _, report = library_class.from_pretrained(tmp_path / component, use_safetensors=True, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert (tmp_path / "tokenizer" / "vocab.json").read_bytes() == (folder / "tokenizer" / "vocab.json").read_bytes()


TASKS = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}


@pytest.fixture(params=TASKS)
def channels(request: pytest.FixtureRequest) -> int:
    chosen: int = request.param
    return chosen


@pytest.fixture
def task_folder(folder: Path, channels: int, tmp_path: Path) -> Path:
    """The checkpoint with a UNet that has more input channels."""
    copy = shutil.copytree(folder, tmp_path / "task")
    config = {**UNet2DConditionModel.load_config(folder / "unet"), "in_channels": channels}
    torch.manual_seed(channels)
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    return copy


def test_input_channels_decide_the_pipeline(
    folder: Path, task_folder: Path, channels: int, family: Family, tmp_path: Path
) -> None:
    """With the configurations of the text-to-image checkpoint, in which `in_channels` is 4."""
    path = write_single_file(task_folder, tmp_path / "task.safetensors", family)
    assert (detect(path).family, detect(path).in_channels) == (NAMES[family], channels)
    assert (infer_diffusers_model_type(load_file(path)) in ("inpainting", "inpainting_v2")) == (channels == 9)
    unpack(path, tmp_path / "unpacked", config=folder)
    index = json.loads((tmp_path / "unpacked" / "model_index.json").read_text())
    assert index["_class_name"] == TASKS[channels]
    found = UNet2DConditionModel.from_pretrained(tmp_path / "unpacked" / "unet", use_safetensors=True)
    assert found.config["in_channels"] == found.conv_in.weight.shape[1] == channels
    # diffusers' own way from the file to the module, with the configuration that it would find on the hub
    expected = UNet2DConditionModel.from_single_file(str(path), config=str(task_folder), subfolder="unet")
    original = UNet2DConditionModel.from_pretrained(task_folder / "unet", use_safetensors=True)
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])
        assert torch.equal(weight, original.state_dict()[name])


def test_half_weights_stay_half(sd1_file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({name: weight.half() for name, weight in load_file(sd1_file).items()}, half)
    unpack(half, tmp_path / "folder", config=sd1_file.parent / "checkpoint")
    for component, layout in COMPONENTS.items():
        weights = load_file(tmp_path / "folder" / component / layout.file)
        assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_the_family_follows_from_the_header(file: Path, family: Family) -> None:
    found = detect(file)
    assert (found.family, found.prediction_type, found.licence) == (NAMES[family], None, None)


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
def test_the_prediction_type_in_the_metadata(metadata: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    weights = {f"{UNET.prefix}input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3), "first_stage_model.x": torch.zeros(1)}
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
        "latentrt_export.checkpoints.single_file.convert", lambda component, layout, places, config: {}
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
def test_an_unknown_prediction_type(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not state its prediction type; pass `prediction_type='epsilon'`"):
        unpack(file, tmp_path)


@pytest.mark.parametrize("family", ["sd2"], indirect=True)
def test_a_tensor_that_states_the_prediction_type(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI and trainers store an empty one."""
    path = tmp_path / "model.safetensors"
    save_file({**load_file(file), "v_pred": torch.zeros(0)}, path)
    monkeypatch.setattr(
        "latentrt_export.checkpoints.single_file.convert", lambda component, layout, places, config: {}
    )  # tiny weights
    unpack(path, tmp_path / "out")
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
def test_an_unsupported_prediction_type_in_a_configuration(folder: Path, file: Path, tmp_path: Path) -> None:
    config = shutil.copytree(folder, tmp_path / "config")
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "flow_prediction"}))
    with pytest.raises(CheckpointError, match="prediction_type flow_prediction"):
        unpack(file, tmp_path / "folder", config=config)


def header(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    path = tmp_path / "header.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


STEM = f"{UNET.prefix}input_blocks.0.0.weight"
FOUR = {STEM: (1, 4, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.diffusion_model.input_blocks.1.0.time_stack.x": (1,)}, "looks like Stable Video Diffusion"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "looks like Stable Diffusion 3"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "looks like Flux"),
        ({STEM: (1, 6, 3, 3)}, "has 6 input channels"),
        ({STEM: (1, 7, 3, 3)}, "has 7 input channels"),
        ({STEM: ()}, r"has the shape \[\] of its first convolution, expected four sides"),
        ({STEM: (4,)}, r"has the shape \[4\] of its first convolution, expected four sides"),
        ({STEM: (320, 4)}, r"has the shape \[320, 4\] of its first convolution, expected four sides"),
        ({STEM: (1, 5, 3, 3)}, r"depth-to-image .*5 input channels.*estimator is not in the file.*Depth2ImgPipeline.*"),
        ({STEM: (1, 5, 3, 3), "depth_model.model.x": (1,)}, r"depth estimator is stored in MiDaS' layout.*"),
        (FOUR | {f"{UNET.prefix}label_emb.0.0.weight": (1,)}, r"class-conditioned model \(unCLIP, or an upscaler\)"),
        (FOUR, "a UNet without its text encoder"),
        (FOUR | {"cond_stage_model.model.x": (1,)}, "a checkpoint without its autoencoder, .*`vae`"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (1,)}, "looks like a LoRA"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (1,)}, "looks like a LoRA"),
        ({"control_model.input_blocks.0.0.weight": (1,)}, "looks like a ControlNet"),
        ({"first_stage_model.encoder.conv_in.weight": (1,)}, "looks like an autoencoder alone"),
        ({"encoder.down.0.block.0.conv1.weight": (1,)}, "looks like an autoencoder alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "a component in diffusers' layout, .* folder.*"),
        ({"emb_params": (1,)}, "looks like a textual inversion"),
        ({"weight": (1,)}, r"something else \(its first tensor is 'weight'\)"),
    ],
)
def test_another_kind_of_file(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{message}; expected a whole Stable Diffusion 1"):
        detect(header(tmp_path, shapes))


@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float8_e4m3fn, False), (torch.float8_e5m2, True)])
def test_eight_bit_weights_are_those_of_diffusers(
    dtype: torch.dtype, mixed: bool, sd1_file: Path, tmp_path: Path
) -> None:
    weights = {
        name: weight.half() if mixed and index % 2 else weight.to(dtype)
        for index, (name, weight) in enumerate(load_file(sd1_file).items())
    }
    path, config = tmp_path / "eight.safetensors", sd1_file.parent / "checkpoint"
    save_file(weights, path)
    unpack(path, tmp_path / "folder", config=config)
    expected = AutoencoderKL.from_single_file(str(path), config=str(config), subfolder="vae").state_dict()
    found = AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae", use_safetensors=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), weight.float()) for name, weight in expected.items())
    for component, layout in COMPONENTS.items():  # the text encoder and the UNet keep their bits as well
        stored = load_file(tmp_path / "folder" / component / layout.file)
        assert {weight.dtype for weight in stored.values()} <= {dtype, torch.float16}


def test_weights_of_integers(tmp_path: Path) -> None:
    names = (STEM, "cond_stage_model.transformer.weight", "first_stage_model.weight")
    save_file({name: torch.zeros(1, 4, 3, 3, dtype=torch.int8) for name in names}, tmp_path / "eight.safetensors")
    with pytest.raises(CheckpointError, match="as I8, expected one of F64"):
        detect(tmp_path / "eight.safetensors")


@pytest.mark.parametrize("wrapper", ["state_dict.", "module.", "state_dict.module.", "model."])
def test_a_prefix_of_every_name_is_removed(wrapper: str, sd1_file: Path, tmp_path: Path) -> None:
    weights = {f"{wrapper}{name}": weight for name, weight in load_file(sd1_file).items()}
    # what trainers leave beside the weights, which diffusers passes over
    leftovers = {
        "model_ema.diffusion_modelout2bias": torch.ones(4),
        "model_ema.decay": torch.ones(1),
        "betas": torch.ones(9),
    }
    path, config = tmp_path / "wrapped.safetensors", sd1_file.parent / "checkpoint"
    save_file({**weights, **leftovers}, path)
    assert detect(path).wrapper == wrapper
    unpack(path, tmp_path / "folder", config=config)
    for component, layout in COMPONENTS.items():
        original, found = (load_file(one / component / layout.file) for one in (config, tmp_path / "folder"))
        original.pop("text_model.embeddings.position_ids", None)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], weight) for name, weight in original.items())


def test_a_pipeline_class_of_the_family_exports_each_kind_of_file() -> None:
    for name in NAMES.values():
        for channels, pipeline in FAMILIES[name].pipelines.items():
            assert pipeline in PIPELINES
            assert channels in stable_diffusion._TASKS[pipeline]


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model's{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"is a pickle.*Convert it with this command"):
        detect(path)


def test_the_suggested_conversion_works(sd1_file: Path, tmp_path: Path) -> None:
    weights = load_file(sd1_file)
    path = tmp_path / "a model's.ckpt"
    torch.save({"state_dict": weights, "global_step": 3}, path)
    with pytest.raises(CheckpointError) as refusal:
        detect(path)
    command = str(refusal.value).splitlines()[-1].strip()
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True, timeout=120)
    converted = load_file(path.with_suffix(".safetensors"))
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())
    with pytest.raises(CheckpointError, match=r"pass .* instead"):
        detect(path)


def test_safetensors_under_another_name(sd1_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sd1_file, tmp_path / "model.ckpt"))
    assert detect(path) == replace(detect(sd1_file), path=path)


def test_a_pickle_called_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"is a pickle") as refusal:
        detect(path)
    assert "model-converted.safetensors" in str(refusal.value)


@pytest.mark.parametrize("kept", [5, 4000])
def test_a_truncated_file(kept: int, sd1_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(sd1_file.read_bytes()[:kept] if kept < 4000 else sd1_file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"header is damaged|truncated or damaged|is empty"):
        detect(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        detect(tmp_path / "none.safetensors")


def test_an_architecture_of_another_size(sd1_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_encoder: .* are missing, .*`config`"):
        unpack(sd1_file, tmp_path)


def test_a_config_folder_without_configurations(sd1_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        unpack(sd1_file, tmp_path / "folder", config=tmp_path)


def test_a_folder_that_cannot_be_written_is_an_export_error(sd1_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be unpacked into"):
        unpack(sd1_file, tmp_path / "file", config=sd1_file.parent / "checkpoint")


def test_a_folder_of_configurations_with_a_link_out_of_it(sd1_file: Path, tmp_path: Path) -> None:
    config = shutil.copytree(sd1_file.parent / "checkpoint", tmp_path / "config")
    (config / "tokenizer" / "notes.txt").symlink_to(sd1_file)
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link that leads to"):
        unpack(sd1_file, tmp_path / "folder", config=config)
