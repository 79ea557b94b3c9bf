"""Graphs on ONNX Runtime."""

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

_NOWHERE = os.path.join(os.devnull, "nowhere")


class OnnxRuntimeSession(Session):
    """One graph, loaded by ONNX Runtime. `held` must outlive the session."""

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

    A CPU computes in float32: half arithmetic there is emulated and slower. A half bundle has a graph that computes in
    float32 from its half weights, and that is the one, unless another is asked for.

    Args:
        bundle: its files are verified before they are parsed.
        component: its name in the manifest.
        threads: of each operator; one per core that this process may use if None.
        precision: of the graph.
        part: of the component; None is the whole.

    Raises:
        MissingExtraError: no ONNX Runtime is installed.
        BundleError: the component's files are missing or not the ones that the manifest pins.
        BackendError: ONNX Runtime refuses the graph.
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
        provider: by ONNX Runtime's name, such as `CUDAExecutionProvider`; the part before `ExecutionProvider` will do.
        precision: of the graph; the bundle's own if None.

    Raises:
        BackendError: this ONNX Runtime does not have that provider, or cannot use it here. Running on a CPU instead,
            without a word, is what ONNX Runtime does with a GPU that it cannot use; here it is an error.
        MissingExtraError, BundleError: as for `open_session`.
    """
    runtime = require()
    name = _full_name(runtime, provider)
    options, chosen = {**_PROVIDER_OPTIONS.get(name, {})}, precision or _own_precision(bundle, component)
    try:
        session, held = _open(runtime, bundle, component, chosen, [(name, options)], threads)
    except BackendError as error:
        # A graph with parts that only the CPU computes cannot be recorded, as the safety classifier's preprocessing.
        if "graph capture" not in str(error):
            raise
        options["enable_cuda_graph"] = "0"
        session, held = _open(runtime, bundle, component, chosen, [(name, options)], threads)
    if name not in session.get_providers():
        raise BackendError(
            f"{component}: ONNX Runtime {runtime.__version__} cannot use {name} here, most likely as a library of "
            "CUDA or cuDNN is missing; its own log names it. Install it, or run on the CPU: --device cpu"
        )
    record = bundle.manifest.components[component]
    if name != CUDA:
        return OnnxRuntimeSession(session, record.inputs, record.outputs, held)
    graphs = options["enable_cuda_graph"] == "1"
    return BoundSession(runtime, session, record.inputs, record.outputs, held, device="cuda", graphs=graphs)


def check_provider(provider: str) -> None:
    """Refuse a provider that the installed ONNX Runtime was not made with.

    Raises:
        BackendError: naming those it has. MissingExtraError: there is no ONNX Runtime.
    """
    _full_name(require(), provider)


def available_providers() -> list[str]:
    """The execution providers that the installed ONNX Runtime was made with; none if there is no ONNX Runtime."""
    try:
        return list(require().get_available_providers())
    except MissingExtraError:
        return []


# float32 graphs are exact, so no TF32; the search for convolutions' algorithms would take minutes at the first run.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
}


def _own_precision(bundle: Bundle, component: str) -> Precision:
    """The bundle's; of int8, which is for CPUs, what the component has beside."""
    record, own = bundle.manifest.components.get(component), bundle.manifest.precision
    if own != "int8" or record is None:
        return own
    return "float16" if "float16" in record.graphs else "float32"


def _full_name(runtime: Any, provider: str) -> str:
    available: list[str] = runtime.get_available_providers()
    for name in available:
        if provider.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
            return name
    mend = "; pip install 'latentrt[gpu]' in place of [cpu]" if provider.lower().startswith("cuda") else ""
    raise BackendError(
        f"found the provider {provider!r}, this ONNX Runtime {runtime.__version__} has {', '.join(available)}{mend}"
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
    """ONNX Runtime's session, and what has to outlive it."""
    graph_name, _ = bundle.component_files(component, precision, part)
    graph, weights = bundle.read(graph_name), bundle.weights(component)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 4  # what a session logs as an error it raises too, a graph that cannot be recorded say
    held = _point_at_weights(runtime, options, weights)
    try:
        session = runtime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise BackendError(f"{component}: ONNX Runtime {runtime.__version__} refuses the graph: {error}") from error
    return session, held


def _point_at_weights(runtime: Any, options: Any, weights: WeightSet) -> list[Any]:
    """Tell ONNX Runtime where the weights lie that a graph, given as the very bytes that were hashed, names by file.

    It opens them itself, in the folder it is told and not outside of it, which costs half the memory of handing them
    over. But it follows no link, and a hub cache is made of them: there the file is mapped and handed over, and
    the folder is one that does not exist, so that nothing else is looked for where the process happens to be.

    Returns:
        What was handed over, which has to outlive the session.
    """
    folder, mapped = str(weights.path.parent), list[Any]()
    if weights.path.is_symlink():
        # By file and not by array: a part's graph names some of them, and another is an error.
        folder, mapped = _NOWHERE, [np.memmap(weights.path, np.uint8, mode="r")]
        options.add_external_initializers_from_files_in_memory([weights.path.name], mapped, [mapped[0].size])
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return mapped


def require(purpose: str = "run a bundle on the CPU") -> Any:
    """The onnxruntime module.

    Args:
        purpose: what it is needed for, as the end of the sentence "… is needed to …".

    Raises:
        MissingExtraError: no ONNX Runtime is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", purpose) from error
    return onnxruntime
