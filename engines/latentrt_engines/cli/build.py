"""The command `latentrt build`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from latentrt.bundle.printable import counted
from latentrt.cli.output import echo
from latentrt_engines.cli.options import add_build_options, add_gpu_options
from latentrt_engines.options import BuildOptions

__all__ = ["build"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@add_gpu_options
@add_build_options
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="File of kernel timings to read and extend (TensorRT)."
)
@click.option("--force", is_flag=True, help="Also build engines that exist; they are kept until they are replaced.")
@click.option("--digest", metavar="sha256:…", help="Expected SHA-256 of bundle.json.")
def build(
    bundle: Path,
    options: BuildOptions,
    gpus: str | None,
    capabilities: str | None,
    timing_cache: Path | None,
    force: bool,
    digest: str | None,
) -> None:
    """Build TensorRT engines from the graphs of BUNDLE, for the GPU of this machine or for other GPUs.

    Engines are stored in the cache (set LATENTRT_CACHE to move it). Each is built once, even if several processes need
    it. An existing engine is compared with its hash and kept.
    """
    from latentrt.bundle.bundle import Bundle
    from latentrt_engines.build import build_engines
    from latentrt_engines.cache import EngineCache
    from latentrt_engines.cli.report import Reporter, describe_target

    opened = Bundle.open(bundle, digest)
    request = options.resolve(opened, gpus, capabilities)
    request.library.check_timing_cache(timing_cache)
    cache, began = EngineCache(), time.monotonic()
    images = "; ".join(map(str, request.profiles))
    echo(f"{request.library}, for {describe_target(request.targets[0].identity)}; images {images}", err=True)
    with Reporter() as reporter:
        engines = list(build_engines(opened, request.targets, cache, reporter, force=force, timing_cache=timing_cache))
    if reasons := {reason for engine in engines if (reason := engine.record.check.skip_reason)}:
        echo(f"compared with the manifest, not run yet: {'; '.join(sorted(reasons))}", err=True)
    echo(f"ready: {counted(len(engines), 'engine')} in {cache.folder}, {time.monotonic() - began:.0f} s")
