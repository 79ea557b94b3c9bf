"""The builder's side of the store of engines: locks, publishing, digests of weights, and pruning.

A process that builds an engine holds the lock of the engine's key; the operating system releases the lock when the
process exits or crashes. The plan is written as a draft under the lock and renamed to its own hash; the record is
replaced last, by a rename. So a builder that is killed at any time leaves the earlier engine, the new one or none; the
next holder of the lock removes its unfinished files.

Pruning decides again under the lock: an engine that was built or used since it was listed is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from latentrt.bundle.atomic_file import remove_abandoned_drafts, write_atomically
from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.interrupts import uninterrupted
from latentrt.bundle.printable import quote
from latentrt.bundle.renames import replace_file
from latentrt.bundle.strict_json import MAX_BYTES, AmbiguousJSONError, StrictDecoder
from latentrt.engines.record import EngineRecord, LibraryName
from latentrt.engines.store import (
    DRAFTS,
    LOCKS,
    QUARANTINE,
    RECORD_NAME,
    WEIGHTS_NAME,
    EngineStore,
    StoredEngine,
    encode_record,
    plan_name,
)
from latentrt.errors import EngineDamagedError, EngineError, MissingExtraError, RequestError
from latentrt_engines.library import Library, load_libraries

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "EngineCache",
    "Prunable",
    "digest_arrays",
    "find_prunable",
    "read_array_digests",
    "translating_os_errors",
]

_SHORTEST_PREFIX = 4
_ARRAY_DIGESTS = StrictDecoder(dict[str, str])


class EngineCache(EngineStore):
    """The store of engines, with the methods that write to it.

    Args:
        folder: the folder of the engines; None for the user's own cache.

    Raises:
        EngineError: the folder cannot be created, or other users can access it.
    """

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """Hold the lock of a key, and yield the path for a draft of its plan.

        Args:
            on_wait: called once if another process holds the lock.

        Raises:
            EngineError: the cache is not writable.
        """
        with translating_os_errors(self.folder):
            for name in (LOCKS, DRAFTS):
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
            lock = _make_lock(self.folder / LOCKS / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except TimeoutError:
                on_wait()
                lock.acquire()
        draft = self.folder / DRAFTS / f"{key}.plan"
        try:
            with translating_os_errors(self.folder):
                # Only the holder of the lock writes here, so an earlier draft was left by a killed process. Opening
                # it now reports a folder that is not writable before the build.
                draft.write_bytes(b"")
                self._remove_unfinished(key)
            yield draft
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            lock.release()

    def _remove_unfinished(self, key: str) -> None:
        """Remove the files that a killed process left in an engine's folder. The caller holds the key's lock."""
        remove_abandoned_drafts(self.folder / key)
        with contextlib.suppress(EngineDamagedError):  # a damaged record is left for the quarantine
            if (engine := self.get(key)) is not None:
                _remove_other_plans(engine)

    def find_intact(self, key: str) -> StoredEngine | None:
        """Return the engine with a key; quarantine it and return None if its plan does not have the recorded hash."""
        try:
            engine = self.get(key)
        except EngineDamagedError as error:
            self.quarantine(key, str(error))
            return None
        if engine is not None:
            with contextlib.suppress(EngineDamagedError):
                self.plan(engine)
                return engine
        return None

    def find_by_prefix(self, prefix: str) -> StoredEngine:
        """Return the engine whose key begins with a prefix.

        Raises:
            RequestError: the prefix has fewer than four digits, or not exactly one engine has such a key.
        """
        if len(prefix) < _SHORTEST_PREFIX:
            raise RequestError(f"got the key {quote(prefix)}, expected its first {_SHORTEST_PREFIX} digits or more")
        found = [engine for engine in self.engines() if engine.key.startswith(prefix)]
        if len(found) != 1:
            raise RequestError(
                f"got the key {quote(prefix)}, expected the beginning of one engine's key, {len(found)} engines have "
                "it; latentrt engines list shows the keys"
            )
        return found[0]

    def publish(self, record: EngineRecord, draft: Path, digests: dict[str, str]) -> StoredEngine:
        """Move a draft into an engine's place, replacing an earlier engine. The caller holds the key's lock.

        Args:
            digests: a digest of each weight array, by name (`digest_arrays`).

        Raises:
            EngineError: the cache cannot be written; the earlier engine is unchanged.
        """
        engine = StoredEngine(self.folder / record.key, record)
        with uninterrupted():
            with translating_os_errors(self.folder):
                engine.folder.mkdir(mode=0o700, exist_ok=True)
                replace_file(draft, engine.plan_path)
                write_atomically(engine.folder / WEIGHTS_NAME, msgspec.json.encode(digests), mode=0o600)
                write_atomically(engine.folder / RECORD_NAME, encode_record(record), mode=0o600)
            _remove_other_plans(engine)
        return engine

    def delete(self, prunable: Prunable) -> bool:
        """Delete a file or folder of the cache unless its engine has been used or built again since it was found.

        Waits for a process that builds the engine, and keeps the new engine.

        Returns:
            Whether it was deleted.
        """
        path, key = prunable.path, prunable.path.name
        if path.parent == self.folder / QUARANTINE:
            shutil.rmtree(path, ignore_errors=True)
            return True
        if path.parent == self.folder / DRAFTS:
            with self.lock(path.stem):  # which removes the draft
                return True
        with self.lock(key):
            if prunable.record is None:
                unchanged = not (path / RECORD_NAME).exists()
            else:
                found = _read_state(self, key)
                unchanged = found is not None and found == (prunable.record, prunable.used_at_ns)
            if unchanged:
                self.remove(key)
            return unchanged


def _remove_other_plans(engine: StoredEngine) -> None:
    for other in engine.folder.glob("*.plan"):
        if other.name != plan_name(engine.record):
            other.unlink(missing_ok=True)


def _read_state(cache: EngineStore, key: str) -> tuple[EngineRecord, int] | None:
    """Return an engine's record and the time of its last use in nanoseconds since 1970; None if it is gone."""
    with contextlib.suppress(EngineDamagedError, OSError):
        if (engine := cache.get(key)) is not None:
            return engine.record, (engine.folder / RECORD_NAME).stat().st_mtime_ns
    return None


def _make_lock(path: Path) -> BaseFileLock:
    """Return a lock that the operating system releases when the process ends.

    Its package is imported here, because only building and deleting need it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingExtraError("filelock", "rtx", "build or delete engines") from error
    return FileLock(path, mode=0o600)


@contextlib.contextmanager
def translating_os_errors(folder: Path) -> Iterator[None]:
    """Replace an OSError, raised while writing to the cache, by an error with the folder, the reason and the remedy.

    Raises:
        EngineError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room (latentrt engines prune)" if full else "make it writable"
        raise EngineError(
            f"{folder} cannot be written: {error.strerror}; {remedy}, or name another folder with LATENTRT_CACHE. "
            "Existing engines are unchanged"
        ) from error


# Digests of weights


def digest_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Return a digest of each array's bytes, by name: BLAKE2b, 16 hexadecimal digits.

    They only show which arrays changed, so they are short; the SHA-256 of the weights' file pins the weights.
    """
    return {
        name: hashlib.blake2b(array.reshape(-1).view("u1").data, digest_size=8).hexdigest()
        for name, array in arrays.items()
    }


def read_array_digests(engine: StoredEngine) -> dict[str, str] | None:
    """Read the digests of the weight arrays that an engine was published with; None if they cannot be read."""
    try:
        with open_regular(engine.folder / WEIGHTS_NAME) as stream:
            return _ARRAY_DIGESTS.decode(read_at_most(stream, MAX_BYTES))
    except (OSError, AmbiguousJSONError):
        return None


# Pruning


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """A file or folder of the cache that can be deleted, and the reason.

    Attributes:
        record: the engine's record; None for a leftover.
        used_at_ns: the time of the engine's last use in nanoseconds since 1970; 0 for a leftover.
    """

    path: Path
    reason: str
    size_bytes: int
    record: EngineRecord | None = None
    used_at_ns: int = 0


def find_prunable(cache: EngineCache, *, everything: bool, not_used_since: float | None) -> list[Prunable]:
    """Find deletable files and folders: leftovers, and engines of another version of an installed library.

    Args:
        everything: whether to include all engines.
        not_used_since: include engines that were neither built nor loaded since this time, in seconds since 1970.
    """
    versions = {name: found.version for name, found in load_libraries().items() if isinstance(found, Library)}
    found = [
        Prunable(path=path, reason=_describe_leftover(path), size_bytes=_total_size(path))
        for path in cache.find_leftovers()
    ]
    for engine in cache.engines():
        state = _read_state(cache, engine.key)
        if state is None:  # deleted meanwhile
            continue
        record, used_at_ns = state
        reason = _prune_reason(record, used_at_ns, versions, everything=everything, not_used_since=not_used_since)
        if reason is not None:
            found.append(
                Prunable(
                    path=engine.folder,
                    reason=reason,
                    size_bytes=_total_size(engine.folder),
                    record=record,
                    used_at_ns=used_at_ns,
                )
            )
    return found


def _prune_reason(
    record: EngineRecord,
    used_at_ns: int,
    versions: Mapping[LibraryName, str],
    *,
    everything: bool,
    not_used_since: float | None,
) -> str | None:
    identity = record.identity
    version = versions.get(identity.library)
    if everything:
        return f"{identity.component}, as all engines"
    # A version-compatible plan outlives an upgrade.
    if version not in (None, identity.library_version) and not identity.options.version_compatible:
        return f"{identity.component}, built by {identity.library} {identity.library_version}, this is {version}"
    if not_used_since is not None and used_at_ns < not_used_since * 1e9:
        return f"{identity.component}, not used recently"
    return None


def _describe_leftover(path: Path) -> str:
    return "quarantined: damaged" if path.parent.name == QUARANTINE else "left by a build that was killed"


def _total_size(path: Path) -> int:
    total = 0
    for file in _files(path):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += file.lstat().st_size
    return total


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)
