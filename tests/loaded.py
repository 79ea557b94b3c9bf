"""Modules whose weights are in memory, for tests that call or change them."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from latentrt_export.modules.streamed import read_parameter

M = TypeVar("M", bound=nn.Module)


def with_weights(module: M) -> M:
    """Read every parameter that is still in its file; return the module."""
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(read_parameter(parameter), requires_grad=False)
    return module
