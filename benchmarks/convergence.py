"""Measures the order of convergence of each solver, for comparison with the claim of its paper.

    .venv/bin/python -m benchmarks.convergence --output benchmarks/results/convergence.json --plot docs/convergence.svg

Runs the solvers' tables in float64 on a probability flow whose solution is known (`gaussian_flow`), with 8 to 512
evaluations of the model. The order is minus the slope of the error's logarithm over that of the number of evaluations,
fitted by least squares from 128 evaluations on; see docs/samplers.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.command import PATH, REPORT, benchmark, write_report
from benchmarks.convergence_cases import CASES, Case
from benchmarks.gaussian_flow import final_error

__all__ = ["EVALUATIONS", "FITTED", "Measured", "Point", "markdown", "measure", "order_of", "points"]

EVALUATIONS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# The same evaluations for all solvers: with fewer, higher powers of the step are not negligible; with more, the errors
# of the best solvers approach the resolution of float64.
FITTED = tuple(count for count in EVALUATIONS if count >= 128)
SHOWN_AT = 32


@dataclass(frozen=True)
class Point:
    """The error of one run."""

    evaluations: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of a case.

    Attributes:
        name, family, paper, source: those of the case.
        order: the order measured with exact starting values.
        own_start: the order measured from the first row on, including the solver's own start of lower order.
        error_at_32: the relative error of 32 evaluations (a few less where a step has several) from its own start.
        points, own_start_points: the error for each number of evaluations.
    """

    name: str
    family: str
    paper: int
    source: str
    order: float
    own_start: float
    error_at_32: float
    points: list[Point]
    own_start_points: list[Point]


@benchmark("benchmarks.convergence", __doc__)
@click.option("--output", type=PATH, required=True, help=REPORT)
@click.option("--plot", type=PATH, help="the plot, an SVG file; needs matplotlib")
def main(output: Path, plot: Path | None) -> None:
    from benchmarks.full_size import machine  # needs psutil, which the runtime's tests lack

    measured = [measure(case) for case in CASES]
    report: dict[str, Any] = {
        "command": "python -m benchmarks.convergence",
        "machine": machine(),
        "fitted_evaluations": FITTED,
        "solvers": [encode(each) for each in measured],
    }
    write_report(output, report)
    print(markdown(report["solvers"]))
    if plot is not None:
        from benchmarks.convergence_plot import plot as write_plot

        write_plot(measured, FITTED, plot)


def measure(case: Case) -> Measured:
    """Run a case with every number of evaluations."""
    given, own = points(case, EVALUATIONS), points(case, EVALUATIONS, own_start=True)
    return Measured(
        name=case.name,
        family=case.family,
        paper=case.paper,
        source=case.source,
        order=order_of(given[-len(FITTED) :]),
        own_start=order_of(own[-len(FITTED) :]),
        error_at_32=own[EVALUATIONS.index(SHOWN_AT)].error,
        points=given,
        own_start_points=own,
    )


def points(case: Case, counts: Sequence[int], *, own_start: bool = False) -> list[Point]:
    """Return the error for each number of evaluations."""
    found = []
    for count in counts:
        schedule = case.schedule(count, own_start=own_start)
        stop = case.stop(schedule)
        given = 0 if own_start else max(case.given, round(case.given_share * stop))
        found.append(Point(stop, final_error(schedule, case.predicts, given=given, stop=stop)))
    return found


def order_of(runs: Sequence[Point]) -> float:
    """Return minus the slope of log error over log evaluations."""
    slope, _ = np.polyfit(np.log([run.evaluations for run in runs]), np.log([run.error for run in runs]), 1)
    return float(-slope)


def encode(measured: Measured) -> dict[str, Any]:
    """Return the record of a case in the report, rounded to significant digits."""
    report = asdict(measured)
    for key in ("order", "own_start"):
        report[key] = round(report[key], 3)
    for key in ("points", "own_start_points"):
        report[key] = {point["evaluations"]: float(f"{point['error']:.3e}") for point in report[key]}
    report["error_at_32"] = float(f"{report['error_at_32']:.3e}")
    return report


def markdown(solvers: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/samplers.md for a report's solvers."""
    head = "| solver | paper | measured | from its own start | error at 32 evaluations | where the paper says so |"
    rows = (
        f"| {solver['name']} | {solver['paper']} | {solver['order']:.2f} | {solver['own_start']:.2f} "
        f"| {solver['error_at_32']:.1e} | {solver['source']} |"
        for solver in solvers
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    main()
