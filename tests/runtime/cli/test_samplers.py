"""`latentrt samplers` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from latentrt.cli.main import main
from latentrt.sampling.sampler_facts import cost
from latentrt.sampling.samplers import SAMPLERS, aliases_of, choose, find


@pytest.fixture(autouse=True)
def _hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["samplers", *args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def listing(capsys: pytest.CaptureFixture[str], *names: str) -> list[dict[str, Any]]:
    assert run("--json", *names) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


@pytest.mark.parametrize("options", [[], ["--verbose"]])
def test_every_sampler_is_listed(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run(*options) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name, sampler in SAMPLERS.items():
        assert f"\n{name} " in f"\n{out}"
        assert f" {sampler.title}\n" in out
        assert f"{sampler.class_name}, for {sampler.kind} models, cost {cost(sampler)}" in words
        for alias in aliases_of(name):
            assert alias in words
        assert sampler.exception in words
    assert "…_karras, …_exponential and …_beta" in words
    assert "DPM++ 2M Karras" in words
    assert max(map(len, out.splitlines())) <= 100
    assert out.replace("\n", "").isprintable()


def test_only_those_that_are_named_by_whatever_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("DPM++ 2M Karras", "EulerAncestralDiscreteScheduler", "dpmpp_2m") == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.split("\n\n")[0].splitlines() if not line.startswith(" ")]
    assert names == ["dpmpp_2m", "euler_a"]
    assert "DPM++ 2M Karras is dpmpp_2m with use_karras_sigmas true.\n" in out


def test_options_and_what_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verbose", "dpmpp_2m", "vq_diffusion") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"takes in a run {', '.join(['begin', *sorted(find('dpmpp_2m').takes)])}" in lines
    assert "solver_order 2 1 or 2 or 3" in lines
    assert 'final_sigmas_type "zero" "zero" or "sigma_min"' in lines
    assert "lambda_min_clipped -Infinity a number" in lines
    assert "beta_start 0.0001 a number above 0" in lines
    assert "num_vec_classes required a whole number of at least 2" in lines


def test_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run("dpmpp_2m") == 0
    wrapped = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, wrapped)) <= 60


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = listing(capsys)
    assert [each["name"] for each in found] == list(SAMPLERS)
    for each in found:
        sampler = SAMPLERS[each["name"]]
        assert (each["class_name"], each["title"], each["kind"]) == (sampler.class_name, sampler.title, sampler.kind)
        assert each["exception"] == (sampler.exception or None)
        assert each["takes"] == sorted(sampler.takes)
        assert each["evaluations_per_step"] == cost(sampler)
        for alias, options in each["aliases"].items():
            assert choose(alias).name == each["name"]
            assert choose(alias).options == options
            assert set(options) <= set(each["options"])


def test_json_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    (heun,) = listing(capsys, "k_heun")
    assert heun["evaluations"] == {"1": 1, "10": 19, "20": 39, "50": 99}
    assert heun["endings"] == ["_karras", "_exponential", "_beta"]
    (dpm,) = listing(capsys, "dpmpp_2m")
    assert dpm["aliases"]["dpmpp_2m_sde"] == {"algorithm_type": "sde-dpmsolver++"}
    assert dpm["options"]["solver_order"] == {"values": "1 or 2 or 3", "choices": [1, 2, 3], "default": 2}
    assert dpm["options"]["lambda_min_clipped"] == {"values": "a number", "default": "-Infinity"}
    (vq,) = listing(capsys, "vq_diffusion")
    assert vq["options"]["num_vec_classes"] == {"values": "a whole number of at least 2"}


@pytest.mark.parametrize("options", [[], ["--json"], ["--verbose"]])
def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    for name in ("eulr", "", "\x1b[2J", "ddim_karras"):
        assert run(*options, name) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: found ")
        assert captured.err.removesuffix("\n").isprintable()


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from latentrt.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit: print({'numpy', 'onnxruntime', 'PIL', 'matplotlib', 'rich'} & set(sys.modules))"
    )
    for command in ("samplers", "schedule"):
        out = subprocess.check_output([sys.executable, "-c", script, command], text=True)
        assert out.endswith("set()\n")
