"""A session on ONNX Runtime whose inputs and outputs are bound to device memory.

Without binding, every run allocates on the device and copies through pageable memory. Bound values keep their
addresses, so CUDA can record a run and launch it again (ONNX Runtime's documentation of the CUDA execution provider:
fixed shapes and addresses, one graph id for each set of shapes, recorded and launched by the same thread).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, translating_library_errors
from latentrt.bundle.graph_check import CheckedGraph
from latentrt.bundle.tensors import TensorSpec, axis_sizes, sized

__all__ = ["BoundSession"]

# Limits device memory: each recorded run keeps buffers of its own.
_MAX_SHAPES = 8


@dataclass
class _Binding:
    """Bound inputs and outputs for one set of shapes.

    Attributes:
        fed: the array that each input was last copied from.
    """

    io: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    graph_id: int
    fed: dict[str, NDArray[Any]]


class BoundSession(Session):
    """One graph, loaded by ONNX Runtime for a device.

    Args:
        runtime: the onnxruntime module.
        session: its session.
        graph: the graph.
        inputs, outputs: the graph's signature.
        held: objects that must outlive the session.
        device: of the bound values, by ONNX Runtime's name.
        graphs: whether runs are recorded as CUDA graphs.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        graph: CheckedGraph,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        held: list[Any],
        *,
        device: str,
        graphs: bool,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._runtime, self._session, self._graph, self._held = runtime, session, graph, held
        self._device, self._graphs = device, graphs
        self._bindings: dict[tuple[int, tuple[tuple[int, ...], ...]], _Binding] = {}
        self._ids, self._lock = itertools.count(1), threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        with self._lock, translating_library_errors("ONNX Runtime"):
            return self._run(feeds)

    def close(self) -> None:
        with self._lock:
            while self._bindings:
                self._release(self._bindings.popitem()[1])
            self._session, self._held = None, []

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        binding = self._binding({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            # The same read-only array as at the last run has been copied already.
            if binding.fed.get(name) is not array or array.flags.writeable:
                binding.inputs[name].update_inplace(np.ascontiguousarray(array))
                binding.fed[name] = array
        options = self._runtime.RunOptions()
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(binding.graph_id))
        self._session.run_with_iobinding(binding.io, options)
        # Copies, as the next run writes to the same memory.
        return {name: np.array(value.numpy()) for name, value in binding.outputs.items()}

    def _binding(self, shapes: dict[str, tuple[int, ...]]) -> _Binding:
        # A recorded run belongs to the thread that recorded it.
        key = (threading.get_ident() if self._graphs else 0, tuple(shapes[spec.name] for spec in self.inputs))
        if key not in self._bindings:
            while len(self._bindings) >= _MAX_SHAPES:
                self._release(self._bindings.pop(next(iter(self._bindings))))
            self._bindings[key] = self._bind(shapes)
        return self._bindings[key]

    def _release(self, binding: _Binding) -> None:
        """Free the recorded run of a binding, which ONNX Runtime would keep until the session ends."""
        if self._graphs and hasattr(self._session, "release_captured_graph"):  # ONNX Runtime 1.27 and later
            self._session.release_captured_graph(binding.graph_id)

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> _Binding:
        self._graph.check_sizes(shapes)
        sizes = axis_sizes(self.inputs, shapes)
        binding = _Binding(self._session.io_binding(), {}, {}, next(self._ids), {})
        for spec in self.inputs:
            binding.inputs[spec.name] = self._value(spec, shapes[spec.name])
            binding.io.bind_ortvalue_input(spec.name, binding.inputs[spec.name])
        for spec in self.outputs:
            binding.outputs[spec.name] = self._value(spec, sized(spec, sizes))
            binding.io.bind_ortvalue_output(spec.name, binding.outputs[spec.name])
        return binding

    def _value(self, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype), self._device, 0)
