"""`latentrt verify`: compares every file of a bundle with its SHA-256."""

from __future__ import annotations

import time

import click
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from latentrt.bundle.bundle import Bundle
from latentrt.cli.console import Console
from latentrt.cli.output import echo
from latentrt.engines.sealed import read_sealed_engines

__all__ = ["verify"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--digest",
    metavar="sha256:…",
    help="Expected digest of bundle.json; without it, only damage is detected, not forgery.",
)
def verify(bundle: str, digest: str | None) -> None:
    """Hash every file of BUNDLE and compare it with the manifest; list each file that is missing or differs."""
    opened = Bundle.open(bundle, digest)
    size, began = sum(record.size for record in opened.manifest.files.values()), time.monotonic()
    _verify_with_progress(opened, size)
    read_sealed_engines(opened)
    echo(f"intact: {len(opened.manifest.files)} files, {decimal(size)}, hashed in {time.monotonic() - began:.1f} s")
    echo(f"digest: {opened.digest}")
    if digest is None:
        echo(f"pin it: latentrt run {bundle} … --digest {opened.digest}")


def _verify_with_progress(bundle: Bundle, size: int) -> None:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(err=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("hashing", total=size)
        bundle.verify(lambda count: progress.advance(task, count))
