"""Traces a module once for all the tiny checkpoints of a test run that have the same module.

Tracing takes most of an export and depends on a module's configuration alone. The checkpoints of other tasks have the
same autoencoder and text encoder, with other weights: their graph is read from a file, and their own weights are put
into it. Each export still compares its graphs with torch, so a graph of another module would miss its gate.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from latentrt_export import component
from latentrt_export.graphs.trace import hide_weights, trace
from latentrt_export.modules.module import ComponentModule


@contextlib.contextmanager
def tracing_once(folder: Path) -> Iterator[None]:
    """Keep traced graphs in `folder`, and read those that are there, in place of `component.trace`."""
    folder.mkdir(exist_ok=True)

    def trace_once(module: ComponentModule, feeds: Mapping[str, NDArray[Any]]) -> ir.Model:
        file = folder / f"{_key(module, feeds)}.onnx"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                model = trace(module, feeds)
                with hide_weights(model, set(module.weights())):
                    onnx.save(ir.to_proto(model), file)
                return model
        return _with_weights(ir.load(file), module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "trace", trace_once)
        yield


def _key(module: ComponentModule, feeds: Mapping[str, NDArray[Any]]) -> str:
    """Return a digest of everything that a graph is made from, which is all but the weights."""
    configs = [str(each.config) for each in module.modules() if hasattr(each, "config")]
    own = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple)}
    weights = {name: tuple(weight.shape) for name, weight in module.weights().items()}
    constants = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in module.named_buffers()}
    shapes = {name: (feed.shape, feed.dtype) for name, feed in feeds.items()}
    parts = (type(module), configs, own, weights, constants, shapes, module.inputs, module.outputs, str(module))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _with_weights(model: ir.Model, module: ComponentModule) -> ir.Model:
    """Turn the inputs that stand for weights into initializers with the module's own values."""
    graph, weights = model.graph, module.weights()
    for value in [each for each in graph.inputs if each.name in weights]:
        assert value.name is not None
        value.const_value = ir.tensor(np.asarray(weights[value.name]), name=value.name)
        graph.inputs.remove(value)
        graph.initializers[value.name] = value
    return model
