"""Sessions on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.bound_session import BoundSession
from latentrt.backends.cores import usable_cores
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import PartName, Precision
from latentrt.bundle.tensors import TensorSpec
from latentrt.bundle.weights import WeightSet
from latentrt.errors import BackendError, MissingExtraError

__all__ = [
    "CUDA",
    "OnnxRuntimeSession",
    "available_providers",
    "check_provider",
    "open_on_provider",
    "open_session",
    "require",
]

CUDA = "CUDAExecutionProvider"

_MISSING_FOLDER = os.path.join(os.devnull, "nowhere")


class OnnxRuntimeSession(Session):
    """One graph, loaded by ONNX Runtime.

    Args:
        held: objects that must outlive the session.
    """

    def __init__(
        self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], held: list[Any]
    ) -> None:
        self.inputs, self.outputs, self._session, self._held = inputs, outputs, session, held
        self._names = [spec.name for spec in outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        try:
            results = self._session.run(self._names, feeds)
        except Exception as error:  # the package's own exceptions have no common class
            raise BackendError(f"ONNX Runtime failed: {error}") from error
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
    session, held = _open(runtime, bundle, component, precision, ["CPUExecutionProvider"], threads, part)
    record = bundle.manifest.components[component]
    signature = record if part is None else record.parts[part]
    return OnnxRuntimeSession(session, signature.inputs, signature.outputs, held)


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
        provider: ONNX Runtime's name, such as `CUDAExecutionProvider`; `ExecutionProvider` may be omitted.
        precision: of the graph; None: the bundle's own.

    Raises:
        BackendError: the installed ONNX Runtime does not have that provider, or cannot use it here. (ONNX Runtime
            itself would silently run on the CPU then.)
        MissingExtraError, BundleError: as for `open_session`.
    """
    runtime = require()
    name = _full_name(runtime, provider)
    options, chosen = {**_PROVIDER_OPTIONS.get(name, {})}, precision or _own_precision(bundle, component)
    try:
        session, held = _open(runtime, bundle, component, chosen, [(name, options)], threads)
    except BackendError as error:
        # A graph with nodes that only the CPU computes, such as the classifier's preprocessing, cannot be captured.
        if "graph capture" not in str(error):
            raise
        options["enable_cuda_graph"] = "0"
        session, held = _open(runtime, bundle, component, chosen, [(name, options)], threads)
    if name not in session.get_providers():
        raise BackendError(
            f"{component}: ONNX Runtime {runtime.__version__} cannot use {name} here, most likely because a library of "
            "CUDA or cuDNN is missing; its own log names it. Install it, or run on the CPU: --device cpu"
        )
    record = bundle.manifest.components[component]
    if name != CUDA:
        return OnnxRuntimeSession(session, record.inputs, record.outputs, held)
    graphs = options["enable_cuda_graph"] == "1"
    return BoundSession(runtime, session, record.inputs, record.outputs, held, device="cuda", graphs=graphs)


def check_provider(provider: str) -> None:
    """Reject a provider that the installed ONNX Runtime does not have.

    Raises:
        BackendError: the message lists those it has.
        MissingExtraError: ONNX Runtime is not installed.
    """
    _full_name(require(), provider)


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime; [] where it is not installed."""
    try:
        return list(require().get_available_providers())
    except MissingExtraError:
        return []


# TF32 would round the inputs of float32 graphs. An exhaustive search for convolution algorithms would take minutes at
# the first run.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
}


def _own_precision(bundle: Bundle, component: str) -> Precision:
    """Return the bundle's precision; for int8, which is for CPUs, float16 or else float32."""
    record, own = bundle.manifest.components.get(component), bundle.manifest.precision
    if own != "int8" or record is None:
        return own
    return "float16" if "float16" in record.graphs else "float32"


def _full_name(runtime: Any, provider: str) -> str:
    available: list[str] = runtime.get_available_providers()
    for name in available:
        if provider.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
            return name
    remedy = "; pip install 'latentrt[gpu]' in place of [cpu]" if provider.lower().startswith("cuda") else ""
    raise BackendError(
        f"`provider`: got {provider!r}, expected one that ONNX Runtime {runtime.__version__} has here: "
        f"{', '.join(available)}{remedy}"
    )


def _open(
    runtime: Any,
    bundle: Bundle,
    component: str,
    precision: Precision,
    providers: list[Any],
    threads: int | None,
    part: PartName | None = None,
) -> tuple[Any, list[Any]]:
    """Return ONNX Runtime's session, and objects that must outlive it."""
    graph_name, _ = bundle.component_files(component, precision, part)
    graph, weights = bundle.read(graph_name), bundle.weights(component)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 4  # fatal only: errors are raised as well
    held = _point_at_weights(runtime, options, weights)
    try:
        session = runtime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise BackendError(f"{component}: ONNX Runtime {runtime.__version__} rejects the graph: {error}") from error
    return session, held


def _point_at_weights(runtime: Any, options: Any, weights: WeightSet) -> list[Any]:
    """Set the location of a graph's external weights; the graph itself is passed as the bytes that were hashed.

    ONNX Runtime opens the weights' file itself, in the given folder only, which needs half the memory of passing an
    array. But it follows no symbolic link, and a hub cache consists of them: then the file is memory-mapped and passed,
    and the folder is one that does not exist, so that no file of the current folder is read.

    Returns:
        The mapped arrays, which must outlive the session.
    """
    folder, mapped = str(weights.path.parent), list[Any]()
    if weights.path.is_symlink():
        # As a file and not as arrays: a part's graph refers to some of them only, and a surplus array is an error.
        folder, mapped = _MISSING_FOLDER, [np.memmap(weights.path, np.uint8, mode="r")]
        options.add_external_initializers_from_files_in_memory([weights.path.name], mapped, [mapped[0].size])
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return mapped


def require(purpose: str = "run a bundle on the CPU") -> Any:
    """Import and return the onnxruntime module.

    Args:
        purpose: the end of the sentence "… is needed to …" in the error.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", purpose) from error
    return onnxruntime
