from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable
from enum import Enum
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.engines import gpu
from latentrt.engines.gpu import Gpu, NoGpu, describe_driver, find_gpu, gpu_memory_in_use, import_cuda
from latentrt.errors import BackendError, MissingExtraError

NAME = "NVIDIA GeForce RTX 4090"
CALLS = ["cuInit", "cuDeviceGetCount", "cuDriverGetVersion", "cuDeviceTotalMem"]


class Status(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803


class FakeDriver:
    """A fake of `cuda.bindings.driver`: every call returns its status first, and nothing else where it fails."""

    CUresult = Status

    def __init__(self, *, devices: int = 1, fails: str = "", status: Status = Status.CUDA_SUCCESS) -> None:
        self.devices, self.fails, self.status = devices, fails, status

    def __getattr__(self, call: str) -> Any:
        answers: dict[str, tuple[Any, ...]] = {
            "cuInit": (),
            "cuDeviceGetCount": (self.devices,),
            "cuDriverGetVersion": (12080,),
            "cuDeviceTotalMem": (24 << 30,),
        }
        if call == self.fails:
            return lambda *given: (self.status, *(None for _ in answers[call]))
        return lambda *given: (Status.CUDA_SUCCESS, *answers[call])


class FakeDevice:
    name, compute_capability, pci_bus_id = f"{NAME} ", (8, 9), "0000:65:00.0"

    def __init__(self, device_id: int) -> None:
        assert device_id == 0


def cuda(**given: Any) -> Callable[[], tuple[Any, Any]]:
    return lambda: (SimpleNamespace(Device=FakeDevice), FakeDriver(**given))


def no_cuda() -> tuple[Any, Any]:
    raise MissingExtraError("cuda.core", "rtx", "use a GPU")


class NVMLError(Exception):
    pass


def nvml_error(name: str) -> NVMLError:
    kind: type[NVMLError] = type(f"NVMLError_{name}", (NVMLError,), {})
    return kind(name)


class FakeNvml:
    """A fake of `pynvml`, which fails at a call.

    Attributes:
        opened: how often it was initialized and not shut down.
    """

    NVMLError = NVMLError

    def __init__(self, *, gpus: int = 1, fails: str = "", error: str = "Unknown") -> None:
        self.gpus, self.fails, self.error, self.opened = gpus, fails, error, 0

    def __call__(self) -> FakeNvml:
        return self

    def _count(self, by: int) -> None:
        self.opened += by

    def __getattr__(self, call: str) -> Any:
        if call == self.fails:

            def fail(*given: Any) -> Any:
                raise nvml_error(self.error)

            return fail
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: self._count(1),
            "nvmlShutdown": lambda: self._count(-1),
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetCount": lambda: self.gpus,
            "nvmlDeviceGetHandleByPciBusId": lambda bus: bus,
            "nvmlDeviceGetMemoryInfo": lambda handle: {FakeDevice.pci_bus_id: SimpleNamespace(used=3 << 30)}[handle],
        }
        if call not in answers:
            raise AttributeError(call)
        return answers[call]


def no_nvml() -> Any:
    raise ModuleNotFoundError("No module named 'pynvml'")


@pytest.fixture(autouse=True)
def drivers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries of the driver that are there: for CUDA and for NVML."""
    here = {"libcuda.so.1", "libnvidia-ml.so.1"}

    def library(name: str) -> None:
        if name not in here:
            raise OSError(name)

    monkeypatch.setattr(gpu, "_CUDA_LIBRARY", "libcuda.so.1")
    monkeypatch.setattr(gpu, "_NVML_LIBRARY", "libnvidia-ml.so.1")
    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(CDLL=library))
    return here


def reason(found: Gpu | NoGpu) -> str:
    assert isinstance(found, NoGpu)
    assert found.mend
    return found.reason


def unexpected() -> Any:
    raise AssertionError("this library need not be imported")


GPU = Gpu(name=NAME, compute_capability="8.9", memory_bytes=24 << 30, cuda="12.8")
NO_NVML = {
    "not installed": no_nvml,
    "no library": FakeNvml(fails="nvmlInit", error="LibraryNotFound"),
    "no permission": FakeNvml(fails="nvmlInit", error="NoPermission"),
    "in part": FakeNvml(fails="nvmlDeviceGetCount", error="NotSupported"),
}


def test_a_gpu() -> None:
    found = find_gpu(cuda(), unexpected)
    assert found == GPU
    assert str(found) == f"{NAME} (compute capability 8.9, 24 GiB)"


def test_a_driver_is_described_by_its_version_and_cudas() -> None:
    nvml = FakeNvml()
    assert describe_driver(GPU, nvml) == "driver 580.65.06 for CUDA 12.8"
    assert nvml.opened == 0


@pytest.mark.parametrize("nvml", NO_NVML.values(), ids=NO_NVML)
def test_a_gpu_without_nvml_as_on_jetson(nvml: Any, drivers: set[str]) -> None:
    """CUDA decides whether there is a GPU; without NVML only the driver's version is unknown."""
    drivers.remove("libnvidia-ml.so.1")
    assert find_gpu(cuda(), nvml) == GPU
    assert describe_driver(GPU, nvml) == "driver for CUDA 12.8"


@pytest.mark.parametrize("nvml", [FakeNvml(gpus=0), no_nvml])
@pytest.mark.parametrize(
    "given", [{"devices": 0}, {"fails": "cuInit", "status": Status.CUDA_ERROR_NO_DEVICE}], ids=["count", "status"]
)
def test_a_driver_that_shows_no_gpu(given: dict[str, Any], nvml: Any) -> None:
    """`cuInit` itself fails where CUDA_VISIBLE_DEVICES names none: no driver is to be installed for that."""
    found = find_gpu(cuda(**given), nvml)
    assert found == NoGpu(reason="the driver shows no GPU", mend="check CUDA_VISIBLE_DEVICES and nvidia-smi")


@pytest.mark.parametrize(("gpus", "words"), [(1, "its GPU"), (8, "any of its 8 GPUs")])
def test_gpus_that_cuda_hides(gpus: int, words: str) -> None:
    found = find_gpu(cuda(fails="cuInit", status=Status.CUDA_ERROR_NO_DEVICE), FakeNvml(gpus=gpus))
    assert found == NoGpu(reason=f"CUDA does not show {words} to this process", mend="check CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_cuda_that_fails(call: str) -> None:
    found = find_gpu(cuda(fails=call, status=Status.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH), FakeNvml())
    assert reason(found) == "the NVIDIA driver cannot be used (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)"


@pytest.mark.parametrize(
    ("error", "word"),
    [("DriverNotLoaded", "not loaded"), ("NoPermission", "permission"), ("LibRmVersionMismatch", "different versions")],
)
def test_nvml_says_why_the_driver_cannot_be_used(error: str, word: str, drivers: set[str]) -> None:
    nvml = FakeNvml(fails="nvmlInit", error=error)
    broken = cuda(fails="cuInit", status=Status.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)
    assert word in reason(find_gpu(broken, nvml))
    drivers.remove("libcuda.so.1")
    assert word in reason(find_gpu(broken, nvml))


def test_no_driver(drivers: set[str]) -> None:
    """Said without an import of either library, which takes its time and would not help."""
    drivers.clear()
    found = find_gpu(unexpected, unexpected)
    assert isinstance(found, NoGpu)
    assert found.reason == "there is no NVIDIA driver"
    assert found.is_usual, "a machine without a GPU is no fault"


def test_a_container_with_the_drivers_tools_and_without_its_cuda(drivers: set[str]) -> None:
    drivers.remove("libcuda.so.1")
    found = find_gpu(unexpected, FakeNvml())
    assert reason(found) == "the NVIDIA driver 580.65.06 is installed without CUDA's library"
    assert reason(find_gpu(unexpected, no_nvml)) == "there is no NVIDIA driver"


def test_no_cuda_core() -> None:
    found = find_gpu(no_cuda, FakeNvml())
    assert found == NoGpu(reason="cuda.core is not installed", mend="pip install 'latentrt[rtx]'")


class BrokenFinder(MetaPathFinder):
    """Fails at the import of `cuda`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "cuda":
            raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'cuda'"), "cuda.core is not installed"),
        (ImportError("cuda.bindings 12.x or 13.x must be installed"), "cuda.core cannot be loaded (cuda.bindings 12.x"),
        (RuntimeError("function cuX is missing"), "cuda.core cannot be loaded (function cuX is missing)"),
    ],
)
def test_a_library_that_cannot_be_imported(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [BrokenFinder(error), *sys.meta_path])
    assert reason(find_gpu(nvml=FakeNvml())).startswith(expected)
    with pytest.raises(BackendError, match=r"cuda\.core .*install") as caught:
        import_cuda()
    assert isinstance(caught.value, MissingExtraError) is isinstance(error, ModuleNotFoundError)


def test_memory_in_use_is_that_of_cudas_first_gpu() -> None:
    nvml = FakeNvml()
    assert gpu_memory_in_use(cuda(), nvml) == 3 << 30
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("libraries", "nvml"),
    [
        (cuda(), no_nvml),
        (cuda(), FakeNvml(fails="nvmlInit", error="LibraryNotFound")),
        (cuda(), FakeNvml(fails="nvmlDeviceGetMemoryInfo", error="NotSupported")),
        (no_cuda, FakeNvml()),
    ],
    ids=["no NVML", "no library", "Jetson", "no CUDA"],
)
def test_memory_in_use_that_nobody_knows(libraries: Any, nvml: Any) -> None:
    assert gpu_memory_in_use(libraries, nvml) is None


@pytest.mark.extras
def test_the_real_libraries_have_the_names_that_are_used() -> None:
    import cuda.core
    import pynvml
    from cuda.bindings import driver

    assert set(CALLS) <= set(dir(driver))
    assert {"CUDA_SUCCESS", "CUDA_ERROR_NO_DEVICE"} <= set(driver.CUresult.__members__)
    assert {"name", "compute_capability", "pci_bus_id"} <= set(dir(cuda.core.Device))
    used = {
        node.attr for node in ast.walk(ast.parse(Path(gpu.__file__).read_text())) if isinstance(node, ast.Attribute)
    }
    calls = {name for name in used if name.startswith("nvml")}
    assert len(calls) == 6
    for name in {*calls, *gpu._DRIVER_PROBLEMS}:
        assert hasattr(pynvml, name)
    assert all(issubclass(getattr(pynvml, name), pynvml.NVMLError) for name in gpu._DRIVER_PROBLEMS)


def test_the_real_driver_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = find_gpu()
    assert isinstance(found, Gpu | NoGpu)
    if isinstance(found, NoGpu):
        assert found.reason in ("there is no NVIDIA driver", "the driver shows no GPU", "cuda.core is not installed")
        assert gpu_memory_in_use() is None
    else:
        assert found.compute_capability.count(".") == 1
        assert found.memory_bytes > 1 << 30


def test_every_extra_for_a_gpu_installs_what_finds_it() -> None:
    """With ONNX Runtime for GPUs alone, `--device auto` ran on the CPU."""
    project = Path(__file__).parents[3] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in ("gpu", "tensorrt", "rtx"):
        packages = {requirement.split(">=")[0] for requirement in extras[name]}
        assert {"cuda-core", "cuda-bindings", "nvidia-ml-py"} <= packages
