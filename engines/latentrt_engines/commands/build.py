"""The command `latentrt build`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from latentrt.bundle.printable import counted
from latentrt.worker_process import terminable
from latentrt_engines.ask import Ask, ask_options, target_options

__all__ = ["build"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@target_options
@ask_options
@click.option("--timing-cache", type=click.Path(path_type=Path), help="Kernels' times, read and added to (TensorRT).")
@click.option("--force", is_flag=True, help="Build also what is there; it stays until the new one takes its place.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def build(
    bundle: Path,
    ask: Ask,
    gpus: str | None,
    capabilities: str | None,
    timing_cache: Path | None,
    force: bool,
    digest: str | None,
) -> None:
    """Turn the graphs of BUNDLE into TensorRT engines, for the GPU of this machine or for GPUs that are not there.

    Engines go into the cache (LATENTRT_CACHE moves it), each built once, however many ask for it. What is there
    already is compared with its hash and left alone.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.build import build_engines
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.report import Reporter, target_words

    opened = Bundle.open(bundle, digest)
    wants = ask.wants(opened, gpus, capabilities)
    wants.library.check_timing_cache(timing_cache)
    cache, began = EngineCache(), time.monotonic()
    pictures = "; ".join(map(str, wants.profiles))
    click.echo(f"{wants.library}, for {target_words(wants.engines[0].identity)}; pictures {pictures}", err=True)
    with terminable(), Reporter() as reporter:
        engines = list(build_engines(opened, wants.engines, cache, reporter, force=force, timing_cache=timing_cache))
    if unrun := {why for engine in engines if (why := engine.record.check.not_run_because)}:
        click.echo(f"compared with the manifest and not run yet: {'; '.join(sorted(unrun))}", err=True)
    click.echo(f"ready: {counted(len(engines), 'engine')} in {cache.folder}, {time.monotonic() - began:.0f} s")
