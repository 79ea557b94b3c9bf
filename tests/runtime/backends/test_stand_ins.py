"""The stand-ins for CUDA and TensorRT have names that the real ones have."""

from __future__ import annotations

import gc
import importlib
import inspect
import operator
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.backends.cuda.api import Cuda, DeviceBuffer, load_cuda
from latentrt.errors import BackendError
from tests.runtime.backends import fake_cuda, fake_tensorrt
from tests.runtime.backends.fake_cuda import FakeCudaApi

pytestmark = pytest.mark.extras


def public(fake: type) -> set[str]:
    return {name for name in vars(fake) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_tensorrt.FakeRuntime, "Runtime"),
        (fake_tensorrt.FakeEngine, "ICudaEngine"),
        (fake_tensorrt.FakeContext, "IExecutionContext"),
        (fake_tensorrt.FakeRuntimeConfig, "IRuntimeConfig"),
        (fake_tensorrt.FakeRuntimeCache, "IRuntimeCache"),
        (fake_tensorrt.FakeModule.ExecutionContextAllocationStrategy, "ExecutionContextAllocationStrategy"),
        (fake_tensorrt.FakeModule.CudaGraphStrategy, "CudaGraphStrategy"),
    ],
)
def test_the_stand_ins_have_names_of_the_real_library(fake: type, real: str) -> None:
    import tensorrt_rtx

    assert public(fake) <= set(dir(getattr(tensorrt_rtx, real)))


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
# By class of the stand-in, the real one in `cuda.core`.
CORE = {
    fake_cuda.FakeDevice: "Device",
    fake_cuda.FakeStream: "Stream",
    fake_cuda.FakeEvent: "Event",
    fake_cuda.FakeBuffer: "Buffer",
    fake_cuda.FakeBuffers: "Buffer",
    fake_cuda.FakeObjectCode: "ObjectCode",
    fake_cuda.FakeKernel: "Kernel",
    fake_cuda.FakeOccupancy: "_module.KernelOccupancy",
}


def cuda_core() -> Any:
    return importlib.import_module("cuda.core")


@pytest.mark.parametrize("fake", CORE, ids=lambda fake: fake.__name__)
def test_calls_of_the_stand_in_for_cuda_core_fit_the_real_ones(fake: type) -> None:
    real = operator.attrgetter(CORE[fake])(cuda_core())
    for name in public(fake) - {"compile"}:
        call = getattr(fake, name)
        if not callable(call):
            assert hasattr(real, name)
            continue
        parameters = dict(inspect.signature(getattr(real, name)).parameters)
        mine = dict(inspect.signature(call).parameters)
        assert mine.pop("self", None) is not None
        parameters.pop("self", None)  # static methods have none
        positional = [each for each in mine if mine[each].kind is _EITHER]
        assert positional == list(parameters)[: len(positional)], name
        for each in mine.keys() - set(positional):
            assert parameters[each].kind in (inspect.Parameter.KEYWORD_ONLY, _EITHER), name
        required = {name for name, each in parameters.items() if each.default is each.empty}
        assert required <= mine.keys(), name


def test_options_and_launches_of_the_stand_in_fit_the_real_ones() -> None:
    core = cuda_core()
    assert public(fake_cuda.FakeCore) <= set(dir(core))
    assert core.StreamOptions(nonblocking=True).nonblocking
    config = core.LaunchConfig(grid=3, block=256)
    assert (config.grid, config.block) == ((3, 1, 1), (256, 1, 1))
    launch, mine = (list(inspect.signature(call).parameters) for call in (core.launch, fake_cuda.FakeCore.launch))
    assert mine[1:] == launch
    assert isinstance(int(core.Stream.from_handle(fake_cuda.HANDLE).handle), int)


def test_the_stand_in_for_the_bindings_has_names_of_the_real_ones() -> None:
    from cuda.bindings import driver

    assert public(fake_cuda.FakeDriver) <= set(dir(driver))
    assert {member.name for member in fake_cuda.FakeResult} <= set(driver.CUresult.__members__)
    assert {member.name for member in fake_cuda.FakeCaptureMode} <= set(driver.CUstreamCaptureMode.__members__)


def test_memory_belongs_to_the_real_buffer() -> None:
    """cuda.core's own buffer over the stand-in's driver: freed once, when closed or unreferenced."""
    api, core = FakeCudaApi(), cuda_core()
    stream = core.Stream.from_handle(fake_cuda.HANDLE)
    mixed = SimpleNamespace(MemoryResource=core.MemoryResource, Buffer=core.Buffer, Device=api.core.Device)
    cuda = Cuda(mixed, api.driver)
    closed, dropped = (DeviceBuffer(cuda, stream) for _ in range(2))
    for buffer in (closed, dropped):
        assert buffer.reserve(100)
        assert buffer.reserve(200)
        assert buffer.address in api.allocated
    assert sorted(map(len, api.allocated.values())) == [200, 200]
    closed.close()
    closed.close()
    assert (closed.address, len(api.allocated)) == (0, 1)
    del buffer, dropped
    gc.collect()
    assert api.allocated == {}
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        DeviceBuffer(cuda, stream).reserve(1 << 40)


def test_the_real_library_without_a_driver_is_a_backend_error() -> None:
    from latentrt.engines.gpu import NoGpu, find_gpu

    if not isinstance(find_gpu(), NoGpu):
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="CUDA failed at creating a stream: "):
        load_cuda().make_stream()
