"""The command `latentrt verify`: compares every file of a bundle with its SHA-256."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_argument
from latentrt.cli.command import command, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.progress import transfer
from latentrt.cli.request_options import digest_option
from latentrt.cli.values import BundlePath
from latentrt.engines.sealed import read_sealed_engines

__all__ = ["VerifyDocument", "verify"]


class VerifyDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt verify --json` for an intact bundle; any other bundle is an error, exit code 4.

    Attributes:
        bundle: the folder.
        digest: of bundle.json.
        pinned: whether --digest was given, without which a forged bundle passes.
        files: number of files. size_bytes: of all files. seconds: of hashing.
    """

    bundle: str
    digest: str
    pinned: bool
    files: int
    size_bytes: int
    seconds: float


@command(
    examples=(
        "latentrt verify my-bundle",
        "latentrt verify my-bundle --digest sha256:…    # of the bundle that you trust",
    )
)
@click.argument("bundle", type=BundlePath())
@digest_option
def verify(bundle: Path, digest: str | None) -> None:
    """Hash every file of BUNDLE and compare it with the manifest; list each file that is missing or differs.

    Without --digest only damage is detected, not forgery.
    """
    opened = Bundle.open(bundle, digest)
    size, began = opened.manifest.size_bytes, time.monotonic()
    with transfer("hashing", size) as progress:
        opened.verify(progress)
    read_sealed_engines(opened)
    document = VerifyDocument(
        bundle=str(opened.folder),
        digest=opened.digest,
        pinned=digest is not None,
        files=len(opened.manifest.files),
        size_bytes=size,
        seconds=round(time.monotonic() - began, 3),
    )
    if settings().json:
        echo_document(document)
    elif not settings().quiet:
        _print(document, bundle)


def _print(document: VerifyDocument, bundle: Path) -> None:
    from rich.filesize import decimal

    size = decimal(document.size_bytes)
    echo(f"intact: {document.files} files, {size}, hashed in {document.seconds:.1f} s")
    echo(f"digest: {document.digest}")
    if not document.pinned:
        echo(f"pin it: latentrt run {bundle_argument(bundle)} … --digest {document.digest}")
