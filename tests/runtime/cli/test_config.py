"""`latentrt config`: what is set and where, and a file to begin with."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.runtime.cli.conftest import Caller


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of the configuration file, in a folder that does not exist yet."""
    monkeypatch.setattr("platformdirs.user_config_path", lambda *_, **__: tmp_path / "config")
    return tmp_path / "config" / "config.toml"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_without_a_file(latentrt: Caller, path: Path) -> None:
    done = latentrt("config")
    assert done.out.startswith(f"file: {path} (does not exist; latentrt config init writes it)\n")
    assert not path.exists()
    found = json.loads(latentrt("config", "--json").out)
    assert (found["path"], found["exists"], found["values"]) == (str(path), False, [])


def test_a_folder_that_cannot_be_looked_into_has_no_file(
    latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As that of another user; here, of a name that is too long, which root cannot look into either."""
    monkeypatch.setattr("platformdirs.user_config_path", lambda *_, **__: tmp_path / ("a" * 300))
    assert latentrt("samplers").code == 0
    assert json.loads(latentrt("config", "--json").out)["exists"] is False


def test_each_value_has_its_source(latentrt: Caller, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, "[run]\nsteps = 20\nwidth = 64\nsampler-option = { solver_order = 3 }\n[engines.list]\njson = true\n")
    monkeypatch.setenv("LATENTRT_RUN_STEPS", "5")
    found = json.loads(latentrt("config", "--json").out)["values"]
    assert [(each["command"], each["key"], each["value"], each["source"], each["name"]) for each in found] == [
        ("engines list", "json", "true", "file", None),
        ("run", "width", "64", "file", None),
        ("run", "steps", "5", "environment", "LATENTRT_RUN_STEPS"),
        ("run", "sampler-option", "solver_order=3", "file", None),
    ]
    printed = latentrt("config").out
    assert re.search(r"^\[engines\.list\]\njson = true +the file$", printed, re.M)
    assert re.search(r"^steps = 5 +LATENTRT_RUN_STEPS$", printed, re.M)
    everything = json.loads(latentrt("config", "--all", "--json").out)["values"]
    assert {("bench", "batch", "1", "default")} <= {
        (each["command"], each["key"], each["value"], each["source"]) for each in everything
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[rnu]\nsteps = 1\n", "got the table [rnu], expected that of a command; did you mean run?"),
        ("[engines.lst]\njson = true\n", "got the table [engines.lst], expected that of a command"),
        ("[bench]\nstpes = 1\n", "stpes in [bench] of"),
        ("[bench]\nruns = 0\n", "runs in [bench] of"),
        ("[compare]\nsteps = 'x'\n", "steps in [compare] of"),
        ("[export]\nprecision = 'int3'\n", "precision in [export] of"),
        ("run = 1\n", "got 1 as run, expected a table: [run]"),
        ("[run]\nsteps = 1\n[run]\n", "is not TOML"),
        ("steps = 3\n", "got 'steps' outside of a table, expected it in the table of a command, such as [run]"),
        ("[engines]\njson = true\n", "got 'json' in [engines], which has commands of its own, expected it in"),
        ("[run]\nsteps = 0\n", "steps in [run] of"),
        ("[run]\nsampler = 'eular'\n", "sampler in [run] of"),
        ('[run]\nimage = "a\\u0000b"\n', "image in [run] of"),
        (".".join(["a"] * 300) + " = 1\n", "has a line with more than 256 dots, expected fewer"),
        (f'[run]\nsampler-option = "{"a" * 30_000}"\n', "…, expected NAME=VALUE"),
    ],
)
def test_what_is_wrong_anywhere_in_the_file_is_refused(latentrt: Caller, path: Path, text: str, says: str) -> None:
    write(path, text)
    done = latentrt("config")
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert str(path) in done.err


def test_a_wrong_variable_is_refused(latentrt: Caller, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_BENCH_RUNS", "many")
    assert latentrt("config").err.startswith("error: LATENTRT_BENCH_RUNS: got 'many', expected a whole number")


def test_a_variable_of_no_option_is_reported(
    latentrt: Caller, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATENTRT_RUN_STEPZ", "3")
    assert latentrt("config").code == 0
    assert "LATENTRT_RUN_STEPZ is that of no option; did you mean LATENTRT_RUN_STEPS?" in caplog.text


def test_a_file_in_which_every_option_is_commented_out(latentrt: Caller, path: Path) -> None:
    done = latentrt("config", "init")
    assert (done.code, done.err) == (0, "")
    text = path.read_text(encoding="utf-8")
    assert tomllib.loads(text) == {}
    assert '# device = "auto"  # auto, cpu or cuda' in text
    assert latentrt("config").out.endswith("no option is set in it or in the environment\n")
    write(path, re.sub(r"^# (\[|[a-z0-9-]+ =)", r"\1", text, flags=re.M))
    assert {"run", "bench", "engines"} <= tomllib.loads(path.read_text()).keys()
    done = latentrt("config")
    assert (done.code, done.err) == (0, ""), "every line may be used as it is"


def test_a_file_that_exists_is_never_replaced(latentrt: Caller, path: Path) -> None:
    write(path, "[run]\nsteps = 3\n")
    done = latentrt("config", "init")
    assert (done.code, done.out) == (8, "")
    assert f"{path} exists" in done.err
    assert path.read_text() == "[run]\nsteps = 3\n"


def test_a_folder_that_cannot_be_made(latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CONFIG", str(tmp_path / "file" / "config.toml"))
    assert latentrt("config", "init").code == 8
    assert latentrt("config").code == 2
    assert latentrt("config", "--help").code == 0


def test_init_writes_the_named_file(latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTRT_CONFIG", str(tmp_path / "mine.toml"))
    assert latentrt("config", "init").code == 0
    assert (tmp_path / "mine.toml").exists()
