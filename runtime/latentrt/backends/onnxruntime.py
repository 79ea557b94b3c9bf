"""Sessions on ONNX Runtime."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.bound_session import BoundSession
from latentrt.backends.cores import usable_cores
from latentrt.backends.execution_providers import PROVIDERS, ExecutionProvider, find_provider
from latentrt.backends.graph_weights import relocate
from latentrt.backends.session import Arrays, Session, translating_library_errors
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.graph_check import CheckedGraph
from latentrt.bundle.manifest import PartName, Precision
from latentrt.bundle.printable import quote
from latentrt.bundle.tensors import TensorSpec
from latentrt.bundle.weights import WeightSet
from latentrt.errors import BackendError, MissingExtraError
from latentrt.telemetry import end_reports, opt_out

__all__ = [
    "CUDA",
    "LOWEST_VERSION",
    "OnnxRuntimeSession",
    "available_providers",
    "check_provider",
    "open_on_provider",
    "open_session",
    "require",
]

CUDA = PROVIDERS["cuda"].name
LOWEST_VERSION = "1.24.1"
"""The first release that checks the paths of external data; the floor in pyproject.toml."""

_LOADING = threading.Lock()
_DESCRIPTORS = "proc/self/fd"


class OnnxRuntimeSession(Session):
    """One graph, loaded by ONNX Runtime.

    Args:
        graph: the graph.
        held: objects that must outlive the session.
    """

    def __init__(
        self,
        session: Any,
        graph: CheckedGraph,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        held: list[Any],
    ) -> None:
        self.inputs, self.outputs, self._session, self._graph, self._held = inputs, outputs, session, graph, held
        self._names = [spec.name for spec in outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self._graph.check_sizes({name: feeds[name].shape for name in self._graph.named_inputs})
        with translating_library_errors("ONNX Runtime"):
            results = self._session.run(self._names, feeds)
        return dict(zip(self._names, results, strict=True))

    def close(self) -> None:
        self._session, self._held = None, []


def open_session(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    precision: Precision = "float32",
    part: PartName | None = None,
) -> OnnxRuntimeSession:
    """Load a component of a bundle for the CPU.

    float16 arithmetic is emulated on a CPU, and slow. So a float16 bundle also has a graph that computes in float32
    from its float16 weights, which is the default.

    Args:
        bundle: its files are verified before they are parsed.
        component: its name in the manifest.
        threads: for each operator; None: one per core that this process may use.
        precision: of the graph.
        part: of the component; None loads the whole component.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: the component's files are missing or differ from those the manifest pins.
        BackendError: ONNX Runtime rejects the graph.
    """
    runtime = require()
    session, graph, held = _open(runtime, bundle, component, precision, PROVIDERS["cpu"], {}, threads, part)
    record = bundle.manifest.components[component]
    signature = record if part is None else record.parts[part]
    return OnnxRuntimeSession(session, graph, signature.inputs, signature.outputs, held)


def open_on_provider(
    bundle: Bundle,
    component: str,
    provider: str = CUDA,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
) -> Session:
    """Load a component of a bundle for another of ONNX Runtime's execution providers.

    Args:
        bundle, component, threads: as for `open_session`.
        provider: a short name (`latentrt.backends.execution_providers`), or ONNX Runtime's own name.
        precision: of the graph; None: the bundle's own.

    Raises:
        BackendError: the installed ONNX Runtime does not have that provider, or cannot use it here. (ONNX Runtime
            itself would silently run on the CPU then.)
        MissingExtraError, BundleError: as for `open_session`.
    """
    runtime = require()
    chosen, precision = _find_available(runtime, provider), precision or _own_precision(bundle, component)
    name, options = chosen.name, dict(chosen.options)
    try:
        session, graph, held = _open(runtime, bundle, component, precision, chosen, options, threads)
    except BackendError as error:
        # A graph with nodes that only the CPU computes, such as the classifier's preprocessing, cannot be captured.
        if "graph capture" not in str(error):
            raise
        options["enable_cuda_graph"] = "0"
        session, graph, held = _open(runtime, bundle, component, precision, chosen, options, threads)
    if name not in session.get_providers():
        raise BackendError(
            f"{component}: ONNX Runtime {runtime.__version__} cannot use {name} here, most likely because a library "
            "that it needs is missing (of CUDA or cuDNN); its own log names it. Install it, or run on the CPU: "
            "--device cpu"
        )
    record = bundle.manifest.components[component]
    if name != CUDA:
        return OnnxRuntimeSession(session, graph, record.inputs, record.outputs, held)
    graphs = options["enable_cuda_graph"] == "1"
    return BoundSession(runtime, session, graph, record.inputs, record.outputs, held, device="cuda", graphs=graphs)


def check_provider(provider: str, given: str | None = None) -> None:
    """Reject a provider that neither the installed ONNX Runtime nor an installed plug-in of it has.

    Args:
        given: the beginning of the error, such as "`device`: got cuda"; None: it names the provider.

    Raises:
        BackendError: the message lists those it has, and names the package that has it.
        MissingExtraError: ONNX Runtime is not installed.
    """
    _find_available(require(), provider, given)


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime; [] where it is not installed or too old."""
    try:
        return list(require().get_available_providers())
    except BackendError:
        return []


def _own_precision(bundle: Bundle, component: str) -> Precision:
    """Return the bundle's precision; for int8, which is for CPUs, float16 or else float32."""
    record, own = bundle.manifest.components.get(component), bundle.manifest.precision
    if own != "int8" or record is None:
        return own
    return "float16" if "float16" in record.graphs else "float32"


def _find_available(runtime: Any, provider: str, given: str | None = None) -> ExecutionProvider:
    """Return the provider of this name.

    Raises:
        BackendError: it is not available.
    """
    wanted, available = find_provider(provider), list(runtime.get_available_providers())
    for name in available:
        if wanted.is_named(name):
            return replace(wanted, name=name)
    remedy = wanted.remedy
    if wanted.plugin and importlib.util.find_spec(wanted.plugin) is not None:
        if _find_devices(runtime, wanted):
            return wanted
        remedy = f"its package {wanted.plugin} is installed and finds no device that it can use"
    raise BackendError(
        f"{given or f'`provider`: got {quote(provider)}'}, expected one that ONNX Runtime {runtime.__version__} has "
        f"here: {', '.join(available)}" + (f"; {wanted.name}: {remedy}" if remedy else "")
    )


def _find_devices(runtime: Any, provider: ExecutionProvider) -> list[Any]:
    """Return the devices of a plug-in, whose library is loaded if that has not been done.

    Raises:
        BackendError: the library cannot be loaded.
    """

    def find() -> list[Any]:
        return [device for device in runtime.get_ep_devices() if provider.is_named(device.ep_name)]

    with _LOADING:
        if not find():
            with translating_library_errors("ONNX Runtime", f"{provider.name} cannot be loaded"):
                _load_plugin(runtime, provider.name, provider.plugin)
        return find()


@functools.cache
def _load_plugin(runtime: Any, name: str, module: str) -> None:
    """Have ONNX Runtime load a plug-in's library, once for the process: a second time is an error."""
    runtime.register_execution_provider_library(name, importlib.import_module(module).get_library_path())


def _open(
    runtime: Any,
    bundle: Bundle,
    component: str,
    precision: Precision,
    provider: ExecutionProvider,
    provider_options: dict[str, str],
    threads: int | None,
    part: PartName | None = None,
) -> tuple[Any, CheckedGraph, list[Any]]:
    """Return ONNX Runtime's session, its graph, and objects that must outlive it."""
    graph_name, _ = bundle.component_files(component, precision, part)
    graph = bundle.read_graph(graph_name)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 4  # fatal only: errors are raised as well
    if not provider.plans_memory:
        options.enable_mem_pattern = False
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    if is_plugin := provider.name not in runtime.get_available_providers():
        options.add_provider_for_devices(_find_devices(runtime, provider)[:1], provider_options)
    with bundle.weights(component) as weights:
        pointed, held = _point_at_weights(options, graph.data, weights)
        with translating_library_errors(
            "ONNX Runtime", f"{component}: ONNX Runtime {runtime.__version__} rejects the graph"
        ):
            session = _load(runtime, pointed, options, None if is_plugin else [(provider.name, provider_options)])
    return session, graph, held


def _load(runtime: Any, graph: bytes, options: Any, providers: list[tuple[str, dict[str, str]]] | None) -> Any:
    return runtime.InferenceSession(graph, options, providers=providers, enable_fallback=0)


def _point_at_weights(options: Any, graph: bytes, weights: WeightSet) -> tuple[bytes, list[Any]]:
    """Let a graph read its weights from the open file that was hashed.

    ONNX Runtime opens external data by name, below a given folder. On systems where an open descriptor has a name
    (`/proc/self/fd/N`), the graph gets that name, which leads to the hashed file whatever has been renamed. On others
    the file is mapped and passed, which needs twice the memory, and the folder does not exist, so that no file is
    opened by name.

    Returns:
        The graph, and objects that must outlive the session.
    """
    location, folder, held = f"{_DESCRIPTORS}/{weights.stream.fileno()}", "/", list[Any]()
    if not os.path.exists(f"/{location}"):
        # As a file and not as arrays: a part's graph refers to some of them only, and a surplus array is an error.
        # The folder has a name that nobody can guess. (One below the null device would be missing too, and Windows
        # refuses to look for it.)
        folder = os.path.join(tempfile.gettempdir(), f"latentrt-{secrets.token_hex(16)}")
        location, held = "weights", [weights.data()]
        options.add_external_initializers_from_files_in_memory([location], held, [weights.size])
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return relocate(graph, location), held


def require(purpose: str = "run a bundle on the CPU") -> Any:
    """Import and return the onnxruntime module, with its telemetry turned off (`latentrt.telemetry`).

    Args:
        purpose: the end of the sentence "… is needed to …" in the error.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: it is older than `LOWEST_VERSION`, or cannot be loaded.
    """
    opt_out()
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", purpose) from error
    found = [int(part) for part in re.findall(r"\d+", str(onnxruntime.__version__))[:3]]
    if found < [int(part) for part in LOWEST_VERSION.split(".")]:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} is installed, expected {LOWEST_VERSION} or later: earlier ones "
            "open any file that a graph names. Upgrade it: pip install --upgrade 'latentrt[cpu]'"
        )
    end_reports(onnxruntime)
    return onnxruntime
