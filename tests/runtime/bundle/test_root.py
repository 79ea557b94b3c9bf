from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.root import BundleRoot
from latentrt.errors import IntegrityError
from tests.runtime.small_bundle import WEIGHTS, everything, write_bundle, write_hub_snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def replace_by_link(place: Path, target: Path) -> None:
    place.unlink()
    place.symlink_to(target)


def test_plain_files(folder: Path) -> None:
    assert BundleRoot(folder).resolve(WEIGHTS) == folder / WEIGHTS


def test_a_link_within_the_bundle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "store")
    (folder / WEIGHTS).symlink_to("../store")
    everything(Bundle.open(folder))
    assert BundleRoot(folder).resolve(WEIGHTS) == folder / "store"


def test_a_hard_link_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "store")
    os.link(tmp_path / "store", folder / WEIGHTS)
    everything(Bundle.open(folder))
    assert BundleRoot(folder).resolve(WEIGHTS) == folder / WEIGHTS


def test_a_link_on_the_way_to_the_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(folder)
    bundle = Bundle.open(tmp_path / "shortcut")
    everything(bundle)
    assert bundle.folder == folder


def test_a_hub_cache(tmp_path: Path) -> None:
    snapshot = write_hub_snapshot(tmp_path)
    bundle = Bundle.open(snapshot)
    everything(bundle)
    # Not the blob: the weights' name, and the graph beside them, count.
    assert bundle.path(WEIGHTS) == snapshot / WEIGHTS


def test_a_bundle_in_a_folder_of_a_hub_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    folder = write_bundle(snapshot / "float16")
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "4f0c")
    (folder / WEIGHTS).symlink_to(blobs / "4f0c")
    everything(Bundle.open(folder))
    assert BundleRoot(folder).resolve(WEIGHTS) == blobs / "4f0c"


def test_a_link_out_of_the_bundle_even_to_the_right_bytes(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "store")
    (folder / WEIGHTS).symlink_to(tmp_path / "store")
    with pytest.raises(
        IntegrityError, match=r"unet/model.safetensors is a link that leads to .*store, expected it to stay"
    ):
        everything(Bundle.open(folder))


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero"])
def test_a_link_to_a_file_of_the_machine(folder: Path, target: str) -> None:
    replace_by_link(folder / "LICENSE", Path(target))
    with pytest.raises(IntegrityError, match="leads to"):
        Bundle.open(folder).read("LICENSE", 100)


def test_a_linked_folder_that_leads_out(folder: Path, tmp_path: Path) -> None:
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(IntegrityError, match="leads to"):
        Bundle.open(folder).path(WEIGHTS)


def test_a_linked_manifest_that_leads_out(folder: Path, tmp_path: Path) -> None:
    (folder / "bundle.json").rename(tmp_path / "bundle.json")
    (folder / "bundle.json").symlink_to(tmp_path / "bundle.json")
    with pytest.raises(IntegrityError, match=r"bundle\.json is a link that leads to"):
        Bundle.open(folder)


def test_a_hub_snapshot_that_links_to_another_repository(tmp_path: Path) -> None:
    snapshot = write_hub_snapshot(tmp_path)
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / WEIGHTS).resolve().rename(other / "4f0c")
    replace_by_link(snapshot / WEIGHTS, other / "4f0c")
    with pytest.raises(IntegrityError, match="leads to"):
        everything(Bundle.open(snapshot))


def test_a_folder_whose_name_only_begins_alike(folder: Path, tmp_path: Path) -> None:
    beside = tmp_path / "bundle-of-others"
    beside.mkdir()
    (folder / WEIGHTS).rename(beside / "store")
    (folder / WEIGHTS).symlink_to(beside / "store")
    with pytest.raises(IntegrityError, match="leads to"):
        Bundle.open(folder).path(WEIGHTS)


@pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
def test_a_link_that_leads_nowhere_or_to_itself(folder: Path, target: str) -> None:
    replace_by_link(folder / WEIGHTS, Path(target))
    with pytest.raises(IntegrityError, match=r"unet/model\.safetensors is missing"):
        Bundle.open(folder).path(WEIGHTS)
