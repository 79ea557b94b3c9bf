"""Traces normalisations as the ONNX operators that they are.

torch's tracer takes a normalisation apart into some twenty operations, reasons about the sizes of each, and the
optimiser puts them together again: half of the time of a UNet's trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_normalizations"]


@contextmanager
def call_normalizations(module: nn.Module) -> Iterator[None]:
    """Make a trace of a module contain one node for each group norm and layer norm with weights."""
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


def _call_group_norm(layer: nn.GroupNorm, forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    attributes = {"num_groups": layer.num_groups, "epsilon": layer.eps}
    return _call("GroupNormalization", layer, forward, features, attributes)


def _call_layer_norm(layer: nn.LayerNorm, forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    attributes = {"axis": -len(layer.normalized_shape), "epsilon": layer.eps}
    return _call("LayerNormalization", layer, forward, features, attributes)


def _call(
    operator: str, layer: Any, forward: Callable[[Tensor], Tensor], features: Tensor, attributes: dict[str, Any]
) -> Tensor:
    if not torch.compiler.is_exporting():
        return forward(features)
    return torch.onnx.ops.symbolic(
        operator,
        (features, layer.weight, layer.bias),
        attributes,
        dtype=features.dtype,
        shape=features.shape,
    )
