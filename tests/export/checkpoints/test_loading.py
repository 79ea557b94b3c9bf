"""Weights that are not the ones a configuration asks for are refused; old names for the right ones are understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentrt.errors import CheckpointError
from latentrt_export.modules.text_encoder import TextEncoder
from latentrt_export.modules.unet import UNet
from latentrt_export.modules.vae import VaeDecoder, VaeEncoder
from tests.tiny import autoencoder, text_encoder, unet, write_tokenizer

Tensors = dict[str, Tensor]
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A text encoder, whose names have no prefix, and an autoencoder."""
    torch.manual_seed(0)
    ids = write_tokenizer(tmp_path / "tokenizer", "sd1", "bpe")
    text_encoder("sd1", ids, 1).save_pretrained(tmp_path / "text_encoder")
    autoencoder().save_pretrained(tmp_path / "vae")
    return tmp_path


def rewrite(file: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def vae_file(checkpoint: Path) -> Path:
    return checkpoint / "vae" / "diffusion_pytorch_model.safetensors"


def text_file(checkpoint: Path) -> Path:
    return checkpoint / "text_encoder" / "model.safetensors"


def remove(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensor

    return change


def test_vae_tensor_missing(checkpoint: Path) -> None:
    rewrite(vae_file(checkpoint), remove("decoder.conv_in.weight"))
    with pytest.raises(CheckpointError, match=r"vae.*decoder\.conv_in\.weight"):
        VaeDecoder.load(checkpoint, None)


def test_vae_tensor_unexpected(checkpoint: Path) -> None:
    rewrite(vae_file(checkpoint), put("decoder.extra.weight", torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"1 tensors are unexpected, the first is decoder\.extra\.weight"):
        VaeDecoder.load(checkpoint, None)


def test_vae_tensor_of_another_shape(checkpoint: Path) -> None:
    rewrite(vae_file(checkpoint), put("decoder.conv_in.bias", torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"vae.*decoder\.conv_in\.bias"):
        VaeDecoder.load(checkpoint, None)


def test_text_tensor_missing(checkpoint: Path) -> None:
    name = next(name for name in load_file(text_file(checkpoint)) if name.endswith("final_layer_norm.bias"))
    rewrite(text_file(checkpoint), remove(name))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, the first is .*final_layer_norm\.bias"):
        TextEncoder.load(checkpoint, None)


def test_text_tensor_unexpected(checkpoint: Path) -> None:
    rewrite(text_file(checkpoint), put("something.weight", torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"unexpected, the first is something\.weight"):
        TextEncoder.load(checkpoint, None)


def test_text_tensor_of_another_shape(checkpoint: Path) -> None:
    name = next(name for name in load_file(text_file(checkpoint)) if name.endswith("final_layer_norm.bias"))
    rewrite(text_file(checkpoint), put(name, torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"text_encoder.*final_layer_norm\.bias|ignore_mismatched_sizes"):
        TextEncoder.load(checkpoint, None)


def test_position_ids_of_old_checkpoints_are_no_weight(checkpoint: Path) -> None:
    rewrite(text_file(checkpoint), put("text_model.embeddings.position_ids", torch.arange(77)[None]))
    assert not any("position_ids" in name for name in TextEncoder.load(checkpoint, None).weights())


def test_damaged_configuration(checkpoint: Path) -> None:
    config = checkpoint / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": "wide"}))
    with pytest.raises(CheckpointError, match="vae"):
        VaeDecoder.load(checkpoint, None)


def test_a_configuration_of_nonsense_is_one_sentence(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match="text_encoder: its weights cannot be loaded"):
        TextEncoder.load(checkpoint, None)


def test_old_attention_names_come_out_under_the_current_ones(checkpoint: Path) -> None:
    """Published SD 1.x autoencoders call their attention's weights query, key, value and proj_attn."""
    expected = {**VaeDecoder.load(checkpoint, None).weights(), **VaeEncoder.load(checkpoint, None).weights()}

    def age(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            tensors[_old(name)] = tensors.pop(name)

    rewrite(vae_file(checkpoint), age)
    assert any(".proj_attn." in name for name in load_file(vae_file(checkpoint)))
    found = {**VaeDecoder.load(checkpoint, None).weights(), **VaeEncoder.load(checkpoint, None).weights()}
    assert found.keys() == expected.keys()
    assert any(name.endswith("attentions.0.to_out.0.weight") for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _old(name: str) -> str:
    for new, old in OLD_ATTENTION.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_names_with_and_without_the_prefix_are_one_name(checkpoint: Path) -> None:
    plain = TextEncoder.load(checkpoint, None).weights()

    def prefix(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)

    rewrite(text_file(checkpoint), prefix)
    prefixed = TextEncoder.load(checkpoint, None).weights()
    assert plain.keys() == prefixed.keys()
    assert all(name.startswith("text_model.") and ".text_model." not in name for name in plain)


def test_an_encoder_that_wants_an_attention_mask(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_attention_mask": True}))
    with pytest.raises(CheckpointError, match="use_attention_mask"):
        TextEncoder.load(checkpoint, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim"),
        ({"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 4}, "class_embed_type"),
    ],
)
def test_unets_of_another_kind(tmp_path: Path, settings: dict[str, object], expected: str) -> None:
    config = {key: value for key, value in unet("sd1").config.items() if not key.startswith("_")}
    UNet2DConditionModel(**{**config, **settings}).save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=expected):
        UNet.load(tmp_path, None)
