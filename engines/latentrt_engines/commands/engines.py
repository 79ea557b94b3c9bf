"""The commands `latentrt engines list | show | why | verify | prune | seal | refit`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import msgspec

from latentrt.bundle.printable import counted
from latentrt_engines.ask import Ask, ask_options, target_options

__all__ = ["engines"]

_SHOWN = 12  # digits of a key: enough for people, and for commands to find it


@click.group()
def engines() -> None:
    """What is built, why something is not, whether it is intact; and a bundle that brings its engines along."""


@engines.command("list")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, for a program to read.")
def list_engines(bundle: Path | None, as_json: bool) -> None:
    """Print the engines of the cache, or those that were built of BUNDLE."""
    from rich.console import Console
    from rich.filesize import decimal

    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.report import ENGINE_HEADINGS, engine_row, plain_table
    from latentrt_engines.seal import is_of_bundle

    cache = EngineCache()
    there = list(cache.engines())
    if bundle is not None:
        opened = Bundle.open(bundle)
        there = [engine for engine in there if is_of_bundle(engine.record.identity, opened)]
    if as_json:
        click.echo(json.dumps([{"key": one.key, **msgspec.to_builtins(one.record)} for one in there], indent=2))
        return
    there.sort(key=lambda one: (one.record.identity.component, one.record.build.built_at))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print(plain_table(ENGINE_HEADINGS, [engine_row(engine) for engine in there]))
    size = decimal(sum(engine.record.plan.size for engine in there))
    console.print(f"{counted(len(there), 'engine')}, {size}, in {cache.folder}", soft_wrap=True)


@engines.command(short_help="Print the record of an engine.")
@click.argument("key")
def show(key: str) -> None:
    """Print the record of the engine whose key begins with KEY, as JSON."""
    from latentrt.engines.store import encode_record
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.seal import find_engine

    click.echo(encode_record(find_engine(key, list(EngineCache().engines())).record).decode(), nl=False)


@engines.command(short_help="Is an engine there, and if not, what differs?")
@click.argument("bundle", type=click.Path(path_type=Path))
@target_options
@ask_options
def why(bundle: Path, ask: Ask, gpus: str | None, capabilities: str | None) -> None:
    """Print, for each engine that BUNDLE wants, whether it is there, and if not, how what is there differs."""
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.report import target_words
    from latentrt_engines.why import explain

    opened = Bundle.open(bundle)
    wants = ask.wants(opened, gpus, capabilities)
    pictures = "; ".join(map(str, wants.profiles))
    click.echo(f"wanted: {wants.library}, for {target_words(wants.engines[0].identity)}; pictures {pictures}")
    for answer in explain(wants.engines, opened, EngineCache()):
        name, nearest = answer.wanted.component, answer.nearest
        if nearest is None:
            click.echo(f"{name:<14}  {'; '.join(answer.differs)}")
            continue
        place = f"{nearest.key[:_SHOWN]} {'in the bundle' if answer.sealed else 'in the cache'}"
        if not answer.differs:
            click.echo(f"{name:<14}  there: {place}")
            continue
        click.echo(f"{name:<14}  missing; nearest is {place}:")
        for words in answer.differs:
            click.echo(f"{'':<14}    {words}")


@engines.command(short_help="Compare every plan with its hash.")
def verify() -> None:
    """Compare every plan of the cache with its hash; move what fails aside."""
    from latentrt.errors import EngineDamagedError
    from latentrt_engines.cache import EngineCache

    cache, intact, damaged = EngineCache(), 0, list[str]()
    for key in cache.all_keys():
        if cache.intact(key) is not None:
            intact += 1
        elif not (cache.folder / key).exists():  # what is still there is being built
            damaged.append(key)
    if damaged:
        listed = "\n  ".join(damaged)
        raise EngineDamagedError(
            f"not what was built: {len(damaged)} of {intact + len(damaged)}; they were moved aside, to "
            f"{cache.folder / 'aside'}:\n  {listed}\nBuild them again: latentrt build"
        )
    click.echo(f"intact: {counted(intact, 'engine')} in {cache.folder}")


@engines.command(short_help="Delete what no run can use.")
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Also what was not used for so long.")
@click.option("--all", "everything", is_flag=True, help="Every engine.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
def prune(older_than: float | None, everything: bool, dry_run: bool) -> None:
    """Delete what no run can use: what was moved aside, what a killed build left, engines of other versions of a
    library that is installed."""
    from rich.filesize import decimal

    from latentrt_engines.cache import EngineCache
    from latentrt_engines.prune import prunable

    cache = EngineCache()
    not_used_since = None if older_than is None else time.time() - older_than * 86400
    found = prunable(cache, everything=everything, not_used_since=not_used_since)
    for each in found:
        click.echo(f"{'would delete' if dry_run else 'deleting'} {each.path.name[:_SHOWN]}: {each.reason}")
        if not dry_run:
            cache.delete(each.path)
    freed = decimal(sum(each.size_bytes for each in found))
    click.echo(
        f"{counted(len(found), 'thing')}, {freed}{' (nothing was deleted)' if dry_run else ''}, in {cache.folder}"
    )


@engines.command("seal", short_help="Write a bundle that brings its engines along.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("keys", nargs=-1)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there, once the new one is complete.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def seal_engines(bundle: Path, out: Path, keys: tuple[str, ...], overwrite: bool, digest: str | None) -> None:
    """Write OUT: BUNDLE and its engines, pinned by a new digest, for machines that must not build.

    KEYS are the beginnings of engines' keys; all engines of BUNDLE in the cache if there are none.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.seal import choose_engines, seal

    opened, cache = Bundle.open(bundle, digest), EngineCache()
    chosen = choose_engines(cache, opened, keys)
    sealed = seal(opened, chosen, cache, out, overwrite=overwrite)
    for engine in chosen:
        click.echo(f"sealed {engine.key[:_SHOWN]}  {engine.record.identity.component}")
    click.echo(f"{out}: {counted(len(sealed.manifest.engines), 'engine')}, {len(chosen)} of them sealed now")
    click.echo(f"digest: {sealed.digest}")


@engines.command("refit", short_help="Other weights into a refittable engine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("key")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def refit_command(bundle: Path, key: str, digest: str | None) -> None:
    """Give a copy of the refittable engine KEY the weights of BUNDLE, a checkpoint of the same architecture.

    It runs on the engine's own GPU and takes seconds where a build takes minutes. The engine KEY stays as it is.
    """
    from latentrt.backends.tensorrt.device import EngineDevice
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.library import load_library
    from latentrt_engines.refit import refit_engine, refitted_identity
    from latentrt_engines.seal import find_engine

    opened, cache = Bundle.open(bundle, digest), EngineCache()
    engine = find_engine(key, list(cache.engines()))
    refitted_identity(engine, opened)
    device = EngineDevice(load_library(engine.record.identity.library))
    made = refit_engine(engine, opened, cache, device)
    click.echo(f"{made.key[:_SHOWN]}  {made.record.identity.component}, with the weights of {bundle}")
