"""The user's store of engines: reading records, hashing plans before they are used, and quarantining damaged engines.

Engines are kept in the user's own cache, a folder each::

    ~/.cache/latentrt/engines/
      <key>/record.json          the engine's record (`latentrt.engines.record`)
      <key>/<sha256>.plan        the plan; named for its hash, so that a new plan never overwrites the old one
      <key>/weights.json         a digest of each weight array, to tell which arrays changed
      <key>/<sha256>.rtcache     kernels that TensorRT-RTX compiled just in time on this machine
      drafts/<key>.plan          a plan that is being built
      locks/<key>.lock           locked by the process that builds the engine; the file itself has no meaning
      quarantine/<key>.<time>/   an engine whose hash or record was wrong

A plan is native code. `EngineStore.plan` returns bytes that were hashed and compared; nothing else may be
deserialised. A damaged engine is moved to the quarantine, so that the next build replaces it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from latentrt.bundle.digests import hash_bytes, open_regular, read_at_most
from latentrt.bundle.file_lock import FIRST_BYTE, claim
from latentrt.bundle.printable import printable
from latentrt.bundle.renames import rename_folder
from latentrt.bundle.signatures import has_plain_axes
from latentrt.bundle.strict_json import AmbiguousJSONError, StrictDecoder, parse_json
from latentrt.bundle.user_cache import require_private_folder
from latentrt.engines.record import ENGINE_FORMAT, EngineIdentity, EngineRecord, serves
from latentrt.errors import EngineDamagedError, EngineError

__all__ = [
    "DRAFTS",
    "LOCKS",
    "MAX_PLAN_BYTES",
    "MAX_RECORD_BYTES",
    "QUARANTINE",
    "RECORD_NAME",
    "WEIGHTS_NAME",
    "EngineStore",
    "StoredEngine",
    "decode_record",
    "encode_record",
    "plan_name",
]

RECORD_NAME, WEIGHTS_NAME = "record.json", "weights.json"
DRAFTS, LOCKS, QUARANTINE = "drafts", "locks", "quarantine"

_KEY = re.compile("[0-9a-f]{64}")
MAX_RECORD_BYTES = 4 << 20
"""Longest `record.json` that is read."""
MAX_PLAN_BYTES = 64 << 30
"""Longest plan that is read, weights included: those of the largest denoisers have 25 GB in half precision."""
_MAX_LISTED = 10
_log = logging.getLogger("latentrt")


def plan_name(record: EngineRecord) -> str:
    """Return the name of an engine's plan file."""
    return f"{record.plan.sha256}.plan"


class _Versioned(msgspec.Struct):
    format_version: int


_VERSION, _RECORD = StrictDecoder(_Versioned), StrictDecoder(EngineRecord)


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the store: its folder and its record. Its plan has not been read yet."""

    folder: Path
    record: EngineRecord

    @property
    def key(self) -> str:
        """The engine's key, which is its folder's name."""
        return self.folder.name

    @property
    def plan_path(self) -> Path:
        """The path of the plan."""
        return self.folder / plan_name(self.record)

    @property
    def is_complete(self) -> bool:
        """True if the plan's file exists and has the recorded size; nothing is hashed."""
        with contextlib.suppress(OSError):
            return self.plan_path.stat().st_size == self.record.plan.size
        return False


class EngineStore:
    """The engines of this user.

    Args:
        folder: of the engines; None: the user's own cache.

    Raises:
        EngineError: the folder cannot be created, or other users can access it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = require_private_folder("engines") if folder is None else folder

    def get(self, key: str) -> StoredEngine | None:
        """Return the engine with this key, or None.

        Raises:
            EngineDamagedError: its record cannot be read, is invalid or has another key.
        """
        folder = self.folder / key
        try:
            with open_regular(folder / RECORD_NAME) as stream:
                data = read_at_most(stream, MAX_RECORD_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineDamagedError(f"{folder / RECORD_NAME} cannot be read: {error.strerror or error}") from None
        record = decode_record(data, f"{folder / RECORD_NAME}")
        if record.key != key:
            raise EngineDamagedError(
                f"{folder / RECORD_NAME} is the record of another engine, {record.key[:12]}, expected {key[:12]}"
            )
        return StoredEngine(folder, record)

    def list_keys(self) -> list[str]:
        """List the keys that have a file or folder in the store, whether or not it is an engine."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.folder) if _KEY.fullmatch(name))
        return []

    def engines(self) -> Iterator[StoredEngine]:
        """Yield every engine with a valid record; log the others."""
        for key in self.list_keys():
            try:
                engine = self.get(key)
            except EngineDamagedError as error:
                _log.warning("%s; latentrt engines verify quarantines it", error)
                continue
            if engine is not None:
                yield engine

    def find(self, wanted: EngineIdentity) -> StoredEngine | None:
        """Return a complete engine that serves an identity (`latentrt.engines.record.serves`), or None."""
        for engine in self.engines():
            if serves(engine.record.identity, wanted) and engine.is_complete:
                return engine
        return None

    def plan(self, engine: StoredEngine) -> bytes:
        """Read an engine's plan; return exactly the bytes that were hashed.

        Raises:
            EngineDamagedError: the plan is missing or differs from its record; the engine is now in the quarantine.
        """
        try:
            data = _read_plan(engine)
        except EngineDamagedError as error:
            current = self.get(engine.key)
            if current is None:
                raise
            if current.record != engine.record:  # replaced by a build meanwhile
                return self.plan(current)
            where = self.quarantine(engine.key, str(error))
            raise EngineDamagedError(f"{error}; it was moved to {where}, build it again: latentrt build") from None
        return data

    def mark_used(self, engine: StoredEngine) -> None:
        """Set the modification time of an engine's record to now; pruning reads it as the time of the last use."""
        with contextlib.suppress(OSError):
            os.utime(engine.folder / RECORD_NAME)

    def quarantine(self, key: str, reason: str) -> Path:
        """Move a key's file or folder to the quarantine and write the reason next to it.

        Returns:
            The new path. It does not exist if another process was faster.

        Raises:
            EngineError: it cannot be moved.
        """
        target = self.folder / QUARANTINE / f"{key}.{time.strftime('%Y%m%dT%H%M%S')}.{secrets.token_hex(4)}"
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            rename_folder(self.folder / key, target)
            if target.is_dir():
                (target / "reason.txt").write_text(f"{printable(reason)}\n", encoding="utf-8")
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            raise EngineError(
                f"{reason}; {self.folder / key} cannot be quarantined: {error.strerror}. Delete it"
            ) from None
        return target

    def find_leftovers(self) -> list[Path]:
        """Return files that no engine needs: the quarantine, drafts of dead processes, and folders without a record."""
        quarantined = [path for path in (self.folder / QUARANTINE).glob("*") if path.is_dir()]
        drafts = [path for path in (self.folder / DRAFTS).glob("*.plan") if not self._is_locked(path.stem)]
        bare = [
            self.folder / key
            for key in self.list_keys()
            if not (self.folder / key / RECORD_NAME).exists() and not self._is_locked(key)
        ]
        return [*quarantined, *drafts, *bare]

    def _is_locked(self, key: str) -> bool:
        """Return whether a process builds the engine with a key."""
        lock = self.folder / LOCKS / f"{key}.lock"
        with claim(lock, FIRST_BYTE) as free:
            return free is None and lock.exists()

    def remove(self, key: str) -> None:
        """Delete an engine, its record first, so that no reader finds a record without a plan."""
        folder = self.folder / key
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / RECORD_NAME)
        shutil.rmtree(folder, ignore_errors=True)


def decode_record(data: bytes, name: str) -> EngineRecord:
    """Decode a `record.json`; unknown keys are errors.

    Args:
        name: of the file, for messages.

    Raises:
        EngineDamagedError: the data is not an engine's record, has another format version, an axis of another form than
            a manifest's, or a profile of other inputs than its own.
    """
    try:
        # Decoded first, as everything else may differ in a newer format.
        tree = parse_json(data, max_bytes=MAX_RECORD_BYTES)
        version = _VERSION.convert(tree).format_version
        record = _RECORD.convert(tree) if version == ENGINE_FORMAT else None
    except AmbiguousJSONError as error:
        raise EngineDamagedError(f"{name} is not the record of an engine: {error}") from None
    if record is None:
        raise EngineDamagedError(
            f"{name} has format {version}, expected {ENGINE_FORMAT}; build the engine again: latentrt build"
        )
    for spec in (*record.inputs, *record.outputs):
        if not has_plain_axes(spec):
            raise EngineDamagedError(
                f"{name} is not the record of an engine: got {printable(str(spec))}, expected axes such as 4, height "
                "or 8*height"
            )
    profile = {name: len(shapes.min) for name, shapes in record.identity.profile.items()}
    inputs = {spec.name: len(spec.shape) for spec in record.inputs}
    if profile != inputs:
        raise EngineDamagedError(
            f"{name} is not the record of an engine: got a profile of {_list_axes(profile)}, expected one of the "
            f"inputs {_list_axes(inputs)}"
        )
    return record


def _list_axes(axes: Mapping[str, int]) -> str:
    """List the first inputs and their numbers of axes."""
    listed = [f"{printable(name)} ({count} axes)" for name, count in itertools.islice(axes.items(), _MAX_LISTED)]
    return ", ".join([*listed, *["…"] * (len(axes) > _MAX_LISTED)]) or "nothing"


def encode_record(record: EngineRecord) -> bytes:
    """Encode a `record.json` for people to read: indented, with each shape on one line."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2)
    return re.sub(rb"\[[\s\d,]+\]", lambda shape: b" ".join(shape[0].split()), text) + b"\n"


def _read_plan(engine: StoredEngine) -> bytes:
    pinned = engine.record.plan
    try:
        with open_regular(engine.plan_path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != pinned.size:
                raise EngineDamagedError(f"{engine.plan_path} has {size:,} bytes, expected {pinned.size:,}")
            if size > MAX_PLAN_BYTES:
                raise EngineDamagedError(f"{engine.plan_path} has {size:,} bytes, expected at most {MAX_PLAN_BYTES:,}")
            data = read_at_most(stream, size)
    except OSError as error:
        raise EngineDamagedError(f"{engine.plan_path} cannot be read: {error.strerror or error}") from None
    if (found := hash_bytes(data)) != pinned.sha256:
        raise EngineDamagedError(f"{engine.plan_path} has SHA-256 {found}, expected {pinned.sha256}")
    return data
