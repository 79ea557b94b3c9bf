"""The command `latentrt pull`: downloads a bundle from the Hugging Face hub."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec
from rich.filesize import decimal

from latentrt.bundle.remote import pull_bundle
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.progress import transfer
from latentrt.cli.repository import RepositoryName, with_revision
from latentrt.hub import HubPath

__all__ = ["PullDocument", "pull"]


class PullDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The output of `latentrt pull --json`: the folder, the repository's commit, the digest, the size in bytes."""

    bundle: str
    repository: str
    commit: str
    digest: str
    files: int
    bytes: int


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
    records = pulled.bundle.manifest.files.values()
    result = PullDocument(
        bundle=str(bundle),
        repository=pulled.repository,
        commit=pulled.commit,
        digest=pulled.bundle.digest,
        files=len(records),
        bytes=sum(record.size for record in records),
    )
    if settings().json:
        echo_document(result)
        return
    echo(f"{bundle}: {result.repository} at {result.commit}, {result.files} files, {decimal(result.bytes)}, intact")
    echo(f"digest: {result.digest}")
    if not settings().quiet:
        echo(f'downloaded in {time.monotonic() - began:.0f} s; run it: latentrt run {bundle} "…"', err=True)
