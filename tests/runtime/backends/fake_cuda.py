"""A CUDA runtime in the host's memory, with the names of `cuda.bindings.runtime` that latentrt calls.

As on a GPU, work on a stream is deferred until the stream is synchronized, copies must stay inside an allocation, and
work on a stream that is being captured is recorded instead. So errors of order, size and lifetime show here too.
"""

# ruff: noqa: N802, N815 (the names are CUDA's)

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from latentrt.backends.cuda import device_loop

Work = Callable[[], None]


class FakeError(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureInvalidated = 901


class FakeEvent:
    """An event, which comes after `behind` pieces of work of the stream."""

    behind = 0


class FakeCopyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCaptureMode(Enum):
    cudaStreamCaptureModeThreadLocal = 1


class FakeResult(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222


# row.cu as C, one thread after the other.
_HOST = """
#define __global__ static
static struct { int x; } blockIdx, blockDim, threadIdx;
#include "row.cu"
#define EACH_THREAD(call) \\
    blockDim.x = block; \\
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) \\
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) call
void run_model_input(int blocks, int block, float *input, float *timesteps, const Slot *slots, const int *slot_of,
                     int count, int stride, int evaluations)
{ EACH_THREAD(model_input(input, timesteps, slots, slot_of, count, stride, evaluations)); }
void run_advance(int blocks, int block, const Slot *slots, const float *output, int count, int size)
{ EACH_THREAD(advance(slots, output, count, size)); }
void run_next_row(int blocks, int block, const Slot *slots, int size)
{ EACH_THREAD(next_row(slots, size)); }
int run_slot_size(void) { return sizeof(Slot); }
"""


@functools.cache
def host_kernels() -> ctypes.CDLL:
    """Compile the kernels for the host, with products and sums rounded one by one as on the device."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "row.c", Path(folder) / "row.so"
        source.write_text(_HOST)
        include = f"-I{Path(device_loop.__file__).parent}"
        flags = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", include, "-o", str(library)]
        subprocess.run(["cc", *flags, str(source)], check=True)
        return ctypes.CDLL(str(library))


class FakeDriver:
    """A stand-in for `cuda.bindings.driver`: kernels run on the host, launches are deferred like other work."""

    CUresult = FakeResult

    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api

    def cuModuleLoadData(self, ptx: bytes) -> tuple[Any, ...]:
        assert threading.get_ident() in self.api.current
        assert ptx.startswith(b"// of row.cu")
        return (FakeResult.CUDA_SUCCESS, host_kernels())

    def cuModuleGetFunction(self, module: ctypes.CDLL, name: bytes) -> tuple[Any, ...]:
        return (FakeResult.CUDA_SUCCESS, getattr(module, f"run_{name.decode()}"))

    def cuLaunchKernel(self, kernel: Any, *launch: Any) -> tuple[Any, ...]:
        blocks, _, _, block, _, _, shared, stream, (values, types), extra = launch
        assert threading.get_ident() in self.api.current
        assert (shared, stream, extra) == (0, 7, 0)
        for value, kind in zip(values, types, strict=True):
            if kind is ctypes.c_void_p:
                self.api.check_range(value, 1)
        self.api.counts["kernels"] += 1
        arguments = [kind(value) for value, kind in zip(values, types, strict=True)]
        self.api.enqueue(lambda: kernel(blocks, block, *arguments))
        return (FakeResult.CUDA_SUCCESS,)


class FakeCudaApi:
    """A stand-in for `cuda.bindings.runtime`.

    Attributes:
        allocated: buffer by address.
        counts: of calls, by kind.
        limit: memory of the GPU in bytes.
        queue: work on the stream. done: how much work has been executed.
        current: threads in which a context is current, which calls of the driver need.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = FakeError, FakeCopyKind, FakeCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, limit: int = 1 << 30) -> None:
        self.allocated: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.limit, self.queue, self.done = limit, list[Work](), 0
        self.capturing: list[Work] | None = None
        self.counts = dict.fromkeys(("uploads", "downloads", "launches", "captures", "allocations", "kernels"), 0)
        self.driver = FakeDriver(self)
        self.current: set[int] = set()
        self.lock = threading.RLock()  # memory may be freed in any thread, by the garbage collector

    def enqueue(self, work: Work) -> None:
        """Put work on the stream."""
        (self.queue if self.capturing is None else self.capturing).append(work)

    def check_range(self, address: int, size: int) -> None:
        """Fail unless the range lies inside one allocation."""
        inside = (
            start <= address and address + size <= start + len(buffer) for start, buffer in self.allocated.items()
        )
        assert any(inside), f"{size} bytes at {address} were not allocated"

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        assert self.capturing is None, "allocation during a capture"
        if sum(map(len, self.allocated.values())) + size > self.limit:
            return (FakeError.cudaErrorMemoryAllocation, 0)
        buffer = ctypes.create_string_buffer(size)
        self.allocated[ctypes.addressof(buffer)] = buffer
        self.counts["allocations"] += 1
        return (FakeError.cudaSuccess, ctypes.addressof(buffer))

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.cudaStreamSynchronize(7)  # as the real one does
        del self.allocated[address]
        return (FakeError.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(map(len, self.allocated.values()))
        return (FakeError.cudaSuccess, self.limit - used, self.limit)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self.current.add(threading.get_ident())
        return (FakeError.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        return (FakeError.cudaSuccess, 7)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert self.capturing is None, "synchronization during a capture"
        with self.lock:
            self._work_until(self.done + len(self.queue))
        return (FakeError.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: FakeCopyKind, stream: int) -> tuple[Any, ...]:
        up = kind is FakeCopyKind.cudaMemcpyHostToDevice
        self.check_range(target if up else source, size)
        self.counts["uploads" if up else "downloads"] += 1

        def copy() -> None:
            ctypes.memmove(target, source, size)

        self.enqueue(copy)
        return (FakeError.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, height: int, *kind_and_stream: Any
    ) -> tuple[Any, ...]:
        assert kind_and_stream == (FakeCopyKind.cudaMemcpyHostToDevice, 7)
        assert width <= min(pitch, source_pitch)
        self.check_range(target, pitch * (height - 1) + width)
        self.counts["uploads"] += 1

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * pitch, source + row * source_pitch, width)

        self.enqueue(copy)
        return (FakeError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: FakeCaptureMode) -> tuple[Any, ...]:
        self.capturing = []
        return (FakeError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        recorded, self.capturing = self.capturing, None
        self.counts["captures"] += 1
        return (FakeError.cudaSuccess, recorded)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, ...]:
        return (FakeError.cudaSuccess, list(graph))

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        graph.clear()
        return (FakeError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        graph.clear()
        return (FakeError.cudaSuccess,)

    def cudaGraphLaunch(self, graph: list[Work], stream: int) -> tuple[Any, ...]:
        self.counts["launches"] += 1
        for work in graph:
            self.enqueue(work)
        return (FakeError.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return (FakeError.cudaSuccess, FakeEvent())

    def cudaEventRecord(self, event: FakeEvent, stream: int) -> tuple[Any, ...]:
        assert self.capturing is None
        with self.lock:
            event.behind = self.done + len(self.queue)
        return (FakeError.cudaSuccess,)

    def cudaEventSynchronize(self, event: FakeEvent) -> tuple[Any, ...]:
        assert self.capturing is None, "synchronization during a capture"
        self._work_until(event.behind)
        return (FakeError.cudaSuccess,)

    def _work_until(self, done: int) -> None:
        with self.lock:
            while self.done < done:
                self.queue.pop(0)()
                self.done += 1

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (FakeError.cudaSuccess,)
