"""`latentrt schedule`: its table, plots, files and errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.cli.main import main
from latentrt.cli.schedule import MAX_CONFIG_BYTES, read_scheduler_config
from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS, Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_table import format_csv, format_json

TABLES = [name for name in SAMPLERS if name != "vq_diffusion"]


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run(*args) == 0
    return capsys.readouterr().out


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, fragment: str, *args: object) -> None:
    assert run(*args) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert fragment in captured.err
    assert "defect" not in captured.err
    assert captured.err.replace("\n", "").isprintable()


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--sampler", "dpmpp_2m", "--karras", "--steps", 12)
    title, noise, _, heading, *rows = out.splitlines()
    assert title == "dpmpp_2m (DPMSolverMultistepScheduler), 12 rows, use_karras_sigmas true"
    assert noise == "init_noise_sigma 1"
    assert heading.split() == ["row", "t", "sigma", "p", "q", "a", "b0", "b1"]
    assert [row.split()[0] for row in rows[:12]] == [str(row) for row in range(12)]
    assert rows[-1] == "without effect in any row: c_in, limit, u, w, e, d, s, noise_draws"


@pytest.mark.parametrize("name", TABLES)
def test_without_a_configuration_the_defaults_of_the_class_apply(capsys: pytest.CaptureFixture[str], name: str) -> None:
    for form, writer in (("json", format_json), ("csv", format_csv)):
        assert printed(capsys, "--sampler", name, "--steps", 9, "--format", form) == writer(
            samplers.schedule(name, {}, 9)
        )


def test_a_sampler_overrides_the_class_of_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}')
    call = ("--config", path, "--sampler", "DPM++ 2M Karras", "--steps", 5, "--format", "json")
    config = json.loads(path.read_text())
    assert printed(capsys, *call) == format_json(samplers.schedule("DPM++ 2M Karras", config, 5))
    # An option overrides what a name implies.
    assert printed(capsys, *call, "--no-karras") == format_json(samplers.schedule("dpmpp_2m", config, 5))


@pytest.mark.parametrize(
    ("args", "name", "expected"),
    [
        (["--eta", "0.5"], "ddim", Steps(count=50, eta=0.5)),
        (["--begin", "30"], "ddim", Steps(count=50, begin=30)),
        (["--timesteps", "999,750,500.0", "--begin", "1"], "ddpm", Steps(count=3, begin=1, timesteps=(999, 750, 500))),
        (["--sigmas", "14.6,5,1.5,0"], "euler", Steps(count=4, sigmas=(14.6, 5, 1.5, 0))),
        (["--option", "s_churn=5", "--option", "s_tmax=Infinity"], "euler", Steps(count=50, s_churn=5)),
        (["--option", "timesteps=[9,8]"], "ddpm", Steps(count=2, timesteps=(9, 8))),
    ],
)
def test_options_of_a_run(capsys: pytest.CaptureFixture[str], args: list[str], name: str, expected: Steps) -> None:
    found = printed(capsys, "--sampler", name, "--format", "json", *args)
    assert found == format_json(samplers.schedule(name, {}, expected))


def test_options_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    def both(name: str, args: list[str], **config: Any) -> tuple[str, Schedule]:
        out = printed(capsys, "--sampler", name, "--steps", 6, "--format", "json", *args)
        return out, samplers.schedule(name, config, Steps(count=6, mu=0.9) if "--mu" in args else 6)

    for found, made in (
        both("dpmpp_2m", ["--option", "solver_order=3"], solver_order=3),
        both("dpmpp_2m", ["--option", "solver_type=heun"], solver_type="heun"),
        both("dpmpp_2m", ["--option", "thresholding=true"], thresholding=True),
        both("dpmpp_2m", ["--option", "lambda_min_clipped=-Infinity"], lambda_min_clipped=-math.inf),
        both("flow_euler", ["--option", "use_dynamic_shifting=true", "--mu", "0.9"], use_dynamic_shifting=True),
        # A key of RePaint's configuration, and an argument of a run of DDIM.
        both("repaint", ["--eta", "0.5"], eta=0.5),
    ):
        assert found == format_json(made)


def test_the_title_lists_differences_from_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--sampler", "DPM++ 3M SDE Karras", "--steps", 3, "--begin", 2)
    assert out.splitlines()[0] == (
        'dpmpp_2m (DPMSolverMultistepScheduler), 1 row, algorithm_type "sde-dpmsolver++", solver_order 3, …'
    )
    out = printed(capsys, "--sampler", "ddpm", "--timesteps", ",".join(map(str, range(999, 0, -1))))
    assert len(out.splitlines()[0]) <= 100


def test_samplers_that_the_pipeline_does_not_run_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sampler", "karras_ve", "--steps", 4, "--format", "json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert SAMPLERS["karras_ve"].unsupported_reason in captured.err


@pytest.mark.parametrize(
    ("name", "args", "form"),
    [
        ("out.json", [], "json"),
        ("out.CSV", [], "csv"),
        ("out.txt", [], "table"),
        ("out.txt", ["--format", "json"], "json"),
        ("out.json", ["--format", "csv"], "csv"),
    ],
)
def test_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, args: list[str], form: str) -> None:
    (tmp_path / name).write_text("earlier")
    call = ("--sampler", "ddim", "--steps", 3)
    assert_refused(capsys, 8, f"{name} exists; give another -o, or --overwrite", *call, "-o", tmp_path / name, *args)
    assert (tmp_path / name).read_text() == "earlier"
    assert printed(capsys, *call, "-o", tmp_path / name, *args, "--overwrite") == ""
    assert (tmp_path / name).read_text() == printed(capsys, *call, "--format", form)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.extras
def test_a_plot_beside_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = ("--sampler", "unipc", "--steps", 5)
    table = printed(capsys, *call)
    for name in ("one.svg", "two.svg"):
        assert printed(capsys, *call, "--plot", tmp_path / name) == table
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"unipc (UniPCMultistepScheduler), 5 rows" in (tmp_path / "one.svg").read_bytes()
    assert printed(capsys, *call, "--plot", tmp_path / "plot.png", "-o", tmp_path / "table.csv") == ""
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(capsys, 8, "plot.png exists; give another --plot", *call, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "table.csv").read_text().startswith("t,c_in,p,q,limit")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        ([], "--config"),
        (["--sampler", "eulr"], "'eulr'"),
        (["--sampler", "ddim_karras"], "karras sigmas"),
        (["--sampler", "ddim", "--karras"], "karras sigmas"),
        (["--sampler", "ddim", "--option", "no_such_key=1"], "'no_such_key'"),
        (["--sampler", "ddim", "--option", "clip_sample=maybe"], "`clip_sample`='maybe'"),
        (["--sampler", "ddim", "--option", "clip_sample"], "NAME=VALUE"),
        (["--sampler", "ddim", "--option", "eta=1", "--eta", "1"], "got eta twice"),
        (["--sampler", "ddim", "--option", "eta=1", "--option", "eta=1"], "got eta twice"),
        (["--sampler", "ddim", "--option", "count=7"], "--steps"),
        (["--sampler", "ddpm", "--option", "timesteps=5"], "timesteps=5"),
        (["--sampler", "ddpm", "--option", "timesteps=[]"], "--timesteps=()"),
        (["--sampler", "ddim", "--eta", "2"], "--eta=2.0"),
        (["--sampler", "ddim", "--eta", "nan"], "--eta=nan"),
        (["--sampler", "euler", "--eta", "0.5"], "--eta=0.5"),
        (["--sampler", "ddim", "--steps", "0"], "expected a whole number from 1 to 10000"),
        (["--sampler", "ddim", "--steps", "2000000000"], "expected a whole number from 1 to 10000"),
        (["--sampler", "ddim", "--steps", "5", "--begin", "5"], "--begin: got 5"),
        (["--sampler", "ddim", "--begin", "-1"], "--begin=-1"),
        (["--sampler", "ddpm", "--timesteps", "9,x"], "separated by commas"),
        (["--sampler", "ddpm", "--timesteps", "1,2"], "--timesteps=[1, 2]"),
        (["--sampler", "ddpm", "--timesteps", "9,8", "--steps", "2"], "--steps and --timesteps"),
        (["--sampler", "euler", "--timesteps", "9,8", "--sigmas", "2,1"], "--timesteps and --sigmas"),
        (["--sampler", "flow_euler", "--mu", "1"], "--mu without `use_dynamic_shifting`"),
        (["--sampler", "edm_euler", "--option", "sigma_max=1e308"], "no table of finite numbers"),
        (["--sampler", "vq_diffusion", "--option", "num_vec_classes=9"], "no table"),
        (["--sampler", "ddim", "--format", "xml"], "'xml'"),
        (["--config", "missing.json"], "missing.json cannot be read: No such file"),
        (["--config", "."], ". cannot be read: Is a directory"),
    ],
)
def test_invalid_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.txt").write_text("earlier")
    assert_refused(capsys, 2, fragment, *args, "-o", "out.txt", "--plot", "out.svg", "--overwrite")
    # An existing file stays, and no other is written.
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.txt", "earlier")]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "is not JSON"),
        ("[]", "contains a list"),
        ('{"beta_end": 0.02}', "has no _class_name"),
        ('{"_class_name": ["LMS"]}', 'has _class_name ["LMS"]'),
        ('{"_class_name": "MyScheduler"}', "'MyScheduler'"),
        ('{"_class_name": "DDIMScheduler", "beta_end": "a lot"}', "`beta_end`='a lot'"),
        ('{"_class_name": "DDIMScheduler", "prediction_type": "\\u001b[2J"}', "prediction_type"),
        ('{"_class_name": "\\u001b[2J"}', "--sampler: got "),
    ],
)
def test_invalid_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, fragment: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert_refused(capsys, 2, fragment, "--config", config)


def test_a_configuration_without_a_class_needs_a_sampler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"beta_end": 0.01}')
    out = printed(capsys, "--config", config, "--sampler", "ddim", "--steps", 3, "--format", "json")
    assert out == format_json(samplers.schedule("ddim", {"beta_end": 0.01}, 3))


@pytest.mark.extras
@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["-o", "missing/out.csv"], "missing/out.csv cannot be written: No such file or directory"),
        (["-o", "folder"], "folder cannot be written: Is a directory"),
        (["--plot", "missing/out.svg"], "missing/out.svg cannot be written"),
        (["--plot", "out.gif"], "has the extension '.gif'"),
        (["-o", "same.svg", "--plot", "folder/../same.svg"], "-o and --plot"),
    ],
)
def test_files_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert_refused(capsys, 8, fragment, "--sampler", "ddim", "--steps", 3, *args)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_without_matplotlib_there_is_a_table_and_no_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call = ("--sampler", "ddim", "--steps", 3)
    assert "init_noise_sigma" in printed(capsys, *call)
    (tmp_path / "out.svg").write_text("earlier")
    (tmp_path / "out.csv").write_text("earlier")
    files = ("--plot", tmp_path / "out.svg", "-o", tmp_path / "out.csv", "--overwrite")
    assert_refused(capsys, 7, "pip install 'latentrt[plot]'", *call, *files)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}


def test_a_table_loads_no_matplotlib() -> None:
    script = (
        "import sys; from latentrt.cli.main import main\n"
        "try: main(['schedule', '--sampler', 'ddim', '--steps', '2'])\n"
        "except SystemExit: print({'matplotlib', 'onnxruntime', 'PIL', 'torch', 'scipy'} & set(sys.modules))"
    )
    out = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert out.endswith("set()\n")


def write(place: Path, text: str | bytes) -> Path:
    place.write_bytes(text.encode() if isinstance(text, str) else text)
    return place


def test_a_configuration_is_read(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "trained_betas": [0.1, 2e-3],
        "clip_sample": False,
        "é": None,
    }
    assert read_scheduler_config(write(tmp_path / "config.json", json.dumps(config))) == config


def test_infinities_are_read_as_diffusers_writes_them(tmp_path: Path) -> None:
    config = read_scheduler_config(write(tmp_path / "config.json", '{"low": -Infinity, "high": Infinity}'))
    assert config == {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"[1, 2]", "contains a list, expected a JSON object"),
        (b"null", "contains a NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        (b'{"a": NaN}', "has the number NaN"),
        (b'{"a": 1e999}', "has the number 1e999"),
        (b'{"a": 9223372036854775808}', "has the number 9223372036854775808"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "has the number 9999"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7)"),
        (b'{"a": ' + b"[" * 200_000, "is nested deeper"),
        (b" " * (MAX_CONFIG_BYTES + 1), "is larger than 1,048,576 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_configurations_are_rejected(tmp_path: Path, text: bytes, fragment: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_scheduler_config(write(tmp_path / "config.json", text))
    assert fragment in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "scheduler_config.json" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_largest_configuration(tmp_path: Path) -> None:
    text = '{"a": 1}'.ljust(MAX_CONFIG_BYTES)
    assert read_scheduler_config(write(tmp_path / "config.json", text)) == {"a": 1}


def test_a_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"missing\.json cannot be read: No such file"):
        read_scheduler_config(tmp_path / "missing.json")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_scheduler_config(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="not a regular file"):
        read_scheduler_config(tmp_path / "pipe")
