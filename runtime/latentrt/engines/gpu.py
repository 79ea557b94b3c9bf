"""Detection of this machine's GPU through the CUDA driver."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "NoGpu", "find_gpu"]


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
    """

    reason: str
    mend: str


_NO_DRIVER = NoGpu(
    reason="there is no NVIDIA driver", mend="install NVIDIA's driver, or give the container access to the GPU"
)
_NO_DEVICE = NoGpu(reason="the driver shows no GPU", mend="check CUDA_VISIBLE_DEVICES and nvidia-smi")


def find_gpu(driver: Callable[[], Any] | None = None) -> Gpu | NoGpu:
    """Return the first GPU that CUDA shows this process (`CUDA_VISIBLE_DEVICES` selects it), or why there is none.

    Args:
        driver: returns the bindings of the CUDA driver; None: `cuda.bindings.driver`.
    """
    try:
        cuda = (driver or _load_bindings)()
    except ImportError:
        if not _has_driver():
            return _NO_DRIVER
        return NoGpu(reason="cuda-bindings is not installed", mend="pip install 'latentrt[rtx]'")
    try:
        return _first_gpu(cuda)
    except Exception as error:
        # cuda-pathfinder's error for a missing libcuda has no public class.
        if "CUDA_ERROR_NO_DEVICE" in str(error):
            return _NO_DEVICE
        if type(error).__name__ == "DynamicLibNotFoundError":
            return _NO_DRIVER
        return NoGpu(reason=f"the NVIDIA driver cannot be used ({error})", mend=_NO_DRIVER.mend)


def _has_driver() -> bool:
    """Return whether the driver's library can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _load_bindings() -> Any:
    from cuda.bindings import driver

    return driver


def _first_gpu(cuda: Any) -> Gpu | NoGpu:
    _value(cuda, cuda.cuInit(0))
    version = _value(cuda, cuda.cuDriverGetVersion())
    if _value(cuda, cuda.cuDeviceGetCount()) == 0:
        return _NO_DEVICE
    device = _value(cuda, cuda.cuDeviceGet(0))
    attribute = cuda.CUdevice_attribute
    major = _value(cuda, cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = _value(cuda, cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return Gpu(
        name=_value(cuda, cuda.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace").strip(),
        compute_capability=f"{major}.{minor}",
        memory_bytes=_value(cuda, cuda.cuDeviceTotalMem(device)),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _value(cuda: Any, result: tuple[Any, ...]) -> Any:
    """Return the value of a driver call, whose result begins with its status.

    Raises:
        RuntimeError: the call failed; the message is CUDA's name of the error.
    """
    status, *values = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{status.name}")
    return values[0] if values else None
