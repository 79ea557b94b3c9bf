"""The engines of one component, built for different shapes, as one session."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes, translating_library_errors
from latentrt.backends.tensorrt.profile import batch_sizes, covers
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.choice import EngineSource
from latentrt.errors import BackendError, EngineError

__all__ = ["EngineSet"]

_log = logging.getLogger("latentrt")


class EngineSet(Session):
    """The engines of a component, each loaded when a shape needs it first.

    Args:
        component: its name, for messages.
        sources: engines that run on this machine, the best first.
        load: loads a source as a session; the plan is hashed before.
        open_fallback: opens a session for shapes that no engine covers; None to raise EngineError for them.
    """

    def __init__(
        self,
        component: str,
        sources: Sequence[EngineSource],
        load: Callable[[EngineSource], Session],
        open_fallback: Callable[[], Session] | None,
    ) -> None:
        self._component, self._sources, self._load, self._open_fallback = component, list(sources), load, open_fallback
        self.inputs: tuple[TensorSpec, ...] = self._sources[0].record.inputs
        self.outputs: tuple[TensorSpec, ...] = self._sources[0].record.outputs
        self._sessions: dict[str, Session | None] = {}  # by engine key; None: not loadable
        self._fallback: Session | None = None
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._session({name: array.shape for name, array in feeds.items()}).run(feeds)

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the batch sizes of all engines that cover the other axes; those of the fallback where none does."""
        usable = [source.record for source in self._sources if self._sessions.get(source.record.key, self) is not None]
        sizes = {size for record in usable for size in batch_sizes(record.identity, shapes)}
        if sizes or self._open_fallback is None:
            return tuple(sorted(sizes))
        return self._load_fallback(shapes).batch_sizes(shapes)

    def prepare(self, shapes: Shapes) -> None:
        """Load the engine that covers the shapes, or the fallback where none does."""
        self._session(shapes).prepare(shapes)

    def device_context(self, shapes: Shapes) -> Any | None:
        return self._session(shapes).device_context(shapes)

    def close(self) -> None:
        with self._lock:
            for session in (*self._sessions.values(), self._fallback):
                if session is not None:
                    session.close()
            self._sessions, self._fallback = {}, None

    def _session(self, shapes: Shapes) -> Session:
        """Return the session that runs inputs of these shapes.

        Raises:
            EngineError: none does. FeedError, BackendError: it cannot be loaded.
        """
        for source in self._sources:
            if covers(source.record.identity, shapes) and (session := self._load_engine(source)) is not None:
                return session
        return self._load_fallback(shapes)

    def _load_engine(self, source: EngineSource) -> Session | None:
        """Return the engine's session, loaded once for all threads; None where it cannot be loaded and something else
        can run its shapes."""
        key = source.record.key
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = self._load_or_log(source)
            return self._sessions[key]

    def _load_or_log(self, source: EngineSource) -> Session | None:
        try:
            with translating_library_errors(self._component, f"{self._component}: the engine cannot be loaded"):
                return self._load(source)
        except (BackendError, EngineError) as error:
            if self._open_fallback is None and len(self._sources) == 1:
                raise
            _log.warning("%s", error)
            return None

    def _load_fallback(self, shapes: Shapes) -> Session:
        name, shape = next(iter(shapes.items()))
        covered = "; ".join(str(source.record.identity.profile[name]) for source in self._sources)
        problem = f"{self._component}: no engine runs {name} of shape {'×'.join(map(str, shape))}, only {covered}"
        remedy = "build one: latentrt build --size … --batch …"
        if self._open_fallback is None:
            raise EngineError(f"{problem}; {remedy}")
        with self._lock:
            if self._fallback is None:
                _log.warning("%s; another backend runs it. For an engine, %s", problem, remedy)
                self._fallback = self._open_fallback()
            return self._fallback
