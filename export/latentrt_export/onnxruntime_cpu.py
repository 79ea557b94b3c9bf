"""The ONNX Runtime that is installed, as the exporter's own instrument: for the gate and for measuring ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentrt.errors import ExportError, MissingExtraError
from latentrt_export.submodule import Arrays

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
    """A graph on disk, run on the CPU."""

    def __init__(self, path: Path) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        options.log_severity_level = 3
        # Arenas keep their peak; without them the memory of a gate is what its largest step needs.
        options.enable_cpu_mem_arena = False
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{path.name}: ONNX Runtime refuses the graph: {error}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
