"""How large do the values inside a graph get? Measured in float32, on real inputs, where nothing overflows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt_export.onnxruntime_cpu import Graph
from latentrt_export.submodule import Arrays

__all__ = ["measure_ranges"]


def measure_ranges(model: ir.Model, path: Path, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Run the graph with two reductions behind every float32 value.

    Args:
        model: the float32 graph. Left as it was.
        path: a scratch file beside the weights; removed again.
        feeds: sets of inputs.

    Returns:
        Largest absolute value of each float32 value, by name, over all inputs. Infinities that a mask puts there do not count.
    """
    probed = model.clone()
    names = _add_probes(probed)
    ir.save(probed, path)
    try:
        graph = Graph(path)
        largest = dict.fromkeys(names, 0.0)
        for feed in feeds:
            results = graph.run(feed)
            for name in names:
                largest[name] = max(largest[name], _largest(results, name))
    finally:
        path.unlink()
    return largest


def _add_probes(model: ir.Model) -> list[str]:
    values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for value in values:
        for operator in ("ReduceMax", "ReduceMin"):
            probe = ir.node(operator, [value], {"keepdims": 0}, name=f"{value.name}/{operator}")
            probe.outputs[0].name = f"{value.name}/{operator}"
            probe.outputs[0].type, probe.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
            model.graph.append(probe)
            model.graph.outputs.append(probe.outputs[0])
    return [str(value.name) for value in values]


def _largest(results: Arrays, name: str) -> float:
    ends = np.array([results[f"{name}/ReduceMax"], results[f"{name}/ReduceMin"]], np.float64)
    finite = ends[np.isfinite(ends)]
    return float(np.abs(finite).max(initial=0.0))
