"""`latentrt completion`, and what completes: commands, options, values."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete

from latentrt.bundle.sample import bundle_path
from latentrt.cli import main as cli
from tests.runtime.cli.conftest import Caller


class _Complete(ShellComplete):
    name, source_template = "test", ""


def complete(*words: str) -> list[CompletionItem]:
    """Return the completions of the last word."""
    *before, incomplete = words
    return _Complete(cli._group, {}, "latentrt", "_LATENTRT_COMPLETE").get_completions(before, incomplete)


def values(*words: str) -> list[str]:
    return [item.value for item in complete(*words)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("r",), ["run"]),
        (("co",), ["compare", "config", "completion"]),
        (("engines", "ve"), ["verify"]),
        (("run", "--guidance-s"), ["--guidance-scale", "--guidance-start"]),
        (("run", "sample", "x", "--sampler", "dpmpp_2m"), ["dpmpp_2m", "dpmpp_2m_inverse"]),
        (("run", "sample", "x", "--device", ""), ["auto", "cpu", "openvino", "cuda", "tensorrt"]),
        (("run", "sample", "x", "--precision", "b"), ["bfloat16"]),
        (("run", "sample", "x", "--decoder", ""), ["full", "preview", "tiled"]),
        (("run", "sample", "x", "--safety", "b"), ["block", "blur"]),
        (("run", "sample", "x", "--format", ""), ["png", "jpeg", "webp"]),
        (("run", "sample", "x", "--provider", "CPU"), ["CPUExecutionProvider"]),
        (("run", "sample", "x", "--log-level", ""), ["debug", "info", "warning", "error"]),
        (("compare", "--samplers", "euler,heu"), ["euler,heun"]),
        (("samplers", "unip"), ["unipc"]),
        (("schedule", "--sampler", "unip"), ["unipc"]),
        (("bench", "sample", "--device", "t"), ["tensorrt"]),
        (("build", "--gpu", "rtx4090,rtx508"), ["rtx4090,rtx5080"]),
        (("plan", "--gpus", "h2"), ["h200"]),
        (("export", "x", "y", "--precision", "int"), ["int8"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("config", ""), ["show", "init"]),
    ],
)
def test_values_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert values(*words) == expected


@pytest.mark.parametrize("option", ["--image", "--mask", "--prompts", "-o"])
def test_files_are_completed_by_the_shell(option: str) -> None:
    (item,) = complete("run", "sample", "x", option, "in")
    assert (item.type, item.value) == ("file", "in")


def test_bundles_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert values("run", "") == ["sample"]
    (item,) = complete("run", "models/")
    assert item.type == "dir"
    (item,) = complete("inspect", "imag")
    assert item.type == "file"
    for name in ("models/sd15", "models/sd21", "sample", "models/none"):
        (tmp_path / name).mkdir(parents=True)
        if name != "models/none":
            (tmp_path / name / "bundle.json").write_text("{}")
    assert values("run", "models/sd") == ["models/sd15", "models/sd21"]
    assert values("verify", "sam") == ["sample", "./sample"]


def test_names_that_are_no_line_of_utf_8_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (b"b one", b"b\xff", b"b\ntwo", b"b\x1b[31m", "bü".encode()):
        os.mkdir(name)
        Path(os.fsdecode(name), "bundle.json").write_text("{}")
    assert values("run", "b") == ["b one", "bü"]


def test_a_malformed_file_or_variable_does_not_stop_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[[[")
    monkeypatch.setenv("LATENTRT_CONFIG", str(tmp_path / "c.toml"))
    monkeypatch.setenv("LATENTRT_RUN_STEPS", "x")
    assert values("run", "sample", "x", "--decoder", "p") == ["preview"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(latentrt: Caller, shell: str) -> None:
    done = latentrt("completion", shell)
    assert done.code == 0
    assert f"_LATENTRT_COMPLETE={shell}_complete" in done.out
    assert json.loads(latentrt("completion", shell, "--json").out) == {"shell": shell, "script": done.out}


def test_an_unknown_shell(latentrt: Caller) -> None:
    done = latentrt("completion", "tcsh")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: SHELL: got 'tcsh', expected one of bash, zsh, fish")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [("latentrt ru", "run"), ("latentrt run sam", "sample"), ("latentrt run sample x --decoder p", "preview")],
)
def test_bash_completes_with_the_script(latentrt: Caller, tmp_path: Path, line: str, expected: str) -> None:
    script = latentrt("completion", "bash").out
    (tmp_path / "latentrt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m latentrt "$@"\n')
    (tmp_path / "latentrt").chmod(0o755)
    words = " ".join(f"'{word}'" for word in line.split())
    call = f"COMP_WORDS=({words}); COMP_CWORD={len(line.split()) - 1}; _latentrt_completion latentrt\n"
    done = subprocess.run(
        ["bash", "--norc", "-c", f'{script}\n{call}printf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.split() == [expected], done.stderr


def test_completion_of_a_command_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom latentrt.cli.main import main\n"
        "try:\n    main([])\nexcept SystemExit:\n    pass\n"
        "print('loaded', sorted({'numpy', 'onnxruntime', 'PIL', 'rich', 'msgspec'} & set(sys.modules)))"
    )
    environment = {**os.environ, "_LATENTRT_COMPLETE": "bash_complete", "COMP_WORDS": "latentrt ru", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["plain,run", "loaded []"], done.stderr


def test_the_sample_bundle_completes_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle_path().parent)
    assert values("run", "sample_b") == ["sample_bundle"]
    assert isinstance(cli._group, click.Group)
