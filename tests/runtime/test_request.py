"""The declarations of a request's options, and everything that is generated from them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import pytest
from click.testing import CliRunner

from latentrt import Pipeline, migration, request
from latentrt.cli.request_options import SPELLING, given_options, request_options
from latentrt.cli.run import run
from latentrt.errors import RequestError
from latentrt.images.metadata import read_metadata
from latentrt.pipeline import call_signature
from latentrt.request import (
    OPTIONS,
    CallOptions,
    Option,
    Request,
    RequestOptions,
    Sampling,
    Whole,
    flat_values,
    option,
)

# Another value than the default for every option, and what the record says of it.
CHANGED: dict[str, Any] = {
    "prompt": "a red circle",
    "prompt_2": "a blue square",
    "negative_prompt": "a star",
    "negative_prompt_2": "a moon",
    "clip_skip": 1,
    "height": 32,
    "width": 48,
    "original_size": [512, 768],
    "crops_coords_top_left": [8, 0],
    "target_size": [64, 48],
    "negative_original_size": [32, 32],
    "negative_crops_coords_top_left": [0, 8],
    "negative_target_size": [48, 64],
    "aesthetic_score": 7.0,
    "negative_aesthetic_score": 1.5,
    "num_inference_steps": 3,
    "sampler": "euler",
    "sampler_options": {"timestep_spacing": "linspace"},
    "karras": True,
    "eta": 0.25,
    "denoising_start": 0.25,
    "denoising_end": 0.75,
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
# Options of tasks that the sample model cannot do, and of other models.
OF_OTHER_TASKS = {"image_guidance_scale", "noise_level", *(keyword for keyword, each in OPTIONS.items() if each.only)}
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
    own = {"self", "output_type", "callback_on_step_end", "progress", "preview", "preview_interval", "generator"}
    assert set(parameters) == {*OPTIONS, *own}
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    assert parameters["height"].annotation == "int | None"


def test_editors_know_every_option_by_its_type() -> None:
    """`CallOptions` has the keywords of the declarations in their order, with the types of the fields."""

    def declared(cls: type) -> Iterator[tuple[str, str]]:
        for each in dataclasses.fields(cls):
            if "option" in each.metadata:
                yield each.metadata["option"].keyword, str(each.type)
            else:
                yield from declared(request._GROUPS[each.name])

    listed = {name: each.__forward_arg__ for name, each in RequestOptions.__annotations__.items()}
    assert listed.pop("generator") == "object"
    assert listed == dict(declared(Request))
    assert RequestOptions.__optional_keys__ == {*OPTIONS, "generator"}
    assert CallOptions.__optional_keys__ == RequestOptions.__optional_keys__ - {"prompt"}


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
    assert {"--count", "--seed"} <= flags
    assert {SPELLING[keyword] for keyword in spelled} == {"PROMPT", "--count", "--seed"}


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


@pytest.mark.parametrize("keyword", sorted({*OF_OTHER_TASKS, "depth_map"}))
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

    assert "--made-up N" in CliRunner().invoke(command, ["--help"]).output
    assert CliRunner().invoke(command, ["--made-up", "3"]).output == "{'made_up': 3}\n"

    with pytest.raises(RequestError, match="`made_up`: got 10, expected a whole number from 1 to 9"):
        pipeline.resolve(Request.of(prompt="a star", made_up=10))  # type: ignore[call-arg]
    assert record_of(pipeline, tmp_path / "out.png", prompt="a star", made_up=7)["made_up"] == 7
    assert flat_values(Request.of(made_up=3))["made_up"] == 3  # type: ignore[call-arg]


def test_an_unknown_keyword_names_the_nearest() -> None:
    unknown: Any = Request.of
    with pytest.raises(TypeError, match=r"'num_inference_step'.*did you mean 'num_inference_steps'"):
        unknown(prompt="a star", num_inference_step=3)
    with pytest.raises(TypeError, match=r"'scheduler'.*did you mean 'sampler'"):
        unknown(prompt="a star", scheduler=None)
    with pytest.raises(TypeError, match=r"'return_dict'.*`\.images` of the result"):
        unknown(prompt="a star", return_dict=False)
    with pytest.raises(TypeError, match=r"'zzz'.*help\(latentrt\.Pipeline\.__call__\) lists them$"):
        unknown(zzz=3)


def test_an_unknown_keyword_of_the_call(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"'guidance'.*did you mean 'guidance_scale'"):
        pipeline("a star", guidance=3)  # type: ignore[call-arg]


def test_the_advice_about_keywords_names_options() -> None:
    for name, advice in migration._KEYWORDS.items():
        assert name not in OPTIONS
        assert not advice.isidentifier() or advice in {*OPTIONS, "callback_on_step_end"}, name


class LikeTorchs:
    """A generator with the methods of torch.Generator that are used."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.seed, self.drawn = device, 0, 0

    def manual_seed(self, seed: int) -> Self:
        self.seed = seed
        return self

    def initial_seed(self) -> int:
        return self.seed

    def get_state(self) -> LikeTensor:
        return LikeTensor((self.seed, self.drawn))


class LikeTensor(tuple[int, int]):
    def equal(self, other: LikeTensor) -> bool:
        return self == other


def seed_of(**values: Any) -> Any:
    return Request.of(**values).seed


def test_a_generator_of_torch_is_its_seed() -> None:
    """tests/parity has the real one."""
    assert seed_of(generator=LikeTorchs().manual_seed(7)) == 7
    assert seed_of(generator=[LikeTorchs().manual_seed(seed) for seed in (7, 3)]) == [7, 3]
    assert seed_of(generator=None, seed=5) == 5
    used = LikeTorchs().manual_seed(7)
    used.drawn = 1
    with pytest.raises(RequestError, match=r"torch\.Generator that was seeded with 7 and used since"):
        Request.of(generator=used)


def test_a_seed_is_drawn_from_a_generator_of_numpy() -> None:
    for make in (np.random.default_rng, np.random.RandomState):
        first, again, other = make(1), make(1), make(2)
        seeds = [seed_of(generator=first) for _ in range(3)]
        assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        assert len(set(seeds)) == 3, "each draw advances the generator"
        assert seed_of(generator=[again, again]) == seeds[:2]
        assert seed_of(generator=other) not in seeds


def test_other_generators_are_refused_with_the_way_to_say_it() -> None:
    for wrong in (7, "7", iter([1]), [7], object()):
        with pytest.raises(RequestError, match=r"`generator`: got .*give a whole number as `seed`"):
            Request.of(generator=wrong)
    with pytest.raises(RequestError, match="got both `seed` and `generator`"):
        Request.of(seed=7, generator=LikeTorchs())


def test_a_request_shows_what_is_set(pipeline: Pipeline) -> None:
    assert repr(Request()) == "Request()"
    noise = np.zeros((1, 4, 16, 16), np.float32)
    made = Request.of(prompt="a\x1bstar", seed=7, guidance_start=0.0, decoder="preview", latents=noise)
    assert repr(made) == ("Request(prompt='a\\x1bstar', latents=<ndarray (1, 4, 16, 16)>, decoder='preview', seed=7)")
    assert len(repr(Request.of(prompt="long " * 2_000))) < 200
    resolved = repr(pipeline.resolve(Request.of(prompt="a star", seed=7)))
    assert resolved.startswith("ResolvedRequest(prompt='a star', height=64, width=64, num_inference_steps=25, ")
    assert resolved.endswith(", seeds=(7,), task='text-to-image')")
    assert "schedule" not in resolved


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
