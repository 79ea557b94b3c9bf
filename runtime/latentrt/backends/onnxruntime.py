"""Graphs on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle import Bundle
from latentrt.errors import BackendError, MissingExtraError
from latentrt.manifest import Precision
from latentrt.session import Arrays
from latentrt.tensors import TensorSpec
from latentrt.weights import map_weights

__all__ = ["OnnxRuntimeSession", "open_session"]


class OnnxRuntimeSession:
    """One graph, loaded by ONNX Runtime."""

    def __init__(self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._session, self._inputs = session, inputs
        self._outputs = [spec.name for spec in outputs]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        try:
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # the package's own exceptions have no common class
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        return dict(zip(self._outputs, results, strict=True))


def open_session(bundle: Bundle, component: str, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Load a component of a bundle for the CPU.

    A CPU computes in float32: half arithmetic there is emulated and slower. Where a bundle has a graph that computes in
    float32 from its half weights, that is the one.

    Args:
        bundle: its files are verified before they are parsed.
        component: `unet`, `text_encoder`, ….
        threads: of each operator; one per core if None.

    Raises:
        MissingExtraError: no ONNX Runtime is installed.
        BundleError: the component's files are missing or not the ones that the manifest pins.
        BackendError: ONNX Runtime refuses the graph.
    """
    runtime = _onnxruntime()
    record = bundle.manifest.components[component]
    precision: Precision = "float32" if "float32" in record.graphs else "float16"
    graph_name, weights_name = bundle.component_files(component, precision)
    graph, weights = bundle.read(graph_name), map_weights(bundle.path(weights_name))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    # The graph comes as the very bytes that were hashed, and the weights by name: ONNX Runtime opens no file itself,
    # and would not follow the links that a hub cache is made of.
    values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"{component}: ONNX Runtime {runtime.__version__} refuses the graph: {error}") from error
    return OnnxRuntimeSession(session, record.inputs, record.outputs)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "run a bundle on the CPU") from error
    return onnxruntime
