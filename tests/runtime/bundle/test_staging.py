"""A folder appears whole or not at all, an earlier one is replaced only by a whole one, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentrt.bundle import staging
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.file_lock import LockedFile, claim, create_locked
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.bundle.staging import find_abandoned_stages, remove_abandoned_stages, staged
from latentrt.errors import BundleError, IntegrityError, OutputError
from tests.killed import count_steps, in_child, start_child
from tests.runtime.small_bundle import edit_manifest, write_bundle


def fill(place: Path, content: str) -> Path:
    """Write a small bundle with a LICENSE of its own."""
    write_bundle(place)
    (place / "LICENSE").write_text(content)

    edit_manifest(place, lambda tree: tree.update(created_by=content))
    return place


def earlier_at(place: Path) -> Path:
    return fill(place, "earlier")


def content(place: Path) -> str:
    return Bundle.open(place).manifest.created_by


def replace(place: Path, by: str = "new") -> None:
    with staged(place, overwrite=True) as stage:
        fill(stage.bundle, by)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to replace a bundle: in one step, and on a system that has no such step."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_find_exchange", lambda: None)


@pytest.fixture
def _two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_find_exchange", lambda: None)


def test_the_bundle_appears_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "new" / "deep" / "bundle"
    with staged(place, overwrite=False) as stage:
        (stage.bundle / "file").write_text("x")
        (stage.scratch / "other").write_text("x")
        assert not place.exists()
    assert list_names(place) == ["file"]
    assert list_names(place.parent) == ["bundle"]


def test_the_bundle_has_the_mode_of_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with staged(tmp_path / "bundle", overwrite=False):
        pass
    assert (tmp_path / "bundle").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_name_of_any_length(tmp_path: Path) -> None:
    """The staging folder's name is short, however long the destination's is."""
    replace(tmp_path / ("b" * 255))
    assert list_names(tmp_path) == ["b" * 255]
    for name in ("b" * 256, "a\0b"):
        with pytest.raises(OutputError, match=r"cannot be written to: .*; choose another path"):
            staged(tmp_path / name, overwrite=False).__enter__()


def fail(place: Path, error: BaseException) -> None:
    with staged(place, overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_a_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    place = earlier_at(tmp_path / "bundle")
    with pytest.raises(type(error)):
        fail(place, error)
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


def test_folders_made_on_the_way_go_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(tmp_path / "a" / "b" / "bundle", KeyError())
    assert list_names(tmp_path) == []


# Which folders are replaced


def test_an_existing_bundle_is_not_replaced_without_overwrite(tmp_path: Path) -> None:
    earlier_at(tmp_path / "bundle")
    with pytest.raises(OutputError, match="exists; choose another path"):
        staged(tmp_path / "bundle", overwrite=False).__enter__()
    assert list_names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_overwrite_replaces_bundles_only(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "precious"
    if kind == "folder":
        (place / "photographs").mkdir(parents=True)
    elif kind == "file":
        place.write_text("precious")
    before = list_names(tmp_path)
    if kind == "link to nothing":
        place.symlink_to(tmp_path / "gone")
        replace(place)
        assert content(tmp_path / "gone") == "new"
        return
    with pytest.raises(OutputError, match="is not a bundle, so --overwrite does not replace it"):
        staged(place, overwrite=True).__enter__()
    assert list_names(tmp_path) == before


@pytest.mark.parametrize("manifest", [b"{}", b"[1", b'{"format_version": 1}', b'{"bundle": ["photo.jpg"]}'])
def test_a_folder_whose_bundle_json_is_no_manifest_is_not_replaced(tmp_path: Path, manifest: bytes) -> None:
    """Other programs use the name too, and the files of another format are unknown."""
    place = earlier_at(tmp_path / "bundle")
    (place / "bundle.json").write_bytes(manifest)
    with pytest.raises(OutputError, match=r"bundle\.json that this version cannot read .*delete the folder yourself"):
        staged(place, overwrite=True).__enter__()
    assert (place / "bundle.json").read_bytes() == manifest


@pytest.mark.parametrize("name", ["notes.txt", "unet/notes.txt", "images/cat.png", "another/bundle.json"])
def test_a_bundle_with_files_of_its_users_is_not_replaced(tmp_path: Path, name: str) -> None:
    place = earlier_at(tmp_path / "bundle")
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("precious")
    with pytest.raises(OutputError, match=rf"files that are not the bundle's \({name}\).*; move them elsewhere"):
        staged(place, overwrite=True).__enter__()
    assert (place / name).read_text() == "precious"


def test_links_and_pipes_count_as_files(tmp_path: Path) -> None:
    place = earlier_at(tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "many").touch()
    (place / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(place / "pipe")
    with pytest.raises(OutputError, match=r"\(link, pipe\)"):
        staged(place, overwrite=True).__enter__()


def test_the_exporters_report_and_empty_folders_may_go(tmp_path: Path) -> None:
    place = earlier_at(tmp_path / "bundle")
    (place / "export-report.json").write_text("{}")
    (place / "empty").mkdir()
    replace(place)
    assert content(place) == "new"
    assert not (place / "empty").exists()


def test_of_many_files_a_few_are_named(tmp_path: Path) -> None:
    place = earlier_at(tmp_path / "bundle")
    for number in range(9):
        (place / f"{number}.png").touch()
    with pytest.raises(OutputError, match=r"\(0\.png, 1\.png, 2\.png, 3\.png, 4\.png …\)"):
        staged(place, overwrite=True).__enter__()


@pytest.mark.parametrize("inside", ["", "unet"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    """It would be moved away under the shell, and relative paths of the same command would lead nowhere."""
    place = earlier_at(tmp_path / "bundle")
    monkeypatch.chdir(place / inside)
    with pytest.raises(OutputError, match="is the current folder or contains it"):
        staged(Path(".") if not inside else place, overwrite=True).__enter__()
    assert content(place) == "earlier"


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = earlier_at(tmp_path / "bundle")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    with pytest.raises(OutputError, match="is a mount point"):
        staged(place, overwrite=True).__enter__()


def test_a_mount_inside_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files have the names of the bundle's, and belong to the folder that is mounted there."""
    place = earlier_at(tmp_path / "with a space")
    lines = [f"31 23 0:26 /store {point} rw - ext4 /dev/x rw\n" for point in ("/proc", f"{place}/unet", f"{place}2")]
    (tmp_path / "mounts").write_text("".join(lines).replace(" a ", r"\040a\040"))
    monkeypatch.setattr(staging, "_MOUNTS", tmp_path / "mounts")
    with pytest.raises(OutputError, match=r"contains the mount point .*with a space/unet,"):
        staged(place, overwrite=True).__enter__()
    (tmp_path / "mounts").write_text(lines[0].replace("/proc", str(place).replace(" ", r"\040")))
    with pytest.raises(OutputError, match="is a mount point"):
        staged(place, overwrite=True).__enter__()


def test_read_only_folders_of_an_earlier_bundle_go() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def work() -> None:
            if os.geteuid() == 0:  # who may write anywhere
                os.setuid(65534)
            place = earlier_at(folder / "bundle")
            (place / "unet").chmod(0o500)
            replace(place)
            assert list_names(folder) == ["bundle"]

        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        assert in_child(work) == 0


def test_a_link_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    place, other = earlier_at(tmp_path / "bundle"), earlier_at(tmp_path / "other")

    def exchange() -> None:
        with staged(place, overwrite=True) as stage:
            fill(stage.bundle, "new")
            shutil.rmtree(place)
            place.symlink_to(other)

    with pytest.raises(OutputError, match="exchanged with a link"):
        exchange()
    assert list_names(tmp_path) == ["bundle", "other"]
    assert content(place) == "earlier"


def test_a_bundle_inside_another(tmp_path: Path) -> None:
    """The inner one can be replaced; the outer one holds files that are not its own."""
    outer = earlier_at(tmp_path / "bundle")
    replace(outer / "inner")
    replace(outer / "inner", "newer")
    assert content(outer / "inner") == "newer"
    with pytest.raises(OutputError, match="inner/"):
        staged(outer, overwrite=True).__enter__()
    assert content(outer / "inner") == "newer"


# Replacing


@pytest.mark.usefixtures("_either_way")
def test_overwrite_replaces_at_the_end(tmp_path: Path) -> None:
    place = earlier_at(tmp_path / "bundle")
    (place / "export-report.json").write_text("stale")
    with staged(place, overwrite=True) as stage:
        fill(stage.bundle, "new")
        assert content(place) == "earlier"
    assert list_names(tmp_path) == ["bundle"]
    assert not (place / "export-report.json").exists()
    assert content(place) == "new"


@pytest.mark.usefixtures("_either_way")
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    earlier_at(tmp_path / "store" / "real")
    (tmp_path / "link").symlink_to("store/real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "store" / "real") == "new"
    assert list_names(tmp_path / "store") == ["real"]


def count_misses(place: Path, times: int) -> tuple[int, int]:
    """Replace a bundle again and again while a reader opens it; return the reader's looks, and how many failed."""
    looks = misses = 0
    done = threading.Event()

    def look() -> None:
        nonlocal looks, misses
        while not done.is_set():
            looks += 1
            try:
                Bundle.open(place, trust_cache=False)
            except BundleError:
                misses += 1

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(times):
            replace(place, str(number))
    finally:
        done.set()
        reader.join()
    return looks, misses


@pytest.mark.usefixtures("_either_way")
def test_a_reader_always_finds_a_bundle(tmp_path: Path) -> None:
    looks, misses = count_misses(earlier_at(tmp_path / "bundle"), 8)
    assert looks > 8
    assert misses == 0


@pytest.mark.usefixtures("_two_renames")
def test_the_moment_between_two_renames_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rename = earlier_at(tmp_path / "bundle"), Path.rename

    def slowly(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        time.sleep(0.05 if self == place else 0)
        return moved

    monkeypatch.setattr(Path, "rename", slowly)
    assert count_misses(place, 3)[1] == 0


def test_with_an_exchange_the_path_exists_at_any_time(tmp_path: Path) -> None:
    """Without `Bundle.open`, which would wait: another program's view."""
    place = earlier_at(tmp_path / "bundle")
    if not staging._exchange(place, earlier_at(tmp_path / "other")):
        pytest.fail("this file system exchanges no folders; run the tests on one that does")
    misses, done = 0, threading.Event()

    def look() -> None:
        nonlocal misses
        while not done.is_set():
            misses += not os.path.exists(place / "bundle.json")

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(300):
        staging._exchange(place, tmp_path / "other")
    done.set()
    reader.join()
    assert misses == 0


@pytest.mark.usefixtures("_two_renames")
def test_the_wait_for_a_replacement_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that was killed between the renames never finishes it."""
    monkeypatch.setattr("latentrt.bundle.bundle._REPLACEMENT_SECONDS", 0.05)
    place = leave_behind(tmp_path, killed_between_renames)
    began = time.monotonic()
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(place)
    assert 0.05 <= time.monotonic() - began < 2


def test_a_missing_bundle_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    with staged(tmp_path / "bundle", overwrite=False), pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "bundle")
    assert time.monotonic() - began < 0.5


def test_who_opened_the_earlier_bundle_is_told_that_it_was_replaced(tmp_path: Path) -> None:
    """Never a mixture: a file of the new bundle does not match the earlier manifest."""
    place = earlier_at(tmp_path / "bundle")
    opened = Bundle.open(place)
    graph = opened.read("unet/model.onnx", MAX_GRAPH_BYTES)
    with staged(place, overwrite=True) as stage:
        fill(stage.bundle, "new")
        (stage.bundle / "unet" / "model.onnx").write_bytes(graph[::-1])
    for use in (lambda name: opened.read(name, MAX_GRAPH_BYTES), opened.path):
        with pytest.raises(IntegrityError, match=r"was replaced by another bundle.*open it again"):
            use("unet/model.onnx")
    assert opened.read("vae_decoder/model.onnx", MAX_GRAPH_BYTES), "the same bytes are the same file"


@pytest.mark.usefixtures("_two_renames")
def test_a_failed_rename_restores_the_earlier_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = earlier_at(tmp_path / "bundle")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "bundle" and self != place:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OutputError, match="Input/output error; its former content is untouched"):
        replace(place)
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES])
def test_a_failed_exchange_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    place = earlier_at(tmp_path / "bundle")
    monkeypatch.setattr(staging, "_find_exchange", lambda: lambda one, other: -1)
    monkeypatch.setattr(staging.ctypes, "get_errno", lambda: code)  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="its former content is untouched"):
        replace(place)
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_file_system_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    place = earlier_at(tmp_path / "bundle")
    monkeypatch.setattr(staging, "_find_exchange", lambda: lambda one, other: -1)
    monkeypatch.setattr(staging.ctypes, "get_errno", lambda: code)  # type: ignore[attr-defined]
    replace(place)
    assert content(place) == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path: Path, overwrite: bool) -> None:
    place = tmp_path / "bundle"
    with (
        pytest.raises(OutputError, match="is not a bundle" if overwrite else "exists; choose another path"),
        staged(place, overwrite=overwrite),
    ):
        (place / "thesis").mkdir(parents=True)
    assert list_names(tmp_path) == ["bundle"]
    assert list_names(place) == ["thesis"]


def test_a_folder_that_appears_at_the_last_moment_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = tmp_path / "bundle", Path.rename

    def too_late(self: Path, target: Path) -> Path:
        earlier_at(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    with (
        pytest.raises(OutputError, match="not empty; its former content is untouched"),
        staged(place, overwrite=False) as stage,
    ):
        (stage.bundle / "bundle.json").write_text("new")
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


@pytest.mark.usefixtures("_either_way")
def test_a_file_that_appears_at_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, replace_now = earlier_at(tmp_path / "bundle"), staging._replace

    def write_notes_first(place: Path, bundle: Path, former: Path, check: Callable[[Path], None]) -> None:
        (place / "notes.txt").write_text("precious")
        replace_now(place, bundle, former, check)

    monkeypatch.setattr(staging, "_replace", write_notes_first)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        replace(place)
    assert (place / "notes.txt").read_text() == "precious"
    assert content(place) == "earlier"
    assert list_names(tmp_path) == ["bundle"]


@pytest.mark.usefixtures("_two_renames")
def test_an_earlier_bundle_that_cannot_be_brought_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = earlier_at(tmp_path / "bundle"), Path.rename

    def away_only(self: Path, target: Path) -> Path:
        if self != place:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", away_only)
    with pytest.raises(OutputError, match=r"Input/output error; its former content is in (\S+)$") as failed:
        replace(place)
    assert content(Path(str(failed.value).rpartition(" ")[2])) == "earlier"
    monkeypatch.setattr(Path, "rename", rename)
    remove_abandoned_stages(tmp_path)
    assert content(place) == "earlier"
    assert list_names(tmp_path) == ["bundle"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    # Tests may run as root, whom no mode keeps out: a folder below a file is impossible for everyone.
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "bundle", tmp_path / "file" / "deep" / "bundle"):
        with pytest.raises(OutputError, match="cannot be written to: not a folder"):
            staged(place, overwrite=False).__enter__()
    assert list_names(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["os.mkdir", "os.write"])
def test_a_read_only_or_full_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    place = earlier_at(tmp_path / "bundle")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OutputError, match=f"{tmp_path} cannot be written to: Permission denied"):
        staged(place, overwrite=True).__enter__()
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


def test_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"bundle cannot be written: No space left on device; its former content"),
        staged(tmp_path / "bundle", overwrite=False),
    ):
        raise OSError(28, "No space left on device")
    assert list_names(tmp_path) == []


@pytest.mark.usefixtures("_two_renames")
def test_a_signal_between_the_renames_leaves_the_earlier_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = earlier_at(tmp_path / "bundle"), Path.rename

    def rename_then_be_asked_to_end(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        monkeypatch.setattr(Path, "rename", rename)
        if self == place:
            raise SystemExit(143)
        return moved

    monkeypatch.setattr(Path, "rename", rename_then_be_asked_to_end)
    with pytest.raises(SystemExit):
        replace(place)
    assert content(place) == "earlier"
    assert list_names(tmp_path) == ["bundle"]


# What killed processes leave


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(place: Path) -> None:
    with staged(place, overwrite=True) as stage:
        (stage.bundle / "weights").write_bytes(b"half")
        (stage.scratch / "deep").mkdir()
        die()


def killed_before_its_first_file(place: Path) -> None:
    def die_instead(path: Path, mode: int = 0o600) -> LockedFile | None:
        die()
        return None

    staging.create_locked = die_instead  # type: ignore[attr-defined]
    staged(place, overwrite=True).__enter__()


def killed_before_it_signed(place: Path) -> None:
    os.write = lambda *_: die()  # type: ignore[assignment]
    staged(place, overwrite=True).__enter__()


def killed_between_renames(place: Path) -> None:
    rename = Path.rename

    def die_after(self: Path, target: Path) -> Path:
        rename(self, target)
        die()
        return target

    Path.rename = die_after  # type: ignore[method-assign, assignment]
    replace(place)


def leave_behind(folder: Path, killed: Callable[[Path], None]) -> Path:
    """Have a replacement of an earlier bundle killed; return the bundle's path."""
    place = earlier_at(folder / "bundle")
    assert in_child(lambda: killed(place)) == -signal.SIGKILL
    assert len(list_names(folder)) == (1 if killed is killed_between_renames else 2)
    return place


@pytest.mark.usefixtures("_two_renames")
@pytest.mark.parametrize(
    "killed", [killed_while_writing, killed_before_its_first_file, killed_before_it_signed, killed_between_renames]
)
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, killed: Callable[[Path], None]) -> None:
    place = leave_behind(tmp_path, killed)
    with pytest.raises(OutputError, match="exists"):
        staged(place, overwrite=False).__enter__()
    assert list_names(tmp_path) == ["bundle"]
    assert content(place) == "earlier"


@pytest.mark.usefixtures("_either_way")
def test_a_kill_at_any_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """Before each change of the file system, and so after each: the next run finds one bundle and makes one."""
    place = earlier_at(tmp_path / "bundle")

    def work() -> None:
        with staged(place, overwrite=True) as stage:
            shutil.copytree(place, stage.bundle, dirs_exist_ok=True)

    for step in range(count_steps(work)):
        assert in_child(work, kill_at=step) == -signal.SIGKILL
        remove_abandoned_stages(tmp_path)
        assert list_names(tmp_path) == ["bundle"], f"killed at step {step}"
        assert content(place) == "earlier"


def test_leftovers_are_found_before_they_are_removed(tmp_path: Path) -> None:
    place = leave_behind(tmp_path, killed_while_writing)
    (found,) = find_abandoned_stages(tmp_path)
    assert (found.destination, found.holds_former) == (place, False)
    assert found.path.name in list_names(tmp_path)


@pytest.mark.usefixtures("_two_renames")
def test_a_former_bundle_in_a_leftover_is_reported(tmp_path: Path) -> None:
    place = leave_behind(tmp_path, killed_between_renames)
    (found,) = find_abandoned_stages(tmp_path)
    assert (found.destination, found.holds_former) == (place, True)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A staging folder whose process, a child, is alive."""
    said, saying = os.pipe()

    def hold() -> None:
        with staged(tmp_path / "bundle", overwrite=False):
            os.write(saying, b"x")
            time.sleep(60)

    child = start_child(hold)
    os.read(said, 1)
    (root,) = tmp_path.iterdir()
    yield root
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(said)
    os.close(saying)


def test_a_running_process_keeps_its_folder(live: Path) -> None:
    remove_abandoned_stages(live.parent)
    assert list_names(live) == ["bundle", "lock", "scratch"]
    assert find_abandoned_stages(live.parent) == []
    replace(live.with_name("another"))
    assert list_names(live) == ["bundle", "lock", "scratch"]


def leave_root(folder: Path) -> Path:
    """Have an export killed while it writes; return its staging folder."""
    place = leave_behind(folder, killed_while_writing)
    (root,) = (path for path in folder.iterdir() if path != place)
    return root


@pytest.mark.parametrize(
    "kind", ["without a lock", "unsigned", "signed otherwise", "with another file", "another user's"]
)
def test_folders_with_files_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Even under the name of a staging folder."""
    root = leave_root(tmp_path)
    if kind == "without a lock":
        (root / "lock").unlink()
    if kind == "unsigned":
        (root / "lock").write_bytes(b"")
    if kind == "signed otherwise":
        (root / "lock").write_bytes(b"bundle")
    if kind == "with another file":
        (root / "thesis").touch()
    if kind == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    before = list_names(root)
    assert find_abandoned_stages(tmp_path) == []
    remove_abandoned_stages(tmp_path)
    assert list_names(root) == before


@pytest.mark.parametrize(
    "name",
    [".bundle.export-20251201", ".bundle.export-plan", ".bundle.export-0123456789abcdef", ".bundle.export-" + "0" * 16],
)
@pytest.mark.parametrize("kind", ["empty", "complete", "a lock"])
def test_folders_of_other_names_stay(tmp_path: Path, name: str, kind: str) -> None:
    root = tmp_path / name
    if kind == "complete":
        leave_root(tmp_path).rename(root)
    else:
        root.mkdir()
        if kind == "a lock":
            (root / "lock").touch()
    assert find_abandoned_stages(tmp_path) == []
    remove_abandoned_stages(tmp_path)
    assert root.is_dir()


def test_a_lock_of_another_content_alone_stays(tmp_path: Path) -> None:
    root = leave_root(tmp_path)
    shutil.rmtree(root / "bundle")
    shutil.rmtree(root / "scratch")
    (root / "lock").write_text("a note")
    remove_abandoned_stages(tmp_path)
    assert list_names(root) == ["lock"]


def test_a_link_under_the_name_of_a_staging_folder_stays(tmp_path: Path) -> None:
    root = leave_root(tmp_path)
    root.rename(tmp_path / "real")
    root.symlink_to("real")
    remove_abandoned_stages(tmp_path)
    assert list_names(root) == ["bundle", "lock", "scratch"]


def test_a_name_that_is_taken_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_name, taken = staging._make_name, tmp_path / ".bundle.export-taken"
    taken.mkdir()
    names = iter([taken.name, make_name("bundle")])
    monkeypatch.setattr(staging, "_make_name", lambda destination: next(names))
    with staged(tmp_path / "bundle", overwrite=False):
        pass
    assert list_names(tmp_path) == [taken.name, "bundle"]


def test_a_folder_that_is_taken_for_a_leftover_before_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the making of the folder and the lock another process may remove it: then a new one is made."""
    taken = list[Path]()

    def remove_first(path: Path) -> LockedFile | None:
        if not taken:
            taken.append(path)
            remove_abandoned_stages(tmp_path)
        return create_locked(path)

    monkeypatch.setattr(staging, "create_locked", remove_first)
    with staged(tmp_path / "bundle", overwrite=False) as stage:
        assert not taken[0].parent.exists()
        with claim(stage.bundle.with_name("lock")) as abandoned:
            assert not abandoned
    assert list_names(tmp_path) == ["bundle"]
