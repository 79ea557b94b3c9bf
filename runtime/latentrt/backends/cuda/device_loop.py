"""Latents that stay on the device while they are denoised: engine, guidance and row, step after step.

A step is the denoiser's engine between two small kernels (`row.cu`): one makes its inputs of the latents, the other
does what the schedule's row says. The table and the number of the row lie in device memory, so a recorded step serves
every row, every sampler and every guidance scale; it is launched once for each row, and nothing comes back to the host
but what somebody looks at.

The host stays one step ahead of the device, so that leaving the loop early leaves next to nothing to be done.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda.api import DeviceBuffer
from latentrt.backends.cuda.recorded_work import RecordedWork
from latentrt.errors import BackendError, RequestError
from latentrt.sampling.schedule import Latents, Schedule
from latentrt.sampling.trajectory import Denoising

if TYPE_CHECKING:
    from latentrt.backends.tensorrt.context import EngineContext
    from latentrt.backends.tensorrt.device import EngineDevice

__all__ = ["DeviceLoop", "DeviceTrajectory", "LoopPool", "loop_table"]

# The columns of row.cu, in its order; the guidance scale and the weights of the memory follow.
_COLUMNS = ("t", "c_in", "p", "q", "limit", "u", "w", "a", "e", "d", "s")
_KERNELS = ("show", "advance", "turn")
_MOST_IDLE = 4


def loop_table(schedule: Schedule, guidance_scale: float) -> NDArray[np.float32]:
    """The rows as the kernels read them: float32 [N, 12 + memory]."""
    columns = [getattr(schedule, name).astype(np.float32) for name in _COLUMNS]
    scale = np.full(len(schedule), guidance_scale, np.float32)
    return np.ascontiguousarray(np.column_stack([*columns, scale, schedule.b.astype(np.float32)]), np.float32)


@dataclass(frozen=True)
class LoopShape:
    """What a recorded step depends on: the shapes of latents and embeddings, guidance, the depth of the memory."""

    latents: tuple[int, ...]
    embeddings: tuple[int, ...]
    guided: bool
    memory: int

    @classmethod
    def of(cls, job: Denoising) -> LoopShape:
        """The shape of a loop."""
        guided = job.guidance_scale is not None
        return cls(job.latents.shape, job.embeddings.shape, guided, job.schedule.memory)

    @property
    def engine_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the denoiser's inputs."""
        batch = self.latents[0] * (2 if self.guided else 1)
        return {"sample": (batch, *self.latents[1:]), "timestep": (batch,), "encoder_hidden_states": self.embeddings}


class LoopPool:
    """Loops that are kept, with their memory and what they recorded, from picture to picture."""

    def __init__(self, device: EngineDevice) -> None:
        self._device, self._lock = device, threading.Lock()
        self._idle: list[DeviceLoop] = []

    def take(self, context: EngineContext, shape: LoopShape) -> DeviceLoop:
        """An idle loop, or a new one."""
        with self._lock:
            for loop in self._idle:
                if loop.context is context and loop.shape == shape:
                    self._idle.remove(loop)
                    return loop
        return DeviceLoop(self._device, context, shape, self.kernels)

    @functools.cached_property
    def kernels(self) -> tuple[Any, ...]:
        """The kernels, compiled by the driver.

        Raises:
            BackendError: the driver does not take them.
        """
        return self._device.cuda.load_kernels(_ptx(), *_KERNELS)

    def put_back(self, loop: DeviceLoop) -> None:
        """Let others use a loop; the one that was idle for longest goes when there are many."""
        with self._lock:
            self._idle.append(loop)
            evicted = self._idle.pop(0) if len(self._idle) > _MOST_IDLE else None
        if evicted is not None:
            evicted.close()


def _ptx() -> bytes:
    return resources.files("latentrt.backends.cuda").joinpath("row.ptx").read_bytes()


class DeviceLoop:
    """The memory and the recorded step of one denoising loop at a time."""

    def __init__(
        self, device: EngineDevice, context: EngineContext, shape: LoopShape, kernels: tuple[Any, ...]
    ) -> None:
        self._device, self.context, self.shape = device, context, shape
        self._show, self._advance, self._turn = kernels
        self._count = int(np.prod(shape.latents))
        self._buffers = {
            name: DeviceBuffer(device.cuda)
            for name in ("latents", "previous", "history", "noise", "table", "cursor", "broken")
        }
        for name, arrays in (("latents", 1), ("previous", 1), ("history", max(shape.memory, 1)), ("noise", 1)):
            self._buffers[name].at_least(4 * self._count * arrays)
        for name in ("cursor", "broken"):
            self._buffers[name].at_least(4)
        self._step = RecordedWork(device.cuda, device.stream, "a step", records=context.session.records_runs)
        self._epoch = -1
        self._event = device.cuda.make_event()
        self._width = 0
        # What copies read: those of the row that is on the stream, and those since.
        self._held: list[Any] = []
        self._pending: list[Any] = []

    def begin(self, latents: Latents, table: NDArray[np.float32]) -> None:
        """Put the first latents and the table on the device."""
        with self._device.lock:
            if self._buffers["table"].at_least(table.nbytes):
                self._step.forget()
            zero = np.zeros(1, np.int32)
            self._width = table.shape[1]
            for name, array in (("latents", latents), ("table", table), ("cursor", zero), ("broken", zero)):
                self._upload(name, array)
            self._synchronize()

    def step(self, embeddings: NDArray[np.float32], noise: Latents | None) -> None:
        """One row, put on the stream."""
        context, cuda, stream = self.context, self._device.cuda, self._device.stream
        with self._device.lock:
            context.prepare()
            if context.epoch != self._epoch:
                self._step.forget()
                self._epoch = context.epoch
            # The kernels write these two.
            context.forget_fed("sample", "timestep")
            self._pending.append(context.feed("encoder_hidden_states", embeddings))
            if noise is not None:
                self._upload("noise", noise)
            self._step.run(self._enqueue)
            if self._step.runs == 1:
                self._synchronize()
            else:
                cuda.wait(self._event)  # for the row before, with this one on the stream already
                self._held, self._pending = self._pending, []
            cuda.record(self._event, stream)

    def fetch(self) -> tuple[Latents, int]:
        """The latents as they are now, and the first row, counted from 1, that broke them; 0 if none did."""
        if not self._buffers["latents"].alive:
            raise BackendError("the pipeline that drew these latents is gone, and they with it")
        latents, broken = np.empty(self.shape.latents, np.float32), np.zeros(1, np.int32)
        with self._device.lock:
            cuda, stream = self._device.cuda, self._device.stream
            cuda.download(latents, self._buffers["latents"].address, stream)
            cuda.download(broken, self._buffers["broken"].address, stream)
            self._synchronize()
        return latents, int(broken[0])

    def replace(self, latents: Latents) -> None:
        """Go on with other latents."""
        with self._device.lock:
            self._upload("latents", latents)

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        assert array.nbytes <= self._buffers[name].size
        self._pending.append(np.ascontiguousarray(array))
        self._device.cuda.upload(self._buffers[name].address, self._pending[-1], self._device.stream)

    def _synchronize(self) -> None:
        self._device.cuda.synchronize(self._device.stream)
        self._held, self._pending = [], []

    def close(self) -> None:
        """Give the device's memory back."""
        with self._device.lock:
            self._step.forget()
            for buffer in self._buffers.values():
                buffer.close()

    def _enqueue(self) -> None:
        """The kernels and the engine, in their order."""
        context, cuda, stream = self.context, self._device.cuda, self._device.stream
        at = {name: buffer.address for name, buffer in self._buffers.items()}
        guided, evaluations = int(self.shape.guided), self.shape.engine_shapes["timestep"][0]
        cuda.start(
            self._show,
            max(self._count, evaluations),
            stream,
            (context.address("sample"), context.address("timestep"), at["latents"], at["table"], at["cursor"]),
            (self._width, self._count, evaluations, guided),
        )
        context.enqueue()
        loop_memory = (at["latents"], at["previous"], at["history"])
        tables = (at["noise"], at["table"], at["cursor"], at["broken"])
        cuda.start(
            self._advance,
            self._count,
            stream,
            (*loop_memory, context.address("noise_pred"), *tables),
            (self._width, self.shape.memory, self._count, guided),
        )
        cuda.start(self._turn, 1, stream, (at["cursor"],), ())


class DeviceTrajectory:
    """One denoising loop, row by row.

    Args:
        context: of the denoiser's engine.
        shape: of the loop. job: what it is to do.
    """

    def __init__(self, context: EngineContext, shape: LoopShape, job: Denoising) -> None:
        self._context, self._pool, self._job, self._row = context, context.session.device.loops, job, 0
        self._loop = self._pool.take(context, shape)
        try:
            self._loop.begin(job.latents, loop_table(job.schedule, job.guidance_scale or 0.0))
        except BaseException:
            self._loop.close()
            raise

    def step(self, changed: Latents | None) -> Callable[[], Latents]:
        """Do a row, with other latents if there are; what fetches those after it."""
        if changed is not None:
            self._loop.replace(changed)
        noise = None
        for _ in range(self._job.schedule.noise_draws[self._row]):
            noise = self._job.noise()
        self._loop.step(self._job.embeddings, noise)
        self._row += 1
        row = self._row
        return lambda: self._fetch(row)

    def close(self) -> None:
        """Let others use the loop's memory."""
        self._pool.put_back(self._loop)
        self._context.session.keep_compiled()

    def _fetch(self, row: int) -> Latents:
        if row != self._row:
            raise RequestError(
                f"the latents after row {row} are gone, the loop has come to row {self._row}; read them before the "
                "generator of steps is resumed"
            )
        latents, broken = self._loop.fetch()
        if broken:
            raise BackendError(
                f"timestep {self._job.schedule.t[broken - 1]:g} gave values that are not finite numbers; lower the "
                "guidance scale, or export the bundle in float32"
            )
        return latents
