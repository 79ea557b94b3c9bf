"""Decides which backend runs each component of a bundle on this machine, and gives the reason.

The preference, best first: an engine for this GPU, ONNX Runtime on the GPU, OpenVINO on the CPU, ONNX Runtime on the
CPU. `auto` takes the best that is available, component by component, with the reason why no better one is; a device
that is named is used, or it is an error.

On a CPU everything is computed in float32 unless a precision is named, so that the image of a seed does not depend on
the machine. An int8 bundle computes its int8 graphs, and bfloat16 around them where the CPU has it, as it is
approximate anyway. A classifier always computes in float32, as its scores are compared with thresholds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.execution_providers import find_provider
from latentrt.backends.session import Session
from latentrt.backends.tensorrt.library import TITLES, LoadedLibrary, find_libraries
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.bundle.printable import quote
from latentrt.engines.choice import EngineSource, Incompatible, Machine, choose_engines
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import LibraryName
from latentrt.errors import BackendError, EngineError, RequestError

__all__ = [
    "Backend",
    "ComputePrecision",
    "Device",
    "Placement",
    "Preferences",
    "check_device",
    "find_machine",
    "place_components",
    "why_no_engine",
]

Device = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
Backend = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]
ComputePrecision = Literal["float32", "bfloat16", "int8"]
MAX_THREADS = 1024
"""Largest number of threads; a backend starts all of them."""

_CPU_TITLES: dict[Backend, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_SPLIT_PARTS = ("body", "cross_attention_kv", "time_embedding")  # in the order a step needs them
_log = logging.getLogger("latentrt")


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Options for components that run on a CPU.

    Attributes:
        threads: on a CPU; None: one for each core that this process may use.
        precision: of arithmetic on a CPU; None: see the module's docstring.
        performance_hint: of OpenVINO: `latency`, or `throughput` for several threads that generate at once.
        low_memory: prefer graphs and settings that need less memory, where the bundle has them.
    """

    threads: int | None = None
    precision: ComputePrecision | None = None
    performance_hint: ov.PerformanceHint = "latency"
    low_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The backend and device that run one component, and the reason.

    Attributes:
        backend: the library.
        device: `cpu`, `gpu`, or the name of another of ONNX Runtime's execution providers.
        title: backend and device, human-readable.
        reason: why nothing better runs it; empty where nothing is better.
        is_improvable: whether `reason` is one that a user of this machine may want to change.
        open: loads the component, or one of its parts.
        key: equal for placements whose sessions may be shared.
        split: whether a denoiser runs in parts. sliced: whether a decoder does.
        reuses_features: whether a denoiser can take deep features of an earlier row (`deep_cache`).
    """

    backend: Backend
    device: str
    title: str
    open: Callable[[str | None], Session] = field(repr=False)
    key: tuple[Hashable, ...] = field(repr=False)
    reason: str = ""
    is_improvable: bool = False
    split: bool = field(default=False, repr=False)
    sliced: bool = field(default=False, repr=False)
    reuses_features: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        return f"{self.title}: {self.reason}" if self.reason else self.title

    @property
    def summary(self) -> str:
        """Backend and device, with the reason only if it is one that a user may want to change."""
        return f"{self.title} ({self.reason})" if self.is_improvable else self.title

    @property
    def first_parts(self) -> tuple[str | None, ...]:
        """The parts that a run opens first, which are worth prefetching; None is the whole."""
        if self.sliced:
            return ()
        return _SPLIT_PARTS if self.split else (None,)


def place_components(
    bundle: Bundle,
    device: Device = "auto",
    *,
    provider: str | None = None,
    preferences: Preferences | None = None,
) -> dict[str, Placement]:
    """Decide which backend runs each component, without loading any.

    Args:
        device: `auto`; `cpu` and `cuda` mean ONNX Runtime; `openvino` also runs on the CPU; `tensorrt` means engines of
            either library, and nothing else.
        provider: one of ONNX Runtime's execution providers instead of a device, by a short name such as `coreml`
            (`latentrt.backends.execution_providers`) or by ONNX Runtime's own.
        preferences: for components on a CPU; None: the defaults.

    Returns:
        The placement of each component, by its name.

    Raises:
        RequestError: the device or a preference is unknown, or the options exclude each other.
        BackendError: the device is not available here.
        EngineError: engines are missing.
    """
    check_device(device)
    preferences = preferences or Preferences()
    _check_preferences(preferences)
    if provider is not None and device != "auto":
        raise RequestError(f"got `device` {device} and `provider` {provider}, expected one of the two")
    if preferences.precision is not None and (provider is not None or device in ("cuda", "tensorrt")):
        raise RequestError(
            f"`precision`: got {preferences.precision} with {provider or device}, but it applies to CPUs only; "
            "elsewhere the bundle or the engine fixes it. Leave it out"
        )
    placer = _Placer(bundle, preferences)
    if provider is not None:
        return {name: placer.on_provider(name, provider) for name in bundle.manifest.components}
    return {name: placer.place(name, device) for name in bundle.manifest.components}


def check_device(device: str) -> None:
    """Reject an unknown device name.

    Raises:
        RequestError: listing the known ones.
    """
    if device not in get_args(Device):
        raise RequestError(f"`device`: got {quote(device)}, expected one of {', '.join(get_args(Device))}")


def _check_preferences(preferences: Preferences) -> None:
    """Reject an impossible number of threads, and an unknown precision or performance hint.

    Raises:
        RequestError: listing the known ones.
    """
    threads = preferences.threads
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise RequestError(f"`threads`: got {quote(threads)}, expected a whole number from 1 to {MAX_THREADS}")
    if preferences.precision not in (None, *get_args(ComputePrecision)):
        names = ", ".join(get_args(ComputePrecision))
        raise RequestError(f"`precision`: got {quote(preferences.precision)}, expected one of {names}")
    if preferences.performance_hint not in get_args(ov.PerformanceHint):
        names = ", ".join(get_args(ov.PerformanceHint))
        raise RequestError(f"`performance_hint`: got {quote(preferences.performance_hint)}, expected one of {names}")


def find_machine(gpu: Gpu) -> tuple[Machine, dict[LibraryName, LoadedLibrary | str]]:
    """Return the machine that engines run on, and each library or the reason why it cannot be used."""
    libraries = find_libraries()
    versions = {name: found.version for name, found in libraries.items() if isinstance(found, LoadedLibrary)}
    return Machine(gpu=gpu.name, compute_capability=gpu.compute_capability, versions=versions), libraries


def why_no_engine(component: str, others: list[Incompatible]) -> str:
    """Return why no engine runs a component, in a clause, and the command that changes that."""
    if not others:
        return f"no engine is built of {component} (latentrt build)"
    nearest = min(others, key=lambda engine: len(engine.reasons))
    return f"{', '.join(nearest.reasons)} (latentrt build)"


class _Placer:
    """Places the components of one bundle; inspects the machine at most once, when the decision depends on it."""

    def __init__(self, bundle: Bundle, preferences: Preferences) -> None:
        self.bundle, self.preferences, self.threads = bundle, preferences, preferences.threads
        self._gpu: Gpu | NoGpu | None = None
        self._machine: tuple[Machine, dict[LibraryName, LoadedLibrary | str]] | None = None
        self._devices: dict[LibraryName, object] = {}
        self._loading = threading.Lock()

    def place(self, name: str, device: Device) -> Placement:
        if device in ("cpu", "openvino"):
            return self._on_cpu(name, "as requested", "onnxruntime" if device == "cpu" else "openvino")
        if device == "cuda":
            return self.on_provider(name, ort.CUDA, "`device`: got cuda")
        if self._gpu is None:
            self._gpu = find_gpu()
        if isinstance(self._gpu, NoGpu):
            if device == "tensorrt":
                raise BackendError(f"engines run on a GPU, and here {self._gpu.reason}; {self._gpu.mend}")
            return replace(self._on_cpu(name, self._gpu.reason), is_improvable=not self._gpu.is_usual)
        if device == "auto" and (why := self._why_cpu()):
            return self._on_cpu(name, why)
        return self._on_gpu(name, self._gpu, engines_only=device == "tensorrt")

    def _why_cpu(self) -> str | None:
        """Return the reason to use the CPU even if a GPU is available, or None."""
        if self.preferences.precision is not None:
            return f"{self.preferences.precision} was requested, which is for CPUs"
        return "its graphs are int8, which is for CPUs" if self.bundle.manifest.precision == "int8" else None

    def _on_gpu(self, name: str, gpu: Gpu, *, engines_only: bool) -> Placement:
        self._machine = self._machine or find_machine(gpu)
        fit, others = choose_engines(self.bundle, name, self._machine[0])
        if fit:
            return self._on_engines(name, fit, engines_only=engines_only)
        why = why_no_engine(name, others)
        if engines_only:
            raise EngineError(f"{name} has no engine that runs on {gpu}: {why}")
        return self._without_engine(name, why)

    def _without_engine(self, name: str, why: str) -> Placement:
        if ort.CUDA in ort.available_providers():
            placement = self.on_provider(name, ort.CUDA)
            return replace(
                placement,
                open=lambda _: self._gpu_or_cpu(name),
                key=("or the CPU", *placement.key),
                reason=why,
                is_improvable=True,
            )
        why = f"{why}, and this ONNX Runtime has no CUDA (pip install 'latentrt[gpu]')"
        return replace(self._on_cpu(name, why), is_improvable=True)

    def _gpu_or_cpu(self, name: str) -> Session:
        """Open a session of ONNX Runtime on the GPU, or on the CPU where libraries of CUDA are missing."""
        try:
            return ort.open_on_provider(self.bundle, name, threads=self.threads)
        except BackendError as error:
            _log.warning("%s runs on the CPU: %s", name, error)
            return ort.open_session(self.bundle, name, threads=self.threads, precision=self._float32_or_int8(name))

    def _float32_or_int8(self, name: str) -> Precision:
        return "float32" if "float32" in self.bundle.manifest.components[name].graphs else "int8"

    def _on_engines(self, name: str, fit: list[EngineSource], *, engines_only: bool) -> Placement:
        from latentrt.backends.tensorrt.engine_set import EngineSet

        record = fit[0].record
        fallback = None if engines_only else self._without_engine(name, "no engine covers that shape").open
        otherwise = None if fallback is None else functools.partial(fallback, None)
        more = f" and {len(fit) - 1} more" if len(fit) > 1 else ""
        return Placement(
            backend=record.identity.library,
            device="gpu",
            title=f"{TITLES[record.identity.library]} engine {record.key[:12]}{more}",
            open=lambda _: EngineSet(name, fit, self._load, otherwise),
            # The weights too: a plan may be stripped of its own, and something else may run other shapes.
            key=("engines", name, engines_only, *(source.record.key for source in fit), *self._digests(name)),
        )

    def _load(self, source: EngineSource) -> Session:
        from latentrt.backends.tensorrt.device import EngineDevice
        from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
        from latentrt.backends.tensorrt.session import EngineSession, NamedWeights
        from latentrt.engines.store import EngineStore

        assert self._machine is not None, "engines are chosen for the machine"
        library_name = source.record.identity.library
        with self._loading:  # components that are loaded at once share one device
            if library_name not in self._devices:
                library = self._machine[1][library_name]
                assert isinstance(library, LoadedLibrary), "only engines of an installed library are chosen"
                self._devices[library_name] = EngineDevice(library)
        device = self._devices[library_name]
        assert isinstance(device, EngineDevice)
        cache = None
        if library_name == "tensorrt_rtx":
            with contextlib.suppress(EngineError):  # a user without a cache compiles at each start
                cache = RuntimeCache(EngineStore().folder / source.record.key)
        if not source.record.identity.options.strip_weights:
            return EngineSession(device, source.plan(), source.record, cache)
        with self.bundle.weights(source.record.identity.component) as weights:
            named = NamedWeights(weights.arrays(), weights.digest)
            return EngineSession(device, source.plan(), source.record, cache, named)

    def on_provider(self, name: str, provider: str, given: str | None = None) -> Placement:
        """Place a component on one of ONNX Runtime's execution providers, which must be available.

        Args:
            given: the beginning of the error where it is not; None: it names the provider.
        """
        ort.check_provider(provider, given)
        known = find_provider(provider)
        on_gpu = known.name == ort.CUDA
        return Placement(
            backend="onnxruntime",
            device="gpu" if on_gpu else provider,
            title="ONNX Runtime on the GPU" if on_gpu else f"ONNX Runtime with {known.title}",
            open=lambda _: ort.open_on_provider(self.bundle, name, provider, threads=self.threads),
            key=("provider", known.name, self.threads, *self._digests(name)),
        )

    def _on_cpu(self, name: str, why: str, backend: Literal["onnxruntime", "openvino"] | None = None) -> Placement:
        """Place a component on the CPU, on the named backend or else the best that is installed.

        Raises:
            BackendError: the requested precision is not available. MissingExtraError: the backend is not installed.
        """
        preferences = self.preferences
        backend = backend or ("openvino" if ov.is_installed() else "onnxruntime")
        arithmetic = _choose_arithmetic(self.bundle, name, backend, preferences.precision)
        if backend == "openvino":
            ov.check_arithmetic(arithmetic.floats)

        def open_graph(part: str | None) -> Session:
            if backend == "openvino":
                return ov.open_session(
                    self.bundle,
                    name,
                    arithmetic.graph,
                    part=part,
                    arithmetic=arithmetic.floats,
                    performance_hint=preferences.performance_hint,
                    threads=preferences.threads,
                    low_memory=preferences.low_memory,
                )
            return ort.open_session(
                self.bundle, name, part=part, threads=preferences.threads, precision=arithmetic.graph
            )

        record = self.bundle.manifest.components[name]
        parts = {part for part, each in record.parts.items() if arithmetic.graph in each.graphs}
        # Slices exchange float32 features. In bfloat16 or int8 OpenVINO holds its activations in that type, and then
        # the whole decoder needs no more memory than its slices (docs/cpu.md).
        narrow = backend == "openvino" and str(arithmetic) != "float32"
        sliced = preferences.low_memory and not narrow and _is_sliced(parts)
        computes = "" if backend == "onnxruntime" and arithmetic.graph == "float32" else f" in {arithmetic}"
        title = f"{_CPU_TITLES[backend]} on the CPU{computes}"
        return Placement(
            backend=backend,
            device="cpu",
            title=f"{title}, in slices" if sliced else title,
            reason=why,
            open=open_graph,
            key=(backend, str(arithmetic), *_settings(preferences), *self._digests(name)),
            split={*_SPLIT_PARTS} <= parts,
            sliced=sliced,
            reuses_features="shallow_body" in parts and {*_SPLIT_PARTS} <= parts,
        )

    def _digests(self, name: str) -> tuple[str, ...]:
        """Return the digests of everything that a component's sessions are made of."""
        files = self.bundle.manifest.files
        return tuple(files[file].sha256 for file in self.bundle.files_of([name]))


def _settings(preferences: Preferences) -> tuple[Hashable, ...]:
    return preferences.threads, preferences.performance_hint, preferences.low_memory


def _is_sliced(parts: Iterable[str]) -> bool:
    """Return whether a decoder has the parts to run in slices."""
    return {"head", "slice.0"} <= {*parts}


@dataclass(frozen=True)
class _Arithmetic:
    """A graph's precision, and the arithmetic of its floating-point operations."""

    graph: Precision
    floats: ov.Arithmetic

    def __str__(self) -> str:
        if self.graph == "int8":
            return "int8" if self.floats == "float32" else f"int8 and {self.floats}"
        return self.floats


def _choose_arithmetic(
    bundle: Bundle, component: str, backend: Backend, precision: ComputePrecision | None
) -> _Arithmetic:
    """Return the arithmetic of a component on a CPU.

    Raises:
        BackendError: the bundle or the backend does not have the requested precision.
    """
    wanted = precision or ("int8" if bundle.manifest.precision == "int8" else "float32")
    record = bundle.manifest.components[component]
    has_int8 = "int8" in record.graphs
    if precision == "int8" and bundle.manifest.precision != "int8":
        raise BackendError(
            f"`precision`: got int8 for a bundle of {bundle.manifest.precision}; export it in int8: "
            "latentrt export CHECKPOINT BUNDLE --precision int8"
        )
    if precision in ("float32", "bfloat16") and "float32" not in record.graphs:
        raise BackendError(
            f"`precision`: got {precision} for a bundle of int8, whose {component} has no float32 graph; leave it out, "
            "or export another bundle: latentrt export CHECKPOINT BUNDLE --precision float16"
        )
    if precision == "bfloat16" and backend == "onnxruntime":
        raise BackendError(
            "`precision`: got bfloat16, which ONNX Runtime does not compute in on a CPU; OpenVINO does: "
            "`device` openvino (pip install 'latentrt[openvino]')"
        )
    if record.role == "classifier" or wanted == "float32" or backend == "onnxruntime":
        return _Arithmetic("int8" if has_int8 and wanted == "int8" else "float32", "float32")
    floats: ov.Arithmetic = "bfloat16" if wanted == "bfloat16" or ov.computes_in_bfloat16() else "float32"
    return _Arithmetic("int8" if has_int8 and wanted == "int8" else "float32", floats)
