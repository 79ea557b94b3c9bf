"""Every command and program of the documentation is run, or says what it needs that is not here."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.sample import bundle_path
from latentrt.engines.gpu import Gpu, find_gpu
from tests.docs.blocks import NEEDS, ROOT, Block, commands, pages, read_blocks

# Languages whose blocks are run; the others are shown.
RUN = {"console", "python"}
SHOWN = {"json", "text", "toml"}
WITH_BLOCKS = [page for page in pages() if any(block.language in RUN for block in read_blocks(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_block_says_what_it_is(page: Path) -> None:
    for block in read_blocks(page):
        assert block.language in RUN | SHOWN, f"line {block.line}: use console or python, or {SHOWN}"
        assert block.without in (None, "gpu")
        assert block.needs is None or block.needs in NEEDS, f"line {block.line}: got {block.needs}, expected {NEEDS}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_are_in_fenced_blocks(page: Path) -> None:
    """An indented block would be run by nobody."""
    indented = re.findall(r"\n\n((?: {4}|\t)(?:latentrt|python|pip|make|pytest|\$) [^\n]*)", page.read_text())
    assert indented == []


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in their order, in one folder, with the sample bundle as `my-bundle`."""
    (tmp_path / "my-bundle").symlink_to(bundle_path())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    folders = {"HOME": tmp_path, "LATENTRT_CACHE": tmp_path / ".cache"}
    for name, value in {**folders, "COLUMNS": 200, "NO_COLOR": 1, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.needs is None and block.language == "console":
            run_console(page, block)
        elif block.needs is None and block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # so that a traceback has the line of the page
            exec(compile(source, str(page), "exec"), namespace)


def run_console(page: Path, block: Block) -> None:
    checker = doctest.OutputChecker()
    for command in commands(block):
        done = subprocess.run(
            ["bash", "-c", command.text],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
        )
        where = f"{name_of(page)}, line {block.line}: {command.text}\n"
        assert done.returncode == 0, f"{where}exit code {done.returncode}\n{done.stdout}{done.stderr}"
        if command.output is not None and not (block.without == "gpu" and isinstance(find_gpu(), Gpu)):
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            matches = checker.check_output(command.output + "\n", done.stdout, flags)
            assert matches, f"{where}expected\n{command.output}\ngot\n{done.stdout}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$ a\n", [("a", None)]),
        ("$ a \\\n  b\nc\n\nd\n$ e\n", [("a \\\n  b", "c\n\nd"), ("e", None)]),
    ],
)
def test_commands_and_their_output(text: str, expected: list[tuple[str, str | None]]) -> None:
    block = Block(language="console", text=text, line=1)
    assert [(command.text, command.output) for command in commands(block)] == expected


def test_a_comment_before_a_block_says_how_it_is_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- needs: gpu -->\n```console\n$ a\n```\n\n```python\nb\n```\n<!-- file: c -->\n```text\nd\n```\n"
        "<!-- without: gpu -->\n```console\n$ e\n```\n"
    )
    blocks = [
        (block.language, block.text, block.line, block.needs, block.file, block.without) for block in read_blocks(page)
    ]
    assert blocks == [
        ("console", "$ a\n", 4, "gpu", None, None),
        ("python", "b\n", 8, None, None, None),
        ("text", "d\n", 12, None, "c", None),
        ("console", "$ e\n", 16, None, None, "gpu"),
    ]
