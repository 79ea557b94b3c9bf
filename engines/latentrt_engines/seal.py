"""Sealing: a new bundle that contains engines and pins them by its digest, for machines that must not build."""

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
from latentrt.engines.sealed import read_sealed_engines
from latentrt.engines.store import RECORD_NAME, StoredEngine, encode_record, plan_name
from latentrt.errors import EngineError, RequestError
from latentrt_engines.cache import EngineCache

__all__ = ["is_of_bundle", "seal", "select_engines"]


def is_of_bundle(identity: EngineIdentity, bundle: Bundle) -> bool:
    """Return whether an engine was built from a bundle's graph and weights."""
    component = bundle.manifest.components.get(identity.component)
    if component is None or identity.precision not in component.graphs:
        return False
    files = bundle.manifest.files
    graph = files[component.graphs[identity.precision].file].sha256
    return identity.graph == graph and identity.weights in (None, files[component.weights.file].sha256)


def select_engines(cache: EngineCache, bundle: Bundle, prefixes: Iterable[str]) -> list[StoredEngine]:
    """Select a bundle's engines from the cache, by the beginnings of their keys.

    Args:
        prefixes: the beginnings of keys; empty for all engines of the bundle.

    Raises:
        RequestError: not exactly one engine has a prefix, or the engine was not built from the bundle.
        EngineError: the cache has no engine of the bundle.
    """
    selected = [cache.find_by_prefix(prefix) for prefix in prefixes]
    for engine in selected:
        if not is_of_bundle(engine.record.identity, bundle):
            raise RequestError(
                f"got the engine {engine.key[:12]}, expected an engine of {bundle.folder}: its graph or weights "
                "differ; latentrt engines why describes the differences"
            )
    if selected:
        return selected
    of_bundle = [engine for engine in cache.engines() if is_of_bundle(engine.record.identity, bundle)]
    if not of_bundle:
        raise EngineError(f"the cache has no engine of {bundle.folder}; build some: latentrt build {bundle.folder}")
    return of_bundle


def seal(bundle: Bundle, engines: Iterable[StoredEngine], cache: EngineCache, out: Path, *, overwrite: bool) -> Bundle:
    """Write a new bundle with a bundle's files, its sealed engines, and more engines.

    Every file is compared with its hash while it is copied. The new bundle appears only once it is complete.

    Returns:
        The new bundle, with a digest of its own.

    Raises:
        EngineDamagedError: a plan differs from its record, or the bundle has a damaged record already.
        IntegrityError: a file of the bundle is damaged.
        OutputError: `out` exists and `overwrite` is false, or the disk is full.
        RequestError: `out` is the bundle.
    """
    if os.path.realpath(out) == str(bundle.folder):
        raise RequestError(
            f"got {out}, which is the bundle itself, expected another folder; its digest must not change"
        )
    read_sealed_engines(bundle)
    with staged(out, overwrite=overwrite) as stage:
        files = dict(bundle.manifest.files)
        for name in files:
            target = stage.bundle / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), target)
        sealed = dict(bundle.manifest.engines)
        for engine in engines:
            if engine.key in sealed:  # rebuilt since it was sealed
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
