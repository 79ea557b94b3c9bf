"""A submodule → its weights file, its graphs, and the figures that prove them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from latentrt.bundle.manifest import Component, GateFigure, GraphRecord, Precision, Quantization
from latentrt_export.gates import verify
from latentrt_export.gates.token_merging import check_matchings, open_forced
from latentrt_export.gates.verify import Run
from latentrt_export.graphs.onnxruntime_cpu import require
from latentrt_export.graphs.part_writer import PartWriter
from latentrt_export.graphs.passes.fuse_self_attention import FuseSelfAttention
from latentrt_export.graphs.passes.quantize_layers import QuantizeLayers
from latentrt_export.graphs.precision import (
    compute_in_float32,
    compute_in_half,
    measure_ranges,
    select_float32_nodes,
)
from latentrt_export.graphs.trace import OPSET, trace
from latentrt_export.graphs.weights import StoredWeights, store
from latentrt_export.modules.module import Arrays, Submodule
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.quantize.plan import Int8Plan, plan_int8

__all__ = ["export_component"]


def export_component(
    submodule: Submodule,
    folder: Path,
    prefix: str,
    precision: Precision,
    known: Mapping[str, NDArray[Any]],
    phase: Callable[[str], None],
    parts: PartWriter | None = None,
    quantizing: QuantizationOptions | None = None,
) -> tuple[Component, Arrays]:
    """Trace, store, rewrite and judge one submodule.

    Args:
        submodule: loaded, in float32. Its weights are rounded in place for float16, and given up to save memory.
        folder: where its files go.
        prefix: what the bundle calls the folder (`unet/`).
        precision: of the bundle. One of int8 has a float32 graph over half weights of what is not quantised.
        known: what earlier submodules made, for inputs.
        phase: told what is being done.
        parts: what divides each graph, where the submodule is to have parts.
        quantizing: how an int8 graph is made.

    Returns:
        The component's record, and what later submodules may use as inputs.

    Raises:
        GateError: a graph misses its bound.
    """
    require()
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    phase("running torch")
    feeds = [submodule.sample(case, known, rng) for case in submodule.judged]
    exact = [_trial(submodule, feed) for feed in feeds]
    learnt = submodule.passes_on(exact[-1].feeds, exact[-1].outputs, known)
    plan = None
    if precision == "int8" and submodule.quantized:
        plan, ended_with = plan_int8(submodule, quantizing or QuantizationOptions(), known, exact, phase)
        learnt |= ended_with
    stored_as: Precision = "float16" if precision == "int8" and plan is None else precision
    phase("tracing")
    model = trace(submodule, submodule.sample(submodule.traced, known, rng))
    maker = _GraphMaker(submodule, model, folder, prefix, stored_as, phase, parts, plan)
    if plan is not None:
        graphs = maker.int8(exact, plan)
    elif precision == "int8":
        graphs = maker.over_half_weights(feeds)
    else:
        graphs = maker.float32(exact) if precision == "float32" else maker.float16(feeds, exact)
    component = Component(
        inputs=submodule.inputs,
        outputs=submodule.outputs,
        weights=maker.stored.record(f"{prefix}model.safetensors", stored_as),
        graphs=graphs,
        parts=parts.parts if parts is not None else {},
        export_peak_bytes=0,
        export_seconds=0.0,
    )
    return component, learnt


class _GraphMaker:
    """Turns one traced graph into those that the bundle gets.

    It owns the module's weights from the moment they are on disk.
    """

    def __init__(
        self,
        submodule: Submodule,
        model: ir.Model,
        folder: Path,
        prefix: str,
        precision: Precision,
        phase: Callable[[str], None],
        parts: PartWriter | None,
        plan: Int8Plan | None,
    ) -> None:
        self.submodule, self.model, self.folder, self.prefix, self.phase = submodule, model, folder, prefix, phase
        self.parts = parts
        self.weights = tuple(submodule.weights())
        if precision == "float16":
            _round_to_half(submodule)
        phase("storing weights")
        quantized = plan.tensors if plan is not None else {}
        self.stored: StoredWeights = store(submodule.weights(), folder / "model.safetensors", precision, quantized)

    def float32(self, trials: Iterable[Run]) -> dict[Precision, GraphRecord]:
        """The one graph of a float32 bundle."""
        self._release()
        return {"float32": self._finish(self.model, "model.onnx", "float32", trials)}

    def int8(self, trials: Iterable[Run], plan: Int8Plan) -> dict[Precision, GraphRecord]:
        """The one graph of a quantised submodule, judged by the checkpoint's own weights."""
        self._release()
        FuseSelfAttention()(self.model)  # before what queries, keys and values are made of is quantised apart
        QuantizeLayers(plan.methods, self.stored.external)(self.model)
        floats = [name for name in self.weights if name not in plan.tensors]
        compute_in_float32(self.model, floats)
        return {"int8": self._finish(self.model, "model.onnx", "int8", trials, quantization=plan.record)}

    def over_half_weights(self, feeds: Iterable[Arrays]) -> dict[Precision, GraphRecord]:
        """The one graph of a submodule that an int8 bundle does not quantise: float32 over rounded weights."""
        self.phase("running torch on half weights")
        rounded = [_trial(self.submodule, feed) for feed in feeds]
        self._release()
        compute_in_float32(self.model, self.weights)
        self._point_at_stored(self.model)
        return {"float32": self._finish(self.model, "model.onnx", "float32", rounded)}

    def float16(self, feeds: Iterable[Arrays], exact: Iterable[Run]) -> dict[Precision, GraphRecord]:
        """The half graph, judged by the checkpoint's own weights, and its float32 companion, by the rounded ones."""
        self.phase("running torch on half weights")
        rounded = [_trial(self.submodule, feed) for feed in feeds]
        self._release()
        companion = self.model.clone()
        compute_in_float32(companion, self.weights)
        self._point_at_stored(companion)
        self.phase("measuring ranges")
        ranges = measure_ranges(
            companion, self.folder / "ranges.onnx", [trial.feeds for trial in rounded], self.weights
        )
        float32 = self._finish(companion, "model.float32.onnx", "float32", rounded)
        must_stay = select_float32_nodes(self.model, ranges)
        kept = compute_in_half(
            self.model,
            self.weights,
            float32_inputs=self.submodule.float32_inputs,
            float32_nodes=must_stay,
            ranges=ranges,
        )
        self._point_at_stored(self.model)
        return {"float16": self._finish(self.model, "model.onnx", "float16", exact, kept), "float32": float32}

    def _release(self) -> None:
        """Let go of the module's memory: from here on the weights are the file's."""
        self._point_at_stored(self.model)
        self.submodule.to_empty(device="meta")

    def _point_at_stored(self, model: ir.Model) -> None:
        for name in self.weights:
            model.graph.initializers[name].const_value = self.stored.external(name)

    def _finish(
        self,
        model: ir.Model,
        file: str,
        precision: Precision,
        trials: Iterable[Run],
        kept: tuple[str, ...] = (),
        quantization: Quantization | None = None,
    ) -> GraphRecord:
        self.phase(f"checking the {precision} graph")
        ir.save(model, self.folder / file)
        graph, _ = open_forced(model, self.folder / file)
        method = quantization.method if quantization is not None else None
        figures: list[GateFigure] = []
        runs: list[Run] = []
        component = self.prefix.rstrip("/")
        for trial in trials:
            outputs = graph.run({**trial.feeds, **trial.forced})
            shapes = {name: array.shape for name, array in trial.feeds.items()}
            figures += check_matchings(component, precision, outputs, trial.forced, shapes)
            runs.append(Run(trial.feeds, {name: outputs[name] for name in trial.outputs}, trial.forced))
            figures += verify.compare(component, precision, trial.feeds, trial.outputs, runs[-1].outputs, method)
        del graph  # before its parts are loaded
        record = GraphRecord(
            file=f"{self.prefix}{file}",
            opset=OPSET,
            nodes=len(model.graph),
            float32_nodes=kept,
            gate=tuple(figures),
            quantization=quantization,
        )
        if self.parts is not None:
            self.parts.write(model, record, precision, runs)
        return record


def _trial(submodule: Submodule, feeds: Arrays) -> Run:
    return Run(feeds, submodule.torch_outputs(feeds), submodule.choices())


def _round_to_half(submodule: Submodule) -> None:
    with torch.no_grad():
        for parameter in submodule.parameters():
            parameter.copy_(parameter.half().float())
