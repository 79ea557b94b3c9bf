"""The command `latentrt build`."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from latentrt.bundle.printable import counted
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.request_options import digest_option
from latentrt.cli.values import BundlePath
from latentrt_engines.cli.documents import ListedEngine
from latentrt_engines.cli.options import add_build_options, add_gpu_options
from latentrt_engines.options import BuildOptions

__all__ = ["BuildDocument", "build"]


class BuildDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt build --json`.

    Attributes:
        folder: of the engines.
        unchecked: why engines have not been run; empty where all were.
        seconds: wall time of all builds.
    """

    folder: str
    engines: list[ListedEngine]
    unchecked: list[str]
    seconds: float


@command(
    examples=(
        "latentrt build my-bundle",
        "latentrt build my-bundle --size 512 --size 768x512 --batch 1..4",
        "latentrt build my-bundle --gpu rtx4090,rtx5090",
    )
)
@click.argument("bundle", type=BundlePath())
@add_gpu_options
@add_build_options
@option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    group="Builder",
    help="File of kernel timings to read and extend (TensorRT).",
)
@option(
    "--force",
    is_flag=True,
    group="Engines",
    help="Also build engines that exist; they are kept until they are replaced.",
)
@digest_option
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
    if not settings().quiet:
        echo(f"{request.library}, for {describe_target(request.targets[0].identity)}; images {images}", err=True)
    with Reporter() as reporter:
        engines = list(build_engines(opened, request.targets, cache, reporter, force=force, timing_cache=timing_cache))
    unchecked = sorted({reason for engine in engines if (reason := engine.record.check.skip_reason)})
    seconds = time.monotonic() - began
    if settings().json:
        listed = [ListedEngine.of(engine) for engine in engines]
        folder = str(cache.folder)
        echo_document(BuildDocument(folder=folder, engines=listed, unchecked=unchecked, seconds=round(seconds, 3)))
    elif not settings().quiet:
        if unchecked:
            echo(f"compared with the manifest, not run yet: {'; '.join(unchecked)}", err=True)
        echo(f"ready: {counted(len(engines), 'engine')} in {cache.folder}, {seconds:.0f} s")
