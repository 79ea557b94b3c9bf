"""Single files of Stable Diffusion XL: tiny checkpoints by the inverse conversion (`tests/ldm.py`) are given back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.single_file import FAMILIES, PredictionType, detect, unpack
from latentrt_export.checkpoints.tokenizer import export_tokenizer
from tests.export.checkpoints.xl_folders import make_xl_checkpoint
from tests.ldm import Family, Weights, write_single_file

NAMES: dict[Family, str] = {"xl": "stable-diffusion-xl", "refiner": "stable-diffusion-xl-refiner"}
UNET = "model.diffusion_model."
STEM = f"{UNET}input_blocks.0.0.weight"


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_xl_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", refiner=family == "refiner")


@pytest.fixture(scope="module")
def file(folder: Path, family: Family) -> Path:
    return write_single_file(folder, folder.parent / "model.safetensors", family)


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the base model; the folder `checkpoint` is beside it."""
    folder = tmp_path_factory.mktemp("base")
    return write_single_file(make_xl_checkpoint(folder / "checkpoint"), folder / "model.safetensors", "xl")


def assert_same_weights(found: Path, expected: Path, family: str, *, dtype: torch.dtype | None = None) -> None:
    for component, layout in FAMILIES[family].components.items():
        original, made = (load_file(one / component / layout.file) for one in (expected, found))
        original.pop("text_model.embeddings.position_ids", None)
        assert made.keys() == original.keys()
        for name, weight in original.items():
            assert torch.equal(made[name], weight.to(dtype or weight.dtype))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_weights_are_those_of_the_checkpoint(folder: Path, file: Path, family: Family, tmp_path: Path) -> None:
    found = detect(file)
    assert (found.family, found.in_channels, found.prediction_type) == (NAMES[family], 4, None)
    unpack(file, tmp_path, config=folder)
    assert_same_weights(tmp_path, folder, NAMES[family])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model_index.json", "scheduler", *FAMILIES[found.family].components, *FAMILIES[found.family].tokenizers)
    }


def test_half_weights_and_a_prefix_of_every_name(folder: Path, file: Path, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({f"state_dict.{name}": weight.half() for name, weight in load_file(file).items()}, path)
    unpack(path, tmp_path / "out", config=folder)
    assert_same_weights(tmp_path / "out", folder, NAMES[family], dtype=torch.float16)


def test_without_its_autoencoder(folder: Path, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if not name.startswith("first_stage_model.")}, path)
    with pytest.raises(CheckpointError, match="`vae`"):
        unpack(path, tmp_path / "none", config=folder)
    unpack(path, tmp_path / "out", config=folder, with_vae=False)
    assert [one.name for one in (tmp_path / "out" / "vae").iterdir()] == ["config.json"]


PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "base": StableDiffusionXLPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
    "edit": StableDiffusionXLInstructPix2PixPipeline,
    "inpainting": StableDiffusionXLInpaintPipeline,
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_folder_is_what_diffusers_loads_from_the_file(kind: str, tmp_path: Path) -> None:
    pipeline, refiner = PIPELINES[kind], kind == "refiner"
    channels = {"edit": 8, "inpainting": 9}.get(kind, 4)
    own = make_xl_checkpoint(
        tmp_path / "own", refiner=refiner, channels=channels, index={"_class_name": pipeline.__name__}
    )
    path = write_single_file(own, tmp_path / "model.safetensors", "refiner" if refiner else "xl")
    # with the configurations of the text-to-image checkpoint, in which `in_channels` is 4
    config = make_xl_checkpoint(tmp_path / "config", refiner=refiner)
    unpack(path, tmp_path / "unpacked", config=config)
    index = read(tmp_path / "unpacked" / "model_index.json")
    assert index["_class_name"] == pipeline.__name__
    expected = pipeline.from_single_file(str(path), config=str(own), local_files_only=True)
    found = pipeline.from_pretrained(tmp_path / "unpacked", use_safetensors=True, local_files_only=True)
    for name in FAMILIES[f"stable-diffusion-xl{'-refiner' if refiner else ''}"].components:
        ours, theirs = (getattr(one, name).state_dict() for one in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, ours[key]) for key, weight in theirs.items())
    assert found.config["force_zeros_for_empty_prompt"] is not refiner
    if refiner:
        assert found.text_encoder is None
        assert found.config["requires_aesthetics_score"] is True


def test_the_folder_loads_as_a_checkpoint(base_file: Path, tmp_path: Path) -> None:
    unpack(base_file, tmp_path, config=base_file.parent / "checkpoint")
    for library_class, component in (
        (CLIPTextModel, "text_encoder"),
        (CLIPTextModelWithProjection, "text_encoder_2"),
        (UNet2DConditionModel, "unet"),
    ):
        _, report = library_class.from_pretrained(tmp_path / component, use_safetensors=True, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


# Markers


def skip_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack the settings of tiny files alone: the shipped ones are those of the full size."""
    monkeypatch.setattr("latentrt_export.checkpoints.single_file.convert", lambda component, layout, places, config: {})


def write_marked(base_file: Path, path: Path, markers: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file({**load_file(base_file), **markers}, path, metadata=metadata or None)
    return path


NONE = torch.zeros(0)


@pytest.mark.parametrize(
    ("markers", "chosen", "expected"),
    [
        ((), None, ("epsilon", False, "leading")),
        ((), "v_prediction", ("v_prediction", False, "leading")),
        (("v_pred",), None, ("v_prediction", False, "leading")),
        (("v_pred", "ztsnr"), None, ("v_prediction", True, "trailing")),
        (("v_pred", "ztsnr"), "epsilon", ("epsilon", False, "leading")),
        (("ztsnr",), None, ("epsilon", False, "leading")),
    ],
)
def test_tensors_that_state_the_prediction_type(
    markers: tuple[str, ...],
    chosen: PredictionType | None,
    expected: tuple[str, bool, str],
    base_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_marked(base_file, tmp_path / "model.safetensors", dict.fromkeys(markers, NONE))
    skip_weights(monkeypatch)
    unpack(path, tmp_path / "out", prediction_type=chosen)
    found = EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler").config
    assert (found["prediction_type"], found["rescale_betas_zero_snr"], found["timestep_spacing"]) == expected


def test_the_prediction_type_in_comfyui_s_metadata(base_file: Path, tmp_path: Path) -> None:
    for stated, expected in (("v", "v_prediction"), ("epsilon", "epsilon")):
        path = write_marked(base_file, tmp_path / f"{stated}.safetensors", {}, **{"modelspec.predict_key": stated})
        assert detect(path).prediction_type == expected


def test_playground(base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The means and deviations are those that its authors published, whatever the precision of the file."""
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float16)
    path = write_marked(base_file, tmp_path / "model.safetensors", {"edm_mean": ones, "edm_std": ones.clone()})
    assert infer_diffusers_model_type(load_file(path)) == "playground-v2-5"
    skip_weights(monkeypatch)
    unpack(path, tmp_path / "out")
    vae = read(tmp_path / "out" / "vae" / "config.json")
    assert (vae["scaling_factor"], len(vae["latents_mean"]), len(vae["latents_std"])) == (0.5, 4, 4)
    assert vae["latents_std"][0] == 8.4927
    scheduler = EDMDPMSolverMultistepScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config["prediction_type"] == "epsilon"
    assert (scheduler.config["sigma_min"], scheduler.config["sigma_max"], scheduler.config["sigma_data"]) == (
        *(0.002, 80.0),
        0.5,
    )
    index = read(tmp_path / "out" / "model_index.json")
    assert index["scheduler"] == ["diffusers", "EDMDPMSolverMultistepScheduler"]
    # diffusers' class reads it without complaints about unknown settings
    assert scheduler.init_noise_sigma > 80


@pytest.mark.parametrize("channels", [4, 8])
def test_the_noise_of_cosxl(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_xl_checkpoint(tmp_path / "checkpoint", channels=channels)
    own = write_single_file(folder, tmp_path / "own.safetensors", "xl")
    markers = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor([0.004])}
    path = write_marked(own, tmp_path / "model.safetensors", markers)
    skip_weights(monkeypatch)
    unpack(path, tmp_path / "out")
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path / "out" / "scheduler").config
    assert scheduler["prediction_type"] == "v_prediction"
    assert (scheduler["sigma_max"], scheduler["sigma_data"]) == (120.0, 1.0)
    assert scheduler["sigma_min"] == pytest.approx(0.004, rel=1e-6)  # a float32
    index = read(tmp_path / "out" / "model_index.json")
    assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    assert index.get("is_cosxl_edit", False) == (channels == 8)


@pytest.mark.parametrize(
    ("sigma_max", "message"),
    [
        (torch.tensor(float("nan")), "range of noise 0.002 to nan"),
        (torch.tensor(float("inf")), "range of noise 0.002 to inf"),
        (torch.tensor(-1.0), "range of noise 0.002 to -1"),
        (torch.ones((), dtype=torch.complex64), r"as C64 with the shape \[\], expected one number of F64"),
        (torch.zeros(0), r"the shape \[0\], expected one number"),
        (torch.zeros(4, 4), r"the shape \[4, 4\], expected one number"),
    ],
)
def test_damaged_noise_of_cosxl(sigma_max: torch.Tensor, message: str, base_file: Path, tmp_path: Path) -> None:
    path = write_marked(base_file, tmp_path / "model.safetensors", {"edm_vpred.sigma_max": sigma_max})
    with pytest.raises(CheckpointError, match=message):
        unpack(path, tmp_path / "out")


def test_given_configurations_are_not_changed(base_file: Path, tmp_path: Path) -> None:
    markers = {"edm_mean": torch.ones(4), "edm_std": torch.ones(4), "v_pred": NONE, "ztsnr": NONE}
    path, config = write_marked(base_file, tmp_path / "x.safetensors", markers), base_file.parent / "checkpoint"
    unpack(path, tmp_path / "out", config=config)
    for name in ("scheduler/scheduler_config.json", "vae/config.json", "unet/config.json"):
        assert read(tmp_path / "out" / name) == read(config / name)


# Distilled UNets

DISTILLED: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "transformer_layers_per_block": [1, 2, [2, 3]],
        "reverse_transformer_layers_per_block": [[3, 2, 1], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA": {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 4]},
    "Vega": {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 1]},
}


@pytest.mark.parametrize("kind", DISTILLED)
def test_distilled_unets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of the base model and the names give the structure; no configuration is passed."""
    distilled = make_xl_checkpoint(tmp_path / "distilled", **DISTILLED[kind])
    path = write_single_file(distilled, tmp_path / "model.safetensors", "xl")
    ship(monkeypatch, make_xl_checkpoint(tmp_path / "configs" / "stable-diffusion-xl"))
    unpack(path, tmp_path / "out")
    assert_same_weights(tmp_path / "out", distilled, "stable-diffusion-xl")
    UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")


def ship(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the configurations of a folder be those that ship for the family of its name."""
    monkeypatch.setattr("latentrt_export.checkpoints.single_file.CONFIGS", folder.parent)
    monkeypatch.setattr("latentrt_export.checkpoints.single_file.write_vocabulary", lambda folder, merges: None)


# Foreign and damaged files


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


FOUR = {STEM: (1, 4, 3, 3)}
CLIP = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (1,)}
SECOND = {"conditioner.embedders.1.model.ln_final.bias": (1,)}
FIRST = {"conditioner.embedders.0.model.ln_final.bias": (1,)}
VAE = {"first_stage_model.x": (1,)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (FOUR | {f"{UNET}label_emb.0.0.weight": (1, 2816)}, "a UNet of Stable Diffusion XL without its text encoders"),
        (FOUR | {f"{UNET}label_emb.0.0.weight": (1, 2560)}, "a UNet of Stable Diffusion XL without its text encoders"),
        (FOUR | {f"{UNET}label_emb.0.0.weight": ()}, "a class-conditioned model"),
        (
            FOUR | VAE | {"cond_stage_model.model.x": (1,), f"{UNET}label_emb.0.0.weight": (1, 2816)},
            "a class-conditioned model",
        ),
        (FOUR | CLIP | VAE, "a checkpoint without its text_encoder_2"),
        (FOUR | SECOND | VAE, "a checkpoint without its text_encoder"),
        (FOUR | CLIP | SECOND, "without its autoencoder, which can be passed as `vae`"),
        ({STEM: (1, 9, 3, 3)} | FIRST | VAE, "has 9 input channels and is a refiner, which has 4"),
        ({STEM: (1, 6, 3, 3)} | CLIP | SECOND | VAE, "has 6 input channels; "),
        ({STEM: (1, 5, 3, 3)} | CLIP | SECOND | VAE, "is a depth-to-image model"),
        (
            {STEM: (1, 8, 3, 3), "conditioner.embedders.0.open_clip.model.x": (1,), f"{UNET}x.time_stack.x": (1,)},
            "Stable Video Diffusion",
        ),
    ],
)
def test_another_kind_of_file(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*expected a whole Stable Diffusion 1"):
        detect(write_header(tmp_path / "header.safetensors", shapes))


@pytest.mark.parametrize(
    ("removed", "component"),
    [
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2"),
        ("conditioner.embedders.1.model.positional_embedding", "text_encoder_2"),
        (f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", "unet"),
        (f"{UNET}label_emb.0.2.bias", "unet"),
        ("first_stage_model.decoder.mid.attn_1.k.weight", "vae"),
    ],
)
def test_a_missing_weight(removed: str, component: str, base_file: Path, tmp_path: Path) -> None:
    weights = load_file(base_file)
    del weights[removed]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{component}: (1 weights are missing|its weights do not have the)"):
        unpack(tmp_path / "model.safetensors", tmp_path / "out", config=base_file.parent / "checkpoint")


@pytest.mark.parametrize(
    ("name", "shape", "component"),
    [
        ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight", (3, 48), "text_encoder_2"),
        ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight", (144,), "text_encoder_2"),
        ("conditioner.embedders.1.model.text_projection", (), "text_encoder_2"),
        ("conditioner.embedders.1.model.text_projection", (7, 48), "text_encoder_2"),
        (f"{UNET}label_emb.0.0.weight", (64, 1), "unet"),
    ],
)
def test_a_weight_of_another_shape(
    name: str, shape: tuple[int, ...], component: str, base_file: Path, tmp_path: Path
) -> None:
    save_file({**load_file(base_file), name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{component}: .*(has shape|do not have the layout)"):
        unpack(tmp_path / "model.safetensors", tmp_path / "out", config=base_file.parent / "checkpoint")


def test_a_base_model_is_not_unpacked_as_another_size(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(text_encoder|text_encoder_2|unet): .*`config`"):
        unpack(file, tmp_path)


def test_a_configuration_without_the_second_tokenizer(base_file: Path, tmp_path: Path) -> None:
    config = shutil.copytree(base_file.parent / "checkpoint", tmp_path / "config")
    shutil.rmtree(config / "text_encoder_2")
    with pytest.raises(CheckpointError, match=r"does not describe a checkpoint; expected .*text_encoder_2"):
        unpack(base_file, tmp_path / "out", config=config)


# What ships


def test_shipped_tokenizers(base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_weights(monkeypatch)
    unpack(base_file, tmp_path / "out")
    pads = {}
    for name in ("tokenizer", "tokenizer_2"):
        encoder = name.replace("tokenizer", "text_encoder")
        record = export_tokenizer(tmp_path / "out", name, encoder, tmp_path / "bundle", tmp_path)
        pads[name] = (record.begin, record.end, record.pad, record.length)
    assert pads == {"tokenizer": (49406, 49407, 49407, 77), "tokenizer_2": (49406, 49407, 0, 77)}


def test_weights_of_the_helper_are_those_that_diffusers_recognises(file: Path, family: Family) -> None:
    """At full size `infer_diffusers_model_type` knows the families by their tenth layer, which a tiny one lacks."""
    weights: Weights = load_file(file)
    prefix = {"xl": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}[family]
    weights[f"{prefix}transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(1)
    assert infer_diffusers_model_type(weights) == {"xl": "xl_base", "refiner": "xl_refiner"}[family]
