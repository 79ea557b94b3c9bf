"""Repositories of the hub, on a local server that speaks its API."""

from __future__ import annotations

import io
import logging
import os
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentrt.errors import HubError, MissingExtraError, OutputError, RequestError
from latentrt.hub import HubPath, _make_meter, _translated, find_origin, open_repository, parse_hub_path
from tests.hub_server import TOKEN

if TYPE_CHECKING:
    from tests.hub_server import HubServer

FILES = {"config.json": b"{}", "unet/model.safetensors": b"weights" * 1000, "unet/model.bin": b"pickle"}
NAME = "owner/name"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stabilityai/stable-diffusion-2-1", HubPath("stabilityai/stable-diffusion-2-1")),
        ("owner/name@v1.0", HubPath(NAME, "v1.0")),
        ("hf://owner/name", HubPath(NAME)),
        ("hf://models/owner/name@main", HubPath(NAME, "main")),
        ("hf://owner/name/a/x.safetensors@v1", HubPath(NAME, "v1", "a/x.safetensors")),
        ("hf://owner/name@v1/a/x.safetensors", HubPath(NAME, "v1", "a/x.safetensors")),
        ("hf://owner/name/x.safetensors@refs/pr/1", HubPath(NAME, "refs/pr/1", "x.safetensors")),
        ("https://huggingface.co/owner/name", HubPath(NAME)),
        ("https://huggingface.co/owner/name/tree/v1", HubPath(NAME, "v1")),
        (
            "https://huggingface.co/owner/name/blob/main/a/x%20y.safetensors?x=1",
            HubPath(NAME, "main", "a/x y.safetensors"),
        ),
        *((text, None) for text in ("folder", "./owner/name", "/owner/name", "a/b/c", "owner/x.safetensors", "a//b")),
        *((text, None) for text in ("..", "../x", "owner/..", "owner/name@", "datasets/name", "a--b/c", "~/x")),
        *((text, None) for text in ("owner/name\n", "owner/name.git", "owner\\name", "", "/")),
        *((text, None) for text in ("owner/name@../x", "owner/name@a b", "owner/name@-x", "owner/name@a//b")),
    ],
)
def test_names_of_repositories(text: str, expected: HubPath | None) -> None:
    assert parse_hub_path(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://name",
        "hf://datasets/owner/name",
        "hf://owner/name/../x",
        "hf://owner/name@a/x@b",
        "hf://owner/name@../../x",
        "hf://owner/name/x@../y",
        "https://huggingface.co/owner/name/tree/..%2F..%2Fx",
        "https://huggingface.co/owner",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/blob/main/../../x",
        "https://civitai.com/models/1",
        "hf://owner/" + "n" * 3000,
    ],
)
def test_addresses_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_hub_path(text)


def test_path_is_written_as_it_is_read() -> None:
    for path in (HubPath(NAME), HubPath(NAME, "v1"), HubPath(NAME, "v1", "a/b.json"), HubPath(NAME, None, "b.json")):
        assert parse_hub_path(str(path)) == path


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError) as caught:
        open_repository(HubPath(NAME))
    assert caught.value.extra == "hub"


@pytest.mark.extras
class TestDownloads:
    def test_only_the_wanted_files_come_and_once(self, hub: HubServer) -> None:
        hub.add(NAME, FILES)
        repository = open_repository(HubPath(NAME))
        received: list[int] = []
        folder = repository.fetch(["config.json", "unet/model.safetensors"], received.append)
        assert (folder / "unet" / "model.safetensors").read_bytes() == FILES["unet/model.safetensors"]
        assert sum(received) == 2 + 7000
        assert hub.downloads == ["config.json", "unet/model.safetensors"]
        assert repository.fetch(["unet/model.safetensors"]) == folder
        assert len(hub.downloads) == 2
        assert find_origin(folder) == find_origin(folder / "unet") == (NAME, repository.commit)

    def test_sizes_and_hashes_are_known_before(self, hub: HubServer) -> None:
        hub.add(NAME, FILES)
        repository = open_repository(HubPath(NAME))
        assert {name: each.size for name, each in repository.files.items()} == {
            name: len(data) for name, data in FILES.items()
        }
        assert repository.files["unet/model.safetensors"].sha256
        assert repository.files["config.json"].sha256 is None
        assert repository.count_missing_bytes(FILES) == sum(map(len, FILES.values()))
        repository.fetch(["config.json"])
        assert repository.count_missing_bytes(["config.json"]) == 0

    def test_revision_is_resolved_once(self, hub: HubServer) -> None:
        """A commit that comes between two downloads does not mix with the first."""
        remote = hub.add(NAME, {"a.json": b"1", "b.json": b"1"})
        old = remote.refs["main"]
        remote.refs["v1"] = old
        repository = open_repository(HubPath(NAME))
        remote.commit({"a.json": b"2", "b.json": b"2"})
        folder = repository.fetch(["a.json"])
        repository.fetch(["b.json"])
        assert ((folder / "a.json").read_bytes(), (folder / "b.json").read_bytes()) == (b"1", b"1")
        assert open_repository(HubPath(NAME, "v1")).commit == open_repository(HubPath(NAME, old)).commit == old

    def test_no_token_goes_to_the_content_network(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(NAME, FILES).private = True
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        open_repository(HubPath(NAME)).fetch(FILES)
        tokens = {each.path.split("/")[1] == "cdn": each.token for each in hub.seen}
        assert tokens == {False: TOKEN, True: None}

    def test_disk_without_room_is_refused_before_a_download(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add(NAME, FILES)
        hub.listed_sizes["unet/model.safetensors"] = 10**15
        with pytest.raises(OutputError, match=r"1,000,000,000,000,002 bytes"):
            open_repository(HubPath(NAME)).fetch(["config.json", "unet/model.safetensors"])
        assert hub.downloads == []

    def test_cut_connection_is_resumed_then_reported(self, hub: HubServer) -> None:
        hub.add(NAME, FILES)
        hub.truncated.add("unet/model.safetensors")
        with pytest.raises(HubError, match=r"unet/model.safetensors cannot be downloaded"):
            open_repository(HubPath(NAME)).fetch(["unet/model.safetensors"])
        assert len(hub.downloads) > 1

    def test_longer_file_than_announced_ends_the_download(self, hub: HubServer) -> None:
        hub.add(NAME, FILES)
        hub.padded.add("unet/model.safetensors")
        with pytest.raises(HubError, match="longer than 7,000 bytes"):
            open_repository(HubPath(NAME)).fetch(["unet/model.safetensors"])


@pytest.mark.extras
def test_bytes_count_once_with_the_library_s_other_protocol() -> None:
    """With hf_xet it reports the bytes on the disk and those on the network, to two bars where it can."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    received: list[int] = []
    meter = _make_meter("owner/name/file", 1000, received.append)
    done = {"total_bytes_completed": 1000, "total_bytes": 1000, "total_bytes_completion_rate": 1.0}
    network = {"total_transfer_bytes_completed": 1100, "total_transfer_bytes_completion_rate": 1.0}
    with XetDownloadProgressReporter(reconstruction_desc="file", log_level=20, tqdm_class=meter) as reporter:
        reporter.update_progress(types.SimpleNamespace(**done, **network))
    assert received == [1000]


@pytest.mark.extras
class TestFailures:
    @pytest.mark.parametrize(
        ("status", "words"), [(500, "status 500"), (429, "limits requests"), (403, "not allowed"), (418, "418")]
    )
    def test_each_answer_is_an_error_of_ours(self, hub: HubServer, status: int, words: str) -> None:
        hub.add(NAME, FILES)
        repository = open_repository(HubPath(NAME))
        hub.answers["/resolve/"] = status
        with pytest.raises(HubError, match=words) as caught:
            repository.fetch(["config.json"])
        assert "own words" not in str(caught.value)
        hub.answers["/api/"] = status
        with pytest.raises(HubError):
            open_repository(HubPath("other/name"))

    def test_missing_and_private_repositories_and_revisions(self, hub: HubServer) -> None:
        with pytest.raises(HubError, match="private"):
            open_repository(HubPath(NAME))
        hub.add(NAME, FILES)
        for revision in ("v9", "0" * 40):
            with pytest.raises(HubError, match=f"no revision '{revision}'"):
                open_repository(HubPath(NAME, revision))

    def test_gated_repository_names_its_page(self, hub: HubServer) -> None:
        hub.add(NAME, FILES).gated = True
        with pytest.raises(HubError, match=f"gated.*{hub.url}/{NAME}.*HF_TOKEN"):
            open_repository(HubPath(NAME)).fetch(["config.json"])

    @pytest.mark.parametrize("token", ["hf_sec\x01ret", "hf_sec ret", "hf_secrét"])
    def test_token_that_cannot_be_sent_is_not_quoted(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str
    ) -> None:
        hub.add(NAME, FILES)
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match="HF_TOKEN") as caught:
            open_repository(HubPath(NAME))
        assert "sec" not in str(caught.value)
        monkeypatch.delenv("HF_TOKEN")
        place = Path(os.environ["HF_HOME"], "token")
        place.parent.mkdir(exist_ok=True)
        place.write_text(token, encoding="utf-8")
        with pytest.raises(HubError, match="token") as caught:
            open_repository(HubPath(NAME))
        assert "sec" not in str(caught.value)
        assert hub.seen == []

    def test_no_network(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(NAME, FILES)
        remembered = open_repository(HubPath(NAME))
        folder = remembered.fetch(["config.json"])
        _disconnect(monkeypatch)
        repository = open_repository(HubPath(NAME))
        assert (repository.commit, set(repository.files)) == (remembered.commit, {"config.json"})
        assert repository.fetch(["config.json"]) == folder
        with pytest.raises(HubError, match="cannot be reached"):
            open_repository(HubPath("other/name"))

    def test_offline_mode_uses_the_cache(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(NAME, FILES)
        folder = open_repository(HubPath(NAME)).fetch(["config.json"])
        hub.seen.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert open_repository(HubPath(NAME)).fetch(["config.json"]) == folder
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            open_repository(HubPath("other/name"))
        assert hub.seen == []

    def test_server_that_is_no_hub(self, hub: HubServer) -> None:
        hub.answers["/api/"] = 200
        with pytest.raises(HubError, match="HF_ENDPOINT"):
            open_repository(HubPath(NAME))

    def test_full_disk_is_an_output_error(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(NAME, FILES)
        repository = open_repository(HubPath(NAME))

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
        with pytest.raises(OutputError, match="No space left"):
            repository.fetch(["config.json"])

    @pytest.mark.parametrize(
        ("name", "header", "text"),
        [
            ("config.json", "ETag", '"../../../../../escaped"'),
            ("config.json", "ETag", '"{}/escaped"'),
            ("config.json", "X-Repo-Commit", "../../../../escaped"),
            ("unet/model.safetensors", "X-Linked-Etag", '"../../../../../escaped"'),
        ],
    )
    def test_a_server_chooses_no_path(self, hub: HubServer, tmp_path: Path, name: str, header: str, text: str) -> None:
        """Of an ETag the library makes the path of the file in its cache, as it is."""
        hub.add(NAME, FILES)
        repository = open_repository(HubPath(NAME))
        hub.headers = {header: text.replace("{}", str(tmp_path))}
        with pytest.raises(HubError, match="HF_ENDPOINT"):
            repository.fetch([name])
        assert not [*tmp_path.rglob("*escaped*")]
        hub.headers = {}
        assert (repository.fetch([name]) / name).read_bytes() == FILES[name]

    def test_a_malformed_listing(self, hub: HubServer) -> None:
        hub.add(NAME, FILES)
        hub.listed_sizes["config.json"] = "12"
        with pytest.raises(HubError, match="HF_ENDPOINT"):
            open_repository(HubPath(NAME))
        hub.listed_sizes.clear()
        hub.repositories[NAME].refs["main"] = "../../escaped"
        hub.repositories[NAME].commits["../../escaped"] = FILES
        with pytest.raises(HubError, match="HF_ENDPOINT"):
            open_repository(HubPath(NAME))

    def test_records_of_the_library_go_through_the_root_logger_only(
        self, hub: HubServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its own handler prints text of the server as it is, with its terminal escapes."""
        hub.add(NAME, FILES)
        own = io.StringIO()
        handlers: list[logging.Handler] = [logging.StreamHandler(own)]
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", handlers)
        repository = open_repository(HubPath(NAME))
        hub.answers["/resolve/"] = 500
        with pytest.raises(HubError):
            repository.fetch(["config.json"])
        assert "Retrying" in caplog.text
        assert f"{hub.url}/{NAME}/resolve" in caplog.text
        assert own.getvalue() == ""
        assert logging.getLogger("huggingface_hub").handlers is handlers


@pytest.mark.extras
def test_records_of_the_library_have_no_signed_address(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has the address that a download is redirected to can read a private file until it expires."""
    log = logging.getLogger("huggingface_hub.file_download")
    with _translated(NAME, None, "it cannot be read"):
        signed = "https://cdn.example/a?b=1&Signature=s3cret"
        log.warning("Error while downloading from %s: %s\nTrying to resume", signed, "why?")
        log.warning(f"'{OSError('it broke')}' thrown while requesting GET {signed}")
    assert "s3cret" not in caplog.text
    assert "Error while downloading from https://cdn.example/a?…: why?\nTrying to resume" in caplog.text
    assert "'it broke' thrown while requesting GET https://cdn.example/a?…" in caplog.text


def test_origin_is_a_snapshot_s_only(tmp_path: Path) -> None:
    for name in ("models--a--b/snapshots/main", "datasets--a--b/snapshots/" + "0" * 40, "models--a--b/" + "0" * 40):
        (tmp_path / name).mkdir(parents=True)
        assert find_origin(tmp_path / name) is None
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir()
    assert find_origin(snapshot) == ("a/b", "0" * 40)


def _disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send all requests to a port where nothing listens."""
    url = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
