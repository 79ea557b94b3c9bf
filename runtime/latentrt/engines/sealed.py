"""Which engines does a bundle bring along?"""

from __future__ import annotations

from dataclasses import dataclass

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineRecord
from latentrt.engines.store import decode_record
from latentrt.errors import EngineDamagedError

__all__ = ["SealedEngineOf", "sealed_engines"]


@dataclass(frozen=True)
class SealedEngineOf:
    """An engine that a bundle pins."""

    bundle: Bundle
    record: EngineRecord
    plan_file: str

    def plan(self) -> bytes:
        """The plan, the very bytes that were hashed.

        Raises:
            IntegrityError: it is missing, or is not the one that the manifest pins.
        """
        return self.bundle.read(self.plan_file)


def sealed_engines(bundle: Bundle) -> list[SealedEngineOf]:
    """The engines that a bundle's manifest names, their records verified and read.

    Raises:
        IntegrityError: a record is not the pinned one.
        EngineDamagedError: a pinned record is none, or is of another engine than the manifest says.
    """
    engines = []
    for key, files in bundle.manifest.engines.items():
        record = decode_record(bundle.read(files.record), files.record)
        pinned = bundle.manifest.files[files.plan]
        if record.key != key or record.plan != pinned:
            raise EngineDamagedError(
                f"{bundle.folder}: {files.record} is not the record of the engine {key[:12]} and its plan; seal the "
                "bundle again: latentrt engines seal"
            )
        engines.append(SealedEngineOf(bundle, record, files.plan))
    return engines
