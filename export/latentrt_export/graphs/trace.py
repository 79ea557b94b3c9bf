"""Traces a torch module into an ONNX graph whose weights have their checkpoint names.

Opset 21: GroupNormalization is one node there (a third fewer nodes than in 18), and both ONNX Runtime and TensorRT run
it. TensorRT-RTX rejects opset 23's Attention in float32, so attention stays in primitive operators.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript import optimizer
from torch import nn

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.graphs.blocks import BlockCalls, Kind, call_blocks, insert_blocks, separate_blocks
from latentrt_export.graphs.passes.drop_safe_softmax import DropSafeSoftmax
from latentrt_export.graphs.passes.name_nodes import NameNodes
from latentrt_export.graphs.passes.transpose_keys import TransposeKeys
from latentrt_export.modules.module import ComponentModule
from latentrt_export.modules.streamed import read_parameter, stand_in_weights

__all__ = ["OPSET", "hide_weights", "trace"]

OPSET = 21


def trace(module: ComponentModule, feeds: Mapping[str, NDArray[Any]]) -> ir.Model:
    """Trace a component into a float32 graph and optimise it.

    Args:
        module: in float32, in evaluation mode. Its weights are not read.
        feeds: one set of inputs, whose sizes all differ, so that no two axes are confused.

    Returns:
        The graph. Its weights are initializers with their canonical names, each read when it is used.

    Raises:
        ExportError: torch cannot trace the module, or a weight is missing from the graph.
    """
    with call_blocks(module) as blocks:
        model = _capture(
            module,
            tuple(torch.from_numpy(feeds[spec.name]) for spec in module.inputs),
            [spec.name for spec in module.inputs],
            [spec.name for spec in module.outputs],
            _free_axes(module.inputs),
        )
    _optimize(model)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        _name_weight(model, name, parameter, module.canonical_name(name))
    insert_blocks(
        model,
        _trace_blocks(blocks.kinds),
        module.canonical_name,
        lambda name: _refer_to(parameters[name], module.canonical_name(name)),
    )
    CommonSubexpressionEliminationPass()(
        model
    )  # what several blocks compute alike, such as the activated time embedding
    lost = {*module.weights()} - {*model.graph.initializers}
    if lost:
        raise ExportError(f"{len(lost)} weights are missing from the traced graph, the first is {min(lost)}")
    _declare(model.graph.inputs, module.inputs)
    _declare(model.graph.outputs, module.outputs)
    return model


def _trace_blocks(kinds: Sequence[Kind]) -> list[ir.Model]:
    if not kinds:
        return []
    calls = BlockCalls(kinds)
    inputs = [f"input{index}" for index in range(len(calls.examples))]
    outputs = [f"output{index}" for index in range(len(kinds))]
    graphs = separate_blocks(_capture(calls, calls.examples, inputs, outputs, (calls.axes,)), kinds)
    for graph in graphs:
        _optimize(graph)
    return graphs


def _capture(
    module: nn.Module,
    examples: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
) -> ir.Model:
    """Trace a module with stand-ins for its weights, which are initializers by their names in torch.

    Raises:
        ExportError: torch returns no graph.
    """
    with _quiet(), stand_in_weights(module), _call_normalizations(module):
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no graph")
    return program.model


@contextlib.contextmanager
def hide_weights(model: ir.Model, names: set[str]) -> Iterator[None]:
    """Turn weights into graph inputs inside the context, so that passes can neither fold, merge nor rename them."""
    graph = model.graph
    weights = {name: graph.initializers.pop(name) for name in list(graph.initializers) if name in names}
    constants = {name: value.const_value for name, value in weights.items()}
    count = len(graph.inputs)
    for value in weights.values():
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        del graph.inputs[count:]
        for name, value in weights.items():
            value.const_value = constants[name]
            if value.uses():
                graph.initializers[name] = value


def _optimize(model: ir.Model) -> None:
    """Simplify a captured graph and name its nodes; its weights are the initializers without values."""
    names = {name for name, value in model.graph.initializers.items() if _is_stand_in(value)}
    with hide_weights(model, names):
        optimizer.optimize_ir(model, num_iterations=3, onnx_shape_inference=True)
        DropSafeSoftmax()(model)
        TransposeKeys()(model)
        optimizer.optimize_ir(model, num_iterations=2, onnx_shape_inference=False)
        NameNodes()(model)


def _is_stand_in(value: ir.Value) -> bool:
    raw = getattr(value.const_value, "raw", None)
    return isinstance(raw, torch.nn.Parameter)


def _name_weight(model: ir.Model, name: str, parameter: nn.Parameter, canonical: str) -> None:
    value = model.graph.initializers.pop(name, None)
    if value is not None:
        value.name = canonical
        value.const_value = _refer_to(parameter, canonical)
        model.graph.initializers[canonical] = value


def _refer_to(parameter: nn.Parameter, name: str) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(read_parameter(parameter).numpy(), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(parameter.shape),
        name=name,
    )


def _free_axes(specs: tuple[TensorSpec, ...]) -> tuple[dict[int, Any], ...]:
    """Return the name of each free axis, by input and axis.

    A multiple is named by its axis alone, unless another input has the axis itself: torch finds the relation of the two
    (8*height of an image to height of latents), and under one name it would declare tensors with wrong shapes.
    """
    plain = {axis for spec in specs for axis in spec.shape}

    def name(axis: str) -> Any:
        factor, _, base = axis.rpartition("*")
        return torch.export.Dim.DYNAMIC if factor and base in plain else base

    return tuple({axis: name(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs)


def _declare(values: Any, specs: tuple[TensorSpec, ...]) -> None:
    """Set the shapes of inputs and outputs to the signature's; the tracer's are correct but hard to read.

    Raises:
        ExportError: a traced input or output has another name or rank.
    """
    for value, spec in zip(values, specs, strict=True):
        if value.name != spec.name or len(value.shape) != len(spec.shape):
            raise ExportError(f"the traced graph has {value.name}{value.shape}, expected {spec} as in the signature")
        value.shape = ir.Shape(spec.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which logs missing optional packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _call_normalizations(module: nn.Module) -> Iterator[None]:
    """Make a trace of a module contain one node for each group norm and layer norm with weights.

    torch's tracer takes a norm apart into some twenty operations and reasons about the sizes of each, and the optimiser
    puts them together again: half of the time of a UNet's trace.
    """
    patched = list[nn.Module]()
    for each in module.modules():
        if type(each) is nn.GroupNorm and each.affine:
            each.forward = partial(_call_group_norm, each, each.forward)  # type: ignore[method-assign]
            patched.append(each)
        elif type(each) is nn.LayerNorm and each.elementwise_affine and each.bias is not None:
            each.forward = partial(_call_layer_norm, each, each.forward)  # type: ignore[method-assign]
            patched.append(each)
    try:
        yield
    finally:
        for each in patched:
            del each.forward


def _call_group_norm(
    layer: nn.GroupNorm, forward: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    attributes = {"num_groups": layer.num_groups, "epsilon": layer.eps}
    return _call_operator("GroupNormalization", layer, forward, features, attributes)


def _call_layer_norm(
    layer: nn.LayerNorm, forward: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    attributes = {"axis": -len(layer.normalized_shape), "epsilon": layer.eps}
    return _call_operator("LayerNormalization", layer, forward, features, attributes)


def _call_operator(
    operator: str,
    layer: Any,
    forward: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    attributes: dict[str, Any],
) -> torch.Tensor:
    if not torch.compiler.is_exporting():
        return forward(features)
    return torch.onnx.ops.symbolic(
        operator,
        (features, layer.weight, layer.bias),
        attributes,
        dtype=features.dtype,
        shape=features.shape,
    )
