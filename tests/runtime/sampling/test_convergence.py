"""The order of convergence of each solver on a probability flow with a known solution (docs/samplers.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gaussian_flow
from benchmarks.convergence import FITTED, markdown, order_of, points
from benchmarks.convergence_cases import CASES, Case
from latentrt.sampling import samplers
from latentrt.sampling.samplers import dpmpp_2m
from latentrt.sampling.samplers.dpm_solver import Step, multistep_weights

ROOT = Path(__file__).parents[3]
COUNTS = FITTED[::2]  # 128, 256 and 512 evaluations give the same order as all that are fitted, in half the time

# The next power of the step is not yet negligible and changes the slope by at most 0.18 (UniPC-3 in ε). A formula with
# a wrong term loses a whole order.
TOLERANCE = 0.25

# As published and in diffusers, these are of order 2; see `test_third_order_lacks_half_its_second_difference`.
MEASURED_OTHERWISE = {"DPM-Solver 3M": 2, "DPM-Solver++ 3M": 2, "EDM DPM-Solver++ 3M": 2}


def case(name: str) -> Case:
    return next(each for each in CASES if each.name == name)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_a_solver_converges_with_its_order(each: Case) -> None:
    expected = MEASURED_OTHERWISE.get(each.name, each.paper)
    assert order_of(points(each, COUNTS)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["DPM-Solver 3M", "DPM-Solver++ 3M"])
def test_third_order_lacks_half_its_second_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its D2 is the second divided difference, which is half the second derivative that the formula needs."""

    def whole(step: Step, solver_type: str, h: Any, order: Any) -> Any:
        return multistep_weights(step._replace(d2=2 * step.d2), solver_type, h, order)

    monkeypatch.setattr(dpmpp_2m, "multistep_weights", whole)
    assert order_of(points(case(name), COUNTS)) == pytest.approx(3, abs=TOLERANCE)


def test_ipndm_loses_x0_in_its_first_step() -> None:
    """At α = 0 it uses ε alone, an error of the size of the step; from exact values it is of order 2."""
    assert order_of(points(case("iPNDM"), COUNTS, own_start=True)) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("predicts", ["epsilon", "v", "velocity", "edm"])
def test_the_solution_solves_the_flow(predicts: gaussian_flow.Predicts) -> None:
    """dx = x0·dα + ε·dσ, for every prediction type."""
    alpha, sigma, h = 0.8, 0.6, 1e-5
    before, after = (gaussian_flow.exact(alpha + sign * h, sigma - sign * 2 * h) for sign in (-1, 1))
    x = gaussian_flow.exact(alpha, sigma)
    m = gaussian_flow.model(predicts, x, alpha, sigma)
    if predicts == "epsilon":
        x0, epsilon = (x - sigma * m) / alpha, m
    elif predicts == "v":
        x0, epsilon = alpha * x - sigma * m, sigma * x + alpha * m
    elif predicts == "velocity":
        x0 = (x - sigma * m) / (alpha + sigma)
        epsilon = x0 + m
    else:
        noise, data = sigma / alpha, gaussian_flow.EDM_SIGMA_DATA
        x0 = data**2 / (noise**2 + data**2) * x / alpha + noise * data / np.hypot(noise, data) * m
        epsilon = (x - alpha * x0) / sigma
    # Central differences: h² of truncation, 1e-16 / h of rounding.
    np.testing.assert_allclose((after - before) / (2 * h), x0 - 2 * epsilon, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["euler_a", "ddim"])
def test_noise_and_limits_are_rejected(name: str) -> None:
    table = samplers.schedule(name, {}, 10)  # the one adds noise, the other clips
    with pytest.raises(ValueError, match="adds noise or clips"):
        gaussian_flow.final_error(table, "epsilon", given=0, stop=9)


def test_the_docs_have_the_measured_table() -> None:
    report = json.loads((ROOT / "benchmarks/results/convergence.json").read_text())
    assert [each["name"] for each in report["solvers"]] == [each.name for each in CASES]
    assert markdown(report["solvers"]) in (ROOT / "docs/samplers.md").read_text()
