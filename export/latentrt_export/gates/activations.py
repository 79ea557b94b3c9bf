"""Observes the outputs of a torch module's layers while it runs.

A component may end in integers (pixels), which have no NaN: a decoder whose activations are not finite returns black
images from torch and from every graph, and no comparison of them shows it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.errors import GateError

__all__ = ["observe_outputs"]


@contextlib.contextmanager
def observe_outputs(component: str, module: nn.Module) -> Iterator[dict[str, float]]:
    """Record the largest absolute output of each layer, a module without children, inside the context.

    Args:
        component: the name of the component, for errors.
        module: the module, which is run inside the context.

    Yields:
        Layer → its largest absolute output so far, by its name in torch. Layers that were not run are absent.

    Raises:
        GateError: a layer returns a value that is not finite; raised by the run.
    """
    largest: dict[str, float] = {}

    def make_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
                return
            low, high = (each.item() for each in torch.aminmax(output))
            if not math.isfinite(low) or not math.isfinite(high):
                raise GateError(
                    f"{component}: torch's {name} returns values from {low:g} to {high:g} for the gate's inputs, "
                    "expected finite ones; its weights are damaged or overflow, get another copy of the checkpoint"
                )
            largest[name] = max(largest.get(name, 0.0), -low, high)

        return record

    with contextlib.ExitStack() as hooks:
        for name, layer in module.named_modules():
            if not any(layer.children()):
                hooks.callback(layer.register_forward_hook(make_hook(name)).remove)
        yield largest
