"""The command `latentrt push`: uploads a bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.filesize import decimal

from latentrt.bundle.remote import push_bundle
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo, is_terminal
from latentrt.cli.progress import transfer
from latentrt.cli.repository import RepositoryName, with_revision
from latentrt.cli.values import BundlePath
from latentrt.hub import HubPath

__all__ = ["PushDocument", "push"]


class PushDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt push --json`.

    Attributes:
        commit: of the repository. url: of the commit.
        digest: of bundle.json.
        files: number of files. size_bytes: of all files.
    """

    repository: str
    commit: str
    url: str
    digest: str
    files: int
    size_bytes: int


@command(
    examples=(
        "latentrt push my-bundle owner/name --private",
        "latentrt push my-bundle owner/name --revision int8   # a branch",
    )
)
@click.argument("bundle", type=BundlePath())
@click.argument("repository", type=RepositoryName())
@option("--private", is_flag=True, help="Make a new repository private; an existing one stays as it is.")
@option("--revision", metavar="BRANCH", help="A branch, made if there is none.  [default: the default branch]")
@option("--keep-card", is_flag=True, help="Leave the repository's README.md as it is.")
@option("--digest", metavar="sha256:…", help="Expected digest of bundle.json.")
def push(
    bundle: Path, repository: HubPath, private: bool, revision: str | None, keep_card: bool, digest: str | None
) -> None:
    """Upload BUNDLE to REPOSITORY, OWNER/NAME on the Hugging Face hub, in one commit.

    The bundle is verified first. A card with its licence, its digest and how to run it becomes README.md. HF_TOKEN, or
    `hf auth login`, gives the right to write.
    """
    pushed = push_bundle(
        bundle,
        with_revision(repository, revision),
        transfer=transfer,
        digest=digest,
        private=private,
        keep_card=keep_card,
        bars=is_terminal(err=True) and not settings().quiet,
    )
    manifest = pushed.bundle.manifest
    document = PushDocument(
        repository=pushed.repository,
        commit=pushed.commit,
        url=pushed.url,
        digest=pushed.bundle.digest,
        files=len(manifest.files),
        size_bytes=manifest.size_bytes,
    )
    if settings().json:
        echo_document(document)
    elif not settings().quiet:
        _print(document)


def _print(document: PushDocument) -> None:
    size = decimal(document.size_bytes)
    echo(f"{document.repository}: {document.files} files, {size}, commit {document.commit}")
    echo(f"digest: {document.digest}")
    echo(f"get it: latentrt pull {document.repository} BUNDLE --digest {document.digest}")
