"""Device memory, streams and graphs through CUDA's own Python bindings: no torch.

One thin face over `cuda.bindings.runtime`, whose every call returns its status first. Sizes are bytes, addresses are
integers.
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
    """The bindings of the CUDA runtime and of the driver.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise MissingExtraError("cuda.bindings", "rtx", "use a GPU") from error
    return Cuda(runtime, driver)


class Cuda:
    """The calls that running an engine takes.

    Args:
        api: `cuda.bindings.runtime`, or what a test puts in its place.
        driver: `cuda.bindings.driver`, which loads kernels and launches them.

    Every method raises BackendError where the call fails; the message is CUDA's own name of what went wrong.
    """

    def __init__(self, api: Any, driver: Any) -> None:
        self.api, self.driver = api, driver

    def allocate(self, size: int) -> int:
        """Device memory; its address."""
        return int(self._ask(self.api.cudaMalloc(size), f"{size:,} bytes of the GPU's memory"))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._ask(self.api.cudaFree(address), "giving memory back")

    def memory(self) -> tuple[int, int]:
        """The GPU's free memory, and all of it."""
        free, total = self._answers(self.api.cudaMemGetInfo(), "asking for the free memory")
        return int(free), int(total)

    def make_stream(self) -> int:
        """A stream, as the number that other libraries take."""
        # One that does not wait for the default stream: recording a run would keep other libraries from using that.
        flags = self.api.cudaStreamNonBlocking
        return int(self._ask(self.api.cudaStreamCreateWithFlags(flags), "making a stream"))

    def synchronize(self, stream: int) -> None:
        """Wait for everything that was put on a stream."""
        self._ask(self.api.cudaStreamSynchronize(stream), "running")

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device. The array has to stay until the stream is synchronised."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._ask(
            self.api.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream), "copying to the GPU"
        )

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy from the device into a contiguous array, which has its contents once the stream is synchronised."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost", stream)

    def begin_capture(self, stream: int) -> None:
        """From here on, work on the stream is recorded, not done."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._ask(self.api.cudaStreamBeginCapture(stream, mode), "beginning a CUDA graph")

    def end_capture(self, stream: int) -> Any:
        """What was recorded, ready to be launched."""
        graph = self._ask(self.api.cudaStreamEndCapture(stream), "ending a CUDA graph")
        try:
            return self._ask(self.api.cudaGraphInstantiate(graph, 0), "making a CUDA graph")
        finally:
            self.api.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Do what a graph recorded."""
        self._ask(self.api.cudaGraphLaunch(graph, stream), "launching a CUDA graph")

    def destroy_graph(self, graph: Any) -> None:
        """Give a graph back."""
        self._ask(self.api.cudaGraphExecDestroy(graph), "giving a CUDA graph back")

    def make_event(self) -> Any:
        """A mark that can be put on a stream and waited for."""
        return self._ask(self.api.cudaEventCreate(), "making an event")

    def record(self, event: Any, stream: int) -> None:
        """Put the mark behind all that is on the stream."""
        self._ask(self.api.cudaEventRecord(event, stream), "recording an event")

    def wait(self, event: Any) -> None:
        """Wait until the stream has come to the mark."""
        self._ask(self.api.cudaEventSynchronize(event), "running")

    def load_kernels(self, ptx: bytes, *names: str) -> tuple[Any, ...]:
        """The kernels of a PTX text, compiled by the driver for its GPU."""
        self._use_device()
        module = self._ask_driver(self.driver.cuModuleLoadData(ptx), "loading kernels")
        return tuple(
            self._ask_driver(self.driver.cuModuleGetFunction(module, name.encode()), f"finding the kernel {name}")
            for name in names
        )

    def start(
        self, kernel: Any, threads: int, stream: int, addresses: tuple[int, ...], numbers: tuple[int, ...]
    ) -> None:
        """Put a kernel on a stream, with at least so many threads. It takes pointers first, then C ints."""
        self._use_device()
        types = (*[ctypes.c_void_p] * len(addresses), *[ctypes.c_int] * len(numbers))
        blocks = -(-threads // _BLOCK)
        arguments = ((*addresses, *numbers), types)
        launched = self.driver.cuLaunchKernel(kernel, blocks, 1, 1, _BLOCK, 1, 1, 0, stream, arguments, 0)
        self._ask_driver(launched, "starting a kernel")

    def _use_device(self) -> None:
        """The driver's own calls need the context that the runtime's make current, in whichever thread this is."""
        self._ask(self.api.cudaSetDevice(0), "choosing the GPU")

    def _ask_driver(self, answer: Any, doing: str) -> Any:
        status, *values = answer
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"CUDA failed at {doing}: {getattr(status, 'name', status)}")
        return values[0] if values else None

    def _copy(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        direction = getattr(self.api.cudaMemcpyKind, kind)
        self._ask(self.api.cudaMemcpyAsync(target, source, size, direction, stream), f"copying ({kind})")

    def _ask(self, answer: Any, doing: str) -> Any:
        values = self._answers(answer, doing)
        return values[0] if values else None

    def _answers(self, answer: Any, doing: str) -> tuple[Any, ...]:
        status, *values = answer
        if status != self.api.cudaError_t.cudaSuccess:
            self.api.cudaGetLastError()  # or the next call would report it again
            raise BackendError(f"CUDA failed at {doing}: {getattr(status, 'name', status)}")
        return tuple(values)


class DeviceBuffer:
    """Device memory that grows and is kept: the largest use decides its size.

    Attributes:
        address: 0 while it is empty. It changes when the buffer grows.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.address, self.size = cuda, 0, 0

    @property
    def alive(self) -> bool:
        """Whether the memory is still there: what is collected together with its buffer may outlive it a little."""
        return bool(self.address) and self._finalizer.alive

    def at_least(self, size: int) -> bool:
        """Make it hold so many bytes; whether it moved. What it held is lost then."""
        if size <= self.size:
            return False
        self.close()
        self.address, self.size = self._cuda.allocate(size), size
        self._finalizer = weakref.finalize(self, _free, self._cuda, self.address)
        self._finalizer.atexit = False  # the process's memory goes with it
        return True

    def close(self) -> None:
        """Give the memory back."""
        if self.address:
            self.address, self.size = 0, 0
            self._finalizer()


def _free(cuda: Cuda, address: int) -> None:
    # After a failure of CUDA nothing can be given back any more.
    with contextlib.suppress(BackendError):
        cuda.free(address)
