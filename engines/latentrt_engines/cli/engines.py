"""The commands `latentrt engines list | show | why | verify | prune | seal | refit`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.bundle.printable import counted
from latentrt.cli.command import Group, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo, echo_json_text
from latentrt.cli.request_options import digest_option
from latentrt.cli.values import BundlePath, Suggested
from latentrt_engines.cli.documents import (
    EnginesDocument,
    ExplainedEngine,
    ListedEngine,
    PrunedItem,
    PruneDocument,
    RefitDocument,
    SealDocument,
    VerifyEnginesDocument,
    WhyDocument,
)
from latentrt_engines.cli.options import add_build_options, add_gpu_options
from latentrt_engines.options import BuildOptions

if TYPE_CHECKING:
    from latentrt_engines.why import Explanation

__all__ = ["engines"]

_KEY_DIGITS = 12  # digits of a key in the output: enough to distinguish engines, and for commands to find one


def _keys() -> Iterable[str]:
    """Return the keys of the engines in the cache, for completion."""
    from latentrt.errors import EngineError
    from latentrt_engines.cache import EngineCache

    try:
        return [key[:_KEY_DIGITS] for key in EngineCache().list_keys()]
    except EngineError:
        return ()


@click.group(
    cls=Group,
    examples=("latentrt engines list", "latentrt engines why my-bundle", "latentrt engines seal my-bundle sealed"),
)
def engines() -> None:
    """List engines, explain missing ones, verify and prune them, and seal them into a bundle."""


@engines.command(
    "list",
    short_help="Print the engines of the cache: all, or those built from a bundle.",
    examples=("latentrt engines list", "latentrt engines list my-bundle --json"),
)
@click.argument("bundle", type=BundlePath(), required=False)
def list_engines(bundle: Path | None) -> None:
    """Print the engines of the cache: all, or those that were built from BUNDLE.

    The engines that BUNDLE itself contains are in its folder `engines`; `latentrt engines why BUNDLE` finds them.
    """
    from rich.filesize import decimal

    from latentrt.bundle.bundle import Bundle
    from latentrt.cli.console import Console
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.cli.report import ENGINE_HEADINGS, format_engine, make_table
    from latentrt_engines.seal import is_of_bundle

    cache = EngineCache()
    found = list(cache.engines())
    if bundle is not None:
        opened = Bundle.open(bundle)
        found = [engine for engine in found if is_of_bundle(engine.record.identity, opened)]
    found.sort(key=lambda one: (one.record.identity.component, one.record.build.built_at))
    if settings().json:
        folder, listed = str(cache.folder), [ListedEngine.of(engine) for engine in found]
        echo_document(EnginesDocument(folder=folder, engines=listed))
        return
    console = Console(pipe_columns=180)
    console.print(make_table(ENGINE_HEADINGS, [format_engine(engine) for engine in found]))
    size = decimal(sum(engine.record.plan.size for engine in found))
    console.print(f"{counted(len(found), 'engine')}, {size}, in {cache.folder}", soft_wrap=True)


@engines.command(short_help="Print the record of an engine.", examples=("latentrt engines show 3f9a12",))
@click.argument("key", type=Suggested(_keys))
def show(key: str) -> None:
    """Print the record of the engine whose key begins with KEY, as JSON (also without --json)."""
    from latentrt.engines.store import encode_record
    from latentrt_engines.cache import EngineCache

    echo_json_text(encode_record(EngineCache().find_by_prefix(key).record).decode())


@engines.command(
    short_help="Explain why an engine has to be built.",
    examples=("latentrt engines why my-bundle", "latentrt engines why my-bundle --gpu rtx4090 --size 768x512"),
)
@click.argument("bundle", type=BundlePath())
@add_gpu_options
@add_build_options
def why(bundle: Path, options: BuildOptions, gpus: str | None, capabilities: str | None) -> None:
    """Print for each engine of BUNDLE whether it exists and, if not, the differences of the nearest existing engine."""
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.cli.report import describe_target
    from latentrt_engines.why import explain

    opened = Bundle.open(bundle)
    request = options.resolve(opened, gpus, capabilities)
    target = describe_target(request.targets[0].identity)
    explanations = explain(request.targets, opened, EngineCache())
    if settings().json:
        images, explained = list(map(str, request.profiles)), [_as_document(each) for each in explanations]
        echo_document(WhyDocument(library=str(request.library), target=target, images=images, engines=explained))
        return
    echo(f"wanted: {request.library}, for {target}; images {'; '.join(map(str, request.profiles))}")
    for explanation in explanations:
        name, nearest = explanation.target.component, explanation.nearest
        if nearest is None:
            echo(f"{name:<14}  missing; {'; '.join(explanation.differences)}")
            continue
        place = f"{nearest.key[:_KEY_DIGITS]} {'in the bundle' if explanation.sealed else 'in the cache'}"
        if not explanation.differences:
            echo(f"{name:<14}  exists: {place}")
            continue
        echo(f"{name:<14}  missing; the nearest is {place}:")
        for difference in explanation.differences:
            echo(f"{'':<14}    {difference}")


def _as_document(explanation: Explanation) -> ExplainedEngine:
    nearest = explanation.nearest
    return ExplainedEngine(
        component=explanation.target.component,
        key=explanation.target.key,
        exists=nearest is not None and not explanation.differences,
        nearest=None if nearest is None else nearest.key,
        location=None if nearest is None else "bundle" if explanation.sealed else "cache",
        differences=list(explanation.differences),
    )


@engines.command(short_help="Compare every plan with its hash.", examples=("latentrt engines verify",))
def verify() -> None:
    """Compare every plan of the cache with its hash; quarantine damaged engines."""
    from latentrt.engines.store import QUARANTINE
    from latentrt.errors import EngineDamagedError
    from latentrt_engines.cache import EngineCache

    cache, intact, damaged = EngineCache(), 0, list[str]()
    for key in cache.list_keys():
        if cache.find_intact(key) is not None:
            intact += 1
        elif not (cache.folder / key).exists():  # a folder that is still there belongs to a running build
            damaged.append(key)
    if damaged:
        listed = "\n  ".join(damaged)
        raise EngineDamagedError(
            f"{len(damaged)} of {intact + len(damaged)} engines are damaged and were moved to "
            f"{cache.folder / QUARANTINE}:\n  {listed}\nBuild them again: latentrt build"
        )
    if settings().json:
        echo_document(VerifyEnginesDocument(folder=str(cache.folder), intact=intact))
    elif not settings().quiet:
        echo(f"intact: {counted(intact, 'engine')} in {cache.folder}")


@engines.command(
    short_help="Delete unusable engines.",
    examples=("latentrt engines prune --dry-run", "latentrt engines prune --older-than 30"),
)
@option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Also engines unused for so long.")
@option("--all", "everything", is_flag=True, help="All engines.")
@option("--dry-run", is_flag=True, help="Only print the names; delete nothing.")
def prune(older_than: float | None, everything: bool, dry_run: bool) -> None:
    """Delete unusable engines: the quarantine, files of killed builds, and engines of other versions of an installed
    library."""
    from rich.filesize import decimal

    from latentrt_engines.cache import EngineCache, find_prunable

    cache = EngineCache()
    not_used_since = None if older_than is None else time.time() - older_than * 86400
    found = find_prunable(cache, everything=everything, not_used_since=not_used_since)
    deleted, kept = list[PrunedItem](), list[str]()
    for each in found:
        name = each.path.name[:_KEY_DIGITS]
        if not dry_run and not cache.delete(each):
            kept.append(name)
            continue
        deleted.append(PrunedItem(name=name, reason=each.reason, size_bytes=each.size_bytes))
    if settings().json:
        echo_document(PruneDocument(folder=str(cache.folder), dry_run=dry_run, deleted=deleted, kept=kept))
        return
    if settings().quiet:
        return
    verb = "would delete" if dry_run else "deleted"
    for name in kept:
        echo(f"keeping {name}: built or used meanwhile")
    for item in deleted:
        echo(f"{verb} {item.name}: {item.reason}")
    freed = decimal(sum(item.size_bytes for item in deleted))
    echo(f"{verb} {counted(len(deleted), 'item')}, {freed}, in {cache.folder}")


@engines.command(
    "seal",
    short_help="Write a bundle that contains its engines.",
    examples=("latentrt engines seal my-bundle sealed", "latentrt engines seal my-bundle sealed 3f9a12 77c01e"),
)
@click.argument("bundle", type=BundlePath())
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("keys", nargs=-1, type=Suggested(_keys))
@option("--overwrite", is_flag=True, help="Replace an existing bundle once the new one is complete.")
@digest_option
def seal_engines(bundle: Path, out: Path, keys: tuple[str, ...], overwrite: bool, digest: str | None) -> None:
    """Write OUT: BUNDLE and its engines, pinned by a new digest, for machines that must not build.

    KEYS are the beginnings of engines' keys; without KEYS all engines of BUNDLE in the cache are sealed.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.seal import seal, select_engines

    opened, cache = Bundle.open(bundle, digest), EngineCache()
    selected = select_engines(cache, opened, keys)
    sealed = seal(opened, selected, cache, out, overwrite=overwrite)
    if settings().json:
        keys_now, count = [engine.key for engine in selected], len(sealed.manifest.engines)
        echo_document(SealDocument(bundle=str(out), digest=sealed.digest, sealed=keys_now, engines=count))
        return
    if settings().quiet:
        return
    for engine in selected:
        echo(f"sealed {engine.key[:_KEY_DIGITS]}  {engine.record.identity.component}")
    echo(f"{out}: {counted(len(sealed.manifest.engines), 'engine')}, {len(selected)} of them sealed now")
    echo(f"digest: {sealed.digest}")


@engines.command(
    "refit",
    short_help="Put other weights into a refittable engine.",
    examples=("latentrt engines refit my-retrained-bundle 3f9a12",),
)
@click.argument("bundle", type=BundlePath())
@click.argument("key", type=Suggested(_keys))
@digest_option
def refit_command(bundle: Path, key: str, digest: str | None) -> None:
    """Refit a copy of the refittable engine KEY with the weights of BUNDLE, a checkpoint of the same architecture.

    This runs on the engine's own GPU and takes seconds, while a build takes minutes. The engine KEY is unchanged.
    """
    from latentrt.backends.tensorrt.device import EngineDevice
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.library import load_library
    from latentrt_engines.refit import identify_refit, refit_engine

    opened, cache = Bundle.open(bundle, digest), EngineCache()
    engine = cache.find_by_prefix(key)
    identify_refit(engine, opened)  # fails before the device is opened
    device = EngineDevice(load_library(engine.record.identity.library))
    made = refit_engine(engine, opened, cache, device)
    if settings().json:
        echo_document(RefitDocument(engine=ListedEngine.of(made)))
    elif not settings().quiet:
        echo(f"{made.key[:_KEY_DIGITS]}  {made.record.identity.component}, with the weights of {bundle}")
