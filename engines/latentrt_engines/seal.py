"""Engines → a new bundle that pins them, for machines that must not build."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, SealedEngine, encode_manifest
from latentrt.bundle.staging import staged
from latentrt.engines.record import EngineIdentity
from latentrt.engines.store import RECORD_NAME, StoredEngine, encode_record, plan_name
from latentrt.errors import EngineError, RequestError
from latentrt_engines.cache import EngineCache

__all__ = ["choose_engines", "find_engine", "is_of_bundle", "seal"]

_SHORTEST_KEY = 4


def is_of_bundle(identity: EngineIdentity, bundle: Bundle) -> bool:
    """Whether an engine was built of this bundle's graph and weights."""
    component = bundle.manifest.components.get(identity.component)
    if component is None or identity.precision not in component.graphs:
        return False
    files = bundle.manifest.files
    graph = files[component.graphs[identity.precision].file].sha256
    return identity.graph == graph and identity.weights in (None, files[component.weights.file].sha256)


def choose_engines(cache: EngineCache, bundle: Bundle, keys: Iterable[str]) -> list[StoredEngine]:
    """The engines of a bundle: those whose keys begin as is said, or all that are there.

    Raises:
        RequestError: no engine, or more than one, has such a key; or it is of another bundle.
        EngineError: there is none.
    """
    there = list(cache.engines())
    of_bundle = [engine for engine in there if is_of_bundle(engine.record.identity, bundle)]
    keys = list(keys)
    if not keys and not of_bundle:
        raise EngineError(f"the cache has no engine of {bundle.folder}; build some: latentrt build {bundle.folder}")
    return [_one(key, there, of_bundle, bundle) for key in keys] if keys else of_bundle


def find_engine(key: str, there: list[StoredEngine]) -> StoredEngine:
    """The engine whose key begins like this.

    Raises:
        RequestError: none has such a key, or several have.
    """
    if len(key) < _SHORTEST_KEY:
        raise RequestError(f"found the key {key!r}, expected its first {_SHORTEST_KEY} digits or more")
    found = [engine for engine in there if engine.key.startswith(key)]
    if len(found) != 1:
        words = "no engine has" if not found else f"{len(found)} engines have"
        raise RequestError(f"{words} a key that begins with {key!r}; latentrt engines list shows them")
    return found[0]


def _one(key: str, there: list[StoredEngine], of_bundle: list[StoredEngine], bundle: Bundle) -> StoredEngine:
    found = find_engine(key, there)
    if found not in of_bundle:
        raise RequestError(
            f"the engine {key} was built of other weights or another graph than {bundle.folder} has; latentrt engines "
            "why tells what differs"
        )
    return found


def seal(bundle: Bundle, engines: Iterable[StoredEngine], cache: EngineCache, out: Path, *, overwrite: bool) -> Bundle:
    """Write a new bundle: the files of `bundle`, engines it has sealed already, and these.

    Every file is compared with its hash on the way, and the new bundle is there whole or not at all.

    Returns:
        The new bundle, which has a digest of its own.

    Raises:
        EngineDamagedError: a plan is not what was built. OutputError: something is in the way, or there is no room.
    """
    if os.path.realpath(out) == str(bundle.folder):
        raise RequestError(f"{out} is the bundle itself; seal into another folder, as its digest stays what it is")
    with staged(out, overwrite=overwrite) as stage:
        files = dict(bundle.manifest.files)
        for name in files:
            target = stage.bundle / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), target)
        sealed = dict(bundle.manifest.engines)
        for engine in engines:
            if engine.key in sealed:  # built again since it was sealed
                _remove(sealed[engine.key], stage.bundle, files)
            sealed[engine.key] = _add(engine, cache, stage.bundle, files)
        manifest: Manifest = msgspec.structs.replace(bundle.manifest, engines=sealed, files=files)
        write_atomically(stage.bundle / MANIFEST_NAME, encode_manifest(manifest))
        Bundle.open(stage.bundle, trust_cache=False).verify()
    return Bundle.open(out)


def _remove(sealed: SealedEngine, folder: Path, files: dict[str, FileRecord]) -> None:
    for name in (sealed.record, sealed.plan):
        del files[name]
        (folder / name).unlink()


def _add(engine: StoredEngine, cache: EngineCache, folder: Path, files: dict[str, FileRecord]) -> SealedEngine:
    place = f"engines/{engine.key}"
    sealed = SealedEngine(record=f"{place}/{RECORD_NAME}", plan=f"{place}/{plan_name(engine.record)}")
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / sealed.record).write_bytes(encode_record(engine.record))
    (folder / sealed.plan).write_bytes(cache.plan(engine))
    files[sealed.plan] = engine.record.plan
    files[sealed.record] = file_record(folder / sealed.record)
    return sealed
