"""Refitting: makes a new engine in the cache from a refittable engine and other weights, without a build."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import msgspec

from latentrt import __version__
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.refit import refit
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import FileRecord
from latentrt.engines.record import BuildStats, EngineIdentity, EngineRecord, SelfCheck, engine_key
from latentrt.engines.store import StoredEngine
from latentrt.errors import EngineError, RequestError
from latentrt.worker_process import peak_bytes
from latentrt_engines.cache import EngineCache, digest_arrays, translating_os_errors

__all__ = ["identify_refit", "refit_engine"]


def identify_refit(engine: StoredEngine, bundle: Bundle) -> EngineIdentity:
    """Return the identity of an engine after a refit with a bundle's weights.

    Raises:
        RequestError: the engine is not refittable, or was built from another graph than the bundle's.
    """
    identity = engine.record.identity
    component = bundle.manifest.components.get(identity.component)
    if not identity.options.refittable or identity.options.strip_weights:
        raise RequestError(
            f"got the engine {engine.key[:12]}, which is not refittable; build a refittable one: "
            "latentrt build --refittable"
        )
    graph = None if component is None else component.graphs.get(identity.precision)
    if component is None or graph is None or bundle.manifest.files[graph.file].sha256 != identity.graph:
        raise RequestError(
            f"got the engine {engine.key[:12]}, which was built from another graph of {identity.component} than the "
            f"one in {bundle.folder}; expected a checkpoint of the same architecture, exported with the same options"
        )
    return msgspec.structs.replace(identity, weights=bundle.manifest.files[component.weights.file].sha256)


def refit_engine(engine: StoredEngine, bundle: Bundle, cache: EngineCache, device: EngineDevice) -> StoredEngine:
    """Refit a copy of an engine with a bundle's weights; the engine itself is unchanged.

    Args:
        device: a device with the library that built the engine and a GPU that runs it.

    Returns:
        The engine with those weights: the existing one, or a new one.

    Raises:
        RequestError: the engine cannot be refitted with the weights.
        EngineError: the library rejects the weights, or the cache cannot be written.
    """
    identity = identify_refit(engine, bundle)
    with cache.lock(engine_key(identity)) as draft:
        if (existing := cache.find_intact(engine_key(identity))) is not None:
            return existing
        began = time.monotonic()
        with bundle.weights(identity.component) as opened, device.lock:
            weights = opened.arrays()
            plan = _refit_plan(engine, cache, device, weights)
            digests = digest_arrays(weights)
        with translating_os_errors(cache.folder):
            draft.write_bytes(plan)
        record = _make_record(engine.record, identity, plan, time.monotonic() - began)
        return cache.publish(record, draft, digests)


def _refit_plan(engine: StoredEngine, cache: EngineCache, device: EngineDevice, weights: dict[str, Any]) -> bytes:
    loaded = device.deserialize(cache.plan(engine), engine.record)
    refit(device.library, loaded, device.logger, engine.record.identity.component, weights)
    flags, config = device.library.module.SerializationFlag, loaded.create_serialization_config()
    config.clear_flag(flags.EXCLUDE_WEIGHTS)
    if hasattr(flags, "INCLUDE_REFIT"):  # TensorRT 10.14 and later: without it the copy would not be refittable
        config.set_flag(flags.INCLUDE_REFIT)
    plan = loaded.serialize_with_config(config)
    if plan is None:
        raise EngineError(f"{device.library} cannot serialise the refitted engine: {device.reason()}")
    return bytes(memoryview(plan))


def _make_record(original: EngineRecord, identity: EngineIdentity, plan: bytes, seconds: float) -> EngineRecord:
    stats = BuildStats(
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes(),
        workspace_bytes=original.build.workspace_bytes,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        created_by=f"latentrt {__version__}",
    )
    return msgspec.structs.replace(
        original,
        identity=identity,
        plan=FileRecord(sha256=hash_bytes(plan), size=len(plan)),
        build=stats,
        check=SelfCheck(ran_on=None, skip_reason=f"its weights were replaced in {original.key[:12]}"),
        refitted_from=original.key,
    )
