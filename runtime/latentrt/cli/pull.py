"""The command `latentrt pull`: downloads a bundle from the Hugging Face hub."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec
from rich.filesize import decimal

from latentrt.bundle.remote import pull_bundle
from latentrt.bundle.sample import bundle_argument
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.progress import transfer
from latentrt.cli.repository import RepositoryName, with_revision
from latentrt.hub import HubPath

__all__ = ["PullDocument", "pull"]


class PullDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt pull --json`.

    Attributes:
        bundle: the folder.
        commit: of the repository.
        digest: of bundle.json.
        files: number of files. size_bytes: of all files. seconds: wall time.
    """

    bundle: str
    repository: str
    commit: str
    digest: str
    files: int
    size_bytes: int
    seconds: float


@command(
    examples=(
        "latentrt pull owner/name my-bundle",
        "latentrt pull owner/name my-bundle --digest sha256:…   # exactly this bundle",
        "latentrt pull owner/name my-bundle --revision v1.0 --overwrite",
    )
)
@click.argument("repository", type=RepositoryName())
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--revision", metavar="NAME", help="A branch, a tag or a commit.  [default: the default branch]")
@option("--digest", metavar="sha256:…", help="Expected digest of bundle.json; without it, you trust the repository.")
@option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
def pull(repository: HubPath, bundle: Path, revision: str | None, digest: str | None, overwrite: bool) -> None:
    """Download the bundle in REPOSITORY, OWNER/NAME on the Hugging Face hub, to the folder BUNDLE.

    Every file is compared with the manifest before the folder appears. HF_TOKEN gives access to private repositories.
    """
    began = time.monotonic()
    pulled = pull_bundle(
        with_revision(repository, revision), bundle, transfer=transfer, digest=digest, overwrite=overwrite
    )
    manifest = pulled.bundle.manifest
    document = PullDocument(
        bundle=str(bundle),
        repository=pulled.repository,
        commit=pulled.commit,
        digest=pulled.bundle.digest,
        files=len(manifest.files),
        size_bytes=manifest.size_bytes,
        seconds=round(time.monotonic() - began, 3),
    )
    if settings().json:
        echo_document(document)
    elif not settings().quiet:
        _print(document)


def _print(document: PullDocument) -> None:
    size, seconds = decimal(document.size_bytes), f"{document.seconds:.0f} s"
    echo(f"{document.bundle}: {document.repository} at {document.commit}, {document.files} files, {size}, in {seconds}")
    echo(f"digest: {document.digest}")
    echo(f'next: latentrt run {bundle_argument(document.bundle)} "a prompt"')
