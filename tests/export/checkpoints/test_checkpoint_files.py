"""Links that lead out of a checkpoint, pipes and huge files, for every file that an export reads or copies."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import checkpoint_files
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.checkpoints.checkpoint_files import check_folders, read_small_file
from tests.export.checkpoints.test_checkpoint import in_hub_cache
from tests.export.skeleton import open_skeleton, write_json, write_skeleton
from tests.tiny import PREPROCESSOR

FILES = [
    "LICENSE",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/vocab.json",
    "tokenizer/special_tokens_map.json",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_skeleton(tmp_path / "model")
    (folder / "LICENSE").write_text("Do as you like.\n")
    for name in ("vocab.json", "special_tokens_map.json"):
        write_json(folder / "tokenizer" / name, {})
    return folder


def move_out(path: Path, elsewhere: Path) -> None:
    """Put a link to a file outside the checkpoint in a file's place."""
    elsewhere.mkdir(exist_ok=True)
    path.symlink_to(path.rename(elsewhere / path.name))


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leads_out_of_the_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    """Even to a file of the right kind: a private key would be published with the bundle, or a private model."""
    move_out(folder / name, tmp_path / "private")
    with pytest.raises(CheckpointError, match=rf"{Path(name).name} is a link that leads to {tmp_path}/private"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", ["unet", "tokenizer", "safety_checker"])
def test_a_folder_that_is_a_link_out_of_the_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    move_out(folder / name, tmp_path / "private")
    with pytest.raises(CheckpointError, match=f"{name} is a link that leads to"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"is a pipe, a device or a socket"):
        open_skeleton(folder)


def test_a_socket_and_a_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "unet")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(CheckpointError, match="socket is a pipe, a device or a socket"):
            open_skeleton(folder)
    os.unlink("socket")
    os.symlink("/dev/zero", "config.txt")
    with pytest.raises(CheckpointError, match="leads to /dev/zero"):
        open_skeleton(folder)


def test_a_loop_of_links(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="cannot be read: Too many levels of symbolic links"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", ["unet/config.json", "tokenizer/vocab.json", "model_index.json"])
def test_a_huge_text_is_not_read(folder: Path, name: str) -> None:
    os.truncate(folder / name, 10 << 30)  # a hole: the file takes no room
    with pytest.raises(CheckpointError, match=r"10,737,418,240 bytes, expected at most"):
        open_skeleton(folder)


def test_weights_may_be_huge(folder: Path) -> None:
    (folder / "unet" / "model.onnx").touch()
    os.truncate(folder / "unet" / "model.onnx", 10 << 30)
    assert open_skeleton(folder).name == "model"


def test_a_header_of_weights_is_bounded(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes((1 << 30).to_bytes(8, "little"))
    os.truncate(path, 2 << 30)
    with pytest.raises(CheckpointError, match="the header has 1,073,741,824 bytes"):
        open_skeleton(folder)


def test_links_inside_the_checkpoint(folder: Path) -> None:
    (folder / "unet" / "config.json").rename(folder / "shared.json")
    (folder / "unet" / "config.json").symlink_to("../shared.json")
    assert open_skeleton(folder).folder == folder


def test_links_of_a_hub_cache_to_its_own_blobs(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_skeleton(in_hub_cache(folder, tmp_path / "hub"))
    assert set(checkpoint.documents) == {"LICENSE", "MODEL_CARD.md"}


def test_a_link_of_a_hub_cache_to_another_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    private = tmp_path / "hub" / "models--my--private" / "blobs"
    private.mkdir(parents=True)
    (private / "secret").write_text("mine")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(private / "secret")
    with pytest.raises(CheckpointError, match="LICENSE is a link that leads to"):
        open_skeleton(snapshot)


def test_the_checkpoint_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert open_skeleton(tmp_path / "link").name == "model"


def test_unrelated_folders_are_not_looked_at(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "cat.png").symlink_to("/etc/hostname")
    assert open_skeleton(folder).name == "model"


@pytest.mark.parametrize("option", ["safety_checker", "preview_decoder", "vae"])
def test_folders_of_further_components_have_the_same_rule(folder: Path, tmp_path: Path, option: str) -> None:
    other = tmp_path / "other"
    write_json(other / "config.json", {"_class_name": "AutoencoderTiny"})
    write_json(other / "preprocessor_config.json", PREPROCESSOR)
    move_out(other / "config.json", tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"config\.json is a link that leads to"):
        open_skeleton(folder, given=GivenComponents(**{option: other}))


def test_a_folder_of_too_many_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_FILES", 3)
    for number in range(4):
        (folder / "unet" / f"{number}").touch()
    with pytest.raises(CheckpointError, match="unet has more than 3 files"):
        check_folders(folder, "unet")


def test_a_text_of_any_origin(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("twelve bytes")
    assert read_small_file(tmp_path / "text", 12) == b"twelve bytes"
    with pytest.raises(CheckpointError, match="12 bytes, expected at most 11"):
        read_small_file(tmp_path / "text", 11)
