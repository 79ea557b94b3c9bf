from __future__ import annotations

from dataclasses import replace

import pytest

from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components, Models
from latentrt.backends.placement import Placement, Preferences, place_components
from latentrt.backends.session import Session
from latentrt.bundle.sample import bundle_path
from latentrt.cli.comparison import (
    SPECIAL,
    Cell,
    default_samplers,
    first_request,
    generate_cell,
    plan_cells,
    suiting_samplers,
    warm_up,
)
from latentrt.errors import RequestError
from latentrt.request import Request
from latentrt.sampling.samplers import SAMPLERS

REQUEST = Request.of(prompt="a red circle", seed=3)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(threads=1)


def nothing(count: int) -> None:
    pass


def test_rows_of_cells(pipeline: Pipeline) -> None:
    cells = plan_cells(pipeline, REQUEST, ["heun", "Euler a"], [2, 4])
    assert [(cell.sampler, cell.steps, cell.evaluations) for cell in cells] == [
        ("heun", 2, 3),
        ("heun", 4, 7),
        ("Euler a", 2, 2),
        ("Euler a", 4, 4),
    ]
    assert {cell.request.seeds for cell in cells if cell.request} == {(3,)}


def test_all_cells_of_a_random_seed_start_from_the_same_noise(pipeline: Pipeline) -> None:
    cells = plan_cells(pipeline, Request.of(prompt="a red circle", seed=-1), ["euler", "heun"], [2])
    first, second = (cell.request.seeds for cell in cells if cell.request)
    assert first == second
    assert first != (-1,)


def test_a_refused_cell_keeps_its_place(pipeline: Pipeline) -> None:
    cells = plan_cells(pipeline, REQUEST, ["pndm", "ddim"], [3])
    assert cells[0].request is None
    assert "needs at least 4" in cells[0].refusal
    assert first_request(cells) is cells[1].request
    assert generate_cell(pipeline, cells[0], runs=1, progress=nothing) is cells[0]


def test_if_every_cell_is_refused_it_is_an_error(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"flow_euler for flow models"):
        plan_cells(pipeline, REQUEST, ["flow_euler"], [2, 3])
    with pytest.raises(RequestError, match=r"nothing to generate, .*:\n  got 3 steps.*\n  got --sampler flow_euler"):
        plan_cells(pipeline, REQUEST, ["pndm", "flow_euler"], [3])
    with pytest.raises(RequestError, match="'eular'"):
        plan_cells(pipeline, REQUEST, ["ddim", "eular"], [3])


def test_the_first_run_gives_the_image_and_the_median_the_time(pipeline: Pipeline) -> None:
    (cell,) = plan_cells(pipeline, REQUEST, ["heun"], [2])
    counted: list[int] = []
    done = generate_cell(pipeline, cell, runs=2, progress=counted.append)
    assert counted == [1] * 6
    assert len(done.seconds) == 2
    assert done.median_seconds == sum(done.seconds) / 2
    alone = pipeline("a red circle", seed=3, sampler="heun", num_inference_steps=2).images[0]
    assert done.image == alone
    assert Cell(sampler="x", steps=1, seconds=(9.0, 1.0, 2.0)).median_seconds == 2


def test_loading_is_not_timed() -> None:
    """Everything that an image needs is opened before the first one is timed."""
    bundle, opened = Bundle.open(bundle_path()), list[str]()

    def recording(name: str, placement: Placement) -> Placement:
        def open_session(part: str | None) -> Session:
            opened.append(name if part is None else f"{name}/{part}")
            return placement.open(part)

        return replace(placement, open=open_session)

    placements = place_components(bundle, "cpu", preferences=Preferences(threads=1))
    recorded = {name: recording(name, placement) for name, placement in placements.items()}
    pipeline = Pipeline(bundle, Components(recorded, models=Models()))
    cells = plan_cells(pipeline, REQUEST, ["ddim"], [2])
    warm_up(pipeline, cells)
    parts = {"unet/body", "unet/cross_attention_kv", "unet/time_embedding"}
    assert {*opened} == {"safety_checker", "text_encoder", "vae_decoder", *parts}
    count = len(opened)
    generate_cell(pipeline, cells[0], runs=1, progress=nothing)
    assert len(opened) == count


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
def test_the_default_samplers_suit_the_model(model: str, first: str, among: str, never: str) -> None:
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
