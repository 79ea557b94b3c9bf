from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.cli.main import main
from tests.runtime.small_bundle import FILES, WEIGHTS, change_byte, edit_manifest, write_bundle, write_hub_snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_an_intact_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = Bundle.open(folder).digest
    assert run("verify", folder) == 0
    captured = capsys.readouterr()
    assert f"intact: {len(FILES)} files, 1.1 MB" in captured.out
    assert f"pin it: latentrt run {folder} … --digest {digest}" in captured.out
    assert not captured.err


def test_a_hub_cache(tmp_path: Path) -> None:
    assert run("verify", write_hub_snapshot(tmp_path)) == 0


def test_with_the_right_digest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder, "--digest", Bundle.open(folder).digest) == 0
    assert "pin it" not in capsys.readouterr().out


def test_with_another_digest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder, "--digest", "sha256:" + "0" * 64) == 4
    assert "expected the pinned" in capsys.readouterr().err


def test_with_a_digest_of_the_wrong_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder, "--digest", "0" * 64) == 2
    assert "expected sha256:" in capsys.readouterr().err


def test_every_bad_file_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_byte(folder / WEIGHTS)
    change_byte(folder / "unet/model.onnx")
    (folder / "LICENSE").unlink()
    assert run("verify", folder) == 4
    captured = capsys.readouterr()
    assert "intact" not in captured.out
    assert f"{WEIGHTS} has SHA-256" in captured.err
    assert "unet/model.onnx has SHA-256" in captured.err
    assert "LICENSE is missing" in captured.err
    assert "Traceback" not in captured.err


def test_a_sealed_engine_without_a_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hashes are right, as whoever makes a bundle pins what he likes."""
    files = {"record": "engines/record.json", "plan": "engines/plan"}
    (folder / "engines").mkdir()
    for name in files.values():
        (folder / name).write_bytes(b"{}")
    pinned = {name: msgspec.to_builtins(file_record(folder / name)) for name in files.values()}
    edit_manifest(folder, lambda tree: tree["files"].update(pinned))
    edit_manifest(folder, lambda tree: tree.update(engines={"0" * 64: files}))
    assert run("verify", folder) == 9
    captured = capsys.readouterr()
    assert "engines/record.json is not the record of an engine" in captured.err
    assert "intact" not in captured.out


def test_a_newer_format(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(folder, lambda tree: tree.update(format_version=3))
    assert run("verify", folder) == 4
    assert "pip install -U latentrt" in capsys.readouterr().err


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", tmp_path / "missing") == 4
    assert "does not exist" in capsys.readouterr().err
