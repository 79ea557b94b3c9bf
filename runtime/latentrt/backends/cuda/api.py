"""Device memory, streams, graphs and kernels through CUDA's own Python bindings, without torch.

`Cuda` wraps `cuda.bindings.runtime` and `cuda.bindings.driver`, whose calls return their status first. Sizes are bytes,
addresses are integers.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from typing import Any

from numpy.typing import NDArray

from latentrt.errors import BackendError, MissingExtraError

__all__ = ["Cuda", "DeviceBuffer", "load_cuda"]

_BLOCK = 256  # threads


def load_cuda() -> Cuda:
    """Load the bindings of the CUDA runtime and of the driver.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise MissingExtraError("cuda.bindings", "rtx", "use a GPU") from error
    return Cuda(runtime, driver)


class Cuda:
    """The CUDA calls that engines and the device-resident loop need.

    Args:
        api: `cuda.bindings.runtime`, or a stand-in.
        driver: `cuda.bindings.driver`, which loads and launches kernels, or a stand-in.

    Every method raises BackendError where the call fails; the message has CUDA's own name of the error.
    """

    def __init__(self, api: Any, driver: Any) -> None:
        self.api, self.driver = api, driver

    def allocate(self, size: int) -> int:
        """Allocate device memory and return its address."""
        return int(self._value(self.api.cudaMalloc(size), f"allocating {size:,} bytes of the GPU's memory"))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._value(self.api.cudaFree(address), "freeing memory")

    def memory(self) -> tuple[int, int]:
        """Return the GPU's free memory and its total memory, in bytes."""
        free, total = self._values(self.api.cudaMemGetInfo(), "querying the free memory")
        return int(free), int(total)

    def make_stream(self) -> int:
        """Create a stream; return its handle as an integer, which other libraries accept."""
        # A stream that does not wait for the default one: a capture would keep other libraries from using that.
        flags = self.api.cudaStreamNonBlocking
        return int(self._value(self.api.cudaStreamCreateWithFlags(flags), "creating a stream"))

    def synchronize(self, stream: int) -> None:
        """Wait for all work on a stream."""
        self._value(self.api.cudaStreamSynchronize(stream), "synchronizing a stream")

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device. Keep the array until the stream has been synchronized."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self.api.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream)
        self._value(copied, "copying to the GPU")

    def upload_rows(self, address: int, pitch: int, array: NDArray[Any], stream: int) -> None:
        """Copy each `array[i]` of a contiguous array to `address + i * pitch`, as `upload` does."""
        kind, width = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice, array[0].nbytes
        copied = self.api.cudaMemcpy2DAsync(address, pitch, array.ctypes.data, width, width, len(array), kind, stream)
        self._value(copied, "copying to the GPU")

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy from the device into a contiguous array, which is valid once the stream has been synchronized."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self.api.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream)
        self._value(copied, "copying from the GPU")

    def begin_capture(self, stream: int) -> None:
        """Record the following work on a stream instead of executing it."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._value(self.api.cudaStreamBeginCapture(stream, mode), "beginning a CUDA graph")

    def end_capture(self, stream: int) -> Any:
        """Return the recorded work as a graph that can be launched."""
        graph = self._value(self.api.cudaStreamEndCapture(stream), "ending a CUDA graph")
        try:
            return self._value(self.api.cudaGraphInstantiate(graph, 0), "instantiating a CUDA graph")
        finally:
            self.api.cudaGraphDestroy(graph)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Put a recorded graph on a stream."""
        self._value(self.api.cudaGraphLaunch(graph, stream), "launching a CUDA graph")

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a recorded graph."""
        self._value(self.api.cudaGraphExecDestroy(graph), "destroying a CUDA graph")

    def make_event(self) -> Any:
        """Create an event."""
        return self._value(self.api.cudaEventCreate(), "creating an event")

    def record(self, event: Any, stream: int) -> None:
        """Record an event behind all work on a stream."""
        self._value(self.api.cudaEventRecord(event, stream), "recording an event")

    def wait(self, event: Any) -> None:
        """Wait until the stream has reached an event. An event that was never recorded does not wait."""
        self._value(self.api.cudaEventSynchronize(event), "waiting for an event")

    def load_kernels(self, ptx: bytes, *names: str) -> tuple[Any, ...]:
        """Compile PTX for this GPU and return the named kernels."""
        self._make_current()
        module = self._driver_value(self.driver.cuModuleLoadData(ptx), "loading kernels")
        return tuple(
            self._driver_value(self.driver.cuModuleGetFunction(module, name.encode()), f"finding the kernel {name}")
            for name in names
        )

    def launch_kernel(
        self, kernel: Any, threads: int, stream: int, addresses: tuple[int, ...], numbers: tuple[int, ...]
    ) -> None:
        """Put a kernel on a stream, with at least `threads` threads. Its parameters are pointers, then C ints."""
        self._make_current()
        types = (*[ctypes.c_void_p] * len(addresses), *[ctypes.c_int] * len(numbers))
        blocks = -(-threads // _BLOCK)
        arguments = ((*addresses, *numbers), types)
        launched = self.driver.cuLaunchKernel(kernel, blocks, 1, 1, _BLOCK, 1, 1, 0, stream, arguments, 0)
        self._driver_value(launched, "launching a kernel")

    def _make_current(self) -> None:
        """Make the runtime's context current in this thread, as calls of the driver need one."""
        self._value(self.api.cudaSetDevice(0), "selecting the GPU")

    def _driver_value(self, result: Any, action: str) -> Any:
        status, *values = result
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"CUDA failed at {action}: {getattr(status, 'name', status)}")
        return values[0] if values else None

    def _value(self, result: Any, action: str) -> Any:
        values = self._values(result, action)
        return values[0] if values else None

    def _values(self, result: Any, action: str) -> tuple[Any, ...]:
        status, *values = result
        if status != self.api.cudaError_t.cudaSuccess:
            self.api.cudaGetLastError()  # or the next call would report it again
            raise BackendError(f"CUDA failed at {action}: {getattr(status, 'name', status)}")
        return tuple(values)


class DeviceBuffer:
    """Device memory that grows and never shrinks.

    Attributes:
        address: 0 while the buffer is empty. It changes when the buffer grows.
        size: in bytes.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.address, self.size = cuda, 0, 0

    def reserve(self, size: int) -> bool:
        """Hold at least `size` bytes. Return whether the memory was replaced; its contents are lost then."""
        if size <= self.size:
            return False
        self.close()
        self.address, self.size = self._cuda.allocate(size), size
        self._finalizer = weakref.finalize(self, _free, self._cuda, self.address)
        self._finalizer.atexit = False  # memory ends with the process
        return True

    def close(self) -> None:
        """Free the memory."""
        if self.address:
            self.address, self.size = 0, 0
            self._finalizer()


def _free(cuda: Cuda, address: int) -> None:
    # After a failure of CUDA nothing can be freed any more.
    with contextlib.suppress(BackendError):
        cuda.free(address)
