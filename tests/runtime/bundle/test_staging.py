"""A folder appears whole or not at all, and an earlier one is replaced only by a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.bundle.staging import staged
from latentrt.errors import OutputError


def bundle_at(place: Path, content: str = "earlier") -> Path:
    place.mkdir(parents=True)
    (place / "bundle.json").write_text(content)
    return place


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def fail(place: Path, error: BaseException) -> None:
    with staged(place, overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_a_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    place = bundle_at(tmp_path / "bundle")
    with pytest.raises(type(error)):
        fail(place, error)
    assert list_names(tmp_path) == ["bundle"]
    assert (place / "bundle.json").read_text() == "earlier"


def test_folders_made_on_the_way_go_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(tmp_path / "a" / "b" / "bundle", KeyError())
    assert list_names(tmp_path) == []


def test_an_existing_bundle_is_not_replaced_without_overwrite(tmp_path: Path) -> None:
    bundle_at(tmp_path / "bundle")
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
        with staged(place, overwrite=True) as stage:
            (stage.bundle / "bundle.json").write_text("new")
        assert (tmp_path / "gone" / "bundle.json").exists()
        return
    with pytest.raises(OutputError, match="is not a bundle, so --overwrite does not replace it"):
        staged(place, overwrite=True).__enter__()
    assert list_names(tmp_path) == before


def test_overwrite_replaces_at_the_end(tmp_path: Path) -> None:
    place = bundle_at(tmp_path / "bundle")
    (place / "stale").write_text("x")
    with staged(place, overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_text("new")
        assert (place / "bundle.json").read_text() == "earlier"
    assert list_names(tmp_path) == ["bundle"]
    assert list_names(place) == ["bundle.json"]
    assert (place / "bundle.json").read_text() == "new"


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    bundle_at(tmp_path / "store" / "real")
    (tmp_path / "link").symlink_to("store/real")
    with staged(tmp_path / "link", overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "store" / "real" / "bundle.json").read_text() == "new"
    assert list_names(tmp_path / "store") == ["real"]


def test_a_failed_rename_restores_the_earlier_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bundle_at(tmp_path / "bundle")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "bundle" and self != place:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with (
        pytest.raises(OutputError, match="Input/output error; its former content is untouched"),
        staged(place, overwrite=True) as stage,
    ):
        (stage.bundle / "bundle.json").write_text("new")
    assert list_names(tmp_path) == ["bundle"]
    assert (place / "bundle.json").read_text() == "earlier"


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
        bundle_at(target, "somebody's")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    with (
        pytest.raises(OutputError, match="not empty; its former content is untouched"),
        staged(place, overwrite=False) as stage,
    ):
        (stage.bundle / "bundle.json").write_text("new")
    assert list_names(tmp_path) == ["bundle"]
    assert (place / "bundle.json").read_text() == "somebody's"


def test_an_earlier_bundle_that_cannot_be_brought_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = bundle_at(tmp_path / "bundle"), Path.rename

    def away_only(self: Path, target: Path) -> Path:
        if self != place:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", away_only)
    with (
        pytest.raises(OutputError, match=r"Input/output error; its former content is in (\S+)$") as failed,
        staged(place, overwrite=True) as stage,
    ):
        (stage.bundle / "bundle.json").write_text("new")
    kept = Path(str(failed.value).rpartition(" ")[2])
    assert (kept / "bundle.json").read_text() == "earlier"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    # Tests may run as root, whom no mode keeps out: a folder below a file is impossible for everyone.
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "bundle", tmp_path / "file" / "deep" / "bundle"):
        with pytest.raises(OutputError, match="cannot be written to: not a folder"):
            staged(place, overwrite=False).__enter__()
    assert list_names(tmp_path) == ["file"]


def test_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"bundle cannot be written: No space left on device; its former content"),
        staged(tmp_path / "bundle", overwrite=False),
    ):
        raise OSError(28, "No space left on device")
    assert list_names(tmp_path) == []


def test_a_signal_between_the_renames_leaves_the_earlier_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = bundle_at(tmp_path / "bundle"), Path.rename

    def rename_then_be_asked_to_end(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        monkeypatch.setattr(Path, "rename", rename)
        if self == place:
            raise SystemExit(143)
        return moved

    monkeypatch.setattr(Path, "rename", rename_then_be_asked_to_end)
    with pytest.raises(SystemExit), staged(place, overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_text("new")
    assert (place / "bundle.json").read_text() == "earlier"
    assert list_names(tmp_path) == ["bundle"]
