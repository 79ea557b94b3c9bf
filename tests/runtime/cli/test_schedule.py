"""`latentrt schedule` as a user sees it: what it prints, draws, writes and refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.cli.main import main
from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS, Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_table import as_csv, as_json

TABLES = [name for name in SAMPLERS if name != "vq_diffusion"]


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run(*args) == 0
    return capsys.readouterr().out


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, words: str, *args: object) -> None:
    assert run(*args) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "defect" not in captured.err
    assert captured.err.replace("\n", "").isprintable()


def save(name: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """A scheduler of diffusers', and the configuration that it saves."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.save_config(folder)
    return scheduler, folder / "scheduler_config.json"


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--sampler", "dpmpp_2m", "--karras", "--steps", 12)
    title, noise, _, heading, *rows = out.splitlines()
    assert title == "dpmpp_2m (DPMSolverMultistepScheduler), 12 rows, use_karras_sigmas true"
    assert noise == "init_noise_sigma 1"
    assert heading.split() == ["row", "t", "sigma", "p", "q", "a", "b0", "b1"]
    assert [row.split()[0] for row in rows[:12]] == [str(row) for row in range(12)]
    assert rows[-1] == "left out, as they do nothing in any row: c_in, limit, u, w, e, d, s, noise_draws"


@pytest.mark.parametrize("name", TABLES)
def test_without_a_configuration_it_is_the_class_s_defaults(capsys: pytest.CaptureFixture[str], name: str) -> None:
    for form, writer in (("json", as_json), ("csv", as_csv)):
        assert printed(capsys, "--sampler", name, "--steps", 9, "--format", form) == writer(
            samplers.schedule(name, {}, 9)
        )


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
        ("LCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("EDMDPMSolverMultistepScheduler", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's arrays in diffusers
def test_a_configuration_as_diffusers_saves_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, class_name: str, options: dict[str, Any]
) -> None:
    scheduler, config = save(class_name, tmp_path, **options)
    steps = 4
    rows = json.loads(printed(capsys, "--config", config, "--steps", steps, "--format", "json"))["rows"]
    made = samplers.schedule(class_name, json.loads(config.read_text()), steps)
    assert rows == json.loads(as_json(made))["rows"]
    # What diffusers itself says of it.
    scheduler.set_timesteps(steps)
    assert np.array_equal([row["t"] for row in rows], scheduler.timesteps.numpy().astype(np.float32))


def test_a_sampler_goes_before_the_configuration_s_class(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, path = save("PNDMScheduler", tmp_path, beta_schedule="scaled_linear", beta_end=0.012)
    call = ("--config", path, "--sampler", "DPM++ 2M Karras", "--steps", 5, "--format", "json")
    config = json.loads(path.read_text())
    assert printed(capsys, *call) == as_json(samplers.schedule("DPM++ 2M Karras", config, 5))
    # What is said by an option goes before what a name means.
    assert printed(capsys, *call, "--no-karras") == as_json(samplers.schedule("dpmpp_2m", config, 5))


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
def test_what_a_run_takes(capsys: pytest.CaptureFixture[str], args: list[str], name: str, expected: Steps) -> None:
    found = printed(capsys, "--sampler", name, "--format", "json", *args)
    assert found == as_json(samplers.schedule(name, {}, expected))


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
        assert found == as_json(made)


def test_what_it_is_of_stands_above_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--sampler", "DPM++ 3M SDE Karras", "--steps", 3, "--begin", 2)
    assert out.splitlines()[0] == (
        'dpmpp_2m (DPMSolverMultistepScheduler), 1 row, algorithm_type "sde-dpmsolver++", solver_order 3, …'
    )
    out = printed(capsys, "--sampler", "ddpm", "--timesteps", ",".join(map(str, range(999, 0, -1))))
    assert len(out.splitlines()[0]) <= 100


def test_a_sampler_that_is_more_than_its_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sampler", "karras_ve", "--steps", 4, "--format", "json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert captured.err == f"karras_ve is more than this table: {SAMPLERS['karras_ve'].exception}\n"


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
    assert printed(capsys, *call, "-o", tmp_path / name, *args) == ""
    assert (tmp_path / name).read_text() == printed(capsys, *call, "--format", form)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_plot_beside_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = ("--sampler", "unipc", "--steps", 5)
    table = printed(capsys, *call)
    for name in ("one.svg", "two.svg"):
        assert printed(capsys, *call, "--plot", tmp_path / name) == table
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"unipc (UniPCMultistepScheduler), 5 rows" in (tmp_path / "one.svg").read_bytes()
    assert printed(capsys, *call, "--plot", tmp_path / "plot.png", "-o", tmp_path / "table.csv") == ""
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.csv").read_text().startswith("t,c_in,p,q,limit")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "found neither --sampler nor --config, expected one of them"),
        (["--sampler", "eulr"], "found sampler 'eulr', expected one of ddim"),
        (["--sampler", "ddim_karras"], "found karras with DDIMScheduler"),
        (["--sampler", "ddim", "--karras"], "found karras with DDIMScheduler"),
        (["--sampler", "ddim", "--option", "no_such_key=1"], "found option 'no_such_key'"),
        (["--sampler", "ddim", "--option", "clip_sample=maybe"], "clip_sample: 'maybe'"),
        (["--sampler", "ddim", "--option", "clip_sample"], "expected a name, = and a value"),
        (["--sampler", "ddim", "--option", "eta=1", "--eta", "1"], "found eta twice"),
        (["--sampler", "ddim", "--option", "eta=1", "--option", "eta=1"], "found eta twice"),
        (["--sampler", "ddim", "--option", "count=7"], "found --option count, expected --steps"),
        (["--sampler", "ddpm", "--option", "timesteps=5"], "found --option timesteps=5, expected a list"),
        (["--sampler", "ddpm", "--option", "timesteps=[]"], "timesteps: found ()"),
        (["--sampler", "ddim", "--eta", "2"], "found eta 2.0, expected a number from 0 to 1"),
        (["--sampler", "ddim", "--eta", "nan"], "found eta nan"),
        (["--sampler", "euler", "--eta", "0.5"], "found eta 0.5 with EulerDiscreteScheduler, which takes none"),
        (["--sampler", "ddim", "--steps", "0"], "0 is not in the range"),
        (["--sampler", "ddim", "--steps", "2000000000"], "is not in the range"),
        (["--sampler", "ddim", "--steps", "5", "--begin", "5"], "found begin 5 of 5 steps"),
        (["--sampler", "ddim", "--begin", "-1"], "found begin -1"),
        (["--sampler", "ddpm", "--timesteps", "9,x"], "expected numbers with commas between them"),
        (["--sampler", "ddpm", "--timesteps", "1,2"], "expected them to descend"),
        (["--sampler", "ddpm", "--timesteps", "9,8", "--steps", "2"], "found --steps and timesteps"),
        (["--sampler", "euler", "--timesteps", "9,8", "--sigmas", "2,1"], "found both timesteps and sigmas"),
        (["--sampler", "flow_euler", "--mu", "1"], "found mu, which needs use_dynamic_shifting"),
        (["--sampler", "edm_euler", "--option", "sigma_max=1e308"], "has no table of finite numbers"),
        (["--sampler", "vq_diffusion", "--option", "num_vec_classes=9"], "whose states are classes"),
        (["--sampler", "ddim", "--format", "xml"], "'xml' is not one of"),
        (["--config", "missing.json"], "missing.json cannot be read: No such file"),
        (["--config", "."], ". cannot be read: Is a directory"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.txt").write_text("earlier")
    assert_refused(capsys, 2, words, *args, "-o", "out.txt", "--plot", "out.svg")
    # What was there stays, and nothing else comes.
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.txt", "earlier")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"beta_end": 0.02}', "has no _class_name, expected the name of a diffusers scheduler"),
        ('{"_class_name": ["LMS"]}', 'has _class_name ["LMS"], expected the name'),
        ('{"_class_name": "MyScheduler"}', "found sampler 'MyScheduler', expected one of"),
        ('{"_class_name": "DDIMScheduler", "beta_end": "a lot"}', "beta_end: 'a lot'"),
        ('{"_class_name": "DDIMScheduler", "prediction_type": "\\u001b[2J"}', "prediction_type"),
        ('{"_class_name": "\\u001b[2J"}', "found sampler"),
    ],
)
def test_a_configuration_that_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert_refused(capsys, 2, words, "--config", config)


def test_a_configuration_without_a_class_needs_a_sampler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"beta_end": 0.01}')
    out = printed(capsys, "--config", config, "--sampler", "ddim", "--steps", 3, "--format", "json")
    assert out == as_json(samplers.schedule("ddim", {"beta_end": 0.01}, 3))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "missing/out.csv"], "missing/out.csv cannot be written: No such file or directory"),
        (["-o", "folder"], "folder cannot be written: Is a directory"),
        (["--plot", "missing/out.svg"], "missing/out.svg cannot be written"),
        (["--plot", "out.gif"], "has the extension '.gif', expected one of .svg, .pdf, .png"),
        (["-o", "same.svg", "--plot", "folder/../same.svg"], "for both -o and --plot, expected two files"),
    ],
)
def test_what_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert_refused(capsys, 8, words, "--sampler", "ddim", "--steps", 3, *args)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_without_matplotlib_there_is_a_table_and_no_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call = ("--sampler", "ddim", "--steps", 3)
    assert "init_noise_sigma" in printed(capsys, *call)
    (tmp_path / "out.svg").write_text("earlier")
    (tmp_path / "out.csv").write_text("earlier")
    files = ("--plot", tmp_path / "out.svg", "-o", tmp_path / "out.csv")
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
