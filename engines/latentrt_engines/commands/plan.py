"""The command `latentrt plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.bundle.printable import counted
from latentrt.errors import EngineError
from latentrt.worker_process import terminable
from latentrt_engines.ask import Ask, ask_options

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.fleet_plan import PlannedEngine

__all__ = ["plan"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--gpus", "--gpu", required=True, help="The fleet, as rtx4090,l4,h100,orin; a card without a name as 8.9."
)
@ask_options
@click.option("--run", is_flag=True, help="Build what this machine can and is not there; goes on where it was stopped.")
@click.option("--check", is_flag=True, help="Exit with 9 where an engine is not there.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, for a program to read.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def plan(bundle: Path, gpus: str, ask: Ask, run: bool, check: bool, as_json: bool, digest: str | None) -> None:
    """Print which engines of BUNDLE a fleet of GPUs wants, which are there, and who can build the others.

    What is there is in this user's cache, or sealed into the bundle.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt.engines.gpu import find_gpu
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
    if check and (missing := {each.key for each in planned if each.there is None}):
        raise EngineError(
            f"{counted(len(missing), 'engine')} of this fleet {'is' if len(missing) == 1 else 'are'} missing"
        )


def _build(bundle: Bundle, planned: list[PlannedEngine], cache: EngineCache) -> None:
    """Each missing engine once, however many GPUs share it. One that fails does not keep the others from being
    built."""
    from latentrt.errors import BuildError
    from latentrt_engines.build import build_engines
    from latentrt_engines.report import Reporter

    # Those that seem to be there too, as a build compares them with their hashes.
    wanted: dict[str, list[PlannedEngine]] = {}
    for each in planned:
        if each.there != "bundle" and each.obstacle is None:
            wanted.setdefault(each.wanted.key, []).append(each)
    failures = []
    with terminable():
        for each, *others in wanted.values():
            labels = ", ".join([each.gpu.label, *(other.gpu.label for other in others)])
            click.echo(f"for {labels}, {each.wanted.profile}:", err=True)
            try:
                with Reporter() as reporter:
                    list(build_engines(bundle, [each.wanted], cache, reporter))
            except BuildError as error:
                failures.append(str(error))
    if failures:
        raise BuildError(f"{len(failures)} of {len(wanted)} engines could not be built:\n  " + "\n  ".join(failures))


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
            _state(each),
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


def _state(each: PlannedEngine) -> str:
    if each.there:
        return f"in the {each.there}"
    if each.obstacle is None:
        return "can be built here"
    return "on its own machine" if each.elsewhere else "cannot be built here"


def _obstacles(planned: list[PlannedEngine]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in planned:
        if each.there is None and each.obstacle is not None:
            labels = found.setdefault(each.obstacle, [])
            labels += [each.gpu.label] if each.gpu.label not in labels else []
    return found


def _summary(planned: list[PlannedEngine]) -> str:
    # What several GPUs share is as the one has it that can do most.
    best = sorted(planned, key=lambda each: (each.there is not None, each.obstacle is None))
    states = list({each.key: _state(each) for each in best}.values())
    here, elsewhere, nowhere = (
        states.count(state) for state in ("can be built here", "on its own machine", "cannot be built here")
    )
    there = len(states) - here - elsewhere - nowhere
    words = [f"{there} there", f"{here} can be built here (--run)", f"{elsewhere} on their own machines"]
    words += [f"{nowhere} cannot be built here"] if nowhere else []
    return f"{counted(len(states), 'different engine')}: {', '.join(words)}"


def _as_json(each: PlannedEngine) -> dict[str, object]:
    return {
        "gpu": each.gpu.label,
        "compute_capability": each.gpu.compute_capability,
        "library": each.wanted.identity.library,
        "component": each.wanted.component,
        "pictures": str(each.wanted.profile),
        "key": each.key,
        "there": each.there,
        "size_bytes": each.size_bytes,
        "size_is_estimated": each.there is None,
        "obstacle": each.obstacle,
        "elsewhere": each.elsewhere,
    }
