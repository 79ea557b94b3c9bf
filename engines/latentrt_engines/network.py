"""The TensorRT network: parsed from a graph, compared with the manifest, and marked for refitting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.tensorrt.library import make_logger
from latentrt.bundle.manifest import Component
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BuildError
from latentrt_engines.library import Library

__all__ = ["Log", "check_network", "make_log", "mark_refittable", "parse_network"]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT64": "int64", "BOOL": "bool"}


class Log:
    """The errors and warnings that a library has logged; the errors explain a failed build."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def text(self) -> str:
        """Return the errors, one on each line."""
        return "\n".join(self.errors)


def make_log(library: Library) -> tuple[Log, Any]:
    """Return a log and the library's own logger that writes to it."""
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
    """Parse a graph whose weights are passed by name.

    Args:
        logger: the library's logger (`make_log`).
        builder: the library's `Builder`, which will build the network.
        component: the component's name, for messages.
        graph: the content of the .onnx file.
        weights: mapped arrays by the names of the graph's initializers. They must outlive the build.

    Returns:
        The network, and the parser, which must outlive it.

    Raises:
        BuildError: the graph cannot be parsed; the message names the node, its operator, and the module it was traced
            in.
    """
    trt = library.module
    # All networks of TensorRT 11 are strongly typed; 10 needs the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    loaded = parser.load_model_proto(graph)
    if loaded:
        for name, array in weights.items():
            if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
                raise BuildError(
                    f"{component}: the weights have {name} with {array.nbytes:,} bytes, the graph has no initializer "
                    "of that name and size; export the bundle again"
                )
    if not loaded or not parser.parse_model_proto():
        raise BuildError(f"{component}: {library} cannot parse the graph: {'; '.join(_parse_errors(parser))}")
    return network, parser


def _parse_errors(parser: Any) -> Iterator[str]:
    if parser.num_errors == 0:
        yield "the library gave no reason"
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, operator, description = error.node_name(), error.node_operator(), error.desc().strip()
        if not name and not operator:
            yield description
            continue
        # A node's name begins with the module that it was traced in (`latentrt_export.graphs.trace`).
        module = name.rpartition("/")[0] or "the component's root"
        yield f"node {name} (number {error.node()}), op {operator}, module {module}: {description}"


def check_network(library: Library, network: Any, name: str, component: Component) -> None:
    """Compare the inputs and outputs of a network with the manifest.

    Args:
        name: the component's name, for messages.

    Raises:
        BuildError: an input or output has another name, dtype or fixed size.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, specs, tensors in (("input", component.inputs, inputs), ("output", component.outputs, outputs)):
        expected, found = {spec.name: spec for spec in specs}, {tensor.name: tensor for tensor in tensors}
        if set(expected) != set(found):
            raise BuildError(
                f"{name}: {library} found the {kind}s {sorted(found)}, expected {sorted(expected)} as in the manifest"
            )
        for tensor in tensors:
            if mismatch := _describe_mismatch(tensor, expected[tensor.name], dynamic=kind == "input"):
                raise BuildError(f"{name}: {library} found the {kind} {tensor.name} as {mismatch}")


def _describe_mismatch(tensor: Any, spec: TensorSpec, *, dynamic: bool) -> str | None:
    """Describe a tensor's difference from the manifest; return None if there is none.

    Args:
        dynamic: whether a named axis has to be dynamic in the network.
    """
    dtype = _DTYPES.get(tensor.dtype.name, tensor.dtype.name)
    if dtype != spec.dtype:
        return f"{dtype}, expected {spec.dtype} as in the manifest"
    sizes = tuple(tensor.shape)
    if len(sizes) != len(spec.shape) or any(
        size != (axis if isinstance(axis, int) else -1) and (dynamic or isinstance(axis, int))
        for size, axis in zip(sizes, spec.shape, strict=True)
    ):
        return f"{list(sizes)}, expected {spec} as in the manifest"
    return None


def mark_refittable(library: Library, network: Any, component: str, names: Iterable[str]) -> None:
    """Mark each weight as refittable by its own name, so that a later refit is complete or fails.

    Raises:
        BuildError: the network has no weights with one of the names.
    """
    names = list(names)
    if unknown := [name for name in names if not network.mark_weights_refittable(name)]:
        raise BuildError(
            f"{component}: {library} has no weights named {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}, "
            f"{len(unknown)} of {len(names)}, so they could not be replaced; omit --refittable and --strip-weights"
        )
