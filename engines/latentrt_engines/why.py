"""Is the engine there that is wanted; and if not, what differs between it and what is there?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.weights import map_weights
from latentrt.engines.record import EngineIdentity, EngineRecord, differences, serves
from latentrt.engines.sealed import sealed_engines
from latentrt.engines.store import WEIGHTS_NAME, EngineStore, StoredEngine
from latentrt_engines.array_digests import array_digests
from latentrt_engines.wanted import Wanted

__all__ = ["Answer", "explain"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is there in place of an engine that is wanted.

    Attributes:
        nearest: the engine itself, or the one that differs least, or None if nothing is built of that submodule.
        sealed: whether it is in the bundle rather than in the cache.
        differs: in which ways; nothing if it is the one.
    """

    wanted: Wanted
    nearest: EngineRecord | None
    sealed: bool
    differs: tuple[str, ...]


def explain(wanted: Iterable[Wanted], bundle: Bundle, store: EngineStore) -> list[Answer]:
    """For each engine that is wanted, the nearest that is there, and what differs."""
    cached = list(store.engines())
    sealed = [engine.record for engine in sealed_engines(bundle)]
    return [_Answering(each, bundle, cached, sealed).answer() for each in wanted]


def _distance(found: EngineIdentity, wanted: EngineIdentity) -> tuple[int, ...]:
    """How near an engine is: of the same graph first, then of the same weights, for the same shapes, for the GPUs."""
    missing = set(wanted.compute_capabilities) - set(found.compute_capabilities)
    return (
        not serves(found, wanted),
        found.graph != wanted.graph,
        found.weights != wanted.weights,
        found.profile != wanted.profile,
        len(missing),
        len(differences(found, wanted)),
    )


class _Answering:
    def __init__(
        self, wanted: Wanted, bundle: Bundle, cached: Sequence[StoredEngine], sealed: Sequence[EngineRecord]
    ) -> None:
        self.wanted, self.bundle, self.cached, self.sealed = wanted, bundle, cached, sealed

    def answer(self) -> Answer:
        """The exact engine, sealed before cached; else the one with the fewest differences."""
        name = self.wanted.component
        candidates = [(record, True) for record in self.sealed if record.identity.component == name]
        candidates += [
            (engine.record, False)
            for engine in self.cached
            if engine.record.identity.component == name and engine.seems_whole
        ]
        if not candidates:
            return Answer(wanted=self.wanted, nearest=None, sealed=False, differs=(f"nothing is built of {name}",))
        record, sealed = min(candidates, key=lambda one: _distance(one[0].identity, self.wanted.identity))
        identity = self.wanted.identity
        words = (
            [] if serves(record.identity, identity) else differences(record.identity, identity, self._arrays(record))
        )
        return Answer(wanted=self.wanted, nearest=record, sealed=sealed, differs=tuple(words))

    def _arrays(self, record: EngineRecord) -> str:
        """How many arrays changed, in words; nothing where it cannot be told, or they did not."""
        identity: EngineIdentity = self.wanted.identity
        if record.identity.weights == identity.weights or None in (record.identity.weights, identity.weights):
            return ""
        with contextlib.suppress(StopIteration, OSError, msgspec.DecodeError):
            engine = next(engine for engine in self.cached if engine.key == record.key)
            then = msgspec.json.decode((engine.folder / WEIGHTS_NAME).read_bytes(), type=dict[str, str])
            _, weights = self.bundle.component_files(identity.component, identity.precision)
            now = array_digests(map_weights(self.bundle.path(weights)))
            if then.keys() != now.keys():
                return f"other arrays ({len(then)} there, {len(now)} here)"
            changed = sum(then[name] != now[name] for name in now)
            return f"{changed} arrays" if changed == len(now) else f"{changed} of {len(now)} arrays"
        return ""
