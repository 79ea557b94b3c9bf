"""One set of shapes of an engine: its execution context, its buffers, and its recorded run.

An execution context has one set of shapes at a time, and changing them costs more than recording a run. So each set of
shapes in use has a context of its own; they share the engine's weights and the device's memory for activations, and
have small inputs and outputs each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda.api import DeviceBuffer
from latentrt.backends.cuda.device_loop import DeviceContext
from latentrt.backends.cuda.recorded_work import RecordedWork
from latentrt.backends.session import Arrays, Shapes
from latentrt.errors import BackendError

if TYPE_CHECKING:
    from latentrt.backends.tensorrt.session import EngineSession

__all__ = ["EngineContext"]


class EngineContext(DeviceContext):
    """Runs an engine with inputs of one set of shapes. The device's lock is held during every call.

    Args:
        session: of the engine.
        context: the library's execution context, without shapes yet.
        shapes: of each input.

    Attributes:
        epoch: incremented whenever a recorded run becomes invalid.
    """

    def __init__(self, session: EngineSession, context: Any, shapes: Shapes) -> None:
        self.session, self._context, self.shapes = session, context, dict(shapes)
        self.inputs, self.outputs = session.inputs, session.outputs
        self.records_runs, self.loops = session.records_runs, session.device.loops
        self._device = session.device
        self._name = session.record.identity.component
        self._buffers: dict[str, DeviceBuffer] = {}
        self._fed: dict[str, NDArray[Any]] = {}  # read-only arrays whose contents the inputs have
        self.epoch, self._lent = 0, (0, 0)
        self._recorded = RecordedWork(self._device.cuda, self._device.stream, self._name, records=self.records_runs)
        self._set_shapes()
        self._set_addresses()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Copy the feeds to the device, run, and return copies of the outputs."""
        self.prepare()
        held = [self.feed(name, array) for name, array in feeds.items()]
        self._recorded.run(self.enqueue)
        outputs = {}
        for spec in self.outputs:
            array = np.empty(self.shape(spec.name), np.dtype(spec.dtype))
            self._device.cuda.download(array, self.address(spec.name), self._device.stream)
            outputs[spec.name] = array
        self._device.cuda.synchronize(self._device.stream)
        del held
        return outputs

    def prepare(self) -> None:
        """Lend the shared memory for activations to this context, if it has moved since the last run.

        Raises:
            EngineError: a refit of the session's engine has failed.
        """
        self.session.check_usable()
        scratch = self._device.scratch
        scratch.reserve(max(self._needed, 1))
        lent = (scratch.address, scratch.size)
        if lent != self._lent:
            self._context.set_device_memory(scratch.address, scratch.size)
            self._lent = lent
            self.invalidate()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def address(self, name: str) -> int:
        return self._buffers[name].address

    def feed(self, name: str, array: NDArray[Any], *, first_channel: int = 0) -> NDArray[Any]:
        if self._fed.get(name) is array:
            return array
        held, shape = np.ascontiguousarray(array), self.shapes[name]
        if first_channel:
            self._feed_channels(name, held, first_channel)
        elif held.nbytes <= self._buffers[name].size:
            self._device.cuda.upload(self.address(name), held, self._device.stream)
        else:
            raise BackendError(f"{self._name}: got {name} of shape {array.shape}, expected {shape}")
        self.forget(name)
        if not array.flags.writeable:
            self._fed[name] = array
        return held

    def forget(self, *names: str) -> None:
        for name in names:
            self._fed.pop(name, None)

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream_handle):
            raise BackendError(f"{self._name}: the engine failed: {self._device.reason()}")

    def keep_compiled(self) -> None:
        self.session.keep_compiled()

    def invalidate(self) -> None:
        """Discard the recorded run."""
        self.epoch += 1
        self._recorded.reset()

    def close(self) -> None:
        """Free the device memory."""
        self._recorded.reset()
        self._context = None
        for buffer in self._buffers.values():
            buffer.close()

    def _feed_channels(self, name: str, array: NDArray[Any], first_channel: int) -> None:
        batch, channels, *rest = self.shapes[name]
        if array.shape != (batch, channels - first_channel, *rest):
            raise BackendError(
                f"{self._name}: got {array.shape} for the channels of {name} from {first_channel} on, expected "
                f"{(batch, channels - first_channel, *rest)}"
            )
        channel = math.prod(rest) * array.itemsize  # bytes
        start = self.address(name) + first_channel * channel
        self._device.cuda.upload_rows(start, channels * channel, array, self._device.stream)

    def _set_shapes(self) -> None:
        for name, shape in self.shapes.items():
            if not self._context.set_input_shape(name, shape):
                allowed = self.session.record.identity.profile[name]
                raise BackendError(f"{self._name}: got {name} of shape {shape}, the engine was built for {allowed}")
        # 0 may also mean unknown; the needs of the largest shapes suffice then.
        self._needed = int(self._context.update_device_memory_size_for_shapes()) or self.session.largest_scratch

    def _set_addresses(self) -> None:
        for spec in (*self.inputs, *self.outputs):
            buffer = self._buffers[spec.name] = DeviceBuffer(self._device.cuda, self._device.stream)
            buffer.reserve(max(math.prod(self.shape(spec.name)) * np.dtype(spec.dtype).itemsize, 1))
            if not self._context.set_tensor_address(spec.name, buffer.address):
                raise BackendError(f"{self._name}: no address for {spec.name}: {self._device.reason()}")
