"""The command `latentrt plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.worker_process import terminable
from latentrt_engines.ask import Ask, ask_options

if TYPE_CHECKING:
    from latentrt.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.fleet_plan import PlannedEngine

__all__ = ["plan"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gpus", required=True, help="The fleet, as rtx4090,l4,h100,orin.")
@ask_options
@click.option("--run", is_flag=True, help="Build what this machine can and is not there; goes on where it was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, for a program to read.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def plan(bundle: Path, gpus: str, ask: Ask, run: bool, as_json: bool, digest: str | None) -> None:
    """Print which engines of BUNDLE a fleet of GPUs wants, which are there, and who can build the others.

    What is there is in this user's cache, or sealed into the bundle.
    """
    from latentrt.bundle import Bundle
    from latentrt.gpu import find_gpu
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.fleet import parse_fleet
    from latentrt_engines.fleet_plan import plan_fleet

    opened, cache, here = Bundle.open(bundle, digest), EngineCache(), find_gpu()
    planned = plan_fleet(opened, ask, parse_fleet(gpus), cache, here)
    if run:
        _build(opened, planned, cache)
        planned = plan_fleet(opened, ask, parse_fleet(gpus), cache, here)
    if as_json:
        click.echo(json.dumps([_as_json(each) for each in planned], indent=2))
    else:
        _print(planned)


def _build(bundle: Bundle, planned: list[PlannedEngine], cache: EngineCache) -> None:
    """Each missing engine once, however many GPUs share it. One that fails does not keep the others from being
    built."""
    from latentrt.errors import BuildError
    from latentrt_engines.build import build_engines
    from latentrt_engines.report import Reporter

    missing = {each.wanted.key: each.wanted for each in planned if each.there is None and each.obstacle is None}
    failures = []
    with terminable(), Reporter() as reporter:
        for wanted in missing.values():
            try:
                list(build_engines(bundle, [wanted], cache, reporter))
            except BuildError as error:
                failures.append(str(error))
    if failures:
        raise BuildError(f"{len(failures)} of {len(missing)} engines could not be built:\n  " + "\n  ".join(failures))


def _print(planned: list[PlannedEngine]) -> None:
    from rich.console import Console
    from rich.filesize import decimal

    from latentrt_engines.report import plain_table

    rows = [
        (
            f"{each.gpu.label} ({each.gpu.compute_capability})",
            each.wanted.identity.library,
            each.wanted.component,
            str(each.wanted.profile),
            decimal(each.size_bytes) if each.there else f"~{decimal(each.size_bytes)}",
            f"in the {each.there}" if each.there else ("on its own machine" if each.obstacle else "can be built here"),
        )
        for each in planned
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(plain_table(("GPU", "library", "component", "pictures", "size", "engine"), rows))
    for obstacle, labels in _obstacles(planned).items():
        console.print(f"{', '.join(labels)}: {obstacle}", soft_wrap=True, markup=False)
    console.print(_summary(planned))


def _obstacles(planned: list[PlannedEngine]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in planned:
        if each.there is None and each.obstacle is not None:
            labels = found.setdefault(each.obstacle, [])
            labels += [each.gpu.label] if each.gpu.label not in labels else []
    return found


def _summary(planned: list[PlannedEngine]) -> str:
    distinct = {(each.wanted.key, each.there, each.obstacle) for each in planned}
    there = sum(place is not None for _, place, _ in distinct)
    here = sum(place is None and obstacle is None for _, place, obstacle in distinct)
    elsewhere = len(distinct) - there - here
    return f"{len(distinct)} different engines: {there} there, {here} can be built here (--run), {elsewhere} elsewhere"


def _as_json(each: PlannedEngine) -> dict[str, object]:
    return {
        "gpu": each.gpu.label,
        "compute_capability": each.gpu.compute_capability,
        "library": each.wanted.identity.library,
        "component": each.wanted.component,
        "pictures": str(each.wanted.profile),
        "key": each.wanted.key,
        "there": each.there,
        "size_bytes": each.size_bytes,
        "size_is_estimated": each.there is None,
        "obstacle": each.obstacle,
    }
