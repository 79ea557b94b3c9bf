"""The element types, against numpy; the exporter's tests compare their codes with ONNX's (`graphs/test_weights.py`)."""

from __future__ import annotations

from typing import get_args

import numpy as np

from latentrt.bundle.onnx_types import CODES, ELEMENT_TYPES, WEIGHT_DTYPES, WEIGHT_TYPES, WHOLE_CODES
from latentrt.bundle.tensors import DType


def test_names_and_sizes_are_numpys() -> None:
    for each in ELEMENT_TYPES.values():
        dtype = np.dtype(each.dtype)
        assert (dtype.name, dtype.itemsize) == (each.name, each.itemsize)
        assert dtype == dtype.newbyteorder("<")
    assert {code for code, each in ELEMENT_TYPES.items() if np.dtype(each.dtype).kind in "iu"} == WHOLE_CODES


def test_every_type_of_a_signature_has_a_code() -> None:
    assert {*get_args(DType)} <= {*CODES}
    assert all(ELEMENT_TYPES[code].name == name for name, code in CODES.items())


def test_weights_have_four_types() -> None:
    assert {*WEIGHT_TYPES} == {"F16", "F32", "I8", "U8"}
    assert WEIGHT_DTYPES == {1: "<f4", 2: "u1", 3: "i1", 10: "<f2"}
