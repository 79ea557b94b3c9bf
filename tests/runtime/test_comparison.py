from __future__ import annotations

import pytest

from latentrt import Bundle, Pipeline
from latentrt.backends.cpu_choice import Preferences
from latentrt.backends.device import choose_sessions
from latentrt.backends.session import Session
from latentrt.comparison import (
    SPECIAL,
    Cell,
    default_samplers,
    drawn,
    first_order,
    judged,
    plan,
    suiting_samplers,
    warm_up,
)
from latentrt.errors import RequestError
from latentrt.request import Request
from latentrt.sample import bundle_path
from latentrt.sample.figures import PROMPT_SEED, Settings, following, readings
from latentrt.sample.prompts import held_out_prompts
from latentrt.sampling.samplers import SAMPLERS

REQUEST = Request.of(prompt="a red circle", seed=3)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(threads=1)


def nothing(count: int) -> None:
    pass


def test_rows_of_cells(pipeline: Pipeline) -> None:
    cells = plan(pipeline, REQUEST, ["heun", "Euler a"], [2, 4])
    assert [(cell.sampler, cell.steps, cell.evaluations) for cell in cells] == [
        ("heun", 2, 3),
        ("heun", 4, 7),
        ("Euler a", 2, 2),
        ("Euler a", 4, 4),
    ]
    assert {cell.order.seeds for cell in cells if cell.order} == {(3,)}


def test_what_is_refused_keeps_its_place(pipeline: Pipeline) -> None:
    cells = plan(pipeline, REQUEST, ["pndm", "ddim"], [3])
    assert cells[0].order is None
    assert "needs at least 4" in cells[0].refusal
    assert first_order(cells) is cells[1].order
    assert drawn(pipeline, cells[0], runs=1, progress=nothing) is cells[0]
    assert judged(pipeline, cells[0], held_out_prompts(2, PROMPT_SEED), nothing) is cells[0]


def test_if_all_is_refused_there_is_no_comparison(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"^found sampler flow_euler for flow models"):
        plan(pipeline, REQUEST, ["flow_euler"], [2, 3])
    with pytest.raises(
        RequestError, match=r"found nothing to draw, .*:\n  found 3 steps.*\n  found sampler flow_euler"
    ):
        plan(pipeline, REQUEST, ["pndm", "flow_euler"], [3])
    with pytest.raises(RequestError, match=r"^found sampler 'eular'"):
        plan(pipeline, REQUEST, ["ddim", "eular"], [3])


def test_the_first_run_is_the_picture_and_the_median_the_time(pipeline: Pipeline) -> None:
    (cell,) = plan(pipeline, REQUEST, ["heun"], [2])
    counted: list[int] = []
    done = drawn(pipeline, cell, runs=2, progress=counted.append)
    assert counted == [1] * 6
    assert len(done.seconds) == 2
    assert done.median_seconds == sum(done.seconds) / 2
    alone = pipeline("a red circle", seed=3, sampler="heun", num_inference_steps=2).images[0]
    assert done.picture == alone
    assert Cell(sampler="x", steps=1, seconds=(9.0, 1.0, 2.0)).median_seconds == 2


def test_loading_is_not_timed() -> None:
    """All that a picture needs is opened before the first one is timed."""
    bundle, opened = Bundle.open(bundle_path()), list[str]()
    sessions = choose_sessions(bundle, preferences=Preferences(threads=1))

    def open_session(name: str) -> Session:
        opened.append(name)
        return sessions(name)

    pipeline = Pipeline(bundle, open_session)
    cells = plan(pipeline, REQUEST, ["ddim"], [2])
    warm_up(pipeline, cells)
    assert sorted(opened) == ["safety_checker", "text_encoder", "unet", "vae_decoder"]
    drawn(pipeline, cells[0], runs=1, progress=nothing)
    assert len(opened) == 4


def test_the_judges_figures_are_those_of_the_benchmark(pipeline: Pipeline) -> None:
    prompts = held_out_prompts(6, PROMPT_SEED)
    (cell,) = plan(pipeline, REQUEST, ["dpmpp_2m"], [6])
    counted: list[int] = []
    figures = judged(pipeline, cell, prompts, counted.append).figures
    seen = readings(pipeline, Settings(steps=6, sampler="dpmpp_2m"), prompts, nothing)
    expected = following(prompts, seen)
    assert {name: figures[name] for name in expected} == expected
    both = [expected[f"{which}: wholly right"].right for which in ("one thing", "two things")]
    assert (figures["wholly right"].right, figures["wholly right"].of) == (sum(both), 6)
    assert sum(counted) == 36
    assert judged(pipeline, cell, [], nothing) is cell


@pytest.mark.parametrize(
    ("model", "first", "among", "never"),
    [
        ("DDIMScheduler", "ddim", "dpmpp_2m_karras", "flow_euler"),
        ("PNDMScheduler", "pndm", "ddim", "edm_euler"),
        ("LCMScheduler", "lcm", "euler", "tcd"),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler", "flow_heun", "euler"),
        ("EDMEulerScheduler", "edm_euler", "edm_dpmpp_2m", "euler"),
    ],
)
def test_what_is_compared_by_default_suits_the_model(model: str, first: str, among: str, never: str) -> None:
    names = default_samplers(model)
    assert names[0] == first
    assert among in names
    assert never not in names
    assert len(set(names)) == len(names)


def test_every_sampler_that_suits() -> None:
    names = suiting_samplers("DDIMScheduler")
    assert {"ddim", "ddpm", "pndm", "sa_solver"} <= set(names)
    assert not set(names) & set(SPECIAL)
    assert set(SPECIAL) < set(SAMPLERS)
    assert "flow_euler" not in names
    assert "repaint" not in names
