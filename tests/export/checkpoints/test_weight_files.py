"""Which weights are taken, and what is refused without loading them."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import checkpoint as checkpoints
from latentrt_export.families import PIPELINES
from tests.export.skeleton import STEMS, write_json, write_shards, write_skeleton, write_weights

open_checkpoint = functools.partial(checkpoints.open_checkpoint, pipelines=PIPELINES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_skeleton(tmp_path / "model")


UNET = "diffusion_pytorch_model.safetensors"


def variants(folder: Path, asked: str | None = None) -> dict[str, str | None]:
    return {part: found.variant for part, found in open_checkpoint(folder, variant=asked).weights.items()}


# Missing and damaged


@pytest.mark.parametrize(("part", "stem"), STEMS.items())
def test_missing_weights(folder: Path, part: str, stem: str) -> None:
    (folder / part / f"{stem}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{part} has no weights; expected {stem}\.safetensors"):
        open_checkpoint(folder)


def test_truncated(folder: Path) -> None:
    file = folder / "unet" / UNET
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, its header promises \d+; it is truncated or damaged"):
        open_checkpoint(folder)


def test_longer_than_its_header_says(folder: Path) -> None:
    with (folder / "unet" / UNET).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0",
        struct.pack("<Q", 10) + b"{damaged}}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 11) + b'{"a": "b"} ',
        struct.pack("<Q", 27) + b'{"a": {"data_offsets": [0]}}'[:27],
        struct.pack("<Q", 2**63) + b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    ],
    ids=["empty", "short", "json", "list", "entry", "offsets", "length", "lfs-pointer"],
)
def test_damaged_header(folder: Path, content: bytes) -> None:
    (folder / "unet" / UNET).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"header is damaged|truncated or damaged"):
        open_checkpoint(folder)


# Shards


def test_sharded(folder: Path) -> None:
    shards = write_shards(folder / "unet", "diffusion_pytorch_model")
    assert list(open_checkpoint(folder).weights["unet"].files) == shards


def test_a_shard_is_missing(folder: Path) -> None:
    write_shards(folder / "unet", "diffusion_pytorch_model")[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing; the index of the shards"):
        open_checkpoint(folder)


def test_a_shard_is_truncated(folder: Path) -> None:
    shard = write_shards(folder / "unet", "diffusion_pytorch_model")[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": "../../elsewhere.safetensors"}, {"a": "x.bin"}])
def test_an_index_without_shards(folder: Path, weight_map: object) -> None:
    write_shards(folder / "unet", "diffusion_pytorch_model")
    write_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match="names no shards in its weight_map"):
        open_checkpoint(folder)


# Variants


def test_plain_weights_are_the_first_choice(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    write_weights(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    found = open_checkpoint(folder).weights["unet"]
    assert found.variant is None
    assert [file.name for file in found.files] == [UNET]


def test_fp16_alone_is_taken(tmp_path: Path) -> None:
    assert set(variants(write_skeleton(tmp_path, variant="fp16")).values()) == {"fp16"}


def test_fp16_shards(folder: Path) -> None:
    (folder / "unet" / UNET).unlink()
    shards = write_shards(folder / "unet", "diffusion_pytorch_model", variant="fp16")
    found = open_checkpoint(folder).weights["unet"]
    assert (found.variant, list(found.files)) == ("fp16", shards)


def test_fp16_asked(tmp_path: Path) -> None:
    write_skeleton(tmp_path)
    write_skeleton(tmp_path, variant="fp16")
    assert set(variants(tmp_path, "fp16").values()) == {"fp16"}
    assert set(variants(tmp_path).values()) == {None}


def test_a_variant_of_some_submodules(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert variants(folder, "fp16") == {"text_encoder": None, "unet": "fp16", "vae": None, "safety_checker": None}


def test_the_second_choice_is_checked_as_well(folder: Path) -> None:
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "vae" / UNET).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"vae.*header is damaged"):
        open_checkpoint(folder, variant="fp16")


def test_a_variant_of_no_submodule(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights of the variant fp61; leave --variant out"):
        open_checkpoint(folder, variant="fp61")


def test_another_variant_alone_is_named(folder: Path) -> None:
    (folder / "unet" / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(CheckpointError, match="only the variants bf16; name one with --variant"):
        open_checkpoint(folder)
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
def test_pickle_alone_is_refused_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "unet" / UNET).unlink()
    set_trap(folder / "unet" / name, tmp_path / "sprung")
    with pytest.raises(CheckpointError, match=r"is a pickle.*convert it:\n  python -c"):
        open_checkpoint(folder)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_would_have_sprung(tmp_path: Path) -> None:
    set_trap(tmp_path / "trap", tmp_path / "sprung")
    pickle.loads((tmp_path / "trap").read_bytes())
    assert (tmp_path / "sprung").exists()


def test_pickle_beside_safetensors_is_not_looked_at(folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "unet", "vae", "safety_checker"):
        set_trap(folder / part / "pytorch_model.bin", tmp_path / "sprung")
    write_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / UNET).unlink()
    assert variants(folder)["unet"] == "fp16", "half weights in safetensors come before a pickle"
    assert not (tmp_path / "sprung").exists()


def test_the_conversion_that_is_named_works(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = write_skeleton(tmp_path / "a model; it's here")
    (folder / "unet" / UNET).unlink()
    torch.save({"weight": torch.arange(6.0).reshape(2, 3).T}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(folder)
    this_python = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(str(refusal.value).split("\n  ")[1], shell=True, check=True, env=this_python)
    assert load_file(folder / "unet" / UNET)["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert open_checkpoint(folder).weights["unet"].variant is None
