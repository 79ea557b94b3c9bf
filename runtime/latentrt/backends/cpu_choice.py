"""What runs a submodule on a CPU, and in what arithmetic?

Unless something else is asked for, a CPU computes in float32, as what a seed draws should not depend on the machine; a
bundle of int8 computes its int8 graphs, and in bfloat16 around them where the CPU has it, as it is approximate anyway.
A classifier always computes in float32, as its scores decide something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.session import Session
from latentrt.backends.sessions import Choice
from latentrt.backends.split_denoiser import SplitDenoiser
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import PartName, Precision
from latentrt.decode.slices import SlicedDecoder, is_sliced
from latentrt.errors import BackendError, RequestError

__all__ = ["ComputePrecision", "CpuBackend", "Preferences", "check_preferences", "choose_on_cpu"]

ComputePrecision = Literal["float32", "bfloat16", "int8"]
CpuBackend = Literal["onnxruntime", "openvino"]

_ALWAYS_FLOAT32 = ("safety_checker",)
_TITLES: dict[CpuBackend, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """How submodules are to be run, where that is open.

    Attributes:
        threads: on a CPU; one for each core that this process may use if None.
        precision: what a CPU computes in; see above if None.
        performance_hint: of OpenVINO: `latency`, or `throughput` for several threads that draw at once.
        low_memory: run what needs less memory, where the bundle has it.
    """

    threads: int | None = None
    precision: ComputePrecision | None = None
    performance_hint: ov.PerformanceHint = "latency"
    low_memory: bool = False


def check_preferences(preferences: Preferences) -> None:
    """Refuse what is no precision and no hint.

    Raises:
        RequestError: naming those there are.
    """
    if preferences.precision not in (None, *get_args(ComputePrecision)):
        names = ", ".join(get_args(ComputePrecision))
        raise RequestError(f"found the precision {preferences.precision!r}, expected one of {names}")
    if preferences.performance_hint not in get_args(ov.PerformanceHint):
        names = ", ".join(get_args(ov.PerformanceHint))
        raise RequestError(f"found the performance hint {preferences.performance_hint!r}, expected one of {names}")


@dataclass(frozen=True)
class _Arithmetic:
    """Which graph, and what its floats are computed in."""

    graph: Precision
    floats: ov.Arithmetic

    def __str__(self) -> str:
        if self.graph == "int8":
            return "int8" if self.floats == "float32" else f"int8 and {self.floats}"
        return self.floats


def choose_on_cpu(bundle: Bundle, component: str, backend: CpuBackend, preferences: Preferences) -> Choice:
    """Decide how a submodule is run on a CPU.

    Raises:
        BackendError: the precision that is asked for cannot be had. MissingExtraError: the backend is not installed.
    """
    arithmetic = _arithmetic(bundle, component, backend, preferences.precision)
    if backend == "openvino":
        ov.check_arithmetic(arithmetic.floats)

    def open_graph(part: PartName | None) -> Session:
        if backend == "openvino":
            return ov.open_session(
                bundle,
                component,
                arithmetic.graph,
                part=part,
                arithmetic=arithmetic.floats,
                performance_hint=preferences.performance_hint,
                threads=preferences.threads,
                low_memory=preferences.low_memory,
            )
        return ort.open_session(bundle, component, part=part, threads=preferences.threads, precision=arithmetic.graph)

    parts: set[PartName] = {
        name for name, part in bundle.manifest.components[component].parts.items() if arithmetic.graph in part.graphs
    }
    in_words = "" if backend == "onnxruntime" and arithmetic.graph == "float32" else f" in {arithmetic}"
    title, record = f"{_TITLES[backend]} on the CPU{in_words}", bundle.manifest.components[component]
    if {"time_embedding", "cross_attention_kv", "body"} <= parts:
        reuses = "shallow_body" in parts
        return Choice(title, lambda: SplitDenoiser(record.inputs, open_graph), on_cpu=True, reuses_features=reuses)
    # Slices hold floats between stages. What OpenVINO computes in bfloat16 or int8 it holds as that, and then the whole
    # needs no more than they do (docs/cpu.md).
    narrow = backend == "openvino" and str(arithmetic) != "float32"
    if preferences.low_memory and is_sliced(parts) and not narrow:
        sliced = f"{title}, in slices"
        return Choice(sliced, lambda: SlicedDecoder(record.inputs, record.parts, open_graph), on_cpu=True)
    return Choice(title, lambda: open_graph(None), on_cpu=True)


def _arithmetic(bundle: Bundle, component: str, backend: CpuBackend, asked: ComputePrecision | None) -> _Arithmetic:
    wanted = asked or ("int8" if bundle.manifest.precision == "int8" else "float32")
    has_int8 = "int8" in bundle.manifest.components[component].graphs
    if asked == "int8" and bundle.manifest.precision != "int8":
        raise BackendError(
            f"found the precision int8 for a bundle of {bundle.manifest.precision}; export it in int8: "
            "latentrt export CHECKPOINT BUNDLE --precision int8"
        )
    if asked in ("float32", "bfloat16") and "float32" not in bundle.manifest.components[component].graphs:
        raise BackendError(
            f"found the precision {asked} for a bundle of int8, whose {component} has no float32 graph; leave it out, "
            "or export another bundle: latentrt export CHECKPOINT BUNDLE --precision float16"
        )
    if asked == "bfloat16" and backend == "onnxruntime":
        raise BackendError(
            "ONNX Runtime does not compute in bfloat16 on a CPU, OpenVINO does: --device openvino "
            "(pip install 'latentrt[openvino]')"
        )
    if component in _ALWAYS_FLOAT32 or wanted == "float32" or backend == "onnxruntime":
        return _Arithmetic("int8" if has_int8 and wanted == "int8" else "float32", "float32")
    floats: ov.Arithmetic = "bfloat16" if wanted == "bfloat16" or ov.computes_in_bfloat16() else "float32"
    return _Arithmetic("int8" if has_int8 and wanted == "int8" else "float32", floats)
