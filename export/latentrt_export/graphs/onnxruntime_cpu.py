"""The ONNX Runtime that is installed, as the exporter's own instrument: for the gate and for measuring ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.cores import usable_cores
from latentrt.errors import ExportError, MissingExtraError
from latentrt_export.modules.module import Arrays

__all__ = ["Graph", "require"]


def require() -> Any:
    """The onnxruntime module.

    Raises:
        MissingExtraError: no ONNX Runtime is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "compare every exported graph with torch") from error
    return onnxruntime


class Graph:
    """A graph on disk, run on the CPU.

    Args:
        path: the .onnx file; its weights lie beside it.
        in_order: run nodes as they stand in the file, as far as their inputs allow, instead of late.
        as_it_stands: compute every node by itself, with nothing folded or fused.
    """

    def __init__(self, path: Path, *, in_order: bool = False, as_it_stands: bool = False) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        # Arenas keep their peak; without them the memory of a gate is what its largest step needs.
        options.enable_cpu_mem_arena = False
        if in_order:
            options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        if as_it_stands:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{path.name}: ONNX Runtime refuses the graph: {error}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
