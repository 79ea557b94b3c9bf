"""Runs graphs with ONNX Runtime on the CPU, for the gates and for measuring ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentrt.backends import onnxruntime
from latentrt.backends.cores import usable_cores
from latentrt.errors import ExportError
from latentrt_export.modules.module import Arrays

__all__ = ["Graph", "require"]


def require() -> Any:
    """Return the onnxruntime module.

    Raises:
        MissingExtraError, BackendError: see `latentrt.backends.onnxruntime.require`.
    """
    return onnxruntime.require("compare every exported graph with torch")


class Graph:
    """A graph on disk, loaded into ONNX Runtime.

    Args:
        path: the .onnx file; its weights are in the same folder.
        file_order: run nodes in the order of the file, where their inputs allow it, instead of as late as possible.
        optimize: fold constants and fuse nodes; False computes every node on its own.

    Raises:
        ExportError: ONNX Runtime rejects the graph.
    """

    def __init__(self, path: Path, *, file_order: bool = False, optimize: bool = True) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        # An arena keeps its peak; without one, a gate needs only the memory of its largest step.
        options.enable_cpu_mem_arena = False
        if file_order:
            options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        if not optimize:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{path.name}: ONNX Runtime rejects the graph: {error}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Evaluate the graph; return its outputs by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
