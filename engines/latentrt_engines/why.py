"""Explanations of missing engines: the nearest existing engine, and its differences from the target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineIdentity, EngineRecord, describe_differences, serves
from latentrt.engines.sealed import read_sealed_engines
from latentrt.engines.store import EngineStore, StoredEngine
from latentrt_engines.cache import digest_arrays, read_array_digests
from latentrt_engines.targets import EngineTarget

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The nearest existing engine to a target.

    Attributes:
        nearest: an engine that serves the target, or the one that differs least; None if the component has none.
        sealed: whether it is in the bundle, not in the cache.
        differences: a clause for each difference; empty if the engine serves the target.
    """

    target: EngineTarget
    nearest: EngineRecord | None
    sealed: bool
    differences: tuple[str, ...]


def explain(targets: Iterable[EngineTarget], bundle: Bundle, store: EngineStore) -> list[Explanation]:
    """Find the nearest existing engine to each target, and describe its differences."""
    stored = [engine for engine in store.engines() if engine.is_complete]
    sealed = [engine.record for engine in read_sealed_engines(bundle)]
    return [_explain(target, bundle, stored, sealed) for target in targets]


def _explain(
    target: EngineTarget, bundle: Bundle, stored: Sequence[StoredEngine], sealed: Sequence[EngineRecord]
) -> Explanation:
    wanted = target.identity
    candidates: list[tuple[EngineRecord, StoredEngine | None]] = [(record, None) for record in sealed]
    candidates += [(engine.record, engine) for engine in stored]
    candidates = [each for each in candidates if each[0].identity.component == target.component]
    if not candidates:
        nothing = f"no engine of {target.component} exists"
        return Explanation(target=target, nearest=None, sealed=False, differences=(nothing,))
    # Sealed engines come first among equals, as min takes the first.
    record, engine = min(candidates, key=lambda each: _measure_distance(each[0].identity, wanted))
    differences: list[str] = []
    if not serves(record.identity, wanted):
        differences = describe_differences(record.identity, wanted, _describe_changed_arrays(engine, wanted, bundle))
    return Explanation(target=target, nearest=record, sealed=engine is None, differences=tuple(differences))


def _measure_distance(found: EngineIdentity, wanted: EngineIdentity) -> tuple[int, ...]:
    """Return the distance of an engine as a sort key: graph, weights, shapes, GPUs, and the number of differences."""
    missing = set(wanted.compute_capabilities) - set(found.compute_capabilities)
    return (
        not serves(found, wanted),
        found.graph != wanted.graph,
        found.weights != wanted.weights,
        found.profile != wanted.profile,
        len(missing),
        len(describe_differences(found, wanted)),
    )


def _describe_changed_arrays(engine: StoredEngine | None, wanted: EngineIdentity, bundle: Bundle) -> str:
    """Describe the weight arrays that changed, as in `3 of 208 arrays`; empty if none did or digests are missing."""
    if engine is None or (before := read_array_digests(engine)) is None:
        return ""
    found = engine.record.identity
    if found.weights == wanted.weights or None in (found.weights, wanted.weights):
        return ""
    with bundle.weights(wanted.component) as weights:
        after = digest_arrays(weights.arrays())
    if before.keys() != after.keys():
        return f"other arrays ({len(before)} in the engine, {len(after)} in the bundle)"
    changed = sum(before[name] != after[name] for name in after)
    return f"{changed} arrays" if changed == len(after) else f"{changed} of {len(after)} arrays"
