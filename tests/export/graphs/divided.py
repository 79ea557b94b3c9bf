"""A graph of an exported denoiser and its parts, and what they compute."""

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
from latentrt_export.graphs.division import divide
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
class Divided:
    """The whole graph and its parts, in memory and on disk: `whole.onnx`, `loop.onnx` …"""

    whole: ir.Model
    parts: Mapping[PartName, ir.Model]
    folder: Path

    def run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """What a graph makes of what it takes of the feeds, computed as it stands: nothing fused, nothing left out.

        ONNX Runtime without its optimisations does that for float32. Half it computes in float32 as well, and rounds
        only where it has to; ONNX's slow reference rounds each value.
        """
        outputs, inputs = (names(values) for values in (self[name].graph.outputs, self[name].graph.inputs))
        given = {name: feeds[name] for name in inputs}
        file = self.folder / f"{name}.onnx"
        run = _by_definition(file) if self.in_half else _unoptimised(file)
        return dict(zip(outputs, run(outputs, given), strict=True))

    def composed(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the parts make one of the other's outputs, beside the feeds."""
        values = dict(feeds)
        for name in ("time_embedding", "cross_attention_kv", "body"):
            values.update(self.run(name, values))
        return values

    @property
    def in_half(self) -> bool:
        """Whether any of it computes in half."""
        return any(value.dtype == ir.DataType.FLOAT16 for node in self.whole.graph for value in node.outputs)

    def __getitem__(self, name: str) -> ir.Model:
        return {"whole": self.whole, **{str(part): model for part, model in self.parts.items()}}[name]


@functools.lru_cache(16)
def _unoptimised(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run


@functools.lru_cache(16)
def _by_definition(file: Path) -> Any:
    return ReferenceEvaluator(onnx.load(file)).run


def names(values: Iterable[ir.Value | None]) -> list[str]:
    return [str(value.name) for value in values if value is not None]


def divided(graph: Path, folder: Path, deep_cache: int | None = None) -> Divided:
    """Divide a denoiser's graph file; the parts and a copy of the weights go into `folder`."""
    return divided_model(ir.load(graph), graph.with_name("model.safetensors"), folder, deep_cache)


def divided_model(model: ir.Model, weights: Path, folder: Path, deep_cache: int | None = None) -> Divided:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, folder / "model.safetensors")
    parts = divide(model, UNet.loop_invariant_inputs, deep_cache)
    ir.save(model, folder / "whole.onnx")
    for name, part in parts.items():
        ir.save(part, folder / f"{name}.onnx")
    return Divided(model, parts, folder)


def feeds_of(model: ir.Model, case: Case) -> Arrays:
    """Noise of the sizes of a case, and a timestep for each sample."""
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
