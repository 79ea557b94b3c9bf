"""`latentrt samplers`: its list, and its description of one sampler."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from latentrt.cli.main import main
from latentrt.cli.samplers import cost, evaluations, format_default, options, suffixes
from latentrt.errors import RequestError
from latentrt.sampling.samplers import SAMPLERS, aliases_of, choose, find, schedule


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
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["samplers"]
    return found


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
def test_every_sampler_is_listed(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert run(*flags) == 0
    out = capsys.readouterr().out
    text = " ".join(out.split())
    for name, sampler in SAMPLERS.items():
        assert f"\n{name} " in f"\n{out}"
        assert f" {sampler.title}\n" in out
        assert f"{sampler.class_name}, for {sampler.kind} models, cost {cost(sampler)}" in text
        for alias in aliases_of(name):
            assert alias in text
        assert sampler.unsupported_reason in text
    assert "…_karras" in text
    assert "DPM++ 2M Karras" in text
    assert max(map(len, out.splitlines())) <= 100
    assert out.replace("\n", "").isprintable()


def test_samplers_are_listed_by_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("DPM++ 2M Karras", "EulerAncestralDiscreteScheduler", "dpmpp_2m") == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.split("\n\n")[0].splitlines() if not line.startswith(" ")]
    assert names == ["dpmpp_2m", "euler_a"]
    assert "DPM++ 2M Karras is dpmpp_2m with use_karras_sigmas true.\n" in out


def test_verbose_lists_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verbose", "dpmpp_2m", "vq_diffusion") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"options of a run: {', '.join(['begin', *sorted(find('dpmpp_2m').run_options)])}" in lines
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
        assert each["unsupported_reason"] == (sampler.unsupported_reason or None)
        assert each["run_options"] == sorted(sampler.run_options)
        assert each["evaluations_per_step"] == cost(sampler)
        for alias, implied in each["aliases"].items():
            assert choose(alias).name == each["name"]
            assert choose(alias).options == implied
            assert set(implied) <= set(each["options"])


def test_json_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    (heun,) = listing(capsys, "k_heun")
    assert heun["evaluations"] == {"1": 1, "10": 19, "20": 39, "50": 99}
    assert heun["suffixes"] == ["_karras", "_exponential", "_beta"]
    (dpm,) = listing(capsys, "dpmpp_2m")
    assert dpm["aliases"]["dpmpp_2m_sde"] == {"algorithm_type": "sde-dpmsolver++"}
    assert dpm["options"]["solver_order"] == {"values": "1 or 2 or 3", "choices": [1, 2, 3], "default": 2}
    assert dpm["options"]["lambda_min_clipped"] == {"values": "a number", "default": "-Infinity"}
    (vq,) = listing(capsys, "vq_diffusion")
    assert vq["options"]["num_vec_classes"] == {"values": "a whole number of at least 2"}


@pytest.mark.parametrize("flags", [[], ["--json"], ["--verbose"]])
def test_unknown_names(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    for name in ("eulr", "", "\x1b[2J", "ddim_karras"):
        assert run(*flags, name) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: NAME: got " if name != "ddim_karras" else "error: got ")
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_suffixes_are_those_that_a_name_may_have(name: str) -> None:
    known = suffixes(SAMPLERS[name])
    for suffix in ("_karras", "_exponential", "_beta"):
        if suffix in known:
            assert choose(name + suffix).name == name
        else:
            with pytest.raises(RequestError):
                choose(name + suffix)


@pytest.mark.parametrize("name", SAMPLERS)
def test_described_options_are_read(name: str) -> None:
    sampler = SAMPLERS[name]
    described = options(sampler)
    required = {option.name: 8 for option in described if option.required}
    assert required == ({"num_vec_classes": 8} if name == "vq_diffusion" else {})
    for option in described:
        assert option.values, option.name
        # Every choice is supported, and nothing else where all are listed.
        for choice in option.choices or ():
            assert getattr(sampler.read({**required, option.name: choice}), option.name) == choice
        if option.choices is not None:
            assert option.default in option.choices
            with pytest.raises(RequestError):
                sampler.read({**required, option.name: "none of these"})


def test_values_are_described() -> None:
    values = {option.name: option.values for sampler in SAMPLERS.values() for option in options(sampler)}
    assert values["num_train_timesteps"] == "a whole number of at least 2"
    assert values["dynamic_thresholding_ratio"] == "a number above 0 and at most 1"
    assert values["shift_terminal"] == "a number of at least 0 and below 1 or null"
    assert values["trained_betas"] == "numbers (2 or more) or null"
    assert values["clip_sample"] == "true or false"
    assert values["final_sigmas_type"] == '"zero" or "sigma_min"'
    assert values["predictor_order"] == "1 or 2 or 3 or 4"


def test_defaults_are_json() -> None:
    for sampler in SAMPLERS.values():
        for option in options(sampler):
            text = format_default(option)
            if option.required:
                assert text == "required"
            elif isinstance(option.default, float) and math.isinf(option.default):
                assert float(text.removesuffix("inity")) == option.default
            else:
                assert json.loads(text) == (list(option.default) if option.default == () else option.default)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].unsupported_reason])
def test_a_table_has_as_many_rows_as_evaluations(name: str) -> None:
    for count in (4, 20):
        assert evaluations(SAMPLERS[name], count) == len(schedule(name, {}, count))


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("euler", "1"),
        ("heun", "2 (last step 1)"),
        ("dpm2_a", "2 (last step 1)"),
        ("sde_ve", "2"),
        ("pndm", "1, and 9 more in a run"),
        ("repaint", "5.5 in 20 steps, 8.2 in 50"),
        ("vq_diffusion", "1"),
    ],
)
def test_the_cost_is_described(name: str, description: str) -> None:
    assert cost(find(name)) == description
