"""Which engines are there, and is a plan the one that was built?

Engines live in the user's own cache, a folder each::

    ~/.cache/latentrt/engines/
      <key>/record.json        what it is (`latentrt.engines.record`)
      <key>/<sha256>.plan      the plan; its record names it by its hash, so a new one never overwrites the old
      <key>/weights.json       a digest of each of its arrays, to tell what changed
      <key>/<sha256>.rtcache   what TensorRT-RTX compiled just in time on this machine
      locks/<key>.lock         held by whoever builds that engine now; an empty file means nothing
      aside/<key>.<when>/      what failed its hash

A plan is native code. `EngineStore.plan` hands out bytes that were hashed and compared; nothing else may be
deserialised. What fails is moved aside, out of the way of the next build.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from latentrt.bundle.digests import hash_bytes, open_regular
from latentrt.bundle.printable import printable
from latentrt.bundle.user_cache import require_private_folder
from latentrt.engines.record import ENGINE_FORMAT, EngineIdentity, EngineRecord, serves
from latentrt.errors import EngineDamagedError, EngineError

__all__ = [
    "ASIDE",
    "LOCKS",
    "RECORD_NAME",
    "WEIGHTS_NAME",
    "EngineStore",
    "StoredEngine",
    "decode_record",
    "encode_record",
    "plan_name",
]

RECORD_NAME, WEIGHTS_NAME = "record.json", "weights.json"
LOCKS, ASIDE = "locks", "aside"

_KEY = re.compile("[0-9a-f]{64}")
_LARGEST_RECORD_BYTES = 4 << 20
_log = logging.getLogger("latentrt")


def plan_name(record: EngineRecord) -> str:
    """What a plan's file is called."""
    return f"{record.plan.sha256}.plan"


class _Versioned(msgspec.Struct):
    format_version: int


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the store: its folder, and its record. Its plan has not been looked at yet."""

    folder: Path
    record: EngineRecord

    @property
    def key(self) -> str:
        """The engine's key, which is its folder's name."""
        return self.folder.name

    @property
    def plan_path(self) -> Path:
        """Where the plan lies."""
        return self.folder / plan_name(self.record)

    @property
    def seems_whole(self) -> bool:
        """Whether the plan is there, in its size. It has not been hashed."""
        with contextlib.suppress(OSError):
            return self.plan_path.stat().st_size == self.record.plan.size
        return False


class EngineStore:
    """The engines of this user.

    Args:
        folder: of the engines; the user's own cache if None.

    Raises:
        EngineError: the folder cannot be made, or others can reach into it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = require_private_folder("engines") if folder is None else folder

    def get(self, key: str) -> StoredEngine | None:
        """The engine of this key, if there is one.

        Raises:
            EngineDamagedError: there is something in its place that is no record of it.
        """
        folder = self.folder / key
        try:
            with open_regular(folder / RECORD_NAME) as stream:
                data = stream.read(_LARGEST_RECORD_BYTES)
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

    def all_keys(self) -> list[str]:
        """The keys under which something lies, an engine or not."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.folder) if _KEY.fullmatch(name))
        return []

    def engines(self) -> Iterator[StoredEngine]:
        """Every engine whose record can be read; the others are logged."""
        for key in self.all_keys():
            try:
                engine = self.get(key)
            except EngineDamagedError as error:
                _log.warning("%s; latentrt engines verify moves it aside", error)
                continue
            if engine is not None:
                yield engine

    def find(self, wanted: EngineIdentity) -> StoredEngine | None:
        """The engine that is wanted, or one plan for more GPUs; its plan is there, and of the right size."""
        for engine in self.engines():
            if serves(engine.record.identity, wanted) and engine.seems_whole:
                return engine
        return None

    def plan(self, engine: StoredEngine) -> bytes:
        """The plan, the very bytes that were hashed.

        Raises:
            EngineDamagedError: it is missing or is not the one that its record pins. It has been moved aside.
        """
        try:
            data = _read_plan(engine)
        except EngineDamagedError as error:
            current = self.get(engine.key)
            if current is None:
                raise
            if current.record != engine.record:  # a build took its place meanwhile
                return self.plan(current)
            where = self.set_aside(engine.key, str(error))
            raise EngineDamagedError(f"{error}; it was moved to {where}, build it again: latentrt build") from None
        return data

    def mark_used(self, engine: StoredEngine) -> None:
        """Note that an engine was loaded, for pruning: its record's time is when it was last used."""
        with contextlib.suppress(OSError):
            os.utime(engine.folder / RECORD_NAME)

    def set_aside(self, key: str, reason: str) -> Path:
        """Move what lies under a key out of the way, with the reason beside it.

        Raises:
            EngineError: it cannot be moved.
        """
        target = self.folder / ASIDE / f"{key}.{time.strftime('%Y%m%dT%H%M%S')}.{secrets.token_hex(4)}"
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(self.folder / key, target)
            if target.is_dir():
                (target / "reason.txt").write_text(f"{reason}\n")
        except FileNotFoundError:
            pass  # somebody else was faster
        except OSError as error:
            raise EngineError(f"{reason}; it cannot be moved aside: {error.strerror}. Delete it yourself") from None
        return target

    def remove(self, key: str) -> None:
        """Delete an engine, its record first, so that it is there whole or not at all."""
        folder = self.folder / key
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / RECORD_NAME)
        shutil.rmtree(folder, ignore_errors=True)


def decode_record(data: bytes, name: str) -> EngineRecord:
    """Read a `record.json`, strictly.

    Raises:
        EngineDamagedError: it is not one, or is of a newer format.
    """
    try:
        # Before anything else: a newer format may differ in everything else.
        version = msgspec.json.decode(data, type=_Versioned).format_version
        record = msgspec.json.decode(data, type=EngineRecord) if version == ENGINE_FORMAT else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineDamagedError(f"{name} is not the record of an engine: {printable(str(error))}") from None
    if record is None:
        raise EngineDamagedError(f"{name} is of format {version}, this latentrt reads {ENGINE_FORMAT}")
    return record


def encode_record(record: EngineRecord) -> bytes:
    """A `record.json` that people can read: indented, shapes on one line."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2)
    return re.sub(rb"\[[\s\d,]+\]", lambda shape: b" ".join(shape[0].split()), text) + b"\n"


def _read_plan(engine: StoredEngine) -> bytes:
    pinned = engine.record.plan
    try:
        with open_regular(engine.plan_path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != pinned.size:
                raise EngineDamagedError(f"{engine.plan_path} has {size:,} bytes, expected {pinned.size:,}")
            data = stream.read(pinned.size + 1)
    except OSError as error:
        raise EngineDamagedError(f"{engine.plan_path} cannot be read: {error.strerror or error}") from None
    if (found := hash_bytes(data)) != pinned.sha256:
        raise EngineDamagedError(f"{engine.plan_path} has SHA-256 {found}, expected {pinned.sha256}")
    return data
