"""What is in a bundle, and is it intact?

`Bundle.open` reads the manifest; `Bundle.path` and `Bundle.read` hand out the files it names, each compared with
its SHA-256 before anything parses it. A file that a run does not need is not hashed.

What that protects against. The manifest pins every file, so damage (a truncated download, a bad copy, a stray edit)
is found before it is run. It does not prove who made the bundle: whoever can change a file can change the manifest
to match. Against forgery, pin the manifest itself with its digest, taken from a source you trust::

    Bundle.open("my-model", digest="sha256:…")

Then every byte that is parsed is one that the digest covers. What stays out of root is someone who can write into
the folder while it is in use: `read` returns the very bytes that were hashed, but a file that `path` has handed out
is opened again by whoever runs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from latentrt.bundle.digest_cache import DigestCache
from latentrt.bundle.digests import Progress, hash_bytes
from latentrt.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PartName, Precision, decode_manifest
from latentrt.bundle.pinned_files import PinnedFiles
from latentrt.bundle.root import BundleRoot
from latentrt.bundle.weights import WeightSet
from latentrt.errors import BundleError, IntegrityError, ManifestError, RequestError

__all__ = ["Bundle", "check_digest_form"]

_DIGEST = re.compile("sha256:[0-9a-f]{64}")


class Bundle:
    """A bundle whose manifest has been read. Use `Bundle.open`; it is safe to share between threads.

    Attributes:
        folder: where it lies, absolute, links resolved.
        manifest: what it says of itself.
        digest: `sha256:…` of `bundle.json`, which pins everything else.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str, files: PinnedFiles) -> None:
        self.folder, self.manifest, self.digest, self._files = folder, manifest, digest, files

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r}, digest={self.digest!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str], digest: str | None = None, *, trust_cache: bool = True) -> Bundle:
        """Read the manifest of the bundle in the folder `path`.

        Args:
            digest: what `bundle.json` must hash to, `sha256:` and 64 hexadecimal digits; checked before it is parsed.
            trust_cache: whether a large file that an earlier run hashed, and that has not changed since as far as
                the file system can tell (`latentrt.bundle.digest_cache`), goes without being hashed again.

        Raises:
            RequestError: `digest` is not of that form.
            BundleError: there is no bundle at `path`.
            IntegrityError: `bundle.json` is not the pinned one, or is a link that leads out of the bundle.
            ManifestError: `bundle.json` cannot be read or says something impossible.
        """
        if digest is not None:
            check_digest_form(digest)
        root = BundleRoot(_bundle_folder(path))
        data = _read_manifest(root)
        found = f"sha256:{hash_bytes(data)}"
        if digest not in (None, found):
            raise IntegrityError(
                f"{root.folder / MANIFEST_NAME} is {found}, expected the pinned {digest}: it is another bundle, or "
                "was changed. Get the one that was pinned, or pin this one if you trust where it came from"
            )
        try:
            manifest = decode_manifest(data)
        except ManifestError as error:
            raise ManifestError(f"{root.folder}: {error}") from None
        return cls(
            root.folder, manifest, found, PinnedFiles(root, manifest.files, DigestCache() if trust_cache else None)
        )

    def path(self, name: str) -> Path:
        """Where the file `name` lies, after it was compared with its SHA-256.

        The path is the one inside the bundle, also where a link stands there, so that files keep their names and
        neighbours.

        Raises:
            BundleError: the manifest does not name it.
            IntegrityError: it is missing, is not the pinned one, or is a link that leads out.
        """
        self._files.check([name])
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`, the very ones that were hashed. For graphs and tokenizers, which are small.

        Raises:
            BundleError, IntegrityError: as for `path`.
        """
        return self._files.read(name)

    def check(self, names: Iterable[str]) -> None:
        """Compare several files with their SHA-256 at once, so that `path` answers without a wait.

        Raises:
            BundleError, IntegrityError: as for `path`; the message lists every file that is wrong.
        """
        self._files.check(names)

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every file of the bundle, whatever is remembered of it.

        Args:
            progress: called with the number of bytes hashed since the last call, from one thread at a time.

        Raises:
            IntegrityError: listing every file that is wrong.
        """
        self._files.verify(progress)

    def component_files(self, component: str, precision: Precision, part: PartName | None = None) -> tuple[str, str]:
        """The names of a component's files: the graph that computes in `precision`, and the weights.

        Args:
            part: of which the graph is wanted; None is the whole component.

        Raises:
            BundleError: the bundle has no such component, or no such graph of it.
        """
        found = self.manifest.components.get(component)
        owner = found if found is None or part is None else found.parts.get(part)
        if found is None or owner is None or precision not in owner.graphs:
            what = component if part is None else f"{component}'s {part} part"
            has = ", ".join(self._graphs_in_words())
            is_int8 = self.manifest.precision == "int8"
            mend = "; a bundle of int8 is for CPUs, export another: --precision float16" if is_int8 else ""
            raise BundleError(f"{self.folder} has no {precision} graph of {what}; it has {has}{mend}")
        return owner.graphs[precision].file, found.weights.file

    def weights(self, component: str) -> WeightSet:
        """Return the weights of a component, compared with their SHA-256.

        Raises:
            BundleError, IntegrityError: as for `path`.
        """
        record = self.manifest.components.get(component)
        if record is None:
            raise BundleError(f"{self.folder} has no {component}; it has {', '.join(self.manifest.components)}")
        name = record.weights.file
        return WeightSet(self.path(name), self.manifest.files[name].sha256)

    def files_of(self, components: Iterable[str]) -> Iterator[str]:
        """The names of all files of components: weights, and graphs of every precision and part."""
        for name in components:
            record = self.manifest.components[name]
            yield record.weights.file
            for graphs in (record.graphs, *(part.graphs for part in record.parts.values())):
                yield from (graph.file for graph in graphs.values())

    def _graphs_in_words(self) -> Iterator[str]:
        for name, component in self.manifest.components.items():
            yield f"{name} in {' and '.join(component.graphs)}"
            for part_name, part in component.parts.items():
                yield f"its {part_name} part in {' and '.join(part.graphs)}"


def check_digest_form(digest: str) -> None:
    """Refuse a digest that no bundle can have.

    Raises:
        RequestError: it is not `sha256:` and 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise RequestError(
            f"found the digest {digest!r}, expected sha256: and 64 lower-case hexadecimal digits; "
            "`latentrt inspect BUNDLE` prints the digest of a bundle"
        )


def _bundle_folder(path: str | os.PathLike[str]) -> Path:
    """Refuse, in words, what is not a bundle's folder."""
    # os.path answers False where Path raises: a folder that may not be entered, a name that no file can have.
    if os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        return Path(path)
    found = "does not exist or cannot be entered"
    if os.path.isfile(os.path.join(path, "model_index.json")):
        raise BundleError(f"{path} is a checkpoint, not a bundle; turn it into one: latentrt export {path} BUNDLE")
    if os.path.exists(path):
        found = f"has no {MANIFEST_NAME}" if os.path.isdir(path) else "is a file"
    raise BundleError(f"{path} {found}, expected the folder of a bundle; latentrt export CHECKPOINT BUNDLE writes one")


def _read_manifest(root: BundleRoot) -> bytes:
    with PinnedFiles(root, {}, None).opened(MANIFEST_NAME) as stream:
        # One byte more than a manifest may have, for its reader to see that it has too many.
        return stream.read(MAX_MANIFEST_BYTES + 1)
