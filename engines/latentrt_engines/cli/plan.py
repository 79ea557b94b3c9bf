"""The command `latentrt plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.bundle.printable import counted
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.request_options import digest_option
from latentrt.cli.values import BundlePath, Suggested
from latentrt.errors import BuildError, EngineError
from latentrt_engines.cli.documents import PlanDocument, PlannedEngineDocument
from latentrt_engines.cli.options import add_build_options, gpu_names
from latentrt_engines.options import BuildOptions

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.fleet import PlannedEngine

__all__ = ["plan"]

_NOWHERE = "cannot be built here"


@command(
    examples=(
        "latentrt plan my-bundle --gpus rtx4090,l4,h100,orin",
        "latentrt plan my-bundle --gpus rtx4090,rtx5090 --size 512..1024 --run",
        "latentrt plan my-bundle --gpus rtx4090 --check --json",
    )
)
@click.argument("bundle", type=BundlePath())
@option(
    "--gpus",
    "--gpu",
    required=True,
    type=Suggested(gpu_names, several=True),
    group="Engines",
    help="The fleet, as in rtx4090,l4,h100,orin; a card without a name by its compute capability, as in 8.9.",
)
@add_build_options
@option(
    "--run",
    is_flag=True,
    group="Engines",
    help="Build the missing engines that this machine can build; resumes a stopped run.",
)
@option("--check", is_flag=True, group="Engines", help="Exit with 9 if an engine is missing.")
@digest_option
def plan(bundle: Path, gpus: str, options: BuildOptions, run: bool, check: bool, digest: str | None) -> None:
    """Print the engines of BUNDLE that a fleet of GPUs needs, and where the missing ones can be built.

    An engine exists if it is in this user's cache or sealed into the bundle.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt.engines.gpu import find_gpu
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.fleet import plan_fleet
    from latentrt_engines.gpus import parse_gpus

    opened, cache, here = Bundle.open(bundle, digest), EngineCache(), find_gpu()
    planned = plan_fleet(opened, options, parse_gpus(gpus), cache, here)
    if run:
        _build_missing(opened, planned, cache)
        planned = plan_fleet(opened, options, parse_gpus(gpus), cache, here)
    if settings().json:
        echo_document(PlanDocument(engines=[_as_document(each) for each in planned]))
    else:
        _print_table(planned)
    if run and (obstacles := {each.obstacle for each in planned if _describe_state(each) == _NOWHERE}):
        raise BuildError(f"engines of this fleet cannot be built here: {'; '.join(sorted(map(str, obstacles)))}")
    if check and (missing := {each.key: each for each in planned if each.location is None}):
        is_possible = any(each.obstacle is None for each in missing.values())
        advice = "run the same command with --run in place of --check" if is_possible else "the table says what to do"
        raise EngineError(
            f"{counted(len(missing), 'engine')} of this fleet {'is' if len(missing) == 1 else 'are'} missing; {advice}"
        )


def _build_missing(bundle: Bundle, planned: list[PlannedEngine], cache: EngineCache) -> None:
    """Build each engine once, even if several GPUs share it; after a failure, continue with the others.

    Raises:
        BuildError: an engine could not be built.
    """
    from latentrt_engines.build import build_engines
    from latentrt_engines.cli.report import Reporter

    # Includes engines in the cache, as a build compares them with their hashes.
    groups: dict[str, list[PlannedEngine]] = {}
    for each in planned:
        if each.location != "bundle" and each.obstacle is None:
            groups.setdefault(each.target.key, []).append(each)
    failures = []
    for each, *others in groups.values():
        labels = ", ".join([each.gpu.label, *(other.gpu.label for other in others)])
        if not settings().quiet:
            echo(f"for {labels}, {each.target.profile}:", err=True)
        try:
            with Reporter() as reporter:
                list(build_engines(bundle, [each.target], cache, reporter))
        except BuildError as error:
            failures.append(str(error))
    if failures:
        raise BuildError(f"{len(failures)} of {len(groups)} engines could not be built:\n  " + "\n  ".join(failures))


def _print_table(planned: list[PlannedEngine]) -> None:
    from rich.filesize import decimal

    from latentrt.cli.console import Console
    from latentrt_engines.cli.report import make_table

    rows = [
        (
            f"{each.gpu.label} ({each.gpu.compute_capability})",
            each.target.identity.library,
            each.target.component,
            str(each.target.profile),
            decimal(each.size_bytes) if each.location else f"~{decimal(each.size_bytes)}",
            _describe_state(each),
        )
        for each in planned
    ]
    console = Console(pipe_columns=160)
    console.print(make_table(("GPU", "library", "component", "images", "size", "engine"), rows))
    for obstacle, labels in _group_obstacles(planned).items():
        console.print(f"{', '.join(labels)}: {obstacle}", soft_wrap=True)
    console.print(_summarize(planned))


def _describe_state(each: PlannedEngine) -> str:
    if each.location:
        return f"in the {each.location}"
    if each.obstacle is None:
        return "can be built here"
    return "on its own machine" if each.buildable_elsewhere else _NOWHERE


def _group_obstacles(planned: list[PlannedEngine]) -> dict[str, list[str]]:
    """Return obstacle → the labels of the GPUs that share it."""
    found: dict[str, list[str]] = {}
    for each in planned:
        if each.location is None and each.obstacle is not None:
            labels = found.setdefault(each.obstacle, [])
            labels += [each.gpu.label] if each.gpu.label not in labels else []
    return found


def _summarize(planned: list[PlannedEngine]) -> str:
    # An engine that several GPUs share is counted once, in the best of its states.
    best = sorted(planned, key=lambda each: (each.location is not None, each.obstacle is None))
    states = list({each.key: _describe_state(each) for each in best}.values())
    here, elsewhere, nowhere = (states.count(state) for state in ("can be built here", "on its own machine", _NOWHERE))
    existing = len(states) - here - elsewhere - nowhere
    counts = [f"{existing} existing", f"{here} can be built here (--run)", f"{elsewhere} on their own machines"]
    counts += [f"{nowhere} cannot be built here"] if nowhere else []
    return f"{counted(len(states), 'different engine')}: {', '.join(counts)}"


def _as_document(each: PlannedEngine) -> PlannedEngineDocument:
    return PlannedEngineDocument(
        gpu=each.gpu.label,
        compute_capability=each.gpu.compute_capability,
        library=each.target.identity.library,
        component=each.target.component,
        images=str(each.target.profile),
        key=each.key,
        location=each.location,
        size_bytes=each.size_bytes,
        size_is_estimated=each.location is None,
        obstacle=each.obstacle,
        buildable_elsewhere=each.buildable_elsewhere,
    )
