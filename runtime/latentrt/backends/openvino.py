"""Sessions on OpenVINO, on a CPU, from the same ONNX files with weights mapped from disk.

OpenVINO reads the graph's bytes and the open file of weights that were hashed, and nothing by its name.

A graph is compiled for each set of static input shapes, which runs faster than dynamic shapes (a bfloat16 denoiser of
full size by about a quarter). The models of the last `_MAX_SHAPES` sets of shapes are kept.

float16 weights stay float16, mapped from their file: the cast behind each is marked as decompression, so that OpenVINO
keeps one packed copy in the type it computes in. Without the mark it would keep a float32 copy of every weight as well
(5.1 instead of 1.8 GiB for the denoiser of Stable Diffusion 1.5 in bfloat16).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from latentrt.backends.compiled_cache import CompiledCache
from latentrt.backends.cores import usable_cores
from latentrt.backends.graph_weights import Weights, detach
from latentrt.backends.session import Arrays, Session, Shapes, translating_library_errors
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.interrupts import uninterrupted
from latentrt.bundle.manifest import PartName, Precision
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BackendError, MissingExtraError
from latentrt.telemetry import hide_openvino_telemetry

__all__ = [
    "Arithmetic",
    "OpenVinoSession",
    "PerformanceHint",
    "check_arithmetic",
    "computes_in_bfloat16",
    "is_installed",
    "open_session",
]

Arithmetic = Literal["float32", "bfloat16"]
PerformanceHint = Literal["latency", "throughput"]

# Each compiled model has its own packed copy of the weights.
_MAX_SHAPES = 4
_TYPES: dict[Arithmetic, str] = {"float32": "f32", "bfloat16": "bf16"}
# For small models, compiling is most of the start-up time. For large ones it is packing weights, which a cache does not
# save, and a compiled model contains its weights: 1.7 GB of disk would save 0.6 of 2.5 seconds.
_MAX_CACHED_WEIGHTS = 64 << 20
# OpenVINO generates code for chains of small operations whenever it loads a compiled model, which took three quarters
# of the loading time. For small models no run was measurably faster with it.
_COMPILES_FAST = {"SNIPPETS_MODE": "DISABLE"}
# Identifies the rewrite of `_mark_decompression` in the compiled models' cache keys, and that a model is made of a
# graph that was checked at the sizes of its inputs, and of files that cannot have been exchanged since they were
# hashed; change it with the rewrite and the checks.
_MARKING = "casts of stored weights, which were hashed; graphs checked at their sizes"


@dataclass
class _Compiled:
    """A graph compiled for one set of shapes, and its idle requests; a request serves one thread at a time.

    Attributes:
        weights: the arrays that the model's constants refer to, which must outlive it.
    """

    model: Any
    weights: Weights
    free: list[Any] = field(default_factory=list)

    def take(self) -> Any:
        """Return an idle request, or a new one."""
        try:
            return self.free.pop()
        except IndexError:
            return self.model.create_infer_request()


class OpenVinoSession(Session):
    """One graph, run by OpenVINO. Threads may share it.

    Args:
        core: the library's `Core`.
        graph: the graph's files.
        inputs, outputs: the graph's signature.
        options: for compilation, by OpenVINO's names.
        cache: of compiled models; None stores nothing.
        most_shapes: number of sets of shapes whose compiled models are kept in memory.
    """

    def __init__(
        self,
        core: Any,
        graph: _Graph,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: dict[str, Any],
        cache: CompiledCache | None,
        most_shapes: int,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._core, self._graph, self._options, self._cache = core, graph, options, cache
        self._most_shapes, self._names = most_shapes, [spec.name for spec in outputs]
        self._compiled: dict[tuple[tuple[int, ...], ...], _Compiled] = {}
        self._lock = threading.Lock()

    def prepare(self, shapes: Shapes) -> None:
        with translating_library_errors("OpenVINO"):
            self._compiled_for({spec.name: shapes[spec.name] for spec in self.inputs})

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        with translating_library_errors("OpenVINO"):
            compiled = self._compiled_for({spec.name: feeds[spec.name].shape for spec in self.inputs})
            request = compiled.take()
            results = request.infer(feeds, share_inputs=True)
            outputs = {name: results[name] for name in self._names}
            compiled.free.append(request)
        return outputs

    def close(self) -> None:
        with self._lock:
            self._compiled.clear()

    def _compiled_for(self, shapes: dict[str, tuple[int, ...]]) -> _Compiled:
        key = tuple(shapes.values())
        with self._lock:
            if key not in self._compiled:
                while len(self._compiled) >= self._most_shapes:
                    self._compiled.pop(next(iter(self._compiled)))
                self._compiled[key] = self._compile(shapes)
            found = self._compiled[key] = self._compiled.pop(
                key
            )  # moved to the end: the least recently used goes first
            return found

    def _compile(self, shapes: dict[str, tuple[int, ...]]) -> _Compiled:
        if self._cache is not None and (stored := self._cache.read(shapes)):
            try:
                return _Compiled(self._core.import_model(stored, "CPU", self._options), {})
            except RuntimeError as error:
                self._cache.refuse(shapes, error)
        with self._graph.opened(self._core, shapes) as (model, weights):
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            _mark_decompression(model)
            compiled = self._core.compile_model(model, "CPU", self._options)
        # Stored after the block, which fails if the files have changed since they were hashed.
        if self._cache is not None:
            with contextlib.suppress(RuntimeError):  # a model that cannot be exported is compiled at each start
                self._cache.write(shapes, compiled.export_model().getvalue())
        return _Compiled(compiled, weights)


@dataclass(frozen=True)
class _Graph:
    """A graph of a bundle, and the component whose weights it has."""

    bundle: Bundle
    file: str
    component: str

    @contextlib.contextmanager
    def opened(self, core: Any, shapes: Shapes) -> Iterator[tuple[Any, Weights]]:
        """Read the graph as a model over mapped weights, from the bytes and the open file that were hashed.

        The weights are mapped and not copied. They must outlive the model.

        Args:
            core: the library's `Core`.
            shapes: of the inputs of every run.

        Raises:
            GraphError: the graph cannot run on inputs of these shapes.
            BundleError, IntegrityError: see `Bundle.weights`, also at the end of the block.
        """
        graph = self.bundle.read_graph(self.file)
        graph.check_sizes(shapes)
        with self.bundle.weights(self.component) as opened:
            detached, weights = detach(graph.data, opened.data())
            model = core.read_model(detached)
            _insert(model, weights)
            yield model, weights


def _insert(model: Any, weights: Weights) -> None:
    """Replace inputs of a model by constants that share the arrays' memory."""
    openvino, _ = _library()
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name not in weights:
            continue
        shared = openvino.Tensor(weights[name], shared_memory=True)
        constant = openvino.op.Constant(shared)
        constant.set_friendly_name(name)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(constant.output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def open_session(
    bundle: Bundle,
    component: str,
    precision: Precision = "float32",
    *,
    part: PartName | None = None,
    arithmetic: Arithmetic = "float32",
    performance_hint: PerformanceHint = "latency",
    threads: int | None = None,
    low_memory: bool = False,
) -> OpenVinoSession:
    """Load a component of a bundle, or a part of it. It is compiled at the first run.

    Args:
        bundle: its files are verified before they are parsed.
        component: its name in the manifest.
        precision: of the graph: `float32` or `int8`.
        part: of the component; None loads the whole component.
        arithmetic: of all operations, except those that an int8 graph computes in int8.
        performance_hint: `latency` spreads one run over all cores; `throughput` runs requests of several threads that
            share the session in parallel.
        threads: None: one for each core that this process may use.
        low_memory: keep the compiled model of one set of shapes only.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BundleError: the component's files are missing or differ from those the manifest pins.
        BackendError: this CPU does not compute in bfloat16.
    """
    check_arithmetic(arithmetic)
    library, core = _library()
    graph_name, weights_name = bundle.component_files(component, precision, part)
    record = bundle.manifest.components[component]
    signature = record if part is None else record.parts[part]
    options = {
        "INFERENCE_PRECISION_HINT": _TYPES[arithmetic],
        "PERFORMANCE_HINT": performance_hint.upper(),
        "INFERENCE_NUM_THREADS": threads or usable_cores(),
        # Off: it would quantize the inputs of int8 weights on the fly, which only a calibrated graph may decide.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    files = bundle.manifest.files
    cache = None
    if files[weights_name].size <= _MAX_CACHED_WEIGHTS:
        options |= _COMPILES_FAST
        # Everything a compiled model depends on except its shapes.
        processor = core.get_property("CPU", "FULL_DEVICE_NAME")
        identity = (library.__version__, _MARKING, processor, *map(str, options.values()))
        cache = CompiledCache.open((*identity, files[graph_name].sha256, files[weights_name].sha256))
    bundle.check((graph_name, weights_name))  # a compiled model may be found under their hashes
    most_shapes = 1 if low_memory else _MAX_SHAPES
    graph = _Graph(bundle, graph_name, component)
    return OpenVinoSession(core, graph, signature.inputs, signature.outputs, options, cache, most_shapes)


def is_installed() -> bool:
    """Return whether OpenVINO is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def computes_in_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 arithmetic, according to OpenVINO.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BackendError: OpenVINO cannot be loaded.
    """
    return "BF16" in _library()[1].get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_arithmetic(arithmetic: Arithmetic) -> None:
    """Reject arithmetic that this CPU does not have. OpenVINO is imported for bfloat16 only.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BackendError: this CPU does not compute in bfloat16.
    """
    if not is_installed():
        raise _missing()
    if arithmetic == "bfloat16" and not computes_in_bfloat16():
        raise BackendError("`precision`: got bfloat16, which this CPU does not compute in; use `precision=float32`")


def _missing() -> MissingExtraError:
    return MissingExtraError("openvino", "openvino", "run a bundle on OpenVINO")


@functools.cache
def _library() -> tuple[Any, Any]:
    """Return the openvino module and its core, one for the process."""
    try:
        # A signal in the middle would leave half of its types registered, and the next import would blame the package.
        with hide_openvino_telemetry(), uninterrupted():
            import openvino
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "openvino":
            raise _missing() from error
        raise BackendError(f"openvino is installed and cannot be loaded: {error}; install it again") from error
    return openvino, openvino.Core()


def _mark_decompression(model: Any) -> None:
    """Mark each cast of a stored weight as decompression (`ov::Decompression`), as OpenVINO's own files do, so that it
    is neither folded nor kept as a tensor of its own.

    Casts that come from a DequantizeLinear are not marked (the graph's own casts are recognised by their names): a
    layer with a marked weight decompresses it and no longer multiplies integers.
    """
    for node in model.get_ops():
        cast = node.get_type_name() == "Convert" and node.get_friendly_name().endswith("/Cast")
        if cast and node.input_value(0).get_node().get_type_name() == "Constant":
            node.get_rt_info()["decompression_0"] = ""
