"""This machine's GPU: imports the libraries that know it, and returns its facts or why there is none.

cuda.core knows the GPU as kernels and engines see it: `CUDA_VISIBLE_DEVICES` and MIG decide which one is the first, and
NVML knows neither. NVML (the package nvidia-ml-py) knows the driver: its version, why it cannot be used, and how much
memory is in use; on Jetson it knows little or is absent. This is the only module that imports either library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from latentrt.errors import BackendError, MissingExtraError

__all__ = [
    "FIRST_DEVICE",
    "Gpu",
    "NoGpu",
    "describe_driver",
    "driver_value",
    "find_gpu",
    "gpu_memory_in_use",
    "import_cuda",
]

_CUDA_LIBRARY, _NVML_LIBRARY = ("nvcuda.dll", "nvml.dll") if os.name == "nt" else ("libcuda.so.1", "libnvidia-ml.so.1")
FIRST_DEVICE = 0  # CUDA's number of the GPU in use; CUDA_VISIBLE_DEVICES selects it


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A usable GPU.

    Attributes:
        name: the driver's name of it, such as `NVIDIA GeForce RTX 4090`.
        compute_capability: such as `8.9`.
        memory_bytes: total memory, in use or not.
        cuda: the newest CUDA version that the driver supports, such as `13.0`.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, {self.memory_bytes / 2**30:.0f} GiB)"


@dataclass(frozen=True, kw_only=True)
class NoGpu:
    """The absence of a usable GPU.

    Attributes:
        reason: a clause.
        mend: the remedy, as an imperative clause.
        is_usual: whether nothing is wrong: most machines without a GPU are like this.
    """

    reason: str
    mend: str
    is_usual: bool = False


@dataclass(frozen=True, kw_only=True)
class _Driver:
    """NVML's facts of the driver: its version, and the number of GPUs in the machine."""

    version: str
    gpus: int


_NO_DRIVER = NoGpu(
    reason="there is no NVIDIA driver",
    mend="install NVIDIA's driver, or give the container access to the GPU",
    is_usual=True,
)
# By the name of NVML's class of the error.
_DRIVER_PROBLEMS = {
    "NVMLError_DriverNotLoaded": NoGpu(
        reason="the NVIDIA driver is installed and not loaded", mend="load it (modprobe nvidia), or restart the machine"
    ),
    "NVMLError_NoPermission": NoGpu(
        reason="this user has no permission to use the NVIDIA driver",
        mend="give the user read and write access to /dev/nvidia*",
    ),
    "NVMLError_LibRmVersionMismatch": NoGpu(
        reason="the NVIDIA driver's library and its kernel module have different versions",
        mend="restart the machine, which loads the driver that was installed last",
    ),
}


def import_cuda() -> tuple[Any, Any]:
    """Import `cuda.core`, and `cuda.bindings.driver` for the few calls that it lacks.

    Raises:
        MissingExtraError: one of them is not installed. BackendError: one is installed and cannot be loaded.
    """
    try:
        import cuda.core
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        raise MissingExtraError("cuda.core", "rtx", "use a GPU") from error
    except Exception as error:  # the two are of versions that do not go together, or parts of one are missing
        raise BackendError(f"cuda.core is installed and cannot be loaded: {error}; install it again") from error
    return cuda.core, driver


def driver_value(driver: Any, result: tuple[Any, ...]) -> Any:
    """Return the value of a call of `cuda.bindings.driver`, whose result begins with its status.

    Raises:
        RuntimeError: the call failed; the message is CUDA's name of the error.
    """
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(getattr(status, "name", str(status)))
    return values[0] if values else None


def _import_nvml() -> Any:
    import pynvml

    return pynvml


def find_gpu(cuda: Callable[[], tuple[Any, Any]] = import_cuda, nvml: Callable[[], Any] = _import_nvml) -> Gpu | NoGpu:
    """Return the first GPU that CUDA shows this process (`CUDA_VISIBLE_DEVICES` selects it), or why there is none.

    Args:
        cuda: returns `cuda.core` and `cuda.bindings.driver`, or stand-ins; raises BackendError.
        nvml: returns `pynvml`, or a stand-in; raises ImportError.
    """
    # Without the library cuda.core could say nothing, and NVML rarely; each takes a fraction of a second to import.
    if not _can_load(_CUDA_LIBRARY):
        return _explain_missing_library(_ask_nvml(nvml) if _can_load(_NVML_LIBRARY) else None)
    try:
        core, driver = cuda()
    except MissingExtraError as error:
        return NoGpu(reason=f"{error.package} is not installed", mend=f"pip install 'latentrt[{error.extra}]'")
    except BackendError as error:
        return NoGpu(reason=f"cuda.core cannot be loaded ({error.__cause__})", mend="install it again")
    try:
        return _first_gpu(core, driver) or _explain_no_device(_ask_nvml(nvml))
    except Exception as error:  # cuda.core's own error has no public class
        known = _ask_nvml(nvml)
        if isinstance(known, NoGpu):
            return known
        return NoGpu(reason=f"the NVIDIA driver cannot be used ({error})", mend=_NO_DRIVER.mend)


def describe_driver(gpu: Gpu, nvml: Callable[[], Any] = _import_nvml) -> str:
    """Return the driver's version, where NVML says it, and CUDA's, as in `driver 580.65.06 for CUDA 13.0`."""
    known = _ask_nvml(nvml)
    return f"driver {known.version + ' ' if isinstance(known, _Driver) else ''}for CUDA {gpu.cuda}"


def gpu_memory_in_use(
    cuda: Callable[[], tuple[Any, Any]] = import_cuda, nvml: Callable[[], Any] = _import_nvml
) -> int | None:
    """Return the memory of the first GPU that is in use, by all processes, in bytes; None where NVML does not say.

    CUDA's own number would need a context in this process, which itself takes hundreds of megabytes.
    """
    try:
        with _opened(nvml()) as library:
            core, _ = cuda()
            handle = library.nvmlDeviceGetHandleByPciBusId(core.Device(FIRST_DEVICE).pci_bus_id)
            return int(library.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # a library is missing, the driver shows no GPU, or it is a Jetson, whose NVML does not know
        return None


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _ask_nvml(nvml: Callable[[], Any]) -> _Driver | NoGpu | None:
    """Return the driver's facts, or why it cannot be used; None where NVML is not installed or says nothing."""
    try:
        library = nvml()
    except ImportError:
        return None
    try:
        with _opened(library):
            return _Driver(version=library.nvmlSystemGetDriverVersion(), gpus=library.nvmlDeviceGetCount())
    except library.NVMLError as error:
        return _DRIVER_PROBLEMS.get(type(error).__name__)


@contextlib.contextmanager
def _opened(library: Any) -> Iterator[Any]:
    library.nvmlInit()
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _first_gpu(core: Any, driver: Any) -> Gpu | None:
    """Return the facts of CUDA's first device; None where it shows none.

    The bindings are called where cuda.core has no call that works without NVML: total memory and CUDA's version; and
    for the first call, whose status tells a driver without GPUs from one that fails.
    """
    initialized = driver.cuInit(0)
    if initialized[0] == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return None
    driver_value(driver, initialized)
    if driver_value(driver, driver.cuDeviceGetCount()) == 0:
        return None
    device, version = core.Device(FIRST_DEVICE), driver_value(driver, driver.cuDriverGetVersion())
    return Gpu(
        name=device.name.strip(),
        compute_capability=".".join(map(str, device.compute_capability)),
        memory_bytes=int(driver_value(driver, driver.cuDeviceTotalMem(FIRST_DEVICE))),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _explain_missing_library(known: _Driver | NoGpu | None) -> NoGpu:
    """Return why CUDA's library is missing, with the facts that NVML has."""
    if isinstance(known, _Driver):
        return NoGpu(
            reason=f"the NVIDIA driver {known.version} is installed without CUDA's library",
            mend="give the container access to it: NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    return known or _NO_DRIVER


def _explain_no_device(known: _Driver | NoGpu | None) -> NoGpu:
    """Return why CUDA shows no GPU, with the facts that NVML has."""
    if isinstance(known, _Driver) and known.gpus:
        found = "its GPU" if known.gpus == 1 else f"any of its {known.gpus} GPUs"
        return NoGpu(reason=f"CUDA does not show {found} to this process", mend="check CUDA_VISIBLE_DEVICES")
    return NoGpu(reason="the driver shows no GPU", mend="check CUDA_VISIBLE_DEVICES and nvidia-smi")
