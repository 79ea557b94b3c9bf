"""The files of a bundle, compared with the SHA-256 that the manifest pins."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader

from latentrt.bundle.digest_cache import DigestCache, FileState
from latentrt.bundle.digests import ByteProgress, hash_bytes, hash_stream, open_regular, read_at_most
from latentrt.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord
from latentrt.bundle.root import BundleRoot
from latentrt.errors import BundleError, IntegrityError

__all__ = ["PinnedFiles"]

# One thread hashes faster than most disks read; more threads than this cause seeks on a hard disk.
_HASHING_THREADS = min(4, os.cpu_count() or 1)


class PinnedFiles:
    """The files of a bundle, each compared with its SHA-256 before use. Threads may share it.

    Args:
        root: the folder that must contain the files.
        records: the pin of each file, by name.
        cache: digests stored by earlier runs; None stores and reads none.
        digest: the digest of the manifest that the records are from, `sha256:…`, to tell a replaced bundle from a
            damaged one; None if it is unknown.
    """

    def __init__(
        self,
        root: BundleRoot,
        records: Mapping[str, FileRecord],
        cache: DigestCache | None,
        *,
        digest: str | None = None,
    ) -> None:
        self._root, self._records, self._cache, self._digest = root, records, cache, digest
        self._intact: dict[str, FileState] = {}

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of a file, the same ones that were hashed.

        Args:
            max_bytes: the largest file that is read; a larger one is neither read nor hashed.

        Raises:
            BundleError: the manifest does not name the file, or it is larger than `max_bytes`.
            IntegrityError: it is missing, differs from the pinned one, or is a link that leads out of the bundle.
        """
        record = self._record(name)
        if record.size > max_bytes:
            raise BundleError(
                f"{self._root.folder / name} has {record.size:,} bytes, expected at most {max_bytes:,}; export the "
                "bundle again"
            )
        try:
            with self.opened(name) as stream:
                _check_size(name, os.fstat(stream.fileno()).st_size, record)
                data = read_at_most(stream, record.size)
            _check_hash(name, hash_bytes(data), record)
        except IntegrityError as error:
            raise self._make_error([str(error)], 1) from None
        return data

    def check(self, names: Iterable[str]) -> None:
        """Compare files with their SHA-256, unless that was done before and they have not changed since.

        Raises:
            BundleError, IntegrityError: as for `read`; the message lists every faulty file.
        """
        self._compare_all([name for name in dict.fromkeys(names) if not self._was_compared(name)], self._cache, None)

    def verify(self, progress: ByteProgress | None = None) -> None:
        """Hash every file, regardless of cached digests.

        Args:
            progress: called from one thread at a time.

        Raises:
            IntegrityError: a file is missing or differs; the message lists every faulty file.
        """
        self._compare_all(list(self._records), None, progress and _serialize(progress))

    @contextmanager
    def open_intact(self, name: str) -> Iterator[BufferedReader]:
        """Open a file for a library that reads or maps it through the descriptor, and compare it with its SHA-256.

        Names are not followed again, so that another file under this name has no effect. Leaving the block checks
        that the file itself has not been written to meanwhile.

        Raises:
            BundleError, IntegrityError: as for `read`. IntegrityError: it has changed while it was in use.
        """
        self._record(name)
        try:
            stream = open_regular(self._root.resolve(name))
        except OSError as error:
            raise self._make_error([f"{name} cannot be read: {error.strerror or error}"], 1) from None
        except IntegrityError as error:
            raise self._make_error([str(error)], 1) from None
        with stream:
            before = FileState.of(os.fstat(stream.fileno()))
            try:
                if self._intact.get(name) != before:
                    self._compare_opened(name, stream, self._cache, None)
            except (IntegrityError, OSError) as error:
                raise self._make_error([str(error)], 1) from None
            yield stream
            if FileState.of(os.fstat(stream.fileno())) != before:
                self._intact.pop(name, None)
                raise IntegrityError(
                    f"{self._root.folder / name} was changed, moved or linked while it was being loaded, expected it "
                    "to stay as it is; load it again, and stop the program that writes there"
                )

    @contextmanager
    def opened(self, name: str) -> Iterator[BufferedReader]:
        """Open a file within the bundle's root, without comparing its hash.

        Raises:
            IntegrityError: it is missing, cannot be read (also while it is open), or is a link that leads out.
        """
        try:
            with open_regular(self._root.resolve(name)) as stream:
                yield stream
        except OSError as error:
            raise IntegrityError(f"{name} cannot be read: {error.strerror or error}") from None

    def _record(self, name: str) -> FileRecord:
        if name not in self._records:
            raise BundleError(
                f"{self._root.folder} has no file {name!r} in its manifest, which pins {sorted(self._records)}"
            )
        return self._records[name]

    def _was_compared(self, name: str) -> bool:
        self._record(name)
        try:
            return self._intact.get(name) == FileState.of(os.stat(self._root.folder / name))
        except OSError:
            return False

    def _compare_all(self, names: list[str], cache: DigestCache | None, progress: ByteProgress | None) -> None:
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            faults = list(pool.map(lambda name: self._find_fault(name, cache, progress), names))
        if wrong := [fault for fault in faults if fault is not None]:
            raise self._make_error(wrong, len(names))

    def _find_fault(self, name: str, cache: DigestCache | None, progress: ByteProgress | None) -> str | None:
        """Describe the fault of one file; None if it is intact."""
        try:
            self._compare(name, cache, progress)
        except IntegrityError as error:
            return str(error)
        return None

    def _compare(self, name: str, cache: DigestCache | None, progress: ByteProgress | None) -> None:
        with self.opened(name) as stream:
            self._compare_opened(name, stream, cache, progress)

    def _compare_opened(
        self, name: str, stream: BufferedReader, cache: DigestCache | None, progress: ByteProgress | None
    ) -> None:
        record, found = self._records[name], os.fstat(stream.fileno())
        _check_size(name, found.st_size, record)
        sha256 = (cache and cache.get(found)) or _hash(stream, cache, progress)
        _check_hash(name, sha256, record)
        self._intact[name] = FileState.of(found)

    def _make_error(self, faults: list[str], compared: int) -> IntegrityError:
        if self._was_replaced():
            return IntegrityError(
                f"{self._root.folder} was replaced by another bundle, or moved away, since it was opened: its "
                f"bundle.json is no longer {self._digest}; open it again"
            )
        wrong, listed = f"wrong, {len(faults)} of {compared} files compared", "\n  ".join(faults)
        return IntegrityError(
            f"{self._root.folder} does not match its bundle.json; {wrong}:\n  {listed}\n"
            "Copy or download the bundle again, or write a new one: latentrt export CHECKPOINT BUNDLE"
        )

    def _was_replaced(self) -> bool:
        """Return whether the folder's `bundle.json` is no longer the one that the records are from."""
        if self._digest is None:
            return False
        try:
            with self.opened(MANIFEST_NAME) as stream:
                return f"sha256:{hash_bytes(read_at_most(stream, MAX_MANIFEST_BYTES))}" != self._digest
        except IntegrityError:
            return True


def _hash(stream: BufferedReader, cache: DigestCache | None, progress: ByteProgress | None) -> str:
    before, began_ns = os.fstat(stream.fileno()), time.time_ns()
    sha256, _ = hash_stream(stream, progress)
    unchanged = FileState.of(os.fstat(stream.fileno())) == FileState.of(before)
    if cache is not None and unchanged:
        cache.put(before, sha256, began_ns)
    return sha256


def _check_size(name: str, size: int, record: FileRecord) -> None:
    if size != record.size:
        raise IntegrityError(f"{name} has {size:,} bytes, expected {record.size:,}")


def _check_hash(name: str, sha256: str, record: FileRecord) -> None:
    if sha256 != record.sha256:
        raise IntegrityError(f"{name} has SHA-256 {sha256}, expected {record.sha256}")


def _serialize(progress: ByteProgress) -> ByteProgress:
    """Return a callback that several threads may call; `progress` is called from one at a time."""
    lock = threading.Lock()

    def locked(count: int) -> None:
        with lock:
            progress(count)

    return locked
