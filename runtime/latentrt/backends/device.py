"""What runs each submodule on this machine, and why that?

The ladder, best first: an engine for this GPU, ONNX Runtime on the GPU, OpenVINO on the CPU, ONNX Runtime on the CPU.
`auto` takes the best that can be had, submodule by submodule, and says why it is not better; a device that is named is
taken or refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.cpu_choice import CpuBackend, Preferences, check_preferences, choose_on_cpu
from latentrt.backends.gpu import Gpu, NoGpu, find_gpu
from latentrt.backends.real_files import linked_weights
from latentrt.backends.session import Session
from latentrt.backends.sessions import Choice, Sessions
from latentrt.backends.tensorrt.library import TITLES, LoadedLibrary, find_libraries
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.weights import map_weights
from latentrt.engines.choice import EngineSource, Machine, Misfit, engines_for
from latentrt.engines.record import EngineRecord, LibraryName
from latentrt.errors import BackendError, EngineError, RequestError

if TYPE_CHECKING:
    from latentrt.backends.tensorrt.session import NamedWeights

__all__ = ["Device", "check_device", "choose_sessions", "find_machine", "why_no_engine"]

Device = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
_log = logging.getLogger("latentrt")


def choose_sessions(
    bundle: Bundle,
    device: Device = "auto",
    *,
    provider: str | None = None,
    preferences: Preferences | None = None,
) -> Sessions:
    """Decide what runs each submodule. Nothing is loaded yet.

    Args:
        device: `auto`; `cpu` and `cuda` are ONNX Runtime; `openvino` is a CPU as well; `tensorrt` is engines of either
            library, and nothing else.
        provider: one of ONNX Runtime's execution providers, by its name, in place of a device.
        preferences: how, where that is open.

    Raises:
        RequestError: there is no such device. BackendError: it cannot be had here. EngineError: the engines cannot.
    """
    check_device(device)
    preferences = preferences or Preferences()
    check_preferences(preferences)
    if provider is not None and device != "auto":
        raise RequestError(f"found the device {device} and the provider {provider}, expected one of the two")
    if preferences.precision is not None and (provider is not None or device in ("cuda", "tensorrt")):
        raise RequestError(
            f"found the precision {preferences.precision} with {provider or device}; it is what a CPU computes in, and "
            "elsewhere it is the bundle's or the engine's. Leave it out"
        )
    choosing = _Choosing(bundle, preferences)
    if provider is not None:
        return Sessions({name: choosing.on_provider(name, provider) for name in bundle.manifest.components})
    return Sessions({name: choosing.choose(name, device) for name in bundle.manifest.components})


def check_device(device: str) -> None:
    """Refuse what is no device.

    Raises:
        RequestError: naming those there are.
    """
    if device not in get_args(Device):
        raise RequestError(f"found the device {device!r}, expected one of {', '.join(get_args(Device))}")


def find_machine(gpu: Gpu) -> tuple[Machine, dict[LibraryName, LoadedLibrary | str]]:
    """What engines run on here, and each library or why it cannot be used."""
    libraries = find_libraries()
    versions = {name: found.version for name, found in libraries.items() if isinstance(found, LoadedLibrary)}
    return Machine(gpu=gpu, versions=versions), libraries


def why_no_engine(component: str, others: list[Misfit]) -> str:
    """Why no engine runs a submodule, in a clause, with what would mend it."""
    if not others:
        return f"no engine is built of {component} (latentrt build)"
    nearest = min(others, key=lambda misfit: len(misfit.reasons))
    return f"{', '.join(nearest.reasons)} (latentrt build)"


class _Choosing:
    """Decides for one bundle; looks at the machine once, and only where it matters."""

    def __init__(self, bundle: Bundle, preferences: Preferences) -> None:
        self.bundle, self.preferences, self.threads = bundle, preferences, preferences.threads
        self._gpu: Gpu | NoGpu | None = None
        self._machine: tuple[Machine, dict[LibraryName, LoadedLibrary | str]] | None = None
        self._devices: dict[LibraryName, object] = {}
        self._loading = threading.Lock()

    def choose(self, name: str, device: Device) -> Choice:
        if device in ("cpu", "openvino"):
            return self._on_cpu(name, "as asked", "onnxruntime" if device == "cpu" else "openvino")
        if device == "cuda":
            return self.on_provider(name, ort.CUDA)
        if self._gpu is None:
            self._gpu = find_gpu()
        if isinstance(self._gpu, NoGpu):
            if device == "tensorrt":
                raise BackendError(f"engines run on a GPU, and here {self._gpu.reason}; {self._gpu.mend}")
            return self._on_cpu(name, self._gpu.reason)
        if device == "auto" and (why := self._why_cpu()):
            return self._on_cpu(name, why)
        return self._on_gpu(name, self._gpu, engines_only=device == "tensorrt")

    def _why_cpu(self) -> str | None:
        """What sends a bundle to the CPU whatever else is here."""
        if self.preferences.precision is not None:
            return f"{self.preferences.precision} was asked for, which is for CPUs"
        return "its graphs are int8, which is for CPUs" if self.bundle.manifest.precision == "int8" else None

    def _on_gpu(self, name: str, gpu: Gpu, *, engines_only: bool) -> Choice:
        self._machine = self._machine or find_machine(gpu)
        fit, others = engines_for(self.bundle, name, self._machine[0])
        if fit:
            return self._on_engines(name, fit, engines_only=engines_only)
        why = why_no_engine(name, others)
        if engines_only:
            raise EngineError(f"{name} has no engine that runs on {gpu}: {why}")
        return self._without_engine(name, why)

    def _without_engine(self, name: str, why: str) -> Choice:
        if ort.CUDA in ort.available_providers():
            choice = self.on_provider(name, ort.CUDA)
            return replace(choice, open=lambda: self._gpu_or_cpu(name), why=f"; {why}")
        return self._on_cpu(name, f"{why}, and this ONNX Runtime has no CUDA (pip install 'latentrt[gpu]')")

    def _gpu_or_cpu(self, name: str) -> Session:
        """ONNX Runtime on the GPU; on the CPU where its libraries turn out not to be there."""
        try:
            return ort.open_on_provider(self.bundle, name, threads=self.threads)
        except BackendError as error:
            _log.warning("%s runs on the CPU: %s", name, error)
            return self._on_cpu(name, str(error)).open()

    def _on_engines(self, name: str, fit: list[EngineSource], *, engines_only: bool) -> Choice:
        from latentrt.backends.tensorrt.engine_set import EngineSet

        record = fit[0].record
        otherwise = None if engines_only else self._without_engine(name, "no engine covers that shape").open
        more = f" and {len(fit) - 1} more" if len(fit) > 1 else ""
        words = f"{TITLES[record.identity.library]} engine {record.key[:12]}{more}"
        return Choice(words, lambda: EngineSet(name, fit, self._load, otherwise))

    def _load(self, source: EngineSource) -> Session:
        from latentrt.backends.tensorrt.device import EngineDevice
        from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
        from latentrt.backends.tensorrt.session import EngineSession
        from latentrt.engines.store import EngineStore

        assert self._machine is not None, "engines are chosen by what the machine is"
        library_name = source.record.identity.library
        with self._loading:  # submodules that are loaded at once share one device
            if library_name not in self._devices:
                library = self._machine[1][library_name]
                assert isinstance(library, LoadedLibrary), "only engines of a library that is here are chosen"
                self._devices[library_name] = EngineDevice(library)
        device = self._devices[library_name]
        assert isinstance(device, EngineDevice)
        cache = None
        if library_name == "tensorrt_rtx":
            with contextlib.suppress(EngineError):  # a user without a cache compiles at each start
                cache = RuntimeCache(EngineStore().folder / source.record.key)
        weights = self._weights(source.record) if source.record.identity.options.strip_weights else None
        return EngineSession(device, source.plan(), source.record, cache, weights)

    def _weights(self, record: EngineRecord) -> NamedWeights:
        """What a plan that is kept without weights is given when it is loaded."""
        from latentrt.backends.tensorrt.session import NamedWeights

        _, name = self.bundle.component_files(record.identity.component, record.identity.precision)
        return NamedWeights(map_weights(self.bundle.path(name)), self.bundle.manifest.files[name].sha256)

    def on_provider(self, name: str, provider: str) -> Choice:
        """ONNX Runtime with one of its execution providers, which it has to have."""
        ort.check_provider(provider)
        words = "ONNX Runtime on the GPU" if provider == ort.CUDA else f"ONNX Runtime with {provider}"
        return Choice(words, lambda: ort.open_on_provider(self.bundle, name, provider, threads=self.threads))

    @functools.cached_property
    def _best_on_cpu(self) -> CpuBackend:
        if not ov.is_installed():
            return "onnxruntime"
        try:
            for component in self.bundle.manifest.components.values():
                linked_weights(self.bundle.folder / component.weights.file)
        except (BackendError, EngineError) as error:
            _log.warning("OpenVINO is not used: %s", error)
            return "onnxruntime"
        return "openvino"

    def _on_cpu(self, name: str, why: str, backend: CpuBackend | None = None) -> Choice:
        """The backend that is named, else the best that is installed."""
        backend = backend or self._best_on_cpu
        return replace(choose_on_cpu(self.bundle, name, backend, self.preferences), why=f": {why}")
