"""The configurations that ship describe the published models, at full size and without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from latentrt_export.checkpoints.conversion import convert
from latentrt_export.checkpoints.single_file import CONFIGS, FAMILIES
from tests.export.checkpoints.test_conversion import describe
from tests.ldm import (
    CLIP_PREFIXES,
    OPENCLIP_PREFIXES,
    Family,
    ldm_clip,
    ldm_openclip,
    ldm_openclip_xl,
    ldm_unet,
    ldm_vae,
)

Parameters = dict[str, torch.Tensor]
NAMES: dict[Family, str] = {
    "sd1": "stable-diffusion-1",
    "sd2": "stable-diffusion-2",
    "xl": "stable-diffusion-xl",
    "refiner": "stable-diffusion-xl-refiner",
}
# Parameters of the published models, and tensors of the published single files.
PARAMETERS: dict[Family, dict[str, int]] = {
    "sd1": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "sd2": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    "xl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
    "refiner": {"text_encoder_2": 694_659_840, "unet": 2_259_526_660, "vae": 83_653_863},
}
TENSORS: dict[Family, dict[str, int]] = {
    "sd1": {"text_encoder": 196, "unet": 686, "vae": 248},
    "sd2": {"text_encoder": 294, "unet": 686, "vae": 248},
    "xl": {"text_encoder": 196, "text_encoder_2": 390, "unet": 1680, "vae": 248},
    "refiner": {"text_encoder_2": 390, "unet": 1220, "vae": 248},
}
PIPELINES: dict[Family, Any] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "xl": StableDiffusionXLPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def build(family: Family, channels: int = 4) -> dict[str, Parameters]:
    """Return the parameters of a family's components by their published names, on the meta device."""
    found: dict[str, Parameters] = {}
    for name, layout in FAMILIES[NAMES[family]].components.items():
        config = read(CONFIGS / NAMES[family] / name / "config.json")
        with torch.device("meta"):
            model = layout.build(config | ({"in_channels": channels} if name == "unet" else {}))
        found[name] = {layout.publish(key): parameter.data for key, parameter in model.named_parameters()}
    return found


def join(published: dict[str, Parameters], family: Family) -> Parameters:
    """Return the tensors of a single file."""
    weights = {**ldm_unet(published["unet"]), **ldm_vae(published["vae"])}
    if family == "sd2":
        weights |= ldm_openclip(published["text_encoder"])
    elif family != "refiner":
        weights |= ldm_clip(published["text_encoder"], CLIP_PREFIXES[family])
    if family in OPENCLIP_PREFIXES:
        weights |= ldm_openclip_xl(published["text_encoder_2"], OPENCLIP_PREFIXES[family])
    return weights


@pytest.mark.parametrize("family", NAMES)
def test_parameters_are_those_of_the_published_models(family: Family) -> None:
    counts = {name: sum(one.numel() for one in parameters.values()) for name, parameters in build(family).items()}
    assert counts == PARAMETERS[family]


@pytest.mark.parametrize(
    ("family", "channels", "kind"),
    [
        ("sd1", 4, "v1"),
        ("sd2", 4, "v2"),
        ("sd1", 9, "inpainting"),
        ("sd2", 9, "inpainting_v2"),
        ("xl", 4, "xl_base"),
        ("xl", 9, "xl_inpaint"),
        ("refiner", 4, "xl_refiner"),
    ],
)
def test_published_files_are_converted(family: Family, channels: int, kind: str) -> None:
    published = build(family, channels)
    weights = join(published, family)
    assert infer_diffusers_model_type(weights) == kind
    components = FAMILIES[NAMES[family]].components
    counts = {name: sum(key.startswith(layout.prefix) for key in weights) for name, layout in components.items()}
    assert counts == TENSORS[family]
    for name, layout in components.items():
        config = read(CONFIGS / NAMES[family] / name / "config.json")
        config |= {"in_channels": channels} if name == "unet" else {}
        found = convert(name, layout, describe(weights, layout.prefix), config)
        assert {key: one.shape for key, one in found.items()} == {
            key: tuple(one.shape) for key, one in published[name].items()
        }


@pytest.mark.parametrize("family", NAMES)
def test_the_index_names_what_there_is(family: Family) -> None:
    folder = CONFIGS / NAMES[family]
    index = read(folder / "model_index.json")
    named = {name for name, one in index.items() if isinstance(one, list) and one[0] is not None}
    assert named == {path.name for path in folder.iterdir() if path.is_dir()}
    assert index["_class_name"] == FAMILIES[NAMES[family]].pipelines[4] == PIPELINES[family].__name__
    assert index["scheduler"][1] == read(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    expected, _ = PIPELINES[family]._get_signature_keys(PIPELINES[family])
    assert {name for name, one in index.items() if isinstance(one, list)} <= set(expected)
