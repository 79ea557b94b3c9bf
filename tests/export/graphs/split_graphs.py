"""Splits the graph of an exported denoiser, and runs the graph and its parts."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from latentrt.bundle.manifest import PartName
from latentrt_export.graphs.split import split_denoiser
from latentrt_export.modules.unet import UNet

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of one set of inputs."""

    batch: int
    height: int
    width: int
    tokens: int = 77


@dataclass(frozen=True)
class SplitGraphs:
    """A whole graph and its parts, in memory and on disk: `whole.onnx`, `body.onnx` …"""

    whole: ir.Model
    parts: Mapping[PartName, ir.Model]
    folder: Path

    def run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run a graph on its inputs among the feeds, without optimisation.

        float32 graphs run on ONNX Runtime, which computes half in float32 and rounds only some values. Half graphs run
        on ONNX's slow reference, which rounds every value.
        """
        outputs, inputs = (names(values) for values in (self[name].graph.outputs, self[name].graph.inputs))
        selected = {name: feeds[name] for name in inputs}
        file = self.folder / f"{name}.onnx"
        run = _open_reference(file) if self.in_half else _open_unoptimised(file)
        return dict(zip(outputs, run(outputs, selected), strict=True))

    def run_parts(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the parts on each other's outputs; return these and the feeds."""
        values = dict(feeds)
        for name in ("time_embedding", "cross_attention_kv", "body"):
            values.update(self.run(name, values))
        return values

    @property
    def in_half(self) -> bool:
        """Whether any node computes in half."""
        return any(value.dtype == ir.DataType.FLOAT16 for node in self.whole.graph for value in node.outputs)

    def __getitem__(self, name: str) -> ir.Model:
        return {"whole": self.whole, **{str(part): model for part, model in self.parts.items()}}[name]


@functools.lru_cache(16)
def _open_unoptimised(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run


@functools.lru_cache(16)
def _open_reference(file: Path) -> Any:
    return ReferenceEvaluator(onnx.load(file)).run


def names(values: Iterable[ir.Value | None]) -> list[str]:
    """Return the names of values."""
    return [str(value.name) for value in values if value is not None]


def split_file(graph: Path, folder: Path, deep_cache: int | None = None) -> SplitGraphs:
    """Split a denoiser's graph file; write the parts and a copy of the weights to `folder`."""
    return split_model(ir.load(graph), graph.with_name("model.safetensors"), folder, deep_cache)


def split_model(model: ir.Model, weights: Path, folder: Path, deep_cache: int | None = None) -> SplitGraphs:
    """Split a denoiser's graph; write the parts and a copy of the weights to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, folder / "model.safetensors")
    parts = split_denoiser(model, UNet.loop_invariant_inputs, deep_cache)
    ir.save(model, folder / "whole.onnx")
    for name, part in parts.items():
        ir.save(part, folder / f"{name}.onnx")
    return SplitGraphs(model, parts, folder)


def make_feeds(model: ir.Model, case: Case) -> Arrays:
    """Make noise of the sizes of a case, and a timestep for each sample."""
    rng = np.random.default_rng(case.height)
    channels, width = (_size(model, "sample", 1), _size(model, "encoder_hidden_states", 2))
    return {
        "sample": rng.standard_normal((case.batch, channels, case.height, case.width)).astype(np.float32),
        "timestep": np.resize(np.array([981.0, 21.0, 401.0], np.float32), case.batch),
        "encoder_hidden_states": rng.standard_normal((case.batch, case.tokens, width)).astype(np.float32),
    }


def _size(model: ir.Model, name: str, axis: int) -> int:
    size = next(value.shape[axis] for value in model.graph.inputs if value.name == name and value.shape is not None)
    assert isinstance(size, int)
    return size
