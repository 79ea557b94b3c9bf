from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.cli.destinations import OutputNames, choose_file
from latentrt.errors import OutputError
from tests.runtime.cli.conftest import Caller


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_file_that_is_named_is_replaced_only_where_asked() -> None:
    assert choose_file(Path("a.png"), "demo.png", overwrite=False) == Path("a.png")
    Path("a.png").touch()
    with pytest.raises(OutputError, match=r"a\.png exists; give another `output`, or `overwrite`"):
        choose_file(Path("a.png"), "demo.png", overwrite=False)
    assert choose_file(Path("a.png"), "demo.png", overwrite=True) == Path("a.png")
    with pytest.raises(OutputError, match="mkdir"):
        choose_file(Path("missing/a.png"), "demo.png", overwrite=True)


def test_the_default_name_is_the_next_that_is_free() -> None:
    for expected in ("demo.png", "demo-1.png", "demo-2.png"):
        found = choose_file(None, "demo.png", overwrite=False)
        assert found == Path(expected)
        found.touch()
    Path("demo-1.png").unlink()
    assert choose_file(None, "demo.png", overwrite=False) == Path("demo-1.png")
    assert choose_file(None, "demo.png", overwrite=True) == Path("demo.png")


@pytest.mark.parametrize(
    ("there", "several", "expected"),
    [
        ((), False, "out.png"),
        ((), True, "out-{index}.png"),
        (("out.png",), True, "out-{index}.png"),
        (("out-7.png",), True, "out-1-{index}.png"),
        (("OUT-7.PNG",), True, "out-1-{index}.png"),
        (("out-7.webp", "out-a.png", "my-out-1.png"), True, "out-{index}.png"),
        (("out-0.png", "out-1-0.png"), True, "out-2-{index}.png"),
    ],
)
def test_several_images_get_names_that_no_file_has(there: tuple[str, ...], several: bool, expected: str) -> None:
    for name in there:
        Path(name).touch()
    main = OutputNames(None, None, "refuse", several=several).main
    assert main is not None
    assert main.template.text == expected
    skipped = OutputNames(None, None, "skip", several=several).main
    assert skipped is not None
    assert skipped.template.text == ("out-{index}.png" if several else "out.png"), "of the run that is continued"


@pytest.mark.parametrize(
    ("output", "makes_folders"), [("a/b.png", False), ("a/{seed}.png", True), ("{sampler}/b.png", True), ("a/", True)]
)
def test_folders_are_made_of_templates(output: str, makes_folders: bool) -> None:
    main = OutputNames(output, None, "refuse", several=True).main
    assert main is not None
    assert main.makes_folders is makes_folders


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_a_sheet_replaces_no_file_unasked(latentrt: Caller, command: str) -> None:
    Path("sheet.png").write_bytes(b"mine")
    done = latentrt(command, "-o", "sheet.png")
    assert done.code == 8
    assert "sheet.png exists; give another -o, or --overwrite to replace it" in done.err
    assert Path("sheet.png").read_bytes() == b"mine"


@pytest.mark.parametrize("arguments", [("demo", "a star"), ("compare", "--samplers", "euler", "--device", "cpu")])
def test_a_sheet_s_default_name_is_the_next_that_is_free(latentrt: Caller, arguments: tuple[str, ...]) -> None:
    name = f"{arguments[0]}.png"
    Path(name).write_bytes(b"mine")
    done = latentrt(*arguments, "--steps", "1")
    assert done.code == 0, done.err
    assert f"{arguments[0]}-1.png: " in done.out
    assert Path(name).read_bytes() == b"mine"
    assert latentrt(*arguments, "--steps", "1", "--overwrite").code == 0
    assert Path(name).read_bytes().startswith(b"\x89PNG")
