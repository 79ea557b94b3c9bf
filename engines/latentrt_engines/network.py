"""A graph → TensorRT's network, checked with the manifest before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.tensorrt.library import make_logger
from latentrt.bundle.manifest import Component
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BuildError
from latentrt_engines.library import Library

__all__ = ["Log", "check_network", "make_log", "parse_network"]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT64": "int64", "BOOL": "bool"}


class Log:
    """What a library said, warnings and errors; the errors tell why a build failed."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def text(self) -> str:
        """The errors, one below the other."""
        return "\n".join(self.errors)


def make_log(library: Library) -> tuple[Log, Any]:
    """A log, and the library's own logger that writes into it."""
    log = Log()
    return log, make_logger(library, log.errors.append, log.warnings.append)


def parse_network(
    library: Library,
    logger: Any,
    builder: Any,
    component: str,
    graph: bytes,
    weights: Mapping[str, NDArray[Any]],
) -> tuple[Any, Any]:
    """Parse a graph whose weights are handed over by name, wherever they lie.

    Args:
        builder: the library's, that will build the network.
        component: for the error.
        graph: the bytes of the .onnx file.
        weights: mapped arrays, by the names of the graph's initializers. They must outlive the build.

    Returns:
        The network, and the parser, which has to outlive it.

    Raises:
        BuildError: naming the node, its op, and the checkpoint's module it came from.
    """
    trt = library.module
    # TensorRT 11 knows no other networks; 10 has to be told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    loaded = parser.load_model_proto(graph)
    if loaded:
        for name, array in weights.items():
            if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
                raise BuildError(f"{component}: the weights have {name}, which the graph does not, or in another size")
    if not loaded or not parser.parse_model_proto():
        raise BuildError(f"{component}: {library} cannot parse the graph: {'; '.join(_parse_errors(parser))}")
    return network, parser


def _parse_errors(parser: Any) -> Iterator[str]:
    if parser.num_errors == 0:
        yield "it does not say why"
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, operator, said = error.node_name(), error.node_operator(), error.desc().strip()
        if not name and not operator:
            yield said
            continue
        # Nodes are called for the module that they were traced in (`latentrt_export.graphs.trace`).
        module = name.rpartition("/")[0] or "the submodule itself"
        yield f"node {name} (number {error.node()}), op {operator}, module {module}: {said}"


def check_network(library: Library, network: Any, name: str, component: Component) -> None:
    """Compare what was parsed with what the manifest says of the submodule.

    Raises:
        BuildError: an input or output has another name, dtype or fixed size.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, specs, tensors in (("input", component.inputs, inputs), ("output", component.outputs, outputs)):
        expected, found = {spec.name: spec for spec in specs}, {tensor.name: tensor for tensor in tensors}
        if set(expected) != set(found):
            raise BuildError(f"{name}: {library} sees the {kind}s {sorted(found)}, the manifest has {sorted(expected)}")
        for tensor in tensors:
            if problem := _mismatch(tensor, expected[tensor.name], free=kind == "input"):
                raise BuildError(f"{name}: {library} sees the {kind} {tensor.name} as {problem}")


def _mismatch(tensor: Any, spec: TensorSpec, *, free: bool) -> str | None:
    """What the library sees otherwise than the manifest; `free` is whether a named axis has to be free."""
    dtype = _DTYPES.get(tensor.dtype.name, tensor.dtype.name)
    if dtype != spec.dtype:
        return f"{dtype}, the manifest says {spec.dtype}"
    sizes = tuple(tensor.shape)
    if len(sizes) != len(spec.shape) or any(
        size != (axis if isinstance(axis, int) else -1) and (free or isinstance(axis, int))
        for size, axis in zip(sizes, spec.shape, strict=True)
    ):
        return f"{list(sizes)}, the manifest says {spec}"
    return None
