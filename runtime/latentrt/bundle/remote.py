"""Bundles as repositories of the Hugging Face hub: download one, and upload one with its card.

A download is no more trusted than a folder from elsewhere. `bundle.json` is bounded, compared with the expected digest
and checked before any other file comes; then exactly the files that it pins are downloaded, of exactly the sizes in it,
and each is compared with its SHA-256 before the folder gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from latentrt.bundle.bundle import Bundle, check_digest_form
from latentrt.bundle.card import CARD_NAME, write_card
from latentrt.bundle.digests import ByteProgress, hash_bytes, open_regular, read_at_most
from latentrt.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, decode_manifest
from latentrt.bundle.printable import printable
from latentrt.bundle.renames import replace_file
from latentrt.bundle.staging import staged
from latentrt.errors import BundleError, HubError, IntegrityError, ManifestError, RequestError
from latentrt.hub import HubPath, Repository, check_room, open_repository, upload

__all__ = ["Pulled", "Pushed", "Transfer", "pull_bundle", "push_bundle"]

Transfer = Callable[[str, int], AbstractContextManager[ByteProgress]]
"""Called with a title and a number of bytes; within the block, the result is called with the bytes that came."""

_MAX_LISTED = 5
# Files of a repository that are no bundle's, and may be there before one is uploaded.
_OTHERS = {".gitattributes", CARD_NAME}


@dataclass(frozen=True)
class Pulled:
    """A bundle that was downloaded, and the commit of the repository that it is from."""

    bundle: Bundle
    repository: str
    commit: str


@dataclass(frozen=True)
class Pushed:
    """A bundle that was uploaded, and the commit that it is in."""

    bundle: Bundle
    repository: str
    commit: str
    url: str


def pull_bundle(
    path: HubPath, destination: Path, *, transfer: Transfer, digest: str | None = None, overwrite: bool = False
) -> Pulled:
    """Download a bundle from the hub.

    The folder appears when it is complete and every file has its SHA-256; after a failure there is none, and an earlier
    bundle is unchanged.

    Args:
        path: the repository.
        destination: the folder to create.
        transfer: notified of the progress.
        digest: the expected digest of `bundle.json`, `sha256:…`.
        overwrite: replace an existing bundle.

    Raises:
        RequestError: `digest` is malformed, or `path` is that of a file.
        HubError: the repository cannot be read.
        BundleError: it has no bundle that this version can run, or not all its files.
        OutputError: the folder cannot be written.
    """
    if digest is not None:
        check_digest_form(digest)
    if path.file is not None:
        raise RequestError(f"got {path}, expected a repository: latentrt pull {path.repository} BUNDLE")
    with staged(destination, overwrite=overwrite) as stage:
        repository = open_repository(path)
        downloads = stage.scratch / "downloads"
        found, manifest = _fetch_manifest(repository, downloads, digest)
        _check_listing(repository, manifest)
        check_room(destination.parent, manifest.size_bytes, repository.name)
        with transfer(repository.name, manifest.size_bytes) as progress:
            repository.fetch_into(downloads, manifest.files, progress)
        for name in (*manifest.files, MANIFEST_NAME):
            place = stage.bundle / name
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(downloads / name, place)
        Bundle.open(stage.bundle, found, trust_cache=False).verify()
    return Pulled(Bundle.open(destination, found), repository.name, repository.commit)


def _fetch_manifest(repository: Repository, folder: Path, digest: str | None) -> tuple[str, Manifest]:
    """Download `bundle.json`; return its digest and its content."""
    place = f"{repository.name} at {repository.commit[:12]}"
    record = repository.files.get(MANIFEST_NAME)
    if record is None:
        if "model_index.json" in repository.files:
            raise BundleError(
                f"{place} is a checkpoint, not a bundle; turn it into one: latentrt export {repository.name} BUNDLE"
            )
        names = ", ".join(sorted(repository.files)[:_MAX_LISTED]) or "no files"
        raise BundleError(f"{place} is no bundle: it has no {MANIFEST_NAME}, but {printable(names)}")
    if record.size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{place} has a {MANIFEST_NAME} of {record.size:,} bytes, expected at most {MAX_MANIFEST_BYTES:,}"
        )
    repository.fetch_into(folder, [MANIFEST_NAME])
    with open_regular(folder / MANIFEST_NAME) as stream:
        data = read_at_most(stream, MAX_MANIFEST_BYTES)
    found = f"sha256:{hash_bytes(data)}"
    if digest not in (None, found):
        raise IntegrityError(
            f"{place} has the digest {found}, expected {digest}: it is another bundle, or was changed. Pass the "
            "revision that has the expected one, or pin this one if you trust its source"
        )
    try:
        return found, decode_manifest(data)
    except ManifestError as error:
        raise ManifestError(f"{place}: {error}") from None


def _check_listing(repository: Repository, manifest: Manifest) -> None:
    """Compare the listing of a repository with the manifest, before anything large is downloaded.

    Raises:
        IntegrityError: a file is missing, or has another size or SHA-256.
    """
    faults = []
    for name, pin in manifest.files.items():
        listed = repository.files.get(name)
        if listed is None:
            faults.append(f"{name} is missing")
        elif listed.size != pin.size:
            faults.append(f"{name} has {listed.size:,} bytes, expected {pin.size:,}")
        elif listed.sha256 not in (None, pin.sha256):
            faults.append(f"{name} has SHA-256 {listed.sha256}, expected {pin.sha256}")
    if faults:
        shown = "\n  ".join(faults[:_MAX_LISTED]) + ("\n  …" if len(faults) > _MAX_LISTED else "")
        raise IntegrityError(
            f"{repository.name} at {repository.commit[:12]} does not have the files of its {MANIFEST_NAME}:\n  {shown}"
            f"\nWhoever made it must push it again: latentrt push BUNDLE {repository.name}"
        )


def push_bundle(
    folder: Path,
    path: HubPath,
    *,
    transfer: Transfer,
    digest: str | None = None,
    private: bool = False,
    keep_card: bool = False,
    bars: bool = False,
) -> Pushed:
    """Upload a bundle to the hub, after comparing every file with its SHA-256.

    Only `bundle.json`, the files that it pins and the card are uploaded, in one commit.

    Args:
        folder: of the bundle.
        path: the repository, created if there is none, and the branch in it.
        transfer: notified of the progress of hashing.
        digest: the expected digest of `bundle.json`.
        private: whether a new repository is private.
        keep_card: leave the repository's README.md as it is.
        bars: show huggingface_hub's progress bars.

    Raises:
        BundleError: the folder has no intact bundle.
        HubError: the repository has files of something else, or cannot be written.
    """
    if path.file is not None:
        raise RequestError(f"got {path}, expected a repository: latentrt push BUNDLE {path.repository}")
    bundle = Bundle.open(folder, digest, trust_cache=False)
    with transfer("hashing", bundle.manifest.size_bytes) as progress:
        bundle.verify(progress)
    files: dict[str, Path | bytes] = {name: bundle.path(name) for name in bundle.manifest.files}
    files[MANIFEST_NAME] = _read_manifest(bundle)
    if not keep_card and CARD_NAME not in files:
        files[CARD_NAME] = write_card(bundle, path.repository).encode()
    commit, url = upload(
        path.repository,
        files,
        message=f"Bundle {bundle.digest}",
        private=private,
        branch=path.revision,
        check=lambda names: _check_destination(path, names),
        bars=bars,
    )
    return Pushed(bundle, path.repository, commit, url)


def _read_manifest(bundle: Bundle) -> bytes:
    """Return the bytes of `bundle.json`, which the bundle's digest is of."""
    with open_regular(bundle.folder / MANIFEST_NAME) as stream:
        data = read_at_most(stream, MAX_MANIFEST_BYTES)
    if f"sha256:{hash_bytes(data)}" != bundle.digest:
        raise IntegrityError(f"{bundle.folder} was replaced by another bundle meanwhile; push it again")
    return data


def _check_destination(path: HubPath, names: Collection[str]) -> None:
    """Check that a repository is empty or has a bundle, as an upload would mix with other files."""
    others = sorted(set(names) - _OTHERS)
    if others and MANIFEST_NAME not in names:
        raise HubError(
            f"{path.repository} has files that are not a bundle's ({printable(', '.join(others[:_MAX_LISTED]))}"
            f"{' …' if len(others) > _MAX_LISTED else ''}); push to another repository, or to a branch of its own"
        )
