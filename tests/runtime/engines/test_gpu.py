from __future__ import annotations

import ctypes
from enum import Enum
from typing import Any

import pytest

from latentrt.engines.gpu import Gpu, NoGpu, find_gpu


class Status(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803


class Attribute(Enum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class FakeDriver:
    """A fake of `cuda.bindings.driver`: every call returns its status first."""

    CUresult, CUdevice_attribute = Status, Attribute

    def __init__(self, *, devices: int = 1, fails: str = "", status: Status = Status.CUDA_SUCCESS) -> None:
        self.devices, self.fails, self.status = devices, fails, status

    def __getattr__(self, call: str) -> Any:
        answers: dict[str, tuple[Any, ...]] = {
            "cuInit": (),
            "cuDriverGetVersion": (12080,),
            "cuDeviceGetCount": (self.devices,),
            "cuDeviceGet": ("the device",),
            "cuDeviceGetName": (b"NVIDIA GeForce RTX 4090\0" + b"\0" * 104,),
            "cuDeviceTotalMem": (24 << 30,),
        }

        def answer(*given: Any) -> tuple[Any, ...]:
            if call == self.fails:
                # A call that failed returns nothing but its status.
                return (self.status, *(None for _ in answers.get(call, (0,))))
            if call == "cuDeviceGetAttribute":
                return Status.CUDA_SUCCESS, 8 if given[0].name.endswith("MAJOR") else 9
            return (Status.CUDA_SUCCESS, *answers[call])

        return answer


def test_a_gpu() -> None:
    found = find_gpu(FakeDriver)
    expected = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_bytes=24 << 30, cuda="12.8")
    assert found == expected
    assert str(found) == "NVIDIA GeForce RTX 4090 (compute capability 8.9, 24 GiB)"


def test_a_driver_that_shows_no_gpu() -> None:
    found = find_gpu(lambda: FakeDriver(devices=0))
    assert isinstance(found, NoGpu)
    assert (found.reason, "CUDA_VISIBLE_DEVICES" in found.mend) == ("the driver shows no GPU", True)


@pytest.mark.parametrize(
    "call", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem"]
)
def test_a_call_that_fails(call: str) -> None:
    found = find_gpu(lambda: FakeDriver(fails=call, status=Status.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH))
    assert isinstance(found, NoGpu)
    assert found.reason == "the NVIDIA driver cannot be used (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)"
    assert found.mend


def test_a_driver_without_a_gpu_says_so_at_once() -> None:
    """`cuInit` itself fails where CUDA_VISIBLE_DEVICES names none: no driver is to be installed for that."""
    found = find_gpu(lambda: FakeDriver(fails="cuInit", status=Status.CUDA_ERROR_NO_DEVICE))
    assert isinstance(found, NoGpu)
    assert found.reason == "the driver shows no GPU"
    assert "CUDA_VISIBLE_DEVICES" in found.mend


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'cuda'")

    def library(name: str) -> Any:
        assert name in ("libcuda.so.1", "nvcuda.dll")
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", library)
    driver = False
    found = find_gpu(missing)
    assert isinstance(found, NoGpu)
    assert found.reason == "there is no NVIDIA driver", "which bindings would not change"
    driver = True
    found = find_gpu(missing)
    assert found == NoGpu(reason="cuda-bindings is not installed", mend="pip install 'latentrt[rtx]'")


def test_no_driver() -> None:
    class DynamicLibNotFoundError(RuntimeError):
        pass

    class Driverless:
        def cuInit(self, flags: int) -> Any:  # noqa: N802, CUDA's name
            raise DynamicLibNotFoundError("libcuda.so.1")

    found = find_gpu(Driverless)
    assert isinstance(found, NoGpu)
    assert found.reason == "there is no NVIDIA driver"
    assert "driver" in found.mend


def test_the_real_driver_of_this_machine() -> None:
    found = find_gpu()
    assert isinstance(found, Gpu | NoGpu)
    if isinstance(found, NoGpu):
        assert found.reason in ("there is no NVIDIA driver", "the driver shows no GPU")
    else:
        assert found.compute_capability.count(".") == 1
        assert found.memory_bytes > 1 << 30
