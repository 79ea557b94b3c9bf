"""Evaluates and traces modules whose weights stay in their files.

`load_pretrained` builds a module with its parameters on the meta device and their places in the checkpoint. In an
evaluation, each layer's weights are read when it begins and released when it ends, so that a model takes the memory of
its largest layer and of its activations, whatever its size. In a trace, stand-ins without memory take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = [
    "Read",
    "WeightsByName",
    "is_stored_as_half",
    "read_parameter",
    "stand_in_weights",
    "streamed_weights",
]

Read = Callable[[str], Tensor]
"""Returns the parameter of a name as it is in torch, float32."""
# Layers whose weights their own `forward` reads and nothing else. Other parameters are loaded for the whole evaluation.
_STREAMED = (nn.Linear, nn.Conv2d, nn.Embedding)


def read_parameter(parameter: Tensor) -> Tensor:
    """Return the values of a parameter: its own, or those in its file."""
    if not parameter.is_meta:
        return parameter.detach()
    stored: Any = getattr(parameter, "stored", None)
    assert stored is not None, "load_pretrained gives each parameter on the meta device its place"
    return stored.load()  # type: ignore[no-any-return]


def is_stored_as_half(parameter: nn.Parameter) -> bool:
    """Return whether a parameter's values in its file are float16."""
    stored: Any = getattr(parameter, "stored", None)
    return stored is not None and stored.dtype == "F16"


def _own_weights(module: nn.Module) -> Read:
    """Return the reader of a module's own parameters."""
    parameters = dict(module.named_parameters())
    return lambda name: read_parameter(parameters[name])


@contextmanager
def streamed_weights(module: nn.Module, read: Read | None = None) -> Iterator[None]:
    """Load the weights of each layer for the time of its evaluation, inside a `with` block.

    Args:
        module: the module, which is evaluated inside the block.
        read: returns the values of a parameter; None reads the module's own. Parameters that are loaded already stay
            as they are unless it is given.
    """
    paths = {id(parameter): name for name, parameter in module.named_parameters()}
    wanted = {key for key, parameter in ((id(each), each) for each in module.parameters()) if read or parameter.is_meta}
    find = read or _own_weights(module)

    def load(layer: nn.Module) -> dict[str, nn.Parameter]:
        own = {name: each for name, each in layer._parameters.items() if each is not None and id(each) in wanted}
        for name, each in own.items():
            layer._parameters[name] = nn.Parameter(find(paths[id(each)]), requires_grad=False)
        return own

    with ExitStack() as undo:
        for layer in module.modules():
            if type(layer) in _STREAMED:
                _stream(layer, load, undo)
            else:
                undo.callback(layer._parameters.update, load(layer))
        yield


def _stream(layer: nn.Module, load: Callable[[nn.Module], dict[str, nn.Parameter]], undo: ExitStack) -> None:
    replaced: dict[str, nn.Parameter] = {}

    def before(layer: nn.Module, inputs: Any) -> None:
        replaced.update(load(layer))

    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        release()

    def release() -> None:
        layer._parameters.update(replaced)
        replaced.clear()

    # Before the hooks of others, which may change the loaded weight, and after them.
    undo.callback(layer.register_forward_pre_hook(before, prepend=True).remove)
    undo.callback(layer.register_forward_hook(after).remove)
    undo.callback(release)  # an evaluation may fail between the two


@contextmanager
def stand_in_weights(module: nn.Module) -> Iterator[None]:
    """Replace every parameter by a stand-in of its shape without memory (a fake tensor), inside a `with` block."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    originals = [(layer, dict(layer._parameters)) for layer in module.modules()]
    try:
        for layer, parameters in originals:
            for name, parameter in parameters.items():
                if parameter is not None:
                    with mode:
                        empty = torch.empty(parameter.shape, dtype=torch.float32)
                    layer._parameters[name] = nn.Parameter(empty, requires_grad=False)
        yield
    finally:
        for layer, parameters in originals:
            layer._parameters.update(parameters)


class WeightsByName(Mapping[str, Tensor]):
    """The parameters of a module by canonical name; each is read when it is looked up.

    Args:
        module: the module.
        names: name in torch → canonical name.
    """

    def __init__(self, module: nn.Module, canonical_name: Callable[[str], str]) -> None:
        self._parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        return read_parameter(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter without reading it."""
        return tuple(self._parameters[name].shape)
