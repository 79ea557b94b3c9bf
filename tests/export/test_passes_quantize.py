"""The rewrite to int8: what a graph computes afterwards, on ONNX Runtime and on OpenVINO, beside integers in numpy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray

from latentrt_export.passes.quantize import QuantizeLayers
from latentrt_export.quantization import LayerMethod, weight_limit
from tests.export.small_graph import run, small_graph

CONV = """
g (float[B,C,H,W] x, float[8,32,3,3] {conv.weight}, float[8] {conv.bias}) => (float[B,8,H,W] y) {
  c = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, {conv.weight}, {conv.bias})
  y = Identity(c)
}
"""
MATMUL = """
g (float[B,T,32] x, float[8,32] {fc.weight}, float[8] {fc.bias}) => (float[B,T,8] y) {
  w = Transpose<perm = [1,0]>({fc.weight})
  m = MatMul(x, w)
  y = Add(m, {fc.bias})
}
"""
SHAPES = {"conv": (8, 32, 3, 3), "fc": (8, 32)}
