from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle, check_digest_form
from latentrt.bundle.manifest import MAX_MANIFEST_BYTES
from latentrt.errors import BundleError, IntegrityError, ManifestError, RequestError
from tests.runtime.small_bundle import FILES, edit_manifest, everything, manifest, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def digest_of(folder: Path) -> str:
    return "sha256:" + hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()


def test_an_intact_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest == manifest(folder)
    assert bundle.digest == digest_of(folder)
    assert bundle.folder == folder
    everything(bundle)
    bundle.verify()


def test_a_relative_path_survives_a_change_of_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    bundle = Bundle.open("bundle")
    monkeypatch.chdir("/")
    assert bundle.read("LICENSE", 100) == FILES["LICENSE"]


def test_the_files_of_a_component(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.component_files("unet", "float32") == ("unet/model.onnx", "unet/model.safetensors")
    with pytest.raises(BundleError, match="no float16 graph of unet"):
        bundle.component_files("unet", "float16")
    with pytest.raises(BundleError, match="no float32 graph of vae_encoder"):
        bundle.component_files("vae_encoder", "float32")


def test_a_pinned_digest(folder: Path) -> None:
    bundle = Bundle.open(folder, digest_of(folder))
    everything(bundle)
    assert bundle.digest == digest_of(folder)


def test_another_bundle_than_the_pinned_one(folder: Path) -> None:
    pinned = digest_of(folder)
    edit_manifest(folder, lambda tree: tree["defaults"].update(guidance_scale=8.0))
    Bundle.open(folder)
    with pytest.raises(IntegrityError, match=f"expected the pinned {pinned}"):
        Bundle.open(folder, pinned)


def test_the_digest_is_checked_before_the_manifest_is_parsed(folder: Path) -> None:
    pinned = digest_of(folder)
    (folder / "bundle.json").write_bytes(b"{" * 1000)
    with pytest.raises(IntegrityError, match="expected the pinned"):
        Bundle.open(folder, pinned)


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "0" * 64,
        f"sha256:{'0' * 63}",
        f"sha256:{'0' * 65}",
        f"sha256:{'A' * 64}",
        f"sha256:{'g' * 64}",
        f"SHA256:{'0' * 64}",
        f" sha256:{'0' * 64}",
        f"sha256:{'0' * 64}\n",
        f"md5:{'0' * 32}",
    ],
)
def test_a_digest_of_the_wrong_form(folder: Path, digest: str) -> None:
    with pytest.raises(RequestError, match="expected sha256: and 64"):
        Bundle.open(folder, digest)
    with pytest.raises(RequestError):
        check_digest_form(digest)


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist.*latentrt export CHECKPOINT BUNDLE"):
        Bundle.open(tmp_path / "nothing")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        Bundle.open(tmp_path)


def test_a_file(folder: Path) -> None:
    with pytest.raises(BundleError, match="is a file"):
        Bundle.open(folder / "LICENSE")


def test_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match=rf"is a checkpoint.*latentrt export {tmp_path} BUNDLE"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, ""])
def test_a_name_that_no_folder_can_have(path: str) -> None:
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").mkdir()
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        Bundle.open(tmp_path)


def test_a_huge_manifest_is_not_read_whole(folder: Path) -> None:
    with (folder / "bundle.json").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ManifestError, match=f"larger than {MAX_MANIFEST_BYTES:,}"):
        Bundle.open(folder)


def test_a_manifest_that_points_outside(folder: Path) -> None:
    edit_manifest(folder, lambda tree: tree["files"].update({"../elsewhere": tree["files"]["LICENSE"]}))
    with pytest.raises(ManifestError, match=r"\.\./elsewhere"):
        Bundle.open(folder)


def test_threads_may_share_a_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(bundle.read, list(FILES) * 4, itertools.repeat(1 << 21))) == list(FILES.values()) * 4


def test_opening_needs_neither_numpy_nor_a_backend() -> None:
    script = "import sys, latentrt.bundle.bundle; print({'numpy', 'onnxruntime', 'PIL', 'rich'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"
