"""How large do the values inside a graph get? Measured in float32, on real inputs, where nothing overflows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt_export.graphs.onnxruntime_cpu import Graph

__all__ = ["measure_ranges"]


def measure_ranges(
    model: ir.Model, path: Path, feeds: Iterable[Mapping[str, NDArray[Any]]], weights: Iterable[str]
) -> dict[str, float]:
    """Run the graph with two reductions behind every float32 value.

    Args:
        model: the float32 graph. Left as it was.
        path: a scratch file beside the weights; removed again.
        feeds: sets of inputs.
        weights: names of the weights, which do not count: they are stored in half in any case.

    Returns:
        Largest absolute value of each float32 value, by name, over all inputs: inputs, constants, and what nodes make.
        Infinities that a mask puts there do not count.
    """
    feeds = tuple(feeds)
    probed = model.clone()
    names = _add_probes(probed)
    ir.save(probed, path)
    try:
        graph = Graph(path, in_order=True)
        largest = {**_constants(model, set(weights)), **dict.fromkeys(names, 0.0)}
        for feed in feeds:
            results = graph.run(feed)
            seen = {name: _largest(results[f"{name}/ReduceMax"], results[f"{name}/ReduceMin"]) for name in names}
            inputs = {name: _largest(array) for name, array in feed.items() if array.dtype == np.float32}
            for name, figure in {**inputs, **seen}.items():
                largest[name] = max(largest.get(name, 0.0), figure)
    finally:
        path.unlink(missing_ok=True)
    return largest


def _constants(model: ir.Model, weights: set[str]) -> dict[str, float]:
    return {
        name: _largest(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name not in weights and value.const_value is not None and value.dtype == ir.DataType.FLOAT
    }


def _add_probes(model: ir.Model) -> list[str]:
    made = [(node, value) for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for node, value in made:
        for operator in ("ReduceMax", "ReduceMin"):
            probe = ir.node(operator, [value], {"keepdims": 0}, name=f"{value.name}/{operator}")
            probe.outputs[0].name = f"{value.name}/{operator}"
            probe.outputs[0].type, probe.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
            # Right behind the value, and run in that order: a value is let go before the next is made.
            model.graph.insert_after(node, probe)
            model.graph.outputs.append(probe.outputs[0])
    return [str(value.name) for _, value in made]


def _largest(*arrays: NDArray[Any]) -> float:
    values = np.concatenate([np.ravel(array) for array in arrays]).astype(np.float64)
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
