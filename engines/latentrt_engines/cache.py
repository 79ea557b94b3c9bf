"""How does an engine get into the store, once, whole, and whatever happens on the way?

Whoever builds an engine holds the lock of its key, which the system lets go when the process ends, however it ends.
The plan is written as a draft, under the lock, renamed to a name made of its own hash, and only then does the record
change, by rename. So a builder that is killed at any moment leaves the earlier engine, the new one or none; what it
left half made is removed by the next who holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from latentrt.bundle.atomic_file import write_atomically
from latentrt.engines.record import EngineRecord
from latentrt.engines.store import (
    ASIDE,
    LOCKS,
    RECORD_NAME,
    WEIGHTS_NAME,
    EngineStore,
    StoredEngine,
    encode_record,
    plan_name,
)
from latentrt.errors import EngineDamagedError, EngineError, MissingExtraError

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["EngineCache", "in_words"]

_DRAFTS = "drafts"


class EngineCache(EngineStore):
    """The store of engines, as those see it who build.

    Args:
        folder: of the engines; the user's own cache if None.

    Raises:
        EngineError: the folder cannot be made, or others can reach into it.
    """

    @contextlib.contextmanager
    def locked(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """Hold the lock of a key; the block may write a draft to the path it is given.

        Args:
            on_wait: called once where another process holds the lock.

        Raises:
            EngineError: nothing can be written into the cache.
        """
        with in_words(self.folder):
            for name in (LOCKS, _DRAFTS):
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
            lock = _lock(self.folder / LOCKS / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except TimeoutError:
                on_wait()
                lock.acquire()
        draft = self.folder / _DRAFTS / f"{key}.plan"
        try:
            with in_words(self.folder):
                # What is there was left by a process that was killed: nobody else may write here. Opened now, so that
                # a folder that cannot be written to is known before the work.
                draft.write_bytes(b"")
            yield draft
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            lock.release()

    def intact(self, key: str) -> StoredEngine | None:
        """The engine of this key, its plan compared with its hash; None if there is none, or what was there failed and
        was moved aside."""
        try:
            engine = self.get(key)
        except EngineDamagedError as error:
            self.set_aside(key, str(error))
            return None
        if engine is not None:
            with contextlib.suppress(EngineDamagedError):
                self.plan(engine)
                return engine
        return None

    def publish(self, record: EngineRecord, draft: Path, arrays: dict[str, str]) -> StoredEngine:
        """Make an engine of a draft, in place of the one that was there. Its key's lock is held.

        Args:
            arrays: a digest of each of its weights, by name.

        Raises:
            EngineError: it cannot be written; the earlier engine is as it was.
        """
        engine = StoredEngine(self.folder / record.key, record)
        with in_words(self.folder):
            engine.folder.mkdir(mode=0o700, exist_ok=True)
            os.replace(draft, engine.plan_path)
            write_atomically(engine.folder / WEIGHTS_NAME, msgspec.json.encode(arrays), mode=0o600)
            write_atomically(engine.folder / RECORD_NAME, encode_record(record), mode=0o600)
        for other in engine.folder.glob("*.plan"):
            if other.name != plan_name(record):
                other.unlink(missing_ok=True)
        return engine

    def leftovers(self) -> list[Path]:
        """What no engine needs: what was moved aside, drafts of processes that are gone, folders without a record."""
        aside = [path for path in (self.folder / ASIDE).glob("*") if path.is_dir()]
        drafts = [path for path in (self.folder / _DRAFTS).glob("*.plan") if not self._is_locked(path.stem)]
        bare = [
            self.folder / key
            for key in self.all_keys()
            if not (self.folder / key / RECORD_NAME).exists() and not self._is_locked(key)
        ]
        return [*aside, *drafts, *bare]

    def delete(self, path: Path) -> None:
        """Delete an engine's folder or a leftover; a builder that is at it is waited for."""
        if path.parent == self.folder:
            with self.locked(path.name):
                self.remove(path.name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _is_locked(self, key: str) -> bool:
        lock = _lock(self.folder / LOCKS / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            return True
        lock.release()
        return False


def _lock(path: Path) -> BaseFileLock:
    """A lock that the system lets go with the process. Only who builds or deletes needs it: to list and to plan, what
    the runtime brings will do."""
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingExtraError("filelock", "rtx", "build or delete engines") from error
    return FileLock(path, mode=0o600)


@contextlib.contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """What the system refuses when something is written into the cache, as a sentence.

    Raises:
        EngineError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "make room (latentrt engines prune)" if full else "make it writable"
        raise EngineError(
            f"{folder} cannot be written: {error.strerror}; {mend}, or name another folder with LATENTRT_CACHE. "
            "The engines that were there are as they were"
        ) from error
