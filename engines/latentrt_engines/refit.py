"""A refittable engine and other weights → a new engine in the cache, without a build."""

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
from latentrt.bundle.weights import map_weights
from latentrt.engines.record import BuildFigures, EngineIdentity, EngineRecord, SelfCheck, engine_key
from latentrt.engines.store import StoredEngine
from latentrt.errors import EngineError, RequestError
from latentrt.worker_process import peak_bytes
from latentrt_engines.array_digests import array_digests
from latentrt_engines.cache import EngineCache, in_words

__all__ = ["refit_engine", "refitted_identity"]


def refitted_identity(engine: StoredEngine, bundle: Bundle) -> EngineIdentity:
    """What identifies an engine once it has a bundle's weights.

    Raises:
        RequestError: the engine cannot be refitted, or was built of another graph than the bundle has.
    """
    identity = engine.record.identity
    component = bundle.manifest.components.get(identity.component)
    if not identity.options.refittable or identity.options.strip_weights:
        raise RequestError(
            f"the engine {engine.key[:12]} was not built to be refitted; build one that is: latentrt build --refittable"
        )
    graph = None if component is None else component.graphs.get(identity.precision)
    if component is None or graph is None or bundle.manifest.files[graph.file].sha256 != identity.graph:
        raise RequestError(
            f"the engine {engine.key[:12]} was built of another graph of {identity.component} than {bundle.folder} "
            "has; only a checkpoint of the same architecture, exported alike, has weights for it"
        )
    return msgspec.structs.replace(identity, weights=bundle.manifest.files[component.weights.file].sha256)


def refit_engine(engine: StoredEngine, bundle: Bundle, cache: EngineCache, device: EngineDevice) -> StoredEngine:
    """Give a copy of an engine a bundle's weights; the engine stays as it is.

    Args:
        device: the library that built it, on a GPU that runs it.

    Returns:
        The engine of those weights: the one that was there, or a new one.

    Raises:
        RequestError: it cannot be refitted with them. EngineError: the library refuses, or the cache cannot be written.
    """
    identity = refitted_identity(engine, bundle)
    with cache.locked(engine_key(identity)) as draft:
        if (there := cache.intact(engine_key(identity))) is not None:
            return there
        began = time.monotonic()
        _, name = bundle.component_files(identity.component, identity.precision)
        weights = map_weights(bundle.path(name))
        with device.lock:
            plan = _with_weights(engine, cache, device, weights)
        with in_words(cache.folder):
            draft.write_bytes(plan)
        record = _record(engine.record, identity, plan, time.monotonic() - began)
        return cache.publish(record, draft, array_digests(weights))


def _with_weights(engine: StoredEngine, cache: EngineCache, device: EngineDevice, weights: dict[str, Any]) -> bytes:
    loaded = device.deserialize(cache.plan(engine), engine.record)
    refit(device.library, loaded, device.logger, engine.record.identity.component, weights)
    flags, config = device.library.module.SerializationFlag, loaded.create_serialization_config()
    config.clear_flag(flags.EXCLUDE_WEIGHTS)
    if hasattr(flags, "INCLUDE_REFIT"):  # TensorRT 10.14: or a copy of it could not be refitted in its turn
        config.set_flag(flags.INCLUDE_REFIT)
    plan = loaded.serialize_with_config(config)
    if plan is None:
        raise EngineError(f"{device.library} cannot write the refitted engine: {device.reason()}")
    return bytes(memoryview(plan))


def _record(former: EngineRecord, identity: EngineIdentity, plan: bytes, seconds: float) -> EngineRecord:
    figures = BuildFigures(
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes(),
        workspace_bytes=former.build.workspace_bytes,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        created_by=f"latentrt {__version__}",
    )
    return msgspec.structs.replace(
        former,
        identity=identity,
        plan=FileRecord(sha256=hash_bytes(plan), size=len(plan)),
        build=figures,
        check=SelfCheck(ran_on=None, not_run_because=f"its weights were replaced in {former.key[:12]}"),
        refitted_from=former.key,
    )
