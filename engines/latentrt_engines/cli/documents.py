"""JSON documents of the engine commands (`latentrt.cli.document`)."""

from __future__ import annotations

from typing import Self

import msgspec

from latentrt.engines.record import EngineRecord
from latentrt.engines.store import StoredEngine

__all__ = [
    "EnginesDocument",
    "ExplainedEngine",
    "ListedEngine",
    "PlanDocument",
    "PlannedEngineDocument",
    "PruneDocument",
    "PrunedItem",
    "RefitDocument",
    "SealDocument",
    "VerifyEnginesDocument",
    "WhyDocument",
]


class ListedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine.

    Attributes:
        key: hash of its identity, by which commands find it.
        complete: whether its plan has the recorded size.
    """

    key: str
    complete: bool
    record: EngineRecord

    @classmethod
    def of(cls, engine: StoredEngine) -> Self:
        """Return the document of a stored engine."""
        return cls(key=engine.key, complete=engine.is_complete, record=engine.record)


class EnginesDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines list --json`.

    Attributes:
        folder: of the engines.
    """

    folder: str
    engines: list[ListedEngine]


class ExplainedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine of a bundle, and the nearest existing one.

    Attributes:
        key: of the engine.
        exists: whether an existing engine serves.
        nearest: key of the nearest existing engine; null without one.
        location: of the nearest engine.
        differences: of the nearest engine; empty if it serves.
    """

    component: str
    key: str
    exists: bool
    nearest: str | None
    location: str | None
    differences: list[str]


class WhyDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines why --json`.

    Attributes:
        target: the GPUs. images: the sizes, in words.
    """

    library: str
    target: str
    images: list[str]
    engines: list[ExplainedEngine]


class VerifyEnginesDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines verify --json` if no engine is damaged; a damaged one is an error.

    Attributes:
        folder: of the engines. intact: number of engines.
    """

    folder: str
    intact: int


class PrunedItem(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that was deleted, or would be."""

    name: str
    reason: str
    size_bytes: int


class PruneDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines prune --json`.

    Attributes:
        folder: of the engines. dry_run: whether nothing was deleted.
        kept: names of those that were built or used meanwhile.
    """

    folder: str
    dry_run: bool
    deleted: list[PrunedItem]
    kept: list[str]


class SealDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines seal --json`.

    Attributes:
        bundle: the folder. digest: of its bundle.json.
        sealed: keys of the engines that were sealed now. engines: number of engines in the bundle.
    """

    bundle: str
    digest: str
    sealed: list[str]
    engines: int


class RefitDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt engines refit --json`."""

    engine: ListedEngine


class PlannedEngineDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An engine for one GPU model of a fleet.

    Attributes:
        images: the sizes, in words.
        location: `bundle` or `cache`; null where it has to be built.
        size_is_estimated: whether `size_bytes` is an estimate.
        obstacle: why this machine cannot build it; null if it can.
        buildable_elsewhere: whether a machine with the GPU can.
    """

    gpu: str
    compute_capability: str
    library: str
    component: str
    images: str
    key: str
    location: str | None
    size_bytes: int
    size_is_estimated: bool
    obstacle: str | None
    buildable_elsewhere: bool


class PlanDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt plan --json`."""

    engines: list[PlannedEngineDocument]
