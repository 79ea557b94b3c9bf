"""CUDA in the host's memory, with the names of `cuda.core` and `cuda.bindings.driver` that latentrt uses.

As on a GPU, work on a stream is deferred until the stream is synchronized, copies must stay inside an allocation, and
work on a stream that is being captured is recorded instead. Calls need a current context in their thread, and kernels
are compiled when they are first needed. So errors of order, size and lifetime show here too.
"""

# ruff: noqa: N802 (the names are CUDA's)

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from latentrt.backends.cuda import device_loop
from latentrt.backends.cuda.api import Cuda

Work = Callable[[], None]
HANDLE = 7  # of the stream


class FakeCudaError(Exception):
    """As cuda.core raises it: the message begins with CUDA's name of the error."""


class MisuseError(BaseException):
    """A call that breaks a rule of CUDA. No Exception, as latentrt turns those into its own and may go on without."""


def require(condition: bool, rule: str) -> None:
    """Fail unless a rule is kept."""
    if not condition:
        raise MisuseError(rule)


class FakeResult(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class FakeCaptureMode(Enum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


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


@dataclass(frozen=True, kw_only=True)
class FakeStreamOptions:
    nonblocking: bool


class FakeEvent:
    """An event, which comes after `behind` pieces of work of the stream."""

    def __init__(self, api: FakeCudaApi) -> None:
        self.api, self.behind = api, 0

    def sync(self) -> None:
        require(self.api.capturing is None, "synchronization during a capture")
        self.api.work_until(self.behind)


class FakeStream:
    handle = HANDLE

    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api

    def sync(self) -> None:
        self.api.synchronize()

    def record(self, event: FakeEvent) -> FakeEvent:
        require(self.api.capturing is None, "a capture is under way")
        with self.api.lock:
            event.behind = self.api.done + len(self.api.queue)
        return event


class FakeDevice:
    """A device as one thread sees it."""

    def __init__(self, api: FakeCudaApi, thread: int) -> None:
        self.api, self.thread = api, thread

    def set_current(self) -> None:
        require(threading.get_ident() == self.thread, "devices belong to a thread")
        self.api.current.add(self.thread)

    def create_stream(self, *, options: FakeStreamOptions) -> FakeStream:
        self.api.check_current()
        require(options.nonblocking, "the stream waits for the default one")
        return FakeStream(self.api)

    def create_event(self) -> FakeEvent:
        self.api.check_current()
        return FakeEvent(self.api)


class FakeMemoryResource:
    """The base class of memory resources."""


class FakeBuffer:
    """A buffer that belongs to a memory resource, to an array, or to nobody: a view."""

    def __init__(
        self, api: FakeCudaApi, handle: int, size: int, mr: Any, owner: Any, stream: FakeStream | None
    ) -> None:
        self.api, self.handle, self.size, self.owner, self._memory, self._stream = api, handle, size, owner, mr, stream

    def copy_from(self, src: FakeBuffer, *, stream: FakeStream) -> None:
        self.api.check_current()
        require((self.size, stream.api) == (src.size, self.api), "buffers of two sizes, or another GPU's stream")
        up = self.owner is None
        require(up is not (src.owner is None), "between the host's memory and the device's")
        host, device = (src, self) if up else (self, src)
        require(
            (host.handle, host.size) == (host.owner.ctypes.data, host.owner.nbytes), "more than the array was copied"
        )
        require(host.owner.flags.c_contiguous, "the array is not contiguous")
        require(up or host.owner.flags.writeable, "the array is read-only")
        self.api.check_range(device.handle, device.size)
        self.api.counts["uploads" if up else "downloads"] += 1
        target, source, size = self.handle, src.handle, self.size

        def copy() -> None:
            ctypes.memmove(target, source, size)

        self.api.enqueue(copy)

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.deallocate(self.handle, self.size, stream=self._stream)

    def __del__(self) -> None:
        self.close()


class FakeBuffers:
    """The class `Buffer` of one fake CUDA."""

    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api

    def from_handle(
        self, ptr: int, size: int, mr: Any = None, owner: Any = None, *, stream: FakeStream | None = None
    ) -> FakeBuffer:
        # Without a stream, the legacy default stream would order the release.
        require((mr is None) is (stream is None), "only owned memory has a stream, and it needs one")
        require(mr is None or owner is None, "memory has one owner")
        require(size > 0, "an empty buffer")
        return FakeBuffer(self.api, ptr, size, mr, owner, stream)


class FakeKernel:
    """A kernel, which is compiled when it is first needed."""

    def __init__(self, api: FakeCudaApi, name: str) -> None:
        self.api, self.name, self.occupancy = api, name, FakeOccupancy(self)
        self._compiled: Any = None

    def compile(self) -> Any:
        self.api.check_current()
        if self._compiled is None:
            require(self.api.capturing is None, "a kernel was compiled during a capture")
            self._compiled = getattr(host_kernels(), f"run_{self.name}")
        return self._compiled


class FakeOccupancy:
    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel

    def max_active_blocks_per_multiprocessor(self, block_size: int, dynamic_shared_memory_size: int) -> int:
        require((block_size, dynamic_shared_memory_size) == (256, 0), "another block than the launch")
        self._kernel.compile()
        return 6


class FakeObjectCode:
    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api

    def from_ptx(self, module: bytes) -> FakeObjectCode:
        require(module.startswith(b"// of row.cu"), "other code")
        return self

    def get_kernel(self, name: str) -> FakeKernel:
        self.api.check_current()
        return FakeKernel(self.api, name)


@dataclass(frozen=True, kw_only=True)
class FakeLaunchConfig:
    grid: int
    block: int


class FakeCore:
    """A stand-in for `cuda.core`: kernels run on the host, launches are deferred like other work."""

    StreamOptions, LaunchConfig, MemoryResource = FakeStreamOptions, FakeLaunchConfig, FakeMemoryResource

    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api
        self.Buffer, self.ObjectCode = FakeBuffers(api), FakeObjectCode(api)

    def Device(self, device_id: int) -> FakeDevice:
        require(device_id == 0, "another device")
        return FakeDevice(self.api, threading.get_ident())

    def launch(self, stream: FakeStream, config: FakeLaunchConfig, kernel: FakeKernel, *kernel_args: Any) -> None:
        self.api.check_current()
        require(stream.api is self.api, "another GPU's stream")
        # As cuda.core passes arguments: an integer is a pointer, a C integer has its own size.
        arguments = [ctypes.c_void_p(value) if type(value) is int else value for value in kernel_args]
        for argument in arguments:
            if isinstance(argument, ctypes.c_void_p):
                self.api.check_range(argument.value or 0, 1)
            else:
                require(isinstance(argument, ctypes.c_int), "an argument of another type")
        self.api.counts["kernels"] += 1
        compiled = kernel.compile()
        self.api.enqueue(lambda: compiled(config.grid, config.block, *arguments))


class FakeDriver:
    """A stand-in for `cuda.bindings.driver`, whose calls return their status first."""

    CUresult, CUstreamCaptureMode = FakeResult, FakeCaptureMode

    def __init__(self, api: FakeCudaApi) -> None:
        self.api = api

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        self.api.check_current()
        require(self.api.capturing is None, "allocation during a capture")
        if sum(map(len, self.api.allocated.values())) + size > self.api.limit:
            return (FakeResult.CUDA_ERROR_OUT_OF_MEMORY, 0)
        buffer = ctypes.create_string_buffer(size)
        self.api.allocated[ctypes.addressof(buffer)] = buffer
        self.api.counts["allocations"] += 1
        return (FakeResult.CUDA_SUCCESS, ctypes.addressof(buffer))

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        self.api.check_current()
        self.api.synchronize()  # as the real one does
        del self.api.allocated[address]
        return (FakeResult.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: int, mode: FakeCaptureMode) -> tuple[Any, ...]:
        require(
            (stream, mode) == (HANDLE, FakeCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "another stream or mode"
        )
        require(self.api.capturing is None, "a capture is under way")
        self.api.capturing = []
        return (FakeResult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        require(stream == HANDLE, "another stream")
        recorded, self.api.capturing = self.api.capturing, None
        self.api.counts["captures"] += 1
        return (FakeResult.CUDA_SUCCESS, recorded)

    def cuGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, ...]:
        require(flags == 0, "flags")
        return (FakeResult.CUDA_SUCCESS, list(graph))

    def cuGraphDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        graph.clear()
        return (FakeResult.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        graph.clear()
        return (FakeResult.CUDA_SUCCESS,)

    def cuGraphLaunch(self, graph: list[Work], stream: int) -> tuple[Any, ...]:
        self.api.check_current()
        require(stream == HANDLE, "another stream")
        self.api.counts["launches"] += 1
        for work in graph:
            self.api.enqueue(work)
        return (FakeResult.CUDA_SUCCESS,)


class FakeCudaApi:
    """A GPU with one stream, and the two libraries that use it.

    Attributes:
        core: in place of `cuda.core`. driver: in place of `cuda.bindings.driver`. cuda: latentrt's own class over both.
        allocated: buffer by address.
        counts: of calls, by kind.
        limit: memory of the GPU in bytes.
        queue: work on the stream. done: how much work has been executed.
        current: threads in which a context is current, which calls of the driver need.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.allocated: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.limit, self.queue, self.done = limit, list[Work](), 0
        self.capturing: list[Work] | None = None
        self.counts = dict.fromkeys(("uploads", "downloads", "launches", "captures", "allocations", "kernels"), 0)
        self.current: set[int] = set()
        self.lock = threading.RLock()  # memory may be freed in any thread, by the garbage collector
        self.core, self.driver = FakeCore(self), FakeDriver(self)
        self.cuda = Cuda(self.core, self.driver)

    def enqueue(self, work: Work) -> None:
        """Put work on the stream."""
        (self.queue if self.capturing is None else self.capturing).append(work)

    def check_current(self) -> None:
        """Fail unless a context is current in this thread."""
        require(threading.get_ident() in self.current, "no context is current")

    def check_range(self, address: int, size: int) -> None:
        """Fail unless the range lies inside one allocation."""
        inside = (
            start <= address and address + size <= start + len(buffer) for start, buffer in self.allocated.items()
        )
        require(any(inside), f"{size} bytes at {address} were not allocated")

    def synchronize(self) -> None:
        """Execute all work on the stream."""
        require(self.capturing is None, "synchronization during a capture")
        with self.lock:
            self.work_until(self.done + len(self.queue))

    def work_until(self, done: int) -> None:
        """Execute work until so many pieces of it are done."""
        with self.lock:
            while self.done < done:
                self.queue.pop(0)()
                self.done += 1
