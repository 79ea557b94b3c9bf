"""An autoencoder's single file, in each layout, gives the weights and the configuration of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.single_file import CONFIGS
from latentrt_export.checkpoints.vae_file import unpack_vae
from tests.ldm import ldm_vae
from tests.tiny import autoencoder, move_off_initial_values

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers."""
    torch.manual_seed(0)
    model = autoencoder(levels=2, scale=0.4)
    move_off_initial_values(model)
    place = tmp_path_factory.mktemp("vae") / "vae"
    model.save_pretrained(place)
    return place


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def write(path: Path, names: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(names), path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("layout", ["checkpoint", "original", "diffusers", "beside"])
def test_each_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    weights = load_file(folder / NAME)
    original = ldm_vae(weights)
    own = folder / "config.json"
    if layout == "checkpoint":
        more = {"cond_stage_model.x": torch.ones(2), "model.diffusion_model.x": torch.ones(2)}
        file = write(tmp_path / "whole.safetensors", {**original, **more})
    elif layout == "original":
        plain = {name.removeprefix("first_stage_model."): weight for name, weight in original.items()}
        file = write(tmp_path / "vae.safetensors", {**plain, "loss.logvar": torch.ones(())})
    elif layout == "diffusers":
        file = write(tmp_path / "vae.safetensors", weights)
    else:  # the configuration beside it comes first
        file, own = folder / NAME, CONFIGS / "stable-diffusion-2" / "vae" / "config.json"
    found = unpack_vae(file, tmp_path / "out", own=own)
    assert read_config(found)["block_out_channels"] == [8, 8]
    assert read_config(found)["scaling_factor"] == 0.4
    made = load_file(found / NAME)
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weight) for name, weight in weights.items())
    AutoencoderKL.from_pretrained(found)


def test_without_a_configuration_it_is_that_of_stable_diffusion(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "vae.safetensors", load_file(folder / NAME))
    found = unpack_vae(file, tmp_path / "out", own=tmp_path / "none.json")
    assert read_config(found) == read_config(CONFIGS / "stable-diffusion-1" / "vae")
    original = write(tmp_path / "original.safetensors", ldm_vae(load_file(folder / NAME)))
    with pytest.raises(CheckpointError, match="vae: "):
        unpack_vae(original, tmp_path / "other", own=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("class_name", "family"),
    [
        ("StableDiffusionXLPipeline", "stable-diffusion-xl"),
        ("StableDiffusionXLImg2ImgPipeline", "stable-diffusion-xl"),
        ("StableDiffusionPipeline", "stable-diffusion-1"),
        (["StableDiffusionXLPipeline"], "stable-diffusion-1"),
    ],
)
def test_without_a_configuration_it_is_that_of_the_checkpoint_s_family(
    class_name: object, family: str, folder: Path, tmp_path: Path
) -> None:
    """The two have the same architecture; the scale of the latents differs."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    file = write(tmp_path / "vae.safetensors", load_file(folder / NAME))
    found = unpack_vae(file, tmp_path / "out", own=tmp_path / "vae" / "config.json")
    assert read_config(found) == read_config(CONFIGS / family / "vae")


def test_the_class_follows_from_the_names(folder: Path, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.safetensors", {"encoder.layers.0.weight": torch.ones(1)})
    found = unpack_vae(tiny, tmp_path / "out", own=folder / "config.json")
    assert read_config(found) == {"_class_name": "AutoencoderTiny"}, "the checkpoint's own is another class"
    names = ("encoder.down_blocks.0.x", "decoder.condition_encoder.layers.0.weight")
    asymmetric = write(tmp_path / "asymmetric.safetensors", {name: torch.ones(1) for name in names})
    with pytest.raises(CheckpointError, match=r"AsymmetricAutoencoderKL without its config\.json"):
        unpack_vae(asymmetric, tmp_path / "other", own=folder / "config.json")


def test_files_that_are_no_autoencoder(folder: Path, tmp_path: Path) -> None:
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors is not an autoencoder.*lora_unet_x"):
        unpack_vae(lora, tmp_path / "out", own=folder / "config.json")
    pickle = tmp_path / "vae.pt"
    pickle.write_bytes(b"PK\x03\x04 anything")
    with pytest.raises(CheckpointError, match=r"(?s)vae\.pt is a pickle.*pickles"):
        unpack_vae(pickle, tmp_path / "out", own=folder / "config.json")
    assert not (tmp_path / "out").exists()
