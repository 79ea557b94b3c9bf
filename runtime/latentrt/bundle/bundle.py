"""A bundle on disk: its manifest, and access to its files.

`Bundle.open` reads the manifest; `Bundle.path` and `Bundle.read` give access to the files it names, each compared with
its SHA-256 before anything parses it. A file that a run does not need is not hashed. A graph is also checked
(`latentrt.bundle.graph_check`) before either of them returns it, so no backend can parse one that was not.

Threat model. The manifest pins every file, so damage (a truncated download, a bad copy, an accidental edit) is detected
before the file is used. It does not prove who made the bundle: someone who can change a file can change the manifest to
match. Against forgery, pin the manifest itself with its digest, taken from a source you trust::

    Bundle.open("my-model", digest="sha256:…")

Then the digest covers every byte that is parsed, also while files in the folder are renamed: `read` returns the same
bytes that were hashed, and `weights` the same open file. Not covered is an attacker who writes into a file of
weights while a session that has mapped it is in use.

A bundle that is replaced after it was opened is not mixed with the new one: a file of the new one differs from the pin
of the old manifest, and `read`, `path`, `check` and `verify` say that the bundle was replaced. Files that are open or
mapped stay as they were.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.bundle.digest_cache import DigestCache
from latentrt.bundle.digests import ByteProgress, hash_bytes, read_at_most
from latentrt.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Component,
    Manifest,
    PartName,
    Precision,
    decode_manifest,
    named_files,
)
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.bundle.pinned_files import PinnedFiles
from latentrt.bundle.printable import did_you_mean, quote
from latentrt.bundle.root import BundleRoot
from latentrt.bundle.sample import SAMPLE, bundle_path
from latentrt.bundle.staging import is_being_replaced
from latentrt.bundle.weights import WeightSet
from latentrt.errors import BundleError, GraphError, IntegrityError, ManifestError, RequestError

if TYPE_CHECKING:
    from latentrt.bundle.graph_check import CheckedGraph

__all__ = ["Bundle", "check_digest_form"]

_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_REPLACEMENT_SECONDS, _TRIES = 1.0, 3
_SHOWN_DIGEST = len("sha256:") + 12


class Bundle:
    """A bundle whose manifest has been read. Use `Bundle.open`; it is safe to share between threads.

    Attributes:
        folder: its absolute path, links resolved.
        manifest: the content of `bundle.json`.
        digest: `sha256:…` of `bundle.json`, which pins all other files.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str, files: PinnedFiles) -> None:
        self.folder, self.manifest, self.digest, self._files = folder, manifest, digest, files
        self._checked_graphs: set[str] = set()

    def __repr__(self) -> str:
        return f"<Bundle {quote(self.name)}: {str(self.folder)!r}, {self.digest[:_SHOWN_DIGEST]}…>"

    @property
    def name(self) -> str:
        """The folder's name, and that of the sample bundle wherever a bundle is named."""
        return SAMPLE if self.folder == bundle_path().resolve() else self.folder.name

    @classmethod
    def open(cls, path: str | os.PathLike[str], digest: str | None = None, *, trust_cache: bool = True) -> Bundle:
        """Read the manifest of the bundle in the folder `path`.

        Args:
            digest: the expected digest of `bundle.json`, `sha256:` and 64 lower-case hexadecimal digits; compared
                before the file is parsed. None accepts any.
            trust_cache: do not hash a large file again that an earlier run hashed and that has not changed since
                according to the file system (`latentrt.bundle.digest_cache`).

        Raises:
            RequestError: `digest` is not of that form.
            BundleError: there is no bundle at `path`.
            IntegrityError: `bundle.json` is not the pinned one, or is a link that leads out of the bundle.
            ManifestError: `bundle.json` is not a manifest of this format, or describes an impossible bundle.
        """
        if digest is not None:
            check_digest_form(digest)
        root, data = _read_manifest(path)
        found = f"sha256:{hash_bytes(data)}"
        if digest not in (None, found):
            raise IntegrityError(
                f"{root.folder / MANIFEST_NAME} is {found}, expected the pinned {digest}: it is another bundle, or "
                "was changed. Get the pinned one, or pin this one if you trust its source"
            )
        try:
            manifest = decode_manifest(data)
        except ManifestError as error:
            raise ManifestError(f"{root.folder}: {error}") from None
        cache = DigestCache() if trust_cache else None
        return cls(root.folder, manifest, found, PinnedFiles(root, manifest.files, cache, digest=found))

    def path(self, name: str) -> Path:
        """Return the path of the file `name`, after comparing it with its SHA-256.

        The path is inside the bundle even if it is a symbolic link, so that files keep their names and neighbours.

        Raises:
            BundleError: the manifest does not name the file.
            IntegrityError: it is missing, differs from the pinned one, or is a link that leads out of the bundle.
            GraphError: it is a graph that the exporter cannot have written, or that differs from the manifest.
        """
        self._files.check([name])
        if name not in self._checked_graphs:
            self._check_graph(name)
        return self.folder / name

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of the file `name`, the same that were hashed.

        Args:
            max_bytes: the largest file that the caller can use; a larger one is neither read nor hashed.

        Raises:
            BundleError, IntegrityError, GraphError: as for `path`. BundleError: the file is larger than `max_bytes`.
        """
        data = self._files.read(name, max_bytes)
        if name not in self._checked_graphs:
            self._check_graph(name, data)
        return data

    def read_graph(self, name: str) -> CheckedGraph:
        """Return the graph of the file `name`, the bytes that were hashed, for a library that runs or builds it.

        Raises:
            BundleError, IntegrityError, GraphError: as for `path`. BundleError: the file is no graph.
        """
        graph = self._check_graph(name)
        if graph is None:
            raise BundleError(f"{name} is no graph of {self.folder}")
        return graph

    def check(self, names: Iterable[str]) -> None:
        """Compare several files with their SHA-256 in parallel; `path` returns without hashing them again.

        Raises:
            BundleError, IntegrityError: as for `path`; the message lists every faulty file.
        """
        self._files.check(names)

    def verify(self, progress: ByteProgress | None = None) -> None:
        """Hash every file of the bundle, regardless of cached digests, and check every graph.

        Args:
            progress: called with the number of bytes hashed since the last call, from one thread at a time.

        Raises:
            IntegrityError: a file is missing or differs; the message lists every faulty file.
            GraphError: as for `path`.
        """
        self._files.verify(progress)
        for name, _ in named_files(self.manifest):
            if name not in self._checked_graphs:
                self._check_graph(name)

    def component_files(self, component: str, precision: Precision, part: PartName | None = None) -> tuple[str, str]:
        """Return the names of a component's files: the graph that computes in `precision`, and the weights.

        Args:
            component: its name in the manifest.
            precision: of the graph.
            part: the part whose graph is returned; None: the graph of the whole component.

        Raises:
            BundleError: the bundle has no such component, part or graph.
        """
        found = self.manifest.components.get(component)
        owner = found if found is None or part is None else found.parts.get(part)
        if found is None or owner is None or precision not in owner.graphs:
            owner_name = component if part is None else f"{component}'s {part} part"
            has = ", ".join(self._describe_graphs())
            is_int8 = self.manifest.precision == "int8"
            remedy = "; a bundle of int8 is for CPUs, export another: --precision float16" if is_int8 else ""
            raise BundleError(f"{self.folder} has no {precision} graph of {owner_name}; it has {has}{remedy}")
        return owner.graphs[precision].file, found.weights.file

    @contextmanager
    def weights(self, component: str) -> Iterator[WeightSet]:
        """Open the weights of a component, compared with their SHA-256, for as long as a library loads them.

        Raises:
            BundleError, IntegrityError: as for `path`. IntegrityError: the file was changed within the block; nothing
                that was made of it may be used or stored.
        """
        name = self._component(component).weights.file
        with self._files.open_intact(name) as stream:
            yield WeightSet(self.manifest.files[name].sha256, stream)

    def files_of(self, components: Iterable[str]) -> Iterator[str]:
        """Yield the names of all files of these components: weights, and graphs of every precision and part.

        Raises:
            BundleError: the bundle lacks one of the components.
        """
        for name in components:
            record = self._component(name)
            yield record.weights.file
            for graphs in (record.graphs, *(part.graphs for part in record.parts.values())):
                yield from (graph.file for graph in graphs.values())

    def _component(self, name: str) -> Component:
        record = self.manifest.components.get(name)
        if record is None:
            raise BundleError(f"{self.folder} has no {name}; it has {', '.join(self.manifest.components)}")
        return record

    def _check_graph(self, name: str, data: bytes | None = None) -> CheckedGraph | None:
        """Check a file if it is a graph, and return it; None if it is another file.

        Args:
            data: its content, the same that was hashed; None to read it.
        """
        from latentrt.bundle.graph_check import check_graph, graphs_by_file  # numpy, which opening does not need

        expected = graphs_by_file(self.manifest).get(name)
        if expected is None:
            return None
        size = self.manifest.files[name].size
        if size > MAX_GRAPH_BYTES:
            raise GraphError(f"{name} has {size:,} bytes, expected a graph of at most {MAX_GRAPH_BYTES:,}")
        graph = check_graph(self._files.read(name, MAX_GRAPH_BYTES) if data is None else data, expected)
        self._checked_graphs.add(name)
        return graph

    def _describe_graphs(self) -> Iterator[str]:
        for name, component in self.manifest.components.items():
            yield f"{name} in {' and '.join(component.graphs)}"
            for part_name, part in component.parts.items():
                yield f"its {part_name} part in {' and '.join(part.graphs)}"


def check_digest_form(digest: str) -> None:
    """Reject a malformed digest.

    Raises:
        RequestError: it is not `sha256:` and 64 lower-case hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise RequestError(
            f"`digest`: got {quote(digest)}, expected sha256: and 64 lower-case hexadecimal digits; "
            "`latentrt inspect BUNDLE` prints the digest of a bundle"
        )


def _bundle_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a bundle's folder.

    Raises:
        BundleError: there is no bundle; the message says whether it is a checkpoint, a file or missing.
    """
    # os.path returns False where Path raises: for a folder without permission to enter, or an invalid name.
    if os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        return Path(path)
    found, otherwise = "does not exist or cannot be entered", "; latentrt export CHECKPOINT BUNDLE writes one"
    if os.path.isfile(os.path.join(path, "model_index.json")):
        raise BundleError(f"{path} is a checkpoint, not a bundle; turn it into one: latentrt export {path} BUNDLE")
    if os.path.exists(path):
        found = f"has no {MANIFEST_NAME}" if os.path.isdir(path) else "is a file"
    else:
        found += _suggest_pull(path)
        otherwise = did_you_mean(os.fspath(path), [SAMPLE]) or otherwise
    raise BundleError(f"{path} {found}, expected the folder of a bundle{otherwise}")


def _suggest_pull(path: str | os.PathLike[str]) -> str:
    """Return a hint where a path that does not exist has the form of a repository's name; no network is used."""
    from latentrt.hub import parse_hub_path

    text = re.sub("^hf:/(?!/)", "hf://", os.fspath(path))  # a Path joins slashes
    try:
        repository = parse_hub_path(text)
    except RequestError:
        return ""
    return f" (if it is a repository on the hub: latentrt pull {text} BUNDLE)" if repository is not None else ""


def _read_manifest(path: str | os.PathLike[str]) -> tuple[BundleRoot, bytes]:
    """Return the root of the bundle at `path` and the bytes of its manifest.

    Where the system cannot exchange two folders in one step, a bundle is missing for a moment while an export replaces
    it, so that a missing bundle is looked for again for up to a second.

    Raises:
        BundleError: there is no bundle. IntegrityError: its manifest cannot be read.
    """
    deadline, tries_left = time.monotonic() + _REPLACEMENT_SECONDS, _TRIES
    while True:
        try:
            root = BundleRoot(_bundle_folder(path))
            with PinnedFiles(root, {}, None).opened(MANIFEST_NAME) as stream:
                # One byte beyond the limit, so that `decode_manifest` detects a file that is too large.
                return root, read_at_most(stream, MAX_MANIFEST_BYTES)
        except BundleError:
            if not is_being_replaced(path):
                tries_left -= 1  # or it has just been replaced, between the two
            if not tries_left or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
