"""How is a denoiser divided?

`timestep` makes what depends on the timestep alone (every residual block's `time_emb_proj`), for a whole schedule at
once if it is fed one; `prompt` what depends on the text embeddings alone (the keys and values of every
cross-attention); `loop` the rest, from the latents and the outputs of both. `shallow` is what is left of `loop` where
the deep features are taken from an earlier step (`deep_cache`).

They are cut from a finished graph, whatever it computes in. What they hand over is float32, batch first. The signature
of `loop` and `shallow` asks for as many rows of each as of the latents, so a runtime repeats rows or gathers them.
Where one row stands for all, ONNX Runtime takes that one as well, by broadcasting; of other backends that is not
promised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from latentrt.bundle.manifest import PartName
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.graphs.cut import cut, handed_over
from latentrt_export.graphs.deep_cache import DEEP_FEATURES, deep_value

__all__ = ["divide", "signature"]

_CALLED = {"to_k": "keys", "to_v": "values"}


def divide(model: ir.Model, alone: Mapping[str, PartName], deep_cache: int | None = None) -> dict[PartName, ir.Model]:
    """Cut a finished graph into its parts.

    Args:
        model: the whole; left as it was. The parts share its tensors.
        alone: the inputs that leave the loop, and the part that each becomes.
        deep_cache: the branch of a part `shallow`, None for no such part.

    Returns:
        The parts by name. Their inputs and outputs are float32 and their axes numbers or names (`signature`).

    Raises:
        RequestError: the denoiser has no such branch.
        ExportError: the graph is none that can be cut like that.
    """
    parts: dict[PartName, ir.Model] = {}
    takes: dict[str, TensorSpec] = {}
    for name, called in alone.items():
        gives = _names(model, handed_over(model, name))
        parts[called] = cut(model, inputs=[name], takes={}, gives=gives)
        ShapeInferencePass()(parts[called])
        takes.update(zip(gives, signature(parts[called].graph.outputs), strict=True))
        if called == "time_embedding":  # one row for each timestep of a schedule, not for each evaluation
            _rename_first_axis(parts[called], "timesteps")
    rest = [str(value.name) for value in model.graph.inputs if value.name not in alone]
    gives = {str(value.name): str(value.name) for value in model.graph.outputs}
    deep = deep_value(model, deep_cache) if deep_cache is not None else None
    if deep is None:
        return {**parts, "body": cut(model, inputs=rest, takes=takes, gives=gives)}
    parts["body"] = cut(model, inputs=rest, takes=takes, gives={**gives, str(deep.name): DEEP_FEATURES})
    features = parts["body"].graph.outputs[-1]
    features.shape = _named_sides(features)
    takes[str(deep.name)] = next(signature([features]))
    return {**parts, "shallow_body": cut(model, inputs=rest, takes=takes, gives=gives)}


def signature(values: Iterable[ir.Value]) -> Iterator[TensorSpec]:
    """How a part's inputs or outputs are described.

    Raises:
        ExportError: an axis has neither a number nor a name, or the first one has no name.
    """
    for value in values:
        shape = tuple(_size(size) for size in value.shape or ())
        if not shape or isinstance(shape[0], int) or "" in shape:
            raise ExportError(f"{value.name} has the shape {value.shape}, expected a name and then numbers or names")
        yield TensorSpec(str(value.name), "float32", shape)


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else size.value or ""


def _rename_first_axis(part: ir.Model, name: str) -> None:
    """Rename the first axis of a part's inputs and outputs, and that axis wherever else it occurs."""
    values = [*part.graph.inputs, *(value for node in part.graph for value in node.outputs)]
    former = _size(values[0].shape[0]) if values[0].shape else ""
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(name if _size(size) == former else size for size in value.shape)


def _named_sides(features: ir.Value) -> ir.Shape:
    """Features of a deeper level have sides of their own, which the tracer writes as formulas; they get names."""
    sides = {2: "deep_height", 3: "deep_width"}
    sizes = enumerate(_size(size) for size in features.shape or ())
    return ir.Shape(size if isinstance(size, int) or size.isidentifier() else sides[axis] for axis, size in sizes)


def _names(model: ir.Model, values: Iterable[ir.Value]) -> dict[str, str]:
    """What each value that leaves its graph is called there: after the module whose weight made it."""
    modules = {name.removesuffix(".weight") for name in model.graph.initializers if name.endswith(".weight")}
    names: dict[str, str] = {}
    for value in values:
        path, _, last = _module(value, modules).rpartition(".")
        called = f"{path}.{_CALLED.get(last, last)}"
        if called in names.values():
            raise ExportError(f"two values that leave the loop would be called {called}, one of them is {value.name}")
        names[str(value.name)] = called
    return names


def _module(value: ir.Value, modules: set[str]) -> str:
    """The module of the nearest node, going back from a value, that belongs to one with a weight of its own."""
    nodes = [value.producer()]
    for node in nodes:  # it grows
        if node is not None:
            scope = str(node.name).rpartition("/")[0]
            if scope in modules:
                return scope
            nodes += [source.producer() for source in node.inputs if source is not None]
    raise ExportError(f"{value.name} leaves the loop, but no module's weight made it")
