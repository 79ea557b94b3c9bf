"""The element types of tensors in the exporter's graphs: ONNX's codes, and the names that numpy and safetensors use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CODES", "ELEMENT_TYPES", "WEIGHT_DTYPES", "WEIGHT_TYPES", "WHOLE_CODES", "ElementType"]


@dataclass(frozen=True, slots=True)
class ElementType:
    """One type.

    Attributes:
        name: numpy's name, which is also that in a signature: `float32`.
        dtype: numpy's code, little endian: `<f4`.
        itemsize: the size of an element in bytes.
        stored: safetensors' name, `F32`, if a component's weights may have this type; else None.
    """

    name: str
    dtype: str
    itemsize: int
    stored: str | None = None


ELEMENT_TYPES: Mapping[int, ElementType] = {
    1: ElementType("float32", "<f4", 4, "F32"),
    2: ElementType("uint8", "u1", 1, "U8"),
    3: ElementType("int8", "i1", 1, "I8"),
    6: ElementType("int32", "<i4", 4),
    7: ElementType("int64", "<i8", 8),
    9: ElementType("bool", "?", 1),
    10: ElementType("float16", "<f2", 2, "F16"),
    11: ElementType("float64", "<f8", 8),
}
"""The types by TensorProto.DataType."""
CODES: Mapping[str, int] = {each.name: code for code, each in ELEMENT_TYPES.items()}
"""TensorProto.DataType by numpy's name."""
WHOLE_CODES = frozenset(code for code, each in ELEMENT_TYPES.items() if "int" in each.name)
"""TensorProto.DataType of the types of whole numbers."""
WEIGHT_TYPES: Mapping[str, int] = {each.stored: code for code, each in ELEMENT_TYPES.items() if each.stored is not None}
"""TensorProto.DataType of the types that a weights file may have (`latentrt.bundle.weights`), by safetensors' name."""
WEIGHT_DTYPES: Mapping[int, str] = {code: ELEMENT_TYPES[code].dtype for code in WEIGHT_TYPES.values()}
"""numpy's code of these types by TensorProto.DataType."""
