"""Which GPU is in this machine?"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "NoGpu", "find_gpu"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that can be used now.

    Attributes:
        name: as its driver calls it, such as `NVIDIA GeForce RTX 4090`.
        compute_capability: such as `8.9`.
        memory_bytes: all of it, in use or not.
        cuda: the newest CUDA that the driver runs, such as `13.0`.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, {self.memory_bytes / 2**30:.0f} GiB)"


@dataclass(frozen=True, kw_only=True)
class NoGpu:
    """There is no GPU that can be used: why, and what would mend it."""

    reason: str
    mend: str


_NO_DRIVER = NoGpu(
    reason="there is no NVIDIA driver", mend="install NVIDIA's driver, or give the container access to the GPU"
)
_NOTHING_SHOWN = NoGpu(reason="the driver shows no GPU", mend="check CUDA_VISIBLE_DEVICES and nvidia-smi")


def find_gpu(driver: Callable[[], Any] | None = None) -> Gpu | NoGpu:
    """The first GPU that CUDA shows this process (`CUDA_VISIBLE_DEVICES` chooses).

    Args:
        driver: loads the CUDA driver's bindings; `cuda.bindings.driver` if None.
    """
    try:
        cuda = (driver or _bindings)()
    except ImportError:
        if not _driver_is_here():
            return _NO_DRIVER
        return NoGpu(reason="cuda-bindings is not installed", mend="pip install 'latentrt[rtx]'")
    try:
        return _first_gpu(cuda)
    except Exception as error:
        # Pathfinder's error for a missing libcuda has no public class.
        if "CUDA_ERROR_NO_DEVICE" in str(error):
            return _NOTHING_SHOWN
        if type(error).__name__ == "DynamicLibNotFoundError":
            return _NO_DRIVER
        return NoGpu(reason=f"the NVIDIA driver cannot be used ({error})", mend=_NO_DRIVER.mend)


def _driver_is_here() -> bool:
    """Whether there is a driver that bindings would find."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _bindings() -> Any:
    from cuda.bindings import driver

    return driver


def _first_gpu(cuda: Any) -> Gpu | NoGpu:
    _ask(cuda, cuda.cuInit(0))
    version = _ask(cuda, cuda.cuDriverGetVersion())
    if _ask(cuda, cuda.cuDeviceGetCount()) == 0:
        return _NOTHING_SHOWN
    device = _ask(cuda, cuda.cuDeviceGet(0))
    attribute = cuda.CUdevice_attribute
    major = _ask(cuda, cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = _ask(cuda, cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return Gpu(
        name=_ask(cuda, cuda.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace").strip(),
        compute_capability=f"{major}.{minor}",
        memory_bytes=_ask(cuda, cuda.cuDeviceTotalMem(device)),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _ask(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a call of the driver; every call answers with its status first."""
    status, *values = answer
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{status.name}")
    return values[0] if values else None
