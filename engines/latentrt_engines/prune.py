"""What in the cache can no run of this machine use?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.record import LibraryName
from latentrt.engines.store import ASIDE, RECORD_NAME, StoredEngine
from latentrt_engines.cache import EngineCache
from latentrt_engines.library import Library, installed_libraries

__all__ = ["Prunable", "prunable"]


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """Something that can be deleted, and why."""

    path: Path
    reason: str
    size_bytes: int


def prunable(cache: EngineCache, *, everything: bool, not_used_since: float | None) -> list[Prunable]:
    """What can be deleted.

    Args:
        everything: engines that are good too.
        not_used_since: seconds since 1970; engines that were neither built nor loaded since are named as well.
    """
    versions = {name: found.version for name, found in installed_libraries().items() if isinstance(found, Library)}
    found = [Prunable(path=path, reason=_leftover_words(path), size_bytes=_size(path)) for path in cache.leftovers()]
    for engine in cache.engines():
        reason = _reason(engine, versions, everything=everything, not_used_since=not_used_since)
        if reason is not None:
            found.append(Prunable(path=engine.folder, reason=reason, size_bytes=_size(engine.folder)))
    return found


def _reason(
    engine: StoredEngine, versions: Mapping[LibraryName, str], *, everything: bool, not_used_since: float | None
) -> str | None:
    identity = engine.record.identity
    version = versions.get(identity.library)
    if everything:
        return f"{identity.component}, as every engine"
    # A plan that is built to be version-compatible outlives an upgrade.
    if version not in (None, identity.library_version) and not identity.options.version_compatible:
        return f"{identity.component}, built by {identity.library} {identity.library_version}, this is {version}"
    used = (engine.folder / RECORD_NAME).stat().st_mtime
    if not_used_since is not None and used < not_used_since:
        return f"{identity.component}, not used for so long"
    return None


def _leftover_words(path: Path) -> str:
    if path.parent.name == ASIDE:
        return "it failed its hash and was moved aside"
    return "a build that was killed left it"


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)
