"""Which of a submodule's engines runs what it is fed; and what if none does?"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.choice import EngineSource
from latentrt.errors import BackendError, EngineError
from latentrt.sampling.trajectory import Denoising, KeepsLatents, Trajectory

__all__ = ["ChosenByShape"]

_log = logging.getLogger("latentrt")


class _Loaded(Protocol):
    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays: ...


class ChosenByShape:
    """A submodule whose engines were built for different shapes, each loaded when it is first needed.

    Args:
        name: of the submodule.
        sources: its engines that run here, the best first.
        load: plan → session. A plan is hashed before.
        otherwise: opens what runs shapes that no engine covers; None refuses them.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[EngineSource],
        load: Callable[[EngineSource], _Loaded],
        otherwise: Callable[[], Session] | None,
    ) -> None:
        self._name, self._sources, self._load, self._open_otherwise = name, list(sources), load, otherwise
        self._loaded: dict[str, _Loaded | None] = {}
        self._loading = threading.Lock()
        self._otherwise: Session | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._sources[0].record.inputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        shapes = {name: array.shape for name, array in feeds.items()}
        for source in list(self._sources):
            if _covers(source, shapes) and (session := self._session(source)) is not None:
                return session.run(feeds)
        return self._without_engine(shapes).run(feeds)

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`latentrt.backends.session.ToldShapes`."""
        if not any(_covers(source, shapes) for source in self._sources):
            self._without_engine(shapes)

    def trajectory(self, job: Denoising) -> Trajectory | None:
        """A denoising loop on the device of the engine that covers it (`latentrt.sampling.trajectory.KeepsLatents`);
        None where no engine does."""
        batch = job.embeddings.shape[0]
        shapes = {
            "sample": (batch, *job.latents.shape[1:]),
            "timestep": (batch,),
            "encoder_hidden_states": job.embeddings.shape,
        }
        for source in list(self._sources):
            if _covers(source, shapes) and (session := self._session(source)) is not None:
                if isinstance(session, KeepsLatents):
                    return session.trajectory(job)
                return None
        return None

    def _session(self, source: EngineSource) -> _Loaded | None:
        """The engine, loaded once however many threads want it; None for one that cannot be, where something else
        can run what it was for."""
        key = source.record.key
        with self._loading:
            if key not in self._loaded:
                self._loaded[key] = self._load_or_not(source)
            return self._loaded[key]

    def _load_or_not(self, source: EngineSource) -> _Loaded | None:
        try:
            return self._load(source)
        except (BackendError, EngineError) as error:
            if self._open_otherwise is None and len(self._sources) == 1:
                raise
            _log.warning("%s", error)
            return None

    def _without_engine(self, shapes: Mapping[str, tuple[int, ...]]) -> Session:
        name, shape = next(iter(shapes.items()))
        covered = "; ".join(str(source.record.identity.profile[name]) for source in self._sources)
        asked = "×".join(map(str, shape))
        words = f"{self._name}: no engine runs {name} of shape {asked}, those that are there run {covered}"
        # Steps without guidance ask for half the batch of those with it.
        twice = {each: (2 * size[0], *size[1:]) for each, size in shapes.items()}
        guidance = " --guidance both" if any(_covers(source, twice) for source in self._sources) else ""
        mend = f"build one: latentrt build --size … --batch …{guidance}"
        if self._open_otherwise is None:
            raise EngineError(f"{words}; {mend}")
        if self._otherwise is None:
            _log.warning("%s; ONNX Runtime runs it. For an engine, %s", words, mend)
            self._otherwise = self._open_otherwise()
        return self._otherwise


def _covers(source: EngineSource, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    profile = source.record.identity.profile
    if profile.keys() != shapes.keys():
        raise BackendError(f"found inputs {sorted(shapes)}, expected {sorted(profile)}")
    return all(profile[name].covers(shape) for name, shape in shapes.items())
