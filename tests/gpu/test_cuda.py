"""cuda.core, the driver's bindings and NVML on a GPU, each call that latentrt makes: `make test-gpu`.

The stand-ins of tests/runtime/backends assume what is tested here. No engine and no TensorRT are needed.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.cuda import device_loop
from latentrt.backends.cuda.api import Cuda, DeviceBuffer, load_cuda
from latentrt.backends.cuda.recorded_work import RecordedWork
from latentrt.engines.gpu import Gpu, NoGpu, describe_driver, find_gpu, gpu_memory_in_use, import_cuda
from latentrt.errors import BackendError

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture
def cuda(gpu: Gpu) -> Cuda:
    return load_cuda()


def free_bytes() -> int:
    """Return the GPU's free memory. A context is current in this thread."""
    _, driver = import_cuda()
    status, free, _ = driver.cuMemGetInfo()
    assert status == driver.CUresult.CUDA_SUCCESS
    return int(free)


def fetch(cuda: Cuda, buffer: DeviceBuffer, count: int, stream: object) -> NDArray[np.float32]:
    array = np.empty(count, np.float32)
    cuda.download(array, buffer.address, stream)
    cuda.synchronize(stream)
    return array


def test_the_facts_of_the_gpu(gpu: Gpu) -> None:
    core, _ = import_cuda()
    capability = core.Device(0).compute_capability
    assert gpu.compute_capability == f"{capability.major}.{capability.minor}"
    assert gpu.memory_bytes > 1 << 30
    assert "." in gpu.cuda
    used = gpu_memory_in_use()
    if used is not None:  # no Jetson
        assert re.fullmatch(rf"driver \d+\.[\d.]+ for CUDA {re.escape(gpu.cuda)}", describe_driver(gpu))
        assert 0 < used <= gpu.memory_bytes * 1.1  # NVML counts what the driver reserves


def test_a_hidden_gpu_is_not_found(gpu: Gpu) -> None:
    script = "from latentrt.engines.gpu import find_gpu; print(find_gpu())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert NoGpu.__name__ in done.stdout
    assert "CUDA_VISIBLE_DEVICES" in done.stdout


def test_copies_go_both_ways_and_row_by_row(cuda: Cuda) -> None:
    stream = cuda.make_stream()
    assert stream.is_nonblocking
    buffer = DeviceBuffer(cuda, stream)
    buffer.reserve(4 * 4 * 6)
    whole, part = np.arange(24, dtype=np.float32), -np.arange(8, dtype=np.float32).reshape(4, 2)
    whole.setflags(write=False)
    cuda.upload(buffer.address, whole, stream)
    cuda.upload_rows(buffer.address + 16, 24, part, stream)
    expected = whole.copy().reshape(4, 6)
    expected[:, 4:] = part
    np.testing.assert_array_equal(fetch(cuda, buffer, 24, stream), expected.ravel())


def test_memory_goes_back_to_the_driver_at_once(cuda: Cuda) -> None:
    stream = cuda.make_stream()
    before = free_bytes()
    closed, dropped = (DeviceBuffer(cuda, stream) for _ in range(2))
    for buffer in (closed, dropped):
        buffer.reserve(256 * MIB)
    assert free_bytes() <= before - 512 * MIB
    closed.close()
    del buffer, dropped
    gc.collect()
    assert free_bytes() >= before - 8 * MIB


def test_too_much_memory_is_an_error_and_the_next_allocation_works(cuda: Cuda, gpu: Gpu) -> None:
    stream = cuda.make_stream()
    buffer = DeviceBuffer(cuda, stream)
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        buffer.reserve(gpu.memory_bytes * 2)
    assert buffer.reserve(MIB)
    assert buffer.address > 0


def test_memory_is_used_and_freed_in_any_thread(cuda: Cuda) -> None:
    stream = cuda.make_stream()
    buffers = [DeviceBuffer(cuda, stream) for _ in range(4)]

    def use(index: int) -> NDArray[np.float32]:
        buffers[index].reserve(4096)
        array = np.full(1024, index, np.float32)
        cuda.upload(buffers[index].address, array, stream)
        return fetch(cuda, buffers[index], 1024, stream)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(use, range(4)))
    assert [float(each.mean()) for each in found] == [0, 1, 2, 3]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(buffers.clear).result()


def test_an_event_comes_after_the_work_before_it(cuda: Cuda) -> None:
    stream, event = cuda.make_stream(), cuda.make_event()
    cuda.wait(event)  # never recorded
    buffer, array = DeviceBuffer(cuda, stream), np.ones(16 * MIB, np.float32)
    buffer.reserve(array.nbytes)
    cuda.upload(buffer.address, array, stream)
    cuda.record(event, stream)
    cuda.wait(event)
    assert event.is_done


def test_kernels_are_compiled_when_they_are_loaded(cuda: Cuda) -> None:
    kernels = cuda.load_kernels(device_loop._ptx(), *device_loop._KERNELS)
    assert len(kernels) == len(device_loop._KERNELS)
    # An ISA that no driver knows yet: the error comes here, not at the first launch.
    newer = device_loop._ptx().replace(b".version 6.4", b".version 99.0")
    with pytest.raises(BackendError, match="CUDA failed at loading kernels: CUDA_ERROR_"):
        cuda.load_kernels(newer, *device_loop._KERNELS)


def next_row_of(cuda: Cuda, stream: object) -> tuple[DeviceBuffer, DeviceBuffer, object]:
    """Return a list of one slot, its row index and nothing else, and the kernel that increments that."""
    (kernel,) = cuda.load_kernels(device_loop._ptx(), "next_row")
    row, slots = DeviceBuffer(cuda, stream), DeviceBuffer(cuda, stream)
    row.reserve(4)
    slots.reserve(device_loop._SLOT.itemsize)
    slot = np.zeros(1, device_loop._SLOT)
    slot["row_index"], slot["positive"], slot["negative"] = row.address, 0, -1
    cuda.upload(row.address, np.zeros(1, np.int32), stream)
    cuda.upload(slots.address, slot, stream)
    cuda.synchronize(stream)
    return row, slots, kernel


def read_row(cuda: Cuda, row: DeviceBuffer, stream: object) -> int:
    return int(fetch(cuda, row, 1, stream).view(np.int32)[0])


def test_work_is_recorded_at_its_second_run_and_launched_from_then_on(cuda: Cuda) -> None:
    stream = cuda.make_stream()
    row, slots, kernel = next_row_of(cuda, stream)
    calls = []

    def work() -> None:
        calls.append(1)
        cuda.launch_kernel(kernel, 1, stream, (slots.address,), (1,))

    recorded = RecordedWork(cuda, stream, "test")
    for count in range(1, 6):
        recorded.run(work)
        assert read_row(cuda, row, stream) == count
    assert len(calls) == 2  # executed, recorded
    recorded.reset()
    recorded.run(work)
    assert read_row(cuda, row, stream) == 6


def test_work_that_cannot_be_recorded_runs_without_and_leaves_the_stream_usable(
    cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    """An allocation invalidates a recording: the error names it, no process ends, every run is executed."""
    stream = cuda.make_stream()
    row, slots, kernel = next_row_of(cuda, stream)

    def work() -> None:
        cuda.launch_kernel(kernel, 1, stream, (slots.address,), (1,))
        DeviceBuffer(cuda, stream).reserve(MIB)

    recorded = RecordedWork(cuda, stream, "test")
    with caplog.at_level(logging.INFO, "latentrt"):
        for count in range(1, 5):
            recorded.run(work)
            assert read_row(cuda, row, stream) == count
    assert any("runs without a CUDA graph" in record.message for record in caplog.records)
    again = RecordedWork(cuda, stream, "test")
    for count in range(5, 9):
        again.run(lambda: cuda.launch_kernel(kernel, 1, stream, (slots.address,), (1,)))
        assert read_row(cuda, row, stream) == count


def test_everything_is_released_in_whatever_order(cuda: Cuda) -> None:
    """Streams, events, graphs and kernels go with their last references, also at the end of a process."""
    script = (
        "from latentrt.backends.cuda.api import DeviceBuffer, load_cuda\n"
        "from latentrt.backends.cuda.device_loop import LoopPool, TensorNames\n"
        "import threading\n"
        "cuda = load_cuda()\n"
        "stream = cuda.make_stream()\n"
        "buffer = DeviceBuffer(cuda, stream)\n"
        "buffer.reserve(1 << 20)\n"
        "names = TensorNames(latents='x', timesteps='t', output='y')\n"
        "loop = LoopPool(cuda, stream, threading.Lock()).take((4, 8, 8), names)\n"
        "del cuda, stream\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_second_look_at_the_gpu_is_the_same(gpu: Gpu) -> None:
    assert find_gpu() == gpu
