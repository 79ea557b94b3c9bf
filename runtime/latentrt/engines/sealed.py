"""Engines that are sealed into a bundle: listed in its manifest and pinned by its digest."""

from __future__ import annotations

from dataclasses import dataclass

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineRecord
from latentrt.engines.store import MAX_PLAN_BYTES, MAX_RECORD_BYTES, decode_record
from latentrt.errors import EngineDamagedError

__all__ = ["BundledEngine", "read_sealed_engines"]


@dataclass(frozen=True)
class BundledEngine:
    """An engine whose record and plan are files of a bundle.

    Attributes:
        plan_file: path of the plan inside the bundle.
    """

    bundle: Bundle
    record: EngineRecord
    plan_file: str

    def plan(self) -> bytes:
        """Read the plan; return exactly the bytes that were hashed.

        Raises:
            IntegrityError: the file is missing or differs from the manifest's SHA-256.
            BundleError: it is larger than `MAX_PLAN_BYTES`.
        """
        return self.bundle.read(self.plan_file, MAX_PLAN_BYTES)


def read_sealed_engines(bundle: Bundle) -> list[BundledEngine]:
    """Read and verify the records of a bundle's engines.

    Raises:
        IntegrityError: a record differs from the manifest's SHA-256.
        BundleError: a record is larger than `MAX_RECORD_BYTES`.
        EngineDamagedError: a pinned file is not an engine's record, or belongs to another key or plan.
    """
    engines = []
    for key, files in bundle.manifest.engines.items():
        record = decode_record(bundle.read(files.record, MAX_RECORD_BYTES), files.record)
        pinned = bundle.manifest.files[files.plan]
        if record.key != key or record.plan != pinned:
            raise EngineDamagedError(
                f"{bundle.folder}: {files.record} describes the engine {record.key[:12]} with the plan "
                f"{record.plan.sha256[:12]}, expected the engine {key[:12]} with the plan {pinned.sha256[:12]}; seal "
                "the bundle again: latentrt engines seal"
            )
        engines.append(BundledEngine(bundle, record, files.plan))
    return engines
