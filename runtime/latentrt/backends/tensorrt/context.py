"""One set of shapes of an engine: its context, its buffers, and what was recorded of a run.

A context knows one set of shapes at a time, and telling it others costs more than a run does to be recorded. So each
set of shapes that is in use has a context of its own; they share the engine's weights and the device's memory for
activations, and have small inputs and outputs each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda.api import DeviceBuffer
from latentrt.backends.cuda.recorded_work import RecordedWork
from latentrt.backends.session import Arrays
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.engines.record import EngineRecord
from latentrt.errors import BackendError

if TYPE_CHECKING:
    from latentrt.backends.tensorrt.session import EngineSession

__all__ = ["EngineContext"]


class EngineContext:
    """What runs an engine with inputs of these shapes. The device's lock is held whenever something is called here.

    Args:
        session: whose engine it is.
        context: the library's, which has been told nothing yet.
        shapes: of each input.

    Attributes:
        epoch: counts the times that what was recorded of a run ceased to be right.
    """

    def __init__(self, session: EngineSession, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.session, self._context, self.shapes = session, context, dict(shapes)
        self._record: EngineRecord = session.record
        self._device: EngineDevice = session.device
        self._name = self._record.identity.component
        self._buffers: dict[str, DeviceBuffer] = {}
        self._fed: dict[str, NDArray[Any]] = {}
        self.epoch, self._lent = 0, (0, 0)
        self._recorded = RecordedWork(self._device.cuda, self._device.stream, self._name, records=session.records_runs)
        self._set_shapes()
        self._set_addresses()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Copy what is fed, run, and copy what comes out."""
        self.prepare()
        held = [self.feed(name, array) for name, array in feeds.items()]
        self._recorded.run(self.enqueue)
        outputs = {}
        for spec in self._record.outputs:
            array = np.empty(self._shape(spec.name), np.dtype(spec.dtype))
            self._device.cuda.download(array, self.address(spec.name), self._device.stream)
            outputs[spec.name] = array
        self._device.cuda.synchronize(self._device.stream)
        del held
        return outputs

    def prepare(self) -> None:
        """Lend the shared memory for activations to this context, if it is another than at the last run.

        Raises:
            EngineError: the session's engine is of no use any more.
        """
        self.session.check_usable()
        scratch = self._device.scratch
        scratch.at_least(max(self._needed, 1))
        lent = (scratch.address, scratch.size)
        if lent != self._lent:
            self._context.set_device_memory(scratch.address, scratch.size)
            self._lent = lent
            self.begin_anew()

    def address(self, name: str) -> int:
        """Where an input or output lies on the device."""
        return self._buffers[name].address

    def feed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Copy an input to the device, unless it is there; what has to stay until the stream is synchronised."""
        if self._fed.get(name) is array and not array.flags.writeable:
            return array
        held = np.ascontiguousarray(array)
        if held.nbytes > self._buffers[name].size:
            raise BackendError(
                f"{self._name}: {name} is fed {held.nbytes:,} bytes, and has {self._buffers[name].size:,}"
            )
        self._device.cuda.upload(self.address(name), held, self._device.stream)
        self._fed[name] = array
        return held

    def forget_fed(self, *names: str) -> None:
        """Something else writes to these inputs."""
        for name in names:
            self._fed.pop(name, None)

    def enqueue(self) -> None:
        """Put a run on the stream."""
        if not self._context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self._name}: the engine failed: {self._device.words()}")

    def begin_anew(self) -> None:
        """What was recorded is not right any more."""
        self.epoch += 1
        self._recorded.forget()

    def close(self) -> None:
        """Give the device's memory back."""
        self._recorded.forget()
        self._context = None
        for buffer in self._buffers.values():
            buffer.close()

    def _set_shapes(self) -> None:
        for name, shape in self.shapes.items():
            if not self._context.set_input_shape(name, shape):
                allowed = self._record.identity.profile[name]
                raise BackendError(f"{self._name}: found {name} of shape {shape}, the engine was built for {allowed}")
        # 0 is also what it says when it cannot tell; then what the largest shapes need is enough.
        self._needed = int(self._context.update_device_memory_size_for_shapes()) or self.session.largest_scratch

    def _set_addresses(self) -> None:
        for spec in (*self._record.inputs, *self._record.outputs):
            buffer = self._buffers[spec.name] = DeviceBuffer(self._device.cuda)
            buffer.at_least(max(math.prod(self._shape(spec.name)) * np.dtype(spec.dtype).itemsize, 1))
            if not self._context.set_tensor_address(spec.name, buffer.address):
                raise BackendError(f"{self._name}: no address for {spec.name}: {self._device.words()}")

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))
