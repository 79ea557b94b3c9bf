"""Hints at mistakes in prompts: without quotes, a file, in the bundle's place."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from latentrt.cli import main as cli
from latentrt.cli.command import command, option
from latentrt.cli.prompts import prompts_argument
from latentrt.cli.values import BundlePath
from tests.runtime.cli.conftest import Caller


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `latentrt paint BUNDLE PROMPT…` with `--prompts`."""

    @command("paint", examples=())
    @click.argument("bundle", type=BundlePath())
    @prompts_argument
    @option("--steps", type=int)
    @option("--prompts", type=click.Path(path_type=Path))
    def paint(**_: object) -> None: ...

    monkeypatch.setattr(cli, "paint", paint, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "paint", ("latentrt.cli.main:paint", "Nothing."))


@pytest.mark.parametrize(
    ("line", "quoted"),
    [
        ("paint sample a red circle", "latentrt paint sample 'a red circle'"),
        ("paint --steps 3 sample a red --steps=4 circle", "latentrt paint --steps 3 sample 'a red circle' --steps=4"),
        ("paint -- my-bundle a $HOME", "latentrt paint -- my-bundle 'a $HOME'"),
        ("demo red circle", "latentrt demo 'red circle'"),
        ("run sample a red circle --seed 7", "latentrt run sample 'a red circle' --seed 7"),
    ],
)
def test_an_unquoted_prompt_is_refused_with_the_line_to_type(latentrt: Caller, line: str, quoted: str) -> None:
    done = latentrt(*line.split())
    assert (done.code, done.out) == (2, "")
    assert "expected quotes around a prompt: " in done.err
    assert done.err.partition("a prompt: ")[2].partition(";")[0].rstrip() == quoted
    assert ("--prompts FILE" in done.err) == (not line.startswith("demo"))
    if line.startswith("paint"):
        assert latentrt(*shlex.split(quoted)[1:]).code == 0


@pytest.mark.parametrize(
    "arguments", [("sample", "circle"), ("sample", "a circle", "star"), ("sample",), ("sample", "a circle", "a star")]
)
def test_other_prompts_are_not(latentrt: Caller, arguments: tuple[str, ...]) -> None:
    assert latentrt("paint", *arguments).code == 0


def test_a_file_of_prompts(latentrt: Caller, tmp_path: Path) -> None:
    (tmp_path / "my prompts").write_text("a star")
    done = latentrt("paint", "sample", f"@{tmp_path / 'my prompts'}")
    assert done.code == 2
    assert f"which names a file; expected --prompts '{tmp_path / 'my prompts'}'" in done.err
    assert latentrt("paint", "sample", "@nothing").code == 0, "a prompt may begin with @"
    assert latentrt("demo", f"@{tmp_path / 'my prompts'}").code == 2


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_prompt_in_the_place_of_the_bundle(latentrt: Caller, tmp_path: Path, command: str) -> None:
    done = latentrt(command, "a red circle")
    assert done.code == 2
    assert done.err.rstrip().endswith(f"before the prompt: latentrt {command} sample 'a red circle'")
    (tmp_path / "a b").mkdir()
    assert latentrt(command, tmp_path / "a b").code == 4, "a folder with a space in its name"
