"""Device memory, streams, events, kernels and graphs without torch, through cuda.core.

cuda.core's objects own what they stand for: a stream, an event, a buffer or a kernel is released with its last
reference. What it cannot do as needed here stays on `cuda.bindings.driver`, whose calls return their status first:

- allocation, in a memory resource of our own: cuda.core's keeps freed memory in a pool of this process, where neither
  TensorRT, which allocates its own, nor another process gets it;
- recording: up to cuda.core 1.2, a `GraphBuilder` whose recording became invalid raises before it ends that, and the
  process crashes when it is released (NVIDIA/cuda-python, issue 2834). An engine that cannot be recorded is ordinary.

Sizes are bytes, addresses are integers.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from latentrt.engines.gpu import FIRST_DEVICE, driver_value, import_cuda
from latentrt.errors import BackendError

__all__ = ["Cuda", "DeviceBuffer", "load_cuda"]

_BLOCK = 256  # threads


def load_cuda() -> Cuda:
    """Load cuda.core and the driver's bindings under it.

    Raises:
        MissingExtraError: they are not installed.
    """
    return Cuda(*import_cuda())


class Cuda:
    """The CUDA calls that engines and the device-resident loop need, on the first GPU that CUDA shows this process.

    Args:
        core: `cuda.core`, or a stand-in.
        driver: `cuda.bindings.driver`, or a stand-in.

    Every method raises BackendError where the call fails; the message has CUDA's own name of the error. Streams, events
    and kernels are objects of cuda.core.
    """

    def __init__(self, core: Any, driver: Any) -> None:
        self._core, self._driver = core, driver
        self._memory = _make_memory_resource(core, driver)

    def allocate(self, size: int, stream: Any) -> Any:
        """Allocate device memory; return a buffer of cuda.core, which frees it when it is closed or unreferenced.

        Args:
            stream: on which the memory is used.
        """
        with self._calling(f"allocating {size:,} bytes of the GPU's memory"):
            return self._memory.allocate(size, stream=stream)

    def make_stream(self) -> Any:
        """Create a stream. Other libraries accept its handle: `int(stream.handle)`."""
        # One that does not wait for the default stream: a capture would keep other libraries from using that.
        options = self._core.StreamOptions(nonblocking=True)
        with self._calling("creating a stream") as device:
            return device.create_stream(options=options)

    def synchronize(self, stream: Any) -> None:
        """Wait for all work on a stream."""
        with self._calling("synchronizing a stream"):
            stream.sync()

    def upload(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Copy a contiguous array to the device. Keep the array until the stream has been synchronized."""
        with self._calling("copying to the GPU"):
            self._view(address, array.nbytes).copy_from(self._host(array), stream=stream)

    def upload_rows(self, address: int, pitch: int, array: NDArray[Any], stream: Any) -> None:
        """Copy each `array[i]` of a contiguous array to `address + i * pitch`, as `upload` does."""
        # One by one, as cuda.core copies no pitched memory; rows are as many as a batch has images.
        for index, row in enumerate(array):
            self.upload(address + index * pitch, row, stream)

    def download(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Copy from the device into a contiguous array, which is valid once the stream has been synchronized."""
        with self._calling("copying from the GPU"):
            self._host(array).copy_from(self._view(address, array.nbytes), stream=stream)

    def begin_capture(self, stream: Any) -> None:
        """Record the following work on a stream instead of executing it."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self._calling("beginning a CUDA graph"):
            self._value(self._driver.cuStreamBeginCapture(stream.handle, mode))

    def end_capture(self, stream: Any) -> Any:
        """Return the recorded work as a graph that can be launched."""
        with self._calling("ending a CUDA graph"):
            graph = self._value(self._driver.cuStreamEndCapture(stream.handle))
        try:
            with self._calling("instantiating a CUDA graph"):
                return self._value(self._driver.cuGraphInstantiate(graph, 0))
        finally:
            self._driver.cuGraphDestroy(graph)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Put a recorded graph on a stream."""
        with self._calling("launching a CUDA graph"):
            self._value(self._driver.cuGraphLaunch(graph, stream.handle))

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a recorded graph."""
        with self._calling("destroying a CUDA graph"):
            self._value(self._driver.cuGraphExecDestroy(graph))

    def make_event(self) -> Any:
        """Create an event."""
        with self._calling("creating an event") as device:
            return device.create_event()

    def record(self, event: Any, stream: Any) -> None:
        """Record an event behind all work on a stream."""
        with self._calling("recording an event"):
            stream.record(event)

    def wait(self, event: Any) -> None:
        """Wait until the stream has reached an event. An event that was never recorded does not wait."""
        with self._calling("waiting for an event"):
            event.sync()

    def load_kernels(self, ptx: bytes, *names: str) -> tuple[Any, ...]:
        """Compile PTX for this GPU and return the named kernels."""
        with self._calling("loading kernels"):
            code = self._core.ObjectCode.from_ptx(ptx)
            kernels = tuple(code.get_kernel(name) for name in names)
            for kernel in kernels:
                # Needs the compiled kernel. By default CUDA compiles at the first launch, which is too late to do
                # without the kernels.
                kernel.occupancy.max_active_blocks_per_multiprocessor(_BLOCK, 0)
            return kernels

    def launch_kernel(
        self, kernel: Any, threads: int, stream: Any, addresses: tuple[int, ...], numbers: tuple[int, ...]
    ) -> None:
        """Put a kernel on a stream, with at least `threads` threads. Its parameters are pointers, then C ints."""
        config = self._core.LaunchConfig(grid=-(-threads // _BLOCK), block=_BLOCK)
        with self._calling("launching a kernel"):
            # cuda.core passes Python's integers as pointers.
            self._core.launch(stream, config, kernel, *addresses, *map(ctypes.c_int, numbers))

    @contextlib.contextmanager
    def _calling(self, action: str) -> Iterator[Any]:
        """Make the GPU current in this thread, as calls of the driver need it, and translate errors within the block.

        It stays current, also in a program that used another one in this thread.

        Returns:
            The GPU, a device of cuda.core, which belongs to this thread.

        Raises:
            BackendError: a call failed.
        """
        try:
            device = self._core.Device(FIRST_DEVICE)
            device.set_current()
            yield device
        except Exception as error:  # cuda.core's own error has no public class
            raise BackendError(f"CUDA failed at {action}: {error}") from error

    def _host(self, array: NDArray[Any]) -> Any:
        """Return a contiguous array as a buffer."""
        return self._core.Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)

    def _view(self, address: int, size: int) -> Any:
        """Return a part of allocated device memory as a buffer that does not own it."""
        return self._core.Buffer.from_handle(address, size)

    def _value(self, result: tuple[Any, ...]) -> Any:
        return driver_value(self._driver, result)


def _make_memory_resource(core: Any, driver: Any) -> Any:
    """Return a memory resource that allocates from the driver and gives memory back to it at once."""
    base: Any = core.MemoryResource

    class DriverMemory(base):  # type: ignore[misc]  # the library is imported here at the earliest
        is_device_accessible, is_host_accessible, is_managed, device_id = True, False, False, FIRST_DEVICE

        def allocate(self, size: int, *, stream: Any) -> Any:
            address = int(driver_value(driver, driver.cuMemAlloc(size)))
            return core.Buffer.from_handle(address, size, mr=self, stream=stream)

        def deallocate(self, ptr: int, size: int, *, stream: Any) -> None:
            # In any thread, as the garbage collector may call it. After a failure of CUDA nothing can be freed.
            with contextlib.suppress(Exception):
                core.Device(FIRST_DEVICE).set_current()
                driver.cuMemFree(ptr)  # waits for work that uses the memory

    return DriverMemory()


class DeviceBuffer:
    """Device memory that grows and never shrinks; freed with its last reference.

    Args:
        stream: on which the memory is used.

    Attributes:
        address: 0 while the buffer is empty. It changes when the buffer grows.
        size: in bytes.
    """

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self._cuda, self._stream, self.address, self.size = cuda, stream, 0, 0
        self._memory: Any = None

    def reserve(self, size: int) -> bool:
        """Hold at least `size` bytes. Return whether the memory was replaced; its contents are lost then."""
        if size <= self.size:
            return False
        self.close()
        self._memory = self._cuda.allocate(size, self._stream)
        self.address, self.size = int(self._memory.handle), size
        return True

    def close(self) -> None:
        """Free the memory."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            self.address, self.size = 0, 0
            memory.close()
