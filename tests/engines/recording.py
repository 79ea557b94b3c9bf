"""A pipeline whose graphs return zeros and record the shapes of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.models import Components
from latentrt.backends.placement import Placement
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component
from latentrt.bundle.tensors import axis_sizes, sized
from latentrt.pipeline import Pipeline

Shapes = dict[str, tuple[int, ...]]


class RecordingSession(Session):
    """A graph with the manifest's inputs and outputs that returns zeros, which no classifier flags."""

    def __init__(self, component: Component, recorded: list[Shapes]) -> None:
        self.inputs, self.outputs, self._recorded = component.inputs, component.outputs, recorded

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        shapes = {name: array.shape for name, array in feeds.items()}
        self._recorded.append(shapes)
        sizes = axis_sizes(self.inputs, shapes)
        return {spec.name: np.zeros(sized(spec, sizes), spec.dtype) for spec in self.outputs}


def feeds_of(bundle: Bundle, **request: Any) -> dict[str, list[Shapes]]:
    """Generate; return the shapes of the inputs of every call, by component."""
    recorded: dict[str, list[Shapes]] = {}

    def place(name: str, component: Component) -> Placement:
        calls = recorded.setdefault(name, [])
        return Placement(
            backend="onnxruntime",
            device="gpu",
            title="a recording",
            open=lambda part: RecordingSession(component, calls),
            key=("recording", id(recorded), name),
        )

    placements = {name: place(name, component) for name, component in bundle.manifest.components.items()}
    Pipeline(bundle, Components(placements))(num_inference_steps=2, sampler="euler", seed=1, **request)
    return recorded
