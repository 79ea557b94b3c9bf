"""Exports a component: its weights file, its graphs, and their gate results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.gate_inputs import (
    UPSTREAM_ROLES,
    collect_outputs,
    join_outputs,
    make_gate_inputs,
    make_images,
    reference_shapes,
)
from latentrt.bundle.manifest import (
    Component,
    GateResult,
    GraphRecord,
    InputSpec,
    LatentSpace,
    Precision,
    Quantization,
)
from latentrt.bundle.tensors import sized
from latentrt.errors import CheckpointError
from latentrt_export.export_warning import warn
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.gates import verify
from latentrt_export.gates.activations import observe_outputs
from latentrt_export.gates.token_merging import check_matchings, force_decisions
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
    select_float32_weights,
)
from latentrt_export.graphs.segments import SegmentedGraph
from latentrt_export.graphs.trace import OPSET, trace
from latentrt_export.graphs.weights import StoredWeights, store
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.modules.streamed import Read, is_stored_as_half
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.quantize.plan import Int8Plan, plan_int8

__all__ = ["export_component"]

# The prefix of arrays that belong to the calibration prompts or images instead of the gate's.
_CALIBRATION = "calibration:"
_CALIBRATION_IMAGES = (4, 256, 320)  # number, height, width


def export_component(
    module: ComponentModule,
    plan: ComponentPlan,
    folder: Path,
    precision: Precision,
    arrays: Mapping[str, NDArray[Any]],
    space: LatentSpace,
    notify: Callable[[str], None],
    parts: PartWriter | None = None,
    quantization: QuantizationOptions | None = None,
) -> tuple[Component, Arrays]:
    """Trace a component, store its weights, write its graphs and compare them with torch.

    Args:
        module: the module, in float32. Its weights are read from the checkpoint one tensor at a time.
        plan: the component's name, its role, and the sources of its inputs.
        folder: the folder for its files.
        precision: the precision of the bundle. An int8 bundle has a float32 graph over half weights for components that
            are not quantised.
        arrays: the arrays behind gate inputs (`latentrt.bundle.gate_inputs`), and those for calibration.
        space: the latent space of the model.
        notify: called with a description of each step that begins.
        parts: the writer that splits each graph into parts; None for no parts.
        quantization: the options of int8.

    Returns:
        The component's record, and its additions to `arrays`.

    Raises:
        CheckpointError: the module has an input without a source in the plan.
        GateError: a difference from torch exceeds its bound, or torch's own values are not finite.
        ExportError: the module cannot be traced, or a graph cannot be split or loaded.

    Warns:
        ExportWarning: an output of torch is constant.
    """
    require()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = _add_sources(module, plan)

    def feed(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        return make_gate_inputs(plan.name, inputs, shapes, arrays)

    notify("running torch")
    feeds = [feed(_input_shapes(inputs, shapes)) for shapes in module.gate_shapes]
    with observe_outputs(plan.name, module) as largest_outputs:
        exact = [_run(module, each) for each in feeds]
    _warn_about_constants(plan.name, exact)
    produced: Arrays = {}
    if plan.role in UPSTREAM_ROLES:
        reference = reference_shapes(inputs)
        run = _find_run(exact, reference) or _run(module, feed(reference))
        produced |= collect_outputs(plan.name, plan.role, run.outputs, space)
        produced |= _run_calibration_prompts(module, plan.name, inputs, arrays)
        if precision == "int8" and plan.role == "image-encoder":
            produced |= _run_calibration_images(module, plan.name, inputs)
    int8 = None
    if precision == "int8" and module.is_quantized:
        calibration = _collect_calibration(plan.name, inputs, arrays)
        int8, denoised = plan_int8(module, quantization or QuantizationOptions(), calibration, exact, notify)
        produced |= denoised
    stored_as: Precision = "float16" if precision == "int8" and int8 is None else precision
    notify("tracing")
    model = trace(module, feed(_input_shapes(inputs, module.trace_shapes)))
    kept = select_float32_weights(module, largest_outputs) if stored_as != "float32" else frozenset()
    maker = _GraphMaker(module, plan.name, model, folder, stored_as, notify, parts, int8, kept)
    if int8 is not None:
        graphs = maker.int8(exact, int8)
    elif precision == "int8":
        graphs = maker.over_half_weights(exact)
    else:
        graphs = maker.float32(exact) if precision == "float32" else maker.float16(exact)
    component = Component(
        role=plan.role,
        inputs=inputs,
        outputs=module.outputs,
        weights=maker.stored.record(f"{plan.name}/model.safetensors", stored_as),
        graphs=graphs,
        parts=parts.parts if parts is not None else {},
        preprocessing=plan.preprocessing,
    )
    return component, produced


def _add_sources(module: ComponentModule, plan: ComponentPlan) -> tuple[InputSpec, ...]:
    for spec in module.inputs:
        if spec.name not in plan.sources:
            raise CheckpointError(
                f"{plan.name}: its configuration adds the input {spec.name}, expected {', '.join(plan.sources)}, the "
                "inputs that its pipeline class uses"
            )
    return tuple(InputSpec(spec.name, spec.dtype, spec.shape, plan.sources[spec.name]) for spec in module.inputs)


def _input_shapes(inputs: Sequence[InputSpec], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {spec.name: sized(spec, shapes) for spec in inputs}


def _run(module: ComponentModule, feeds: Arrays, read: Read | None = None) -> Run:
    return Run(feeds, module.torch_outputs(feeds, read), module.matchings())


def _warn_about_constants(name: str, runs: Sequence[Run]) -> None:
    """Warn of each output that is the same for every input, or of which every row is one value repeated."""
    for output in runs[0].outputs if runs else ():
        # A row of one value, such as a verdict, says nothing.
        rows = [row for run in runs for row in np.atleast_1d(run.outputs[output]) if row.size > 1]
        if rows and (_are_equal(rows) or all((row == row.flat[0]).all() for row in rows)):
            warn(
                f"{name}: its {output} are constant for every input of the gate, which no trained model's are; the "
                "checkpoint is most likely damaged. Look at an image before you use the bundle"
            )


def _are_equal(rows: Sequence[NDArray[Any]]) -> bool:
    """Return whether all rows of one shape are equal; False if every row has a shape of its own."""
    by_shape: dict[tuple[int, ...], NDArray[Any]] = {}
    return len({row.shape for row in rows}) < len(rows) and all(
        np.array_equal(by_shape.setdefault(row.shape, row), row) for row in rows
    )


def _find_run(runs: Iterable[Run], shapes: Mapping[str, tuple[int, ...]]) -> Run | None:
    return next((run for run in runs if {name: feed.shape for name, feed in run.feeds.items()} == shapes), None)


def _run_calibration_prompts(
    module: ComponentModule, name: str, inputs: Sequence[InputSpec], arrays: Mapping[str, NDArray[Any]]
) -> Arrays:
    """Run a text encoder on the calibration prompts, if there are any; options are 0."""
    tokens = arrays.get(f"{_CALIBRATION}tokens:{name}")
    if tokens is None:
        return {}
    feeds = {spec.name: tokens if spec.source == "tokens" else np.zeros(len(tokens), spec.dtype) for spec in inputs}
    return {f"{_CALIBRATION}{name}.{output}": array for output, array in module.torch_outputs(feeds).items()}


def _run_calibration_images(module: ComponentModule, name: str, inputs: Sequence[InputSpec]) -> Arrays:
    """Run an image encoder on synthetic images; other inputs are 0."""
    images = make_images(*_CALIBRATION_IMAGES)
    feeds = {spec.name: images if spec.source == "image" else np.zeros(len(images), spec.dtype) for spec in inputs}
    return {f"{_CALIBRATION}{name}.{output}": array for output, array in module.torch_outputs(feeds).items()}


def _collect_calibration(name: str, inputs: Sequence[InputSpec], arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Collect the arrays for `ComponentModule.calibrate`."""
    found = {
        spec.name: join_outputs(spec, arrays, _CALIBRATION)
        for spec in inputs
        if all(f"{_CALIBRATION}{each}" in arrays for each in spec.source.split("+"))
    }
    own = {key: f"{key}:{name}" for key in ("noise_schedule", "latent_size")}
    for key, stored in {**own, "latents": "latents", "denoised": "denoised"}.items():
        if stored in arrays:
            found[key] = arrays[stored]
    return found


class _GraphMaker:
    """The writer of a bundle's graphs from one traced graph."""

    def __init__(
        self,
        module: ComponentModule,
        name: str,
        model: ir.Model,
        folder: Path,
        precision: Precision,
        notify: Callable[[str], None],
        parts: PartWriter | None,
        int8: Int8Plan | None,
        kept: frozenset[str],
    ) -> None:
        self.module, self.name, self.model, self.folder, self.notify = module, name, model, folder, notify
        self.parts = parts
        self.weights = tuple(module.weights())
        self.kept = kept
        notify("storing weights")
        quantized = int8.tensors if int8 is not None else {}
        self.stored: StoredWeights = store(module.weights(), folder / "model.safetensors", precision, quantized, kept)
        self.halved = (
            ()
            if precision == "float32"
            else tuple(each for each in self.weights if each not in kept | quantized.keys())
        )
        self._point_at_stored(self.model)

    def float32(self, runs: Sequence[Run]) -> dict[Precision, GraphRecord]:
        """Write the one graph of a float32 bundle."""
        return {"float32": self._finish(self.model, "model.onnx", "float32", runs)}

    def int8(self, runs: Sequence[Run], plan: Int8Plan) -> dict[Precision, GraphRecord]:
        """Write the one graph of a quantised component, compared with the checkpoint's own weights."""
        FuseSelfAttention()(self.model)  # before the projections of queries, keys and values are quantised separately
        QuantizeLayers(plan.methods, self.stored.external)(self.model)
        compute_in_float32(self.model, self.halved)
        return {"int8": self._finish(self.model, "model.onnx", "int8", runs, quantization=plan.record)}

    def over_half_weights(self, exact: Sequence[Run]) -> dict[Precision, GraphRecord]:
        """Write the one graph of a component that an int8 bundle does not quantise: float32 over rounded weights.

        The graph is compared with torch on the rounded weights, and that with torch on the checkpoint's own.
        """
        rounded = self._run_on_stored_weights(exact)
        for own, run in zip(exact, rounded, strict=True):
            verify.compare(self.name, "float16", run.feeds, own.outputs, run.outputs)
        compute_in_float32(self.model, self.halved)
        return {"float32": self._finish(self.model, "model.onnx", "float32", rounded)}

    def float16(self, exact: Sequence[Run]) -> dict[Precision, GraphRecord]:
        """Write the half graph and its float32 companion.

        The half graph is compared with torch on the checkpoint's own weights, its companion on the rounded ones. The
        companion's run also measures the ranges that decide which nodes of the half graph compute in float32.
        """
        rounded = self._run_on_stored_weights(exact)
        companion = self.model.clone()
        compute_in_float32(companion, self.halved)
        ranges: dict[str, float] = {}
        float32 = self._finish(companion, "model.float32.onnx", "float32", rounded, ranges=ranges)
        must_stay = select_float32_nodes(self.model, ranges, self.kept)
        kept = compute_in_half(
            self.model,
            self.halved,
            float32_inputs=self.module.float32_inputs,
            float32_nodes=must_stay,
            ranges=ranges,
        )
        return {"float16": self._finish(self.model, "model.onnx", "float16", exact, kept), "float32": float32}

    def _run_on_stored_weights(self, exact: Sequence[Run]) -> Sequence[Run]:
        """Run torch on the bundle's weights; where they are the checkpoint's to the bit, the results are known."""
        if all(map(is_stored_as_half, self.module.parameters())):
            return exact
        self.notify("running torch on half weights")
        canonical = {name: self.module.canonical_name(name) for name, _ in self.module.named_parameters()}
        return [_run(self.module, run.feeds, lambda name: self.stored.read(canonical[name])) for run in exact]

    def _point_at_stored(self, model: ir.Model) -> None:
        for name in self.weights:
            model.graph.initializers[name].const_value = self.stored.external(name)

    def _finish(
        self,
        model: ir.Model,
        file: str,
        precision: Precision,
        runs: Sequence[Run],
        float32_nodes: tuple[str, ...] = (),
        quantization: Quantization | None = None,
        ranges: dict[str, float] | None = None,
    ) -> GraphRecord:
        """Save a graph, compare it with torch, and split it into parts.

        Args:
            ranges: filled with the largest absolute value of each of the graph's values, if it is given.
        """
        self.notify(f"checking the {precision} graph")
        ir.save(model, self.folder / file)
        forced, _ = force_decisions(ir.load(self.folder / file))
        feeds = [{**run.feeds, **run.forced} for run in runs]
        if ranges is None:
            outputs = SegmentedGraph(forced, self.folder).run_all(feeds)
        else:
            found, outputs = measure_ranges(forced, self.folder, feeds, self.weights)
            ranges.update(found)
        method = quantization.method if quantization is not None else None
        results: list[GateResult] = []
        own: list[Run] = []
        for run, made in zip(runs, outputs, strict=True):
            shapes = {name: array.shape for name, array in run.feeds.items()}
            results += check_matchings(self.name, precision, made, run.forced, shapes)
            own.append(Run(run.feeds, {name: made[name] for name in run.outputs if name in made}, run.forced))
            results += verify.compare(self.name, precision, run.feeds, run.outputs, own[-1].outputs, method)
        record = GraphRecord(
            file=f"{self.name}/{file}",
            opset=OPSET,
            nodes=len(model.graph),
            float32_nodes=float32_nodes,
            gate=tuple(results),
            quantization=quantization,
        )
        if self.parts is not None:
            self.parts.write(model, record, precision, own)
        return record
