"""The commands `latentrt engines list | show | why | verify | prune | seal | refit`."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from latentrt.bundle.printable import counted
from latentrt.cli.output import echo, echo_json, echo_json_text
from latentrt_engines.cli.options import add_build_options, add_gpu_options
from latentrt_engines.options import BuildOptions

__all__ = ["engines"]

_KEY_DIGITS = 12  # digits of a key in the output: enough to distinguish engines, and for commands to find one


@click.group()
def engines() -> None:
    """List engines, explain missing ones, verify and prune them, and seal them into a bundle."""


@engines.command("list")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def list_engines(bundle: Path | None, as_json: bool) -> None:
    """Print the engines of the cache, or those that were built from BUNDLE."""
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
    if as_json:
        echo_json([{"key": one.key, **msgspec.to_builtins(one.record)} for one in found])
        return
    found.sort(key=lambda one: (one.record.identity.component, one.record.build.built_at))
    console = Console(pipe_columns=180)
    console.print(make_table(ENGINE_HEADINGS, [format_engine(engine) for engine in found]))
    size = decimal(sum(engine.record.plan.size for engine in found))
    console.print(f"{counted(len(found), 'engine')}, {size}, in {cache.folder}", soft_wrap=True)


@engines.command(short_help="Print the record of an engine.")
@click.argument("key")
def show(key: str) -> None:
    """Print the record of the engine whose key begins with KEY, as JSON."""
    from latentrt.engines.store import encode_record
    from latentrt_engines.cache import EngineCache

    echo_json_text(encode_record(EngineCache().find_by_prefix(key).record).decode())


@engines.command(short_help="Explain why an engine has to be built.")
@click.argument("bundle", type=click.Path(path_type=Path))
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
    images = "; ".join(map(str, request.profiles))
    echo(f"wanted: {request.library}, for {describe_target(request.targets[0].identity)}; images {images}")
    for explanation in explain(request.targets, opened, EngineCache()):
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


@engines.command(short_help="Compare every plan with its hash.")
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
    echo(f"intact: {counted(intact, 'engine')} in {cache.folder}")


@engines.command(short_help="Delete unusable engines.")
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Also engines unused for so long.")
@click.option("--all", "everything", is_flag=True, help="All engines.")
@click.option("--dry-run", is_flag=True, help="Only print the names; delete nothing.")
def prune(older_than: float | None, everything: bool, dry_run: bool) -> None:
    """Delete unusable engines: the quarantine, files of killed builds, and engines of other versions of an installed
    library."""
    from rich.filesize import decimal

    from latentrt_engines.cache import EngineCache, find_prunable

    cache = EngineCache()
    not_used_since = None if older_than is None else time.time() - older_than * 86400
    found = find_prunable(cache, everything=everything, not_used_since=not_used_since)
    deleted = []
    for each in found:
        name = each.path.name[:_KEY_DIGITS]
        if not dry_run and not cache.delete(each):
            echo(f"keeping {name}: built or used meanwhile")
            continue
        deleted.append(each)
        echo(f"{'would delete' if dry_run else 'deleted'} {name}: {each.reason}")
    freed = decimal(sum(each.size_bytes for each in deleted))
    verb = "would delete" if dry_run else "deleted"
    echo(f"{verb} {counted(len(deleted), 'item')}, {freed}, in {cache.folder}")


@engines.command("seal", short_help="Write a bundle that contains its engines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("keys", nargs=-1)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle once the new one is complete.")
@click.option("--digest", metavar="sha256:…", help="Expected SHA-256 of bundle.json.")
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
    for engine in selected:
        echo(f"sealed {engine.key[:_KEY_DIGITS]}  {engine.record.identity.component}")
    echo(f"{out}: {counted(len(sealed.manifest.engines), 'engine')}, {len(selected)} of them sealed now")
    echo(f"digest: {sealed.digest}")


@engines.command("refit", short_help="Put other weights into a refittable engine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("key")
@click.option("--digest", metavar="sha256:…", help="Expected SHA-256 of bundle.json.")
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
    echo(f"{made.key[:_KEY_DIGITS]}  {made.record.identity.component}, with the weights of {bundle}")
