"""Bundles as repositories: what is downloaded, what is refused, and what an upload contains."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.remote import Pulled, pull_bundle, push_bundle
from latentrt.errors import BundleError, HubError, IntegrityError, ManifestError, OutputError, RequestError
from latentrt.hub import HubPath
from tests.hub_server import TOKEN, read_folder
from tests.runtime.small_bundle import FILES, WEIGHTS, change_byte, edit_manifest, write_bundle

if TYPE_CHECKING:
    from tests.hub_server import HubServer

# The library uploads with an argument of httpx2 that has another name now.
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

NAME = "owner/name"
PATH = HubPath(NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "made")


@contextlib.contextmanager
def silent(title: str, size: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def pull(destination: Path, path: HubPath = PATH, **options: Any) -> Pulled:
    return pull_bundle(path, destination, transfer=silent, **options)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"made", "hub-home", "cache"}


class TestPull:
    def test_exactly_the_pinned_files_come(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        hub.add(NAME, {**read_folder(folder), "README.md": b"", "model.ckpt": b"", "unet/other.safetensors": b""})
        received: dict[str, int] = {}

        @contextlib.contextmanager
        def count(title: str, size: int) -> Iterator[Callable[[int], None]]:
            yield lambda count: received.__setitem__(title, received.get(title, 0) + count)
            assert received[title] == size

        pulled = pull_bundle(PATH, tmp_path / "pulled", transfer=count)
        assert read_folder(tmp_path / "pulled") == read_folder(folder)
        assert sorted(hub.downloads) == sorted([*FILES, "bundle.json"])
        assert hub.downloads[0] == "bundle.json"
        assert (pulled.repository, pulled.commit) == (NAME, hub.repositories[NAME].refs["main"])
        assert pulled.bundle.digest == Bundle.open(folder).digest
        assert left(tmp_path) == {"pulled"}
        assert not [*(tmp_path / "hub-home").rglob("blobs")]  # a second copy would take twice the room

    def test_revision_and_digest(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        remote = hub.add(NAME, folder)
        remote.refs["v1"] = remote.refs["main"]
        digest = Bundle.open(folder).digest
        edit_manifest(folder, lambda tree: tree.update(created_by="another"))
        remote.commit(read_folder(folder))
        with pytest.raises(IntegrityError, match=digest):
            pull(tmp_path / "pulled", digest=digest)
        assert hub.downloads == ["bundle.json"]
        assert pull(tmp_path / "pulled", HubPath(NAME, "v1"), digest=digest).bundle.digest == digest

    def test_existing_folder_is_replaced_on_request_only(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        hub.add(NAME, folder)
        pull(tmp_path / "pulled")
        hub.seen.clear()
        with pytest.raises(OutputError, match="--overwrite"):
            pull(tmp_path / "pulled")
        assert hub.seen == []
        pull(tmp_path / "pulled", overwrite=True)

    @pytest.mark.parametrize(
        ("files", "error", "words"),
        [
            ({"model_index.json": b"{}"}, BundleError, "latentrt export owner/name"),
            ({"x.safetensors": b""}, BundleError, r"no bundle.json, but x.safetensors"),
            ({}, BundleError, "no files"),
            ({"bundle.json": b"{}"}, ManifestError, "format_version"),
            ({"bundle.json": b"\x80\x04"}, ManifestError, "owner/name"),
            ({"bundle.json": b" " * (17 << 20)}, BundleError, "17,825,792 bytes"),
        ],
    )
    def test_repository_without_a_bundle(
        self, hub: HubServer, tmp_path: Path, files: dict[str, bytes], error: type[Exception], words: str
    ) -> None:
        hub.add(NAME, files)
        with pytest.raises(error, match=words):
            pull(tmp_path / "pulled")
        assert left(tmp_path) == set()

    @pytest.mark.parametrize(
        "name", ["../outside", "/tmp/outside", "a/../../outside", "C:\\outside", "a//b", "bundle.json", "x\x1b[31m"]
    )
    def test_hostile_paths_are_refused_before_a_download(
        self, hub: HubServer, folder: Path, tmp_path: Path, name: str
    ) -> None:
        edit_manifest(folder, lambda tree: tree["files"].update({name: {"sha256": hash_bytes(b"x"), "size": 1}}))
        hub.add(NAME, {**read_folder(folder), name: b"x"} if name != "bundle.json" else folder)
        with pytest.raises(ManifestError):
            pull(tmp_path / "pulled")
        assert hub.downloads == ["bundle.json"]
        assert left(tmp_path) == set()

    @pytest.mark.parametrize("attack", ["other size", "other content", "missing", "huge"])
    def test_listing_that_differs_is_refused_before_a_download(
        self, hub: HubServer, folder: Path, tmp_path: Path, attack: str
    ) -> None:
        files = read_folder(folder)
        if attack == "other size":
            files[WEIGHTS] += b"more"
        elif attack == "other content":
            files[WEIGHTS] = files[WEIGHTS][::-1].replace(b"w", b"v")
        elif attack == "missing":
            del files[WEIGHTS]
        else:
            hub.listed_sizes[WEIGHTS] = 10**15
        hub.add(NAME, files)
        with pytest.raises(IntegrityError, match=WEIGHTS):
            pull(tmp_path / "pulled")
        assert hub.downloads == ["bundle.json"]
        assert left(tmp_path) == set()

    def test_content_that_no_listing_tells_is_found_afterwards(
        self, hub: HubServer, folder: Path, tmp_path: Path
    ) -> None:
        """The hub knows the SHA-256 of large files only."""
        files = read_folder(folder)
        files["LICENSE"] = files["LICENSE"].upper()
        hub.add(NAME, files)
        with pytest.raises(IntegrityError, match="LICENSE has SHA-256"):
            pull(tmp_path / "pulled")
        assert left(tmp_path) == set()

    def test_bundle_that_is_larger_than_the_disk(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        edit_manifest(folder, lambda tree: tree["files"][WEIGHTS].update(size=10**15))
        hub.listed_sizes[WEIGHTS] = 10**15
        hub.add(NAME, folder)
        with pytest.raises(OutputError, match="bytes"):
            pull(tmp_path / "pulled")
        assert hub.downloads == ["bundle.json"]

    @pytest.mark.parametrize("fault", ["truncated", "padded"])
    def test_broken_transfers_leave_an_earlier_bundle(
        self, hub: HubServer, folder: Path, tmp_path: Path, fault: str
    ) -> None:
        hub.add(NAME, folder)
        pull(tmp_path / "pulled")
        before = read_folder(tmp_path / "pulled")
        getattr(hub, fault).add(WEIGHTS)
        with pytest.raises(HubError, match=WEIGHTS):
            pull(tmp_path / "pulled", overwrite=True)
        assert read_folder(tmp_path / "pulled") == before
        assert left(tmp_path) == {"pulled"}

    def test_arguments_that_cannot_be(self, hub: HubServer, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="latentrt pull owner/name"):
            pull(tmp_path / "pulled", HubPath(NAME, None, "bundle.json"))
        with pytest.raises(RequestError, match="sha256"):
            pull(tmp_path / "pulled", digest="sha1:0")
        assert hub.seen == []


class TestPush:
    @pytest.fixture(autouse=True)
    def _token(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def push(self, folder: Path, path: HubPath = PATH, **options: Any) -> Any:
        return push_bundle(folder, path, transfer=silent, **options)

    def test_only_the_bundle_and_its_card_are_uploaded(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        (folder / "export-report.json").write_text("{}")
        pushed = self.push(folder, private=True)
        files = hub.repositories[NAME].commits[pushed.commit]
        assert {*files} == {*FILES, "bundle.json", "README.md", ".gitattributes"}
        assert hub.repositories[NAME].private
        assert pushed.url.endswith(pushed.commit)
        assert pull(tmp_path / "pulled", digest=pushed.bundle.digest).commit == pushed.commit
        assert b"latentrt pull owner/name my-bundle --digest " + pushed.bundle.digest.encode() in files["README.md"]

    def test_large_files_go_past_git(self, hub: HubServer, folder: Path) -> None:
        self.push(folder)
        puts = [each for each in hub.seen if each.method == "PUT"]
        assert len(puts) == sum(name.endswith((".onnx", ".safetensors")) for name in FILES)
        assert {each.token for each in puts} == {None}

    def test_branch_and_second_push(self, hub: HubServer, folder: Path) -> None:
        self.push(folder)
        first = hub.repositories[NAME].refs["main"]
        edit_manifest(folder, lambda tree: tree.update(created_by="another"))
        pushed = self.push(folder, HubPath(NAME, "int8"))
        assert hub.repositories[NAME].refs == {"main": first, "int8": pushed.commit}
        self.push(folder)
        assert hub.repositories[NAME].refs["main"] != first

    def test_card_can_be_kept(self, hub: HubServer, folder: Path) -> None:
        self.push(folder)
        remote = hub.repositories[NAME]
        remote.commit({**remote.commits[remote.refs["main"]], "README.md": b"mine"})
        edit_manifest(folder, lambda tree: tree.update(created_by="another"))
        pushed = self.push(folder, keep_card=True)
        assert remote.commits[pushed.commit]["README.md"] == b"mine"

    def test_damaged_bundle_is_not_uploaded(self, hub: HubServer, folder: Path) -> None:
        change_byte(folder / WEIGHTS)
        with pytest.raises(IntegrityError):
            self.push(folder)
        assert hub.seen == []

    def test_link_out_of_the_folder_is_not_uploaded(self, hub: HubServer, folder: Path, tmp_path: Path) -> None:
        (folder / "LICENSE").rename(tmp_path / "secret")
        os.symlink(tmp_path / "secret", folder / "LICENSE")
        with pytest.raises(IntegrityError):
            self.push(folder)
        assert hub.seen == []

    def test_repository_of_something_else_is_left_alone(self, hub: HubServer, folder: Path) -> None:
        remote = hub.add(NAME, {"model_index.json": b"{}", "README.md": b"a checkpoint"})
        before = dict(remote.refs)
        with pytest.raises(HubError, match=r"model_index.json"):
            self.push(folder)
        assert remote.refs == before

    @pytest.mark.parametrize(("token", "words"), [(None, "HF_TOKEN"), ("hf_other", "HF_TOKEN")])
    def test_without_the_right_to_write(
        self, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
    ) -> None:
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=words) as caught:
            self.push(folder)
        assert "hf_other" not in str(caught.value)
        assert hub.repositories == {}

    @pytest.mark.parametrize("step", ["create", "preupload", "batch", "/upload/", "/commit/", "validate-yaml"])
    def test_failure_of_each_step_is_an_error_of_ours(self, hub: HubServer, folder: Path, step: str) -> None:
        hub.answers[step] = 500
        with pytest.raises(HubError):
            self.push(folder)
        assert all("bundle.json" not in files for each in hub.repositories.values() for files in each.commits.values())

    def test_bundle_from_the_hub_names_it_as_its_base(self, hub: HubServer, folder: Path) -> None:
        edit_manifest(folder, lambda tree: tree["source"].update(repository="base/model", revision="0" * 40))
        commit = self.push(folder).commit
        card = hub.repositories[NAME].commits[commit]["README.md"].decode()
        assert 'base_model: "base/model"' in card
        assert "base/model@" + "0" * 40 in card


def test_manifest_has_both_or_neither_of_repository_and_revision(folder: Path) -> None:
    edit_manifest(folder, lambda tree: tree["source"].update(repository="base/model"))
    with pytest.raises(ManifestError, match="both or neither"):
        Bundle.open(folder)
    assert "repository" in json.loads((folder / "bundle.json").read_text())["source"]
