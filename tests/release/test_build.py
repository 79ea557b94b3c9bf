"""What is published: built twice to the same bytes, with what belongs inside and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import click
import pytest

import latentrt
from release.build import ROOT, build, check_changelog, content_faults, export_commit, main

EPOCH = 1_700_000_000


def copy_sources(folder: Path) -> Path:
    """Copy the working tree, with changes that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("release")
    return build(copy_sources(folder / "source"), folder / "dist", EPOCH)


def test_builds_are_equal_to_the_byte(built: list[Path], tmp_path: Path) -> None:
    """Wherever the sources lie, whoever owns them, and whatever a run has left among them."""
    source = copy_sources(tmp_path / "elsewhere" / "with a longer name")
    for name in ("README.md", "runtime/latentrt/cli/main.py"):
        (source / name).chmod(0o600)
    for name in ("runtime/latentrt/__pycache__/main.cpython-311.pyc", "scratch/state.bin", ".venv/bin/python"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"left over")
    again = build(source, tmp_path / "dist", EPOCH)
    assert [file.name for file in again] == [file.name for file in built]
    assert [file.name for file in built if file.read_bytes() != again[built.index(file)].read_bytes()] == []


def test_they_have_what_belongs_inside_and_nothing_else(built: list[Path]) -> None:
    assert [content_faults(file) for file in built] == [[], []]


def test_the_version_stands_in_one_place(built: list[Path]) -> None:
    assert [file.name for file in built] == [
        f"latentrt-{latentrt.__version__}-py3-none-any.whl",
        f"latentrt-{latentrt.__version__}.tar.gz",
    ]
    assert f'"{latentrt.__version__}"' not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["latentrt/__pycache__/x.pyc", "tests/conftest.py", "latentrt/large.bin"])
def test_a_stray_file_in_a_wheel_is_named(name: str, built: list[Path], tmp_path: Path) -> None:
    wheel = Path(shutil.copy(built[0], tmp_path))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, bytes(1_000_001), zipfile.ZIP_DEFLATED)
    assert all(f"has {name}" in fault for fault in content_faults(wheel))
    assert content_faults(wheel)


def test_what_a_source_distribution_lacks_is_named(built: list[Path], tmp_path: Path) -> None:
    missing = ["NOTICE", "export/latentrt_export/py.typed", "sample/checkpoint/model_index.json"]
    path = tmp_path / built[1].name
    with tarfile.open(built[1]) as whole, tarfile.open(path, "w:gz", compresslevel=1) as rest:
        for entry in whole:
            if entry.name.partition("/")[2] not in missing:
                rest.addfile(entry, whole.extractfile(entry))
    assert content_faults(path) == [f"lacks {name}" for name in missing]


def test_a_release_has_its_section_in_the_changelog() -> None:
    assert check_changelog((ROOT / "CHANGELOG.md").read_text(), latentrt.__version__) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n", None),
        ("## [Unreleased]\n\n## [1.2.0]\n", "no section of version 1.2.0"),
        ("## [Unreleased]\n\n## [1.2.01] - 2026-01-31\n", "no section of version 1.2.0"),
        ("## [Unreleased]\n\n## [1x2.0] - 2026-01-31\n", "no section of version 1.2.0"),
        ("## [1.2.0] - 2026-01-31\n", "expected [Unreleased]"),
        ("", "expected [Unreleased]"),
    ],
)
def test_what_a_changelog_lacks_is_named(text: str, fault: str | None) -> None:
    found = check_changelog(text, "1.2.0")
    assert found is None if fault is None else fault in (found or "")


def test_a_commit_is_exported_without_the_rest_of_the_tree(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *settings, *arguments], cwd=repository, capture_output=True, check=True)

    (repository / "kept.txt").write_text("committed")
    git("init")
    git("add", "kept.txt")
    git("commit", "-m", "one")
    (repository / "kept.txt").write_text("changed")
    (repository / "new.txt").write_text("not committed")
    export_commit(repository, tmp_path / "copy")
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == {"kept.txt": "committed"}


def test_a_changed_working_tree_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("release.build._git", lambda *_: " M runtime/latentrt/pipeline.py")
    with pytest.raises(click.ClickException, match=r"pipeline\.py"):
        main.callback(tmp_path)  # type: ignore[misc]
