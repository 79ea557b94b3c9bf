"""Weight files: selection, formats that are rejected unopened, and strict loading."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel
from transformers.models.clip import modeling_clip

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.weights import check_values, find_weights, load_pretrained
from latentrt_export.export_warning import ExportWarning
from latentrt_export.modules.streamed import read_parameter
from latentrt_export.modules.text_encoder import TextEncoder
from latentrt_export.modules.unet import UNet
from latentrt_export.modules.vae import VaeDecoder, VaeEncoder
from tests.export.skeleton import (
    STEMS,
    change_json,
    open_skeleton,
    write_json,
    write_shards,
    write_skeleton,
    write_weights,
)
from tests.tiny import autoencoder, text_encoder, unet, write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_skeleton(tmp_path / "model")


UNET = "diffusion_pytorch_model.safetensors"


def variants(folder: Path, preferred: str | None = None) -> dict[str, str | None]:
    return {part: found.variant for part, found in open_skeleton(folder, variant=preferred).weights.items()}


# Missing and damaged


@pytest.mark.parametrize(("part", "stem"), STEMS.items())
def test_missing_weights(folder: Path, part: str, stem: str) -> None:
    (folder / part / f"{stem}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{part} has no weights; expected {stem}\.safetensors"):
        open_skeleton(folder)


def test_truncated(folder: Path) -> None:
    file = folder / "unet" / UNET
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, expected \d+ .*truncated or damaged"):
        open_skeleton(folder)


def test_a_file_longer_than_its_header_states(folder: Path) -> None:
    with (folder / "unet" / UNET).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"\x08\0\0",
        struct.pack("<Q", 10) + b"{damaged}}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 11) + b'{"a": "b"} ',
        struct.pack("<Q", 27) + b'{"a": {"data_offsets": [0]}}'[:27],
        struct.pack("<Q", 2**63) + b"{}",
    ],
    ids=["short", "json", "list", "entry", "offsets", "length"],
)
def test_damaged_header(folder: Path, content: bytes) -> None:
    (folder / "unet" / UNET).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"header is damaged|truncated or damaged"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "a pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"PK\x03\x04archive/data.pkl", r"is a pickle in spite of its name.*\n  python -c"),
        (pickle.dumps({}, protocol=2), "is a pickle in spite of its name"),
        (b"GGUF\x03\0\0\0", "is GGUF"),
    ],
    ids=["empty", "lfs-pointer", "html", "zip", "pickle", "gguf"],
)
def test_another_kind_of_file_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "unet" / UNET).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        open_skeleton(folder)


# Dtypes and values


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_weights_of_integers_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    save_file({"conv_in.weight": torch.zeros(2, dtype=dtype), "table": torch.zeros(2)}, folder / "unet" / UNET)
    with pytest.raises(CheckpointError, match=r"stores conv_in\.weight as \w+, expected one of F64, F32"):
        open_skeleton(folder)


def test_a_dtype_that_the_library_does_not_know_is_refused_by_name(folder: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (folder / "unet" / UNET).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(CheckpointError, match=r"stores a\.weight as F4"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", ["conv.scale_weight", "conv.weight_scale", "scaled_fp8"])
def test_scales_of_eight_bit_weights_are_refused(folder: Path, name: str) -> None:
    """diffusers passes over them, and would generate noise."""
    save_file({"conv.weight": torch.zeros(2, dtype=torch.float8_e4m3fn), name: torch.ones(1)}, folder / "unet" / UNET)
    with pytest.raises(CheckpointError, match=f"stores {name}, a scale of 8-bit weights"):
        open_skeleton(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_values_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    tensors = {"a.weight": torch.ones(3, dtype=torch.float64), "b.bias": torch.tensor([0.0, value, value]).double()}
    tensors["b.bias"][1:] = value
    save_file(tensors, folder / "unet" / UNET)
    with pytest.raises(CheckpointError, match=r"unet: 1 tensors .*NaN or infinite, the first is b\.bias with 2;"):
        check_values("unet", open_skeleton(folder).weights["unet"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_every_dtype_is_checked(folder: Path, dtype: torch.dtype) -> None:
    save_file({"a.weight": torch.tensor([1.0, float("nan")]).to(dtype)}, folder / "unet" / UNET)
    with pytest.raises(CheckpointError, match=r"the first is a\.weight with 1"):
        check_values("unet", open_skeleton(folder).weights["unet"])


def test_constants_and_empty_tensors_are_not_weights(folder: Path) -> None:
    tensors = {
        "attn_mask": torch.tensor([0.0, float("-inf")]),
        "a.weight": torch.zeros(0),
        "position_ids": torch.ones(2).long(),
    }
    save_file(tensors, folder / "unet" / UNET)
    check_values("unet", open_skeleton(folder).weights["unet"])


# Shards


def test_sharded(folder: Path) -> None:
    shards = write_shards(folder / "unet", "diffusion_pytorch_model")
    assert list(open_skeleton(folder).weights["unet"].files) == shards


def test_a_shard_is_missing(folder: Path) -> None:
    write_shards(folder / "unet", "diffusion_pytorch_model")[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing, .*index of the shards"):
        open_skeleton(folder)


def test_a_shard_is_truncated(folder: Path) -> None:
    shard = write_shards(folder / "unet", "diffusion_pytorch_model")[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*truncated"):
        open_skeleton(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": "../../elsewhere.safetensors"}, {"a": "x.bin"}])
def test_an_index_without_shards(folder: Path, weight_map: object) -> None:
    write_shards(folder / "unet", "diffusion_pytorch_model")
    write_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match="names no shards in its weight_map"):
        open_skeleton(folder)


def test_of_a_single_file_and_shards_the_one_is_checked_that_the_library_loads(checkpoint: Path) -> None:
    """transformers loads the single file, diffusers the shards."""
    for part, stem, module in (
        ("text_encoder", "model", CLIPTextModel),
        ("vae", "diffusion_pytorch_model", AutoencoderKL),
    ):
        folder, shard = checkpoint / part, f"{stem}-00001-of-00001.safetensors"
        single = folder / f"{stem}.safetensors"
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(single).items()}
        save_file(zeros, folder / shard, metadata={"format": "pt"})
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(zeros, shard)}
        )
        (found,) = find_weights(checkpoint, folder, stem, None).files
        assert found.name == (single.name if part == "text_encoder" else shard)
        loaded = load_pretrained(module, folder, None)
        loads_zeros = all(not read_parameter(parameter).any() for parameter in loaded.parameters())
        assert loads_zeros == (found.name == shard)


@pytest.mark.parametrize("name", ["{}.fp16.safetensors.index.json", "{}.safetensors.fp16.index.json"])
def test_an_index_by_an_earlier_name_is_refused(folder: Path, name: str) -> None:
    """diffusers loads its shards in place of the single file that was checked."""
    stem = "diffusion_pytorch_model"
    write_weights(folder / "unet" / f"{stem}.fp16.safetensors")
    write_json(folder / "unet" / name.format(stem), {"weight_map": {"first": "other.safetensors"}})
    open_skeleton(folder)
    with pytest.raises(CheckpointError, match=r"has an earlier name of diffusers"):
        open_skeleton(folder, variant="fp16")


def test_a_folder_with_an_adapter_is_refused(folder: Path) -> None:
    """transformers would load the model that it names, with peft installed, and none of it without."""
    write_json(folder / "text_encoder" / "adapter_config.json", {"base_model_name_or_path": "another/model"})
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json, of an adapter.*merge_and_unload"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", ["x" * 252 + ".safetensors", "é" * 130 + ".safetensors", "x\0.safetensors"])
def test_a_shard_with_a_name_that_no_file_can_have(folder: Path, name: str) -> None:
    write_shards(folder / "unet", "diffusion_pytorch_model")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": {"first": name}})
    with pytest.raises(CheckpointError, match=r"names no shards in its weight_map|is missing"):
        open_skeleton(folder)


# Variants


def test_plain_weights_are_the_first_choice(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    write_weights(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    found = open_skeleton(folder).weights["unet"]
    assert found.variant is None
    assert [file.name for file in found.files] == [UNET]


def test_fp16_alone_is_used(tmp_path: Path) -> None:
    assert set(variants(write_skeleton(tmp_path, variant="fp16")).values()) == {"fp16"}


def test_fp16_shards(folder: Path) -> None:
    (folder / "unet" / UNET).unlink()
    shards = write_shards(folder / "unet", "diffusion_pytorch_model", variant="fp16")
    found = open_skeleton(folder).weights["unet"]
    assert (found.variant, list(found.files)) == ("fp16", shards)


def test_fp16_preferred(tmp_path: Path) -> None:
    write_skeleton(tmp_path)
    write_skeleton(tmp_path, variant="fp16")
    assert set(variants(tmp_path, "fp16").values()) == {"fp16"}
    assert set(variants(tmp_path).values()) == {None}


def test_a_variant_of_some_components(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert variants(folder, "fp16") == {"text_encoder": None, "unet": "fp16", "vae": None, "safety_checker": None}


def test_the_second_choice_is_checked_as_well(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "vae" / UNET).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"vae.*is empty"):
        open_skeleton(folder, variant="fp16")


def test_a_variant_of_no_component(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights of the `variant` fp61"):
        open_skeleton(folder, variant="fp61")


def test_only_another_variant(folder: Path) -> None:
    (folder / "unet" / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(CheckpointError, match="only the variants bf16; pass one as `variant`"):
        open_skeleton(folder)
    assert variants(folder, "bf16")["unet"] == "bf16"


# Pickles


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.evidence),)


def set_trap(file: Path, evidence: Path) -> None:
    file.write_bytes(pickle.dumps(_Trap(evidence)))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt", "model.pth"])
def test_a_pickle_alone_is_rejected_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "unet" / UNET).unlink()
    set_trap(folder / "unet" / name, tmp_path / "sprung")
    with pytest.raises(CheckpointError, match=r"is a pickle.*Convert it .*:\n  python -c"):
        open_skeleton(folder)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_works(tmp_path: Path) -> None:
    set_trap(tmp_path / "trap", tmp_path / "sprung")
    pickle.loads((tmp_path / "trap").read_bytes())
    assert (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_ignored(folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "unet", "vae", "safety_checker"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            set_trap(folder / part / name, tmp_path / "sprung")
    assert set(variants(folder).values()) == {None}
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["{}.bin", "{}-00001-of-00002.bin"])
@pytest.mark.parametrize(
    ("part", "stem", "library_stem"),
    [
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    ],
)
def test_a_pickle_that_diffusers_would_load_is_not_passed_over(
    folder: Path, part: str, stem: str, library_stem: str, name: str
) -> None:
    """Of the plain weights before half ones, and of a variant before the plain ones."""
    plain, half = folder / part / f"{stem}.safetensors", folder / part / f"{stem}.fp16.safetensors"
    plain.rename(half)
    (folder / part / name.format(library_stem)).write_bytes(b"of other weights")
    with pytest.raises(CheckpointError, match=rf"not {half.name}; for the weights of that, pass `variant` fp16"):
        variants(folder)
    assert variants(folder, "fp16")[part] == "fp16"
    half.rename(plain)
    assert variants(folder)[part] is None
    (folder / part / name.format(f"{library_stem}.fp16")).write_bytes(b"of other weights")
    with pytest.raises(CheckpointError, match=rf"not {plain.name}; for the weights of that, pass no `variant`"):
        variants(folder, "fp16")


def test_the_suggested_conversion_is_of_the_library(tmp_path: Path) -> None:
    """The command is run once, in `test_single_file`; here its code runs in this process."""
    folder = write_skeleton(tmp_path / "a model; it's here")
    (folder / "unet" / UNET).unlink()
    torch.save({"weight": torch.arange(6.0).reshape(2, 3).T}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "alphabetically_first.pt").write_bytes(b"an optimizer's")
    with pytest.raises(CheckpointError) as refusal:
        open_skeleton(folder)
    python, option, code = shlex.split(str(refusal.value).split("\n  ")[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert load_file(folder / "unet" / UNET)["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert open_skeleton(folder).weights["unet"].variant is None


def test_the_suggested_conversion_takes_all_shards(folder: Path) -> None:
    (folder / "unet" / UNET).unlink()
    for number in (1, 2):
        torch.save(
            {f"w{number}": torch.ones(2)}, folder / "unet" / f"diffusion_pytorch_model-0000{number}-of-00002.bin"
        )
    with pytest.raises(CheckpointError) as refusal:
        open_skeleton(folder)
    exec(shlex.split(str(refusal.value).split("\n  ")[1])[2], {})
    assert set(load_file(folder / "unet" / UNET)) == {"w1", "w2"}


# Loading


Tensors = dict[str, Tensor]
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A text encoder, whose weights have no prefix, and an autoencoder."""
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
    with pytest.warns(ExportWarning, match=r"vae: ignored 1 tensors .*first is decoder\.extra\.weight"):
        assert not any("extra" in name for name in VaeDecoder.load(checkpoint, None).weights())


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
    """As diffusers does with the projection that some checkpoints store beside the encoder."""
    plain = {**TextEncoder.load(checkpoint, None).weights()}  # read before the file changes
    rewrite(text_file(checkpoint), put("text_projection.weight", torch.eye(32)))
    with pytest.warns(ExportWarning, match=r"text_encoder: ignored 1 tensors .*first is text_projection\.weight"):
        found = TextEncoder.load(checkpoint, None).weights()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], weight) for name, weight in plain.items())


def test_text_tensor_of_another_shape(checkpoint: Path) -> None:
    name = next(name for name in load_file(text_file(checkpoint)) if name.endswith("final_layer_norm.bias"))
    rewrite(text_file(checkpoint), put(name, torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"text_encoder.*final_layer_norm\.bias|ignore_mismatched_sizes"):
        TextEncoder.load(checkpoint, None)


@pytest.mark.parametrize("component", ["text", "vae"])
def test_one_tensor_under_two_names_is_refused(checkpoint: Path, component: str) -> None:
    """A library takes either, so the weights would be those of another model than its own."""
    if component == "text":
        bias = "final_layer_norm.bias"
        other = {bias, f"text_model.{bias}"} - load_file(text_file(checkpoint)).keys()
        rewrite(text_file(checkpoint), put(other.pop(), torch.zeros(32)))
        with pytest.raises(CheckpointError, match=r"text_encoder: its files store .*final_layer_norm\.bias.*two names"):
            TextEncoder.load(checkpoint, None)
    else:
        name = "decoder.mid_block.attentions.0.query.bias"
        rewrite(vae_file(checkpoint), put(name, torch.zeros(3)))
        with pytest.raises(CheckpointError, match=r"vae: its files store .*two names of one tensor"):
            VaeDecoder.load(checkpoint, None)


def test_position_ids_of_old_checkpoints_are_ignored(checkpoint: Path) -> None:
    rewrite(text_file(checkpoint), put("text_model.embeddings.position_ids", torch.arange(77)[None]))
    assert not any("position_ids" in name for name in TextEncoder.load(checkpoint, None).weights())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_every_dtype_is_loaded_as_in_diffusers(checkpoint: Path, dtype: torch.dtype) -> None:
    def cast(tensors: Tensors) -> None:
        for name in list(tensors)[::2]:  # the others stay float32
            tensors[name] = tensors[name].to(dtype)

    rewrite(vae_file(checkpoint), cast)
    expected = AutoencoderKL.from_pretrained(checkpoint / "vae", use_safetensors=True, torch_dtype=torch.float32)
    stored, expected = load_file(vae_file(checkpoint)), dict(expected.named_parameters())
    found = {**VaeDecoder.load(checkpoint, None).weights(), **VaeEncoder.load(checkpoint, None).weights()}
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    for name, weight in found.items():
        assert torch.equal(weight, expected[name])
        assert torch.equal(weight, stored[name].float())


def test_damaged_configuration(checkpoint: Path) -> None:
    config = checkpoint / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": "wide"}))
    with pytest.raises(CheckpointError, match="vae"):
        VaeDecoder.load(checkpoint, None)


def test_an_invalid_configuration(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match="text_encoder: its weights cannot be loaded"):
        TextEncoder.load(checkpoint, None)


def test_old_attention_names_are_renamed(checkpoint: Path) -> None:
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


def test_names_with_and_without_a_prefix_are_equal(checkpoint: Path) -> None:
    plain = {**TextEncoder.load(checkpoint, None).weights()}  # read before the file changes

    def prefix(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)

    rewrite(text_file(checkpoint), prefix)
    prefixed = TextEncoder.load(checkpoint, None).weights()
    assert plain.keys() == prefixed.keys()
    assert all(name.startswith("text_model.") and ".text_model." not in name for name in plain)


def test_an_encoder_with_an_attention_mask(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_attention_mask": True}))
    with pytest.raises(CheckpointError, match="use_attention_mask"):
        TextEncoder.load(checkpoint, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity'"),
    ],
)
def test_unsupported_unets(tmp_path: Path, settings: dict[str, object], expected: str) -> None:
    config = {key: value for key, value in unet("sd1").config.items() if not key.startswith("_")}
    UNet2DConditionModel(**{**config, **settings}).save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=expected):
        UNet.load(tmp_path, None)


@pytest.mark.parametrize(("layers", "width"), [(100, 32), (3, 4096)])
def test_a_model_that_is_larger_than_its_weights_is_not_built(
    checkpoint: Path, layers: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 layers of a text encoder have 1,600 parameters; the files have some 50 tensors."""
    built, make = [], modeling_clip.CLIPEncoderLayer.__init__

    def count(self: Any, config: Any) -> None:
        built.append(config)
        make(self, config)

    monkeypatch.setattr(modeling_clip.CLIPEncoderLayer, "__init__", count)
    TextEncoder.load(checkpoint, None)
    assert len(built) == 1
    change_json(checkpoint / "text_encoder" / "config.json", num_hidden_layers=layers, hidden_size=width)
    with pytest.raises(CheckpointError, match=r"text_encoder: config\.json describes a model of at least"):
        TextEncoder.load(checkpoint, None)
    assert len(built) < 90
