"""Quantises the layers of a float32 graph, with QuantizeLinear and DequantizeLinear around those that compute in int8.

The reasons for the structure of the rewritten graph:

* ONNX Runtime fuses DequantizeLinear → Conv → QuantizeLinear to one QLinearConv, and needs all three, so the output of
  a convolution is quantised too. Otherwise it computes in float, slower than before. OpenVINO does not need this and
  loses no time by it.
* ONNX Runtime fuses DequantizeLinear → MatMul to MatMulIntegerToFloat, but before that it fuses MatMul and the Add of a
  vector behind it to Gemm. An Add of three dimensions prevents that.
* The weights of a layer that computes in float pass through Cast and Mul, which ONNX Runtime folds at load. It would
  compute a DequantizeLinear at each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from latentrt_export.quantize.layers import LayerMethod

__all__ = ["QuantizeLayers"]

_FLOAT, _INT8, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8
_LAYERS = {"Conv", "Gemm", "MatMul"}

# A value's use in onnx_ir: a node and the index of its input.
Use = Any


class QuantizeLayers(ir.passes.InPlacePass):
    """Quantise layers of a float32 graph whose weights are initializers named `<layer>.weight`.

    Args:
        methods: layer → method. Layers whose method is `float32` are not changed.
        tensor: returns the stored tensor of a name: the weights, `<layer>.weight_scale` and, for static layers,
            `<layer>.input_scale`, `<layer>.input_zero_point` and for convolutions `<layer>.output_…`.
    """

    def __init__(self, methods: Mapping[str, LayerMethod], tensor: Callable[[str], ir.TensorProtocol]) -> None:
        self._methods, self._tensor = methods, tensor

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rewrite = _Rewrite(model, self._tensor)
        found = {
            layer: node
            for node in tuple(model.graph)
            if node.op_type in _LAYERS and (layer := _find_layer(node)) in self._methods
        }
        for layer, node in found.items():
            if self._methods[layer] == "static":
                rewrite.quantize(layer, node)
            elif self._methods[layer] == "weights":
                rewrite.quantize_weight(layer)
        return ir.passes.PassResult(model, modified=bool(found))


class _Rewrite:
    """The rewriting of one graph. A value that several layers read is quantised once."""

    def __init__(self, model: ir.Model, tensor: Callable[[str], ir.TensorProtocol]) -> None:
        self.graph, self.tensor = model.graph, tensor
        self.rounded: dict[ir.Value, ir.Value] = {}  # input of layers → its dequantised uint8 form

    def quantize_weight(self, layer: str) -> None:
        """Store a layer's weight as int8, with a Cast and a Mul with its scale behind it."""
        weight, uses = self._store_as_int8(layer)
        cast = _node("Cast", [weight], f"{layer}.weight/Cast", _FLOAT, weight.shape, {"to": int(_FLOAT)})
        scale = self._constant(f"{layer}.weight_scale")
        scaled = _node("Mul", [cast.outputs[0], scale], f"{layer}.weight/Mul", _FLOAT, weight.shape)
        self.graph.insert_before(self.graph[0], [cast, scaled])
        _replace_uses(uses, scaled.outputs[0])

    def quantize(self, layer: str, node: ir.Node) -> None:
        """Store a layer's weight as int8 and round its activations, so that it multiplies integers."""
        weight, uses = self._store_as_int8(layer)
        inputs = [weight, self._constant(f"{layer}.weight_scale")]
        name = f"{layer}.weight/DequantizeLinear"
        dequantize = _node("DequantizeLinear", inputs, name, _FLOAT, weight.shape, {"axis": 0})
        self.graph.insert_before(self.graph[0], dequantize)
        _replace_uses(uses, dequantize.outputs[0])
        source = node.inputs[0]
        assert source is not None
        if source not in self.rounded:
            quantize, dequantize = self._round(source, f"{layer}.input", f"{layer}/input")
            self.graph.insert_before(node, [quantize, dequantize])
            self.rounded[source] = dequantize.outputs[0]
        node.replace_input_with(0, self.rounded[source])
        if node.op_type == "Conv":
            self._round_output(layer, node)
        elif node.op_type == "MatMul":
            self._widen_bias(layer, node)

    def _round_output(self, layer: str, node: ir.Node) -> None:
        output = node.outputs[0]
        uses = tuple(output.uses())
        quantize, dequantize = self._round(output, f"{layer}.output", f"{layer}/output")
        rounded = dequantize.outputs[0]
        self.graph.insert_after(node, [quantize, dequantize])
        if output.is_graph_output():
            index = [*self.graph.outputs].index(output)
            rounded.name, output.name, rounded.shape = output.name, f"{output.name}/float", output.shape
            self.graph.outputs[index] = rounded
        _replace_uses(uses, rounded)

    def _widen_bias(self, layer: str, node: ir.Node) -> None:
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != "Add":
            return
        (add,) = users
        for index, value in enumerate(add.inputs):
            if value is not None and value.name == f"{layer}.bias":
                axes = ir.Value(name=f"{layer}.bias/axes", const_value=ir.tensor([0, 1], name=f"{layer}.bias/axes"))
                axes.type, axes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([2])
                self.graph.initializers[str(axes.name)] = axes
                wide = _node("Unsqueeze", [value, axes], f"{layer}.bias/Unsqueeze", _FLOAT, None)
                self.graph.insert_before(add, wide)
                add.replace_input_with(index, wide.outputs[0])

    def _round(self, source: ir.Value, stored: str, name: str) -> tuple[ir.Node, ir.Node]:
        """Return the two nodes that convert a value to uint8 and back to float."""
        scale, zero_point = self._constant(f"{stored}_scale"), self._constant(f"{stored}_zero_point")
        quantize = _node("QuantizeLinear", [source, scale, zero_point], f"{name}/QuantizeLinear", _UINT8, source.shape)
        back = [quantize.outputs[0], scale, zero_point]
        return quantize, _node("DequantizeLinear", back, f"{name}/DequantizeLinear", _FLOAT, source.shape)

    def _store_as_int8(self, layer: str) -> tuple[ir.Value, tuple[Use, ...]]:
        weight = self.graph.initializers[f"{layer}.weight"]
        weight.const_value = self.tensor(f"{layer}.weight")
        weight.dtype = _INT8
        return weight, tuple(weight.uses())

    def _constant(self, name: str) -> ir.Value:
        tensor = self.tensor(name)
        shape = ir.Shape(size for size in tensor.shape if isinstance(size, int))
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        return self.graph.initializers.setdefault(name, value)


def _find_layer(node: ir.Node) -> str:
    """Return the layer whose weight, or transposed weight, a node multiplies with; empty for other nodes."""
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "Transpose":
        weight = producer.inputs[0]
    name = str(weight.name) if weight is not None and weight.is_initializer() else ""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _replace_uses(uses: tuple[Use, ...], value: ir.Value) -> None:
    for use in uses:
        use.node.replace_input_with(use.idx, value)


def _node(
    operator: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    shape: ir.Shape | None,
    attributes: dict[str, int] | None = None,
) -> ir.Node:
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), shape
    return node
