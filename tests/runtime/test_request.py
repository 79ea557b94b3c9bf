"""The declarations of a request's options, and everything that is generated from them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from latentrt import Pipeline, request
from latentrt.cli.request_options import SPELLING, given_options, request_options
from latentrt.cli.run import run
from latentrt.errors import RequestError
from latentrt.images.metadata import read_metadata
from latentrt.pipeline import call_signature
from latentrt.request import OPTIONS, Option, Request, Sampling, Whole, flat_values, option

# Another value than the default for every option, and what the record says of it.
CHANGED: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "a star",
    "clip_skip": 1,
    "height": 32,
    "width": 48,
    "num_inference_steps": 3,
    "sampler": "euler",
    "sampler_options": {"timestep_spacing": "linspace"},
    "karras": True,
    "eta": 0.25,
    "guidance_scale": 4.0,
    "guidance_rescale": 0.5,
    "guidance_start": 0.25,
    "guidance_end": 0.75,
    "image_guidance_scale": 1.25,
    "strength": 0.75,
    "noise_level": 20,
    "padding_mask_crop": 4,
    "deep_cache": 2,
    "decoder": "preview",
    "num_images_per_prompt": 2,
    "seed": 5,
    "safety": "report",
}
# Options of tasks that the sample model cannot do.
OF_OTHER_TASKS = {"image_guidance_scale", "noise_level"}
# Options that the record holds in a field of their own, and one that does not concern a single image.
OWN_FIELDS = {"prompt", "negative_prompt", "seed", "safety", "num_images_per_prompt"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", threads=1)


def test_every_option_is_a_keyword_of_the_call() -> None:
    parameters = inspect.signature(Pipeline.__call__).parameters
    for keyword, each in OPTIONS.items():
        assert parameters[keyword].default == each.default
        assert f"{keyword}: {each.help}" in (Pipeline.__call__.__doc__ or "")
    assert set(parameters) == {*OPTIONS, "self", "output_type", "callback_on_step_end"}
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def test_every_option_with_a_flag_is_on_the_command_line() -> None:
    flags = {flag for each in run.params for flag in each.opts}
    shown = " ".join(CliRunner().invoke(run, ["--help"]).output.split())
    for keyword, each in OPTIONS.items():
        if each.flag is not None:
            assert each.flag in flags
            assert each.flag in shown
            assert SPELLING[keyword] == each.flag
    # Those without a flag are arrays, or spelled by the command itself.
    spelled = {keyword for keyword, each in OPTIONS.items() if each.flag is None and each.check.kind != "python"}
    assert spelled == {"prompt", "num_images_per_prompt", "seed"}
    assert {"--images", "--seed"} <= flags
    assert {SPELLING[keyword] for keyword in spelled} == {"PROMPT", "--images", "--seed"}


def test_the_list_of_options_is_complete() -> None:
    """Else the test of the record below would pass over a new option."""
    assert {keyword for keyword, each in OPTIONS.items() if each.check.kind not in ("python", "path")} == {*CHANGED}


def record_of(pipeline: Pipeline, place: Path, **values: Any) -> dict[str, Any]:
    """Return the record's options of an image of a request, read back from its file."""
    resolved = pipeline.resolve(Request.of(**values))
    shape = pipeline.family.latent_space.shape(resolved.height, resolved.width)
    result = pipeline.finish(resolved, np.zeros((len(resolved.seeds), *shape), np.float32))
    record = read_metadata(result.save(place)[0]).record
    assert record is not None
    assert record == result.records[0]
    return record.options


# Values that belong to a task or a sampler are set where they are allowed.
ALONE: dict[str, dict[str, Any]] = {
    "eta": {"sampler": "ddim"},
    "karras": {"sampler": "euler"},
    "sampler_options": {"sampler": "euler"},
    "strength": {"image": np.zeros((64, 64, 3), np.uint8)},
    "padding_mask_crop": {
        "image": np.zeros((64, 64, 3), np.uint8),
        "mask_image": np.full((64, 64), 255, np.uint8),
    },
}


@pytest.mark.parametrize("keyword", sorted({*CHANGED} - OWN_FIELDS - OF_OTHER_TASKS))
def test_an_option_that_differs_from_its_default_is_in_the_record(
    pipeline: Pipeline, tmp_path: Path, keyword: str
) -> None:
    values = {"prompt": "a star", "seed": 0, "num_inference_steps": 2, **ALONE.get(keyword, {})}
    plain = record_of(pipeline, tmp_path / "plain.png", **values)
    options = record_of(pipeline, tmp_path / "out.png", **{**values, keyword: CHANGED[keyword]})
    assert options[keyword] == CHANGED[keyword]
    assert plain.get(keyword) != CHANGED[keyword]


def test_an_option_at_its_default_is_not_in_the_record(pipeline: Pipeline, tmp_path: Path) -> None:
    options = record_of(pipeline, tmp_path / "out.png", prompt="a star", guidance_end=1.0, decoder="full")
    assert {*options} == {"height", "width", "num_inference_steps", "guidance_scale", "sampler"}


@pytest.mark.parametrize("keyword", [*sorted(OF_OTHER_TASKS), "depth_map"])
def test_an_option_of_another_task_is_refused_by_name(pipeline: Pipeline, keyword: str) -> None:
    value = CHANGED.get(keyword, np.ones((8, 8), np.float32))
    with pytest.raises(RequestError, match=f"`{keyword}`"):
        pipeline.resolve(Request.of(prompt="a star", **{keyword: value}))


def test_a_new_option_is_declared_in_one_place(
    monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, tmp_path: Path
) -> None:
    """The call, the command line, the checks and the record follow from the declaration alone."""
    made_up = option(None, "made_up", "--made-up", Whole(1, 9), "A made-up option.")
    extended = dataclasses.make_dataclass(
        "Sampling", [("made_up", int | None, made_up)], bases=(Sampling,), frozen=True, kw_only=True, eq=False
    )
    monkeypatch.setitem(request._GROUPS, "sampling", extended)
    for each in request.declared_options(Request):
        monkeypatch.setitem(OPTIONS, each.keyword, each)

    assert OPTIONS["made_up"].path == ("sampling", "made_up")
    assert call_signature().parameters["made_up"].default is None

    @click.command()
    @request_options()
    def command(**options: Any) -> None:
        click.echo(given_options(options))

    assert "--made-up INTEGER" in CliRunner().invoke(command, ["--help"]).output
    assert CliRunner().invoke(command, ["--made-up", "3"]).output == "{'made_up': 3}\n"

    with pytest.raises(RequestError, match="`made_up`: got 10, expected a whole number from 1 to 9"):
        pipeline.resolve(Request.of(prompt="a star", made_up=10))
    assert record_of(pipeline, tmp_path / "out.png", prompt="a star", made_up=7)["made_up"] == 7
    assert flat_values(Request.of(made_up=3))["made_up"] == 3


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'num_inference_step'.*did you mean 'num_inference_steps'"):
        Request.of(prompt="a star", num_inference_step=3)
    with pytest.raises(TypeError, match=r"'generator'.*did you mean 'seed'"):
        Request.of(prompt="a star", generator=None)
    with pytest.raises(TypeError, match=r"'zzz'.*__call__\)$"):
        Request.of(zzz=3)


def test_an_unknown_keyword_of_the_call(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"'guidance'.*did you mean 'guidance_"):
        pipeline("a star", guidance=3)


def test_keywords_come_back_from_a_request() -> None:
    values = flat_values(Request.of(**CHANGED))
    assert {keyword: values[keyword] for keyword in CHANGED} == CHANGED
    assert flat_values(Request()) == {keyword: each.default for keyword, each in OPTIONS.items()}


@pytest.mark.parametrize("each", OPTIONS.values(), ids=OPTIONS)
def test_a_default_is_a_value_that_the_option_accepts(each: Option) -> None:
    if each.default is not None:
        assert each.check(each.keyword, each.default) == each.default


@pytest.mark.parametrize(
    ("keyword", "value", "plain"),
    [
        ("num_inference_steps", np.int64(3), 3),
        ("guidance_scale", np.float32(2.5), 2.5),
        ("guidance_scale", 3, 3.0),
        ("karras", np.bool_(True), True),
        ("decoder", np.str_("tiled"), "tiled"),
    ],
)
def test_numpys_scalars_become_plain_python(keyword: str, value: Any, plain: Any) -> None:
    checked = OPTIONS[keyword].check(keyword, value)
    assert (type(checked), checked) == (type(plain), plain)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", True),
        ("num_inference_steps", "3"),
        ("height", "64"),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", "5"),
        ("guidance_scale", True),
        ("guidance_rescale", 1.5),
        ("eta", -0.1),
        ("karras", 1),
        ("karras", "yes"),
        ("decoder", "half"),
        ("decoder", ["full"]),
        ("decoder", np.array(["full", "tiled"])),
        ("strength", 1.1),
        ("padding_mask_crop", -1),
        ("deep_cache", 0),
        ("deep_cache", 51),
    ],
)
def test_a_value_that_an_option_does_not_accept(keyword: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"`{keyword}`: got .*, expected "):
        OPTIONS[keyword].check(keyword, value)
