"""The stand-ins for CUDA and TensorRT have names that the real ones have."""

from __future__ import annotations

import pytest

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


def test_the_stand_in_for_cuda_has_names_of_the_real_bindings() -> None:
    from cuda.bindings import runtime

    own = {"enqueue", "check_range"}
    assert public(FakeCudaApi) - own <= set(dir(runtime))
    for enum in (fake_cuda.FakeError, fake_cuda.FakeCopyKind, fake_cuda.FakeCaptureMode):
        real = {fake_cuda.FakeError: "cudaError_t", fake_cuda.FakeCopyKind: "cudaMemcpyKind"}
        members = getattr(runtime, real.get(enum, "cudaStreamCaptureMode")).__members__
        assert {member.name for member in enum} <= set(members)
