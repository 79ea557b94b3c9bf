"""Pipelines of the sample bundle whose sessions a test replaces or watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components
from latentrt.backends.placement import Placement, place_components
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec

__all__ = ["ChangedSession", "FunctionSession", "pipeline_with"]

Open = Callable[[str, str | None, Callable[[], Session]], Session]


class ChangedSession(Session):
    """A session that passes some outputs of a real one through functions."""

    def __init__(self, real: Session, **changes: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self.inputs, self.outputs = real.inputs, real.outputs
        self._real, self._changes = real, changes

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        outputs = self._real.run(feeds)
        return {name: self._changes[name](each) if name in self._changes else each for name, each in outputs.items()}


class FunctionSession(Session):
    """A session that is one function of its inputs."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        function: Callable[[Mapping[str, NDArray[Any]]], Arrays],
    ) -> None:
        self.inputs, self.outputs, self._function = inputs, outputs, function

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._function(feeds)


def pipeline_with(open_one: Open, *components: str, low_memory: bool = False) -> Pipeline:
    """Return a pipeline on ONNX Runtime with components whose sessions `open_one(component, part, open_real)` opens.

    Args:
        components: by name; all of them if none is named. The others' sessions may be shared with other pipelines.
    """
    bundle = Bundle.open(bundle_path())
    placements = place_components(bundle, "cpu")

    def opener(component: str, real: Placement) -> Callable[[str | None], Session]:
        return lambda part: open_one(component, part, lambda: real.open(part))

    for name in components or tuple(placements):
        real = placements[name]
        placements[name] = replace(real, open=opener(name, real), key=(object(),))
    return Pipeline(bundle, Components(placements, low_memory=low_memory))
