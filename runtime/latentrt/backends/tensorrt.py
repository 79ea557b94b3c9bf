"""Engines on TensorRT or TensorRT-RTX: plans that were hashed, device memory that is shared, CUDA graphs.

A pipeline's engines share one `EngineDevice`: a stream, on which one engine runs at a time, and one piece of memory for
activations, as large as the largest submodule needs. Inputs and outputs have buffers that are kept. An input that is
the very array it was at the last run, as the prompt's embeddings are at each step, is not copied again.

`engine_host_code_allowed` stays off, so that a plan brings kernels and no host code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda import DeviceBuffer
from latentrt.backends.device_loop import DeviceTrajectory, LoopShape
from latentrt.backends.engine_device import EngineDevice
from latentrt.backends.recorded_work import RecordedWork
from latentrt.backends.refit import refit
from latentrt.backends.runtime_cache import RuntimeCache
from latentrt.engine_record import EngineRecord
from latentrt.errors import BackendError, EngineError
from latentrt.schedule import Latents, Schedule
from latentrt.session import Arrays
from latentrt.tensors import TensorSpec

__all__ = ["EngineSession", "NamedWeights"]

_log = logging.getLogger("latentrt")


@dataclass(frozen=True)
class NamedWeights:
    """Arrays by their names, and the SHA-256 of the file they were mapped from."""

    arrays: Mapping[str, NDArray[Any]]
    sha256: str


class EngineSession:
    """One engine, ready to run.

    Args:
        device: what it shares with the others.
        plan: bytes that were hashed and compared.
        record: of the engine.
        cache: where TensorRT-RTX keeps what it compiles just in time; None keeps nothing.
        weights: for a plan that is kept without its own.

    Attributes:
        epoch: counts the times that what was recorded of a run ceased to be right.
        weights: the SHA-256 of the weights' file that the engine holds; None after a plan without weights was loaded
            without any.
    """

    def __init__(
        self,
        device: EngineDevice,
        plan: bytes,
        record: EngineRecord,
        cache: RuntimeCache | None = None,
        weights: NamedWeights | None = None,
    ) -> None:
        self.record, self._device, self._cache = record, device, cache
        self._name = record.identity.component
        self._engine = device.deserialize(plan, record)
        self.weights = record.identity.weights
        if weights is not None:
            self._replace(weights)
        self._is_rtx = device.library.name == "tensorrt_rtx"
        self._context = self._make_context()
        self._buffers = {spec.name: DeviceBuffer(device.cuda) for spec in (*record.inputs, *record.outputs)}
        self._fed: dict[str, NDArray[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        # TensorRT-RTX records its runs itself.
        self._recorded = RecordedWork(device.cuda, device.stream, self._name, records=not self._is_rtx)
        self.epoch = 0
        self._needed = 0
        self._lent = (0, 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.record.inputs

    def refit(self, weights: NamedWeights) -> None:
        """Replace all weights, by those of another checkpoint of the same architecture or by the first ones again.

        Raises:
            EngineError: as `latentrt.backends.refit` says.
        """
        with self._device.lock:
            self._replace(weights)
            # A recorded run may hold values that were derived from the former weights.
            self._begin_anew()

    def _replace(self, weights: NamedWeights) -> None:
        refit(self._device.library, self._engine, self._device.logger, self._name, weights.arrays)
        self.weights = weights.sha256

    def covers(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes may be fed."""
        return all(self.record.identity.profile[name].covers(shape) for name, shape in shapes.items())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        with self._device.lock:
            self.prepare({name: array.shape for name, array in feeds.items()})
            held = [self.feed(name, array) for name, array in feeds.items()]
            self._recorded.run(self.enqueue)
            outputs = self._fetch()
            self._device.cuda.synchronize(self._device.stream)
            del held
            self.keep_compiled(first=self._recorded.runs == 1)
            return outputs

    def trajectory(
        self,
        schedule: Schedule,
        latents: Latents,
        embeddings: NDArray[np.float32],
        guidance_scale: float | None,
        noise: Callable[[], Latents],
    ) -> DeviceTrajectory | None:
        """A denoising loop whose latents stay on the device (`latentrt.trajectory.KeepsLatents`); None where the driver
        does not take its kernels."""
        try:
            _ = self._device.loops.kernels
        except BackendError as error:
            _log.info("latents do not stay on the device: %s", error)
            return None
        guided = guidance_scale is not None
        shape = LoopShape(self, latents.shape, embeddings.shape, guided, schedule.memory)
        scale = 0.0 if guidance_scale is None else guidance_scale
        return DeviceTrajectory(self._device.loops, shape, schedule, latents, embeddings, scale, noise)

    def close(self) -> None:
        """Give the device's memory back."""
        self._begin_anew()
        for buffer in self._buffers.values():
            buffer.close()

    def _make_context(self) -> Any:
        trt, engine = self._device.library.module, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._is_rtx:
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._cache is not None:
                self._cache.attach(config)
            context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"{self._name}: no context for the engine: {self._words()}")
        return context

    def prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell the context shapes and addresses, where they are other than at the last run. The device's lock is held,
        here and below, until what is put on the stream is whole."""
        changed = shapes != self._shapes
        if changed:
            self._shapes = {}  # of no use if what follows fails
            self._set_shapes(shapes)
            self._set_addresses()
            self._shapes = shapes
        if self._lend_scratch() or changed:
            self._begin_anew()

    def address(self, name: str) -> int:
        """Where an input or output lies on the device, once the shapes are prepared."""
        return self._buffers[name].address

    def feed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Copy an input to the device, unless it is there; what has to stay until the stream is synchronised."""
        if self._fed.get(name) is array and not array.flags.writeable:
            return array
        held = np.ascontiguousarray(array)
        self._device.cuda.upload(self.address(name), held, self._device.stream)
        self._fed[name] = array
        return held

    def forget_fed(self, *names: str) -> None:
        """Something else has written to these inputs."""
        for name in names:
            self._fed.pop(name, None)

    def enqueue(self) -> None:
        """Put a run on the stream."""
        if not self._context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self._name}: the engine failed: {self._words()}")

    def keep_compiled(self, *, first: bool) -> None:
        """After the first run with some shapes, write down what was compiled for it."""
        if self._cache is not None and first:
            self._cache.save()

    def _begin_anew(self) -> None:
        self.epoch += 1
        self._recorded.forget()

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                allowed = self.record.identity.profile[name]
                raise BackendError(f"{self._name}: found {name} of shape {shape}, the engine was built for {allowed}")
        self._needed = int(self._context.update_device_memory_size_for_shapes())

    def _set_addresses(self) -> None:
        for spec in (*self.record.inputs, *self.record.outputs):
            buffer = self._buffers[spec.name]
            count = math.prod(self._context.get_tensor_shape(spec.name))
            if buffer.at_least(max(count * np.dtype(spec.dtype).itemsize, 1)):
                self._fed.pop(spec.name, None)
            if not self._context.set_tensor_address(spec.name, buffer.address):
                raise BackendError(f"{self._name}: no address for {spec.name}: {self._words()}")

    def _lend_scratch(self) -> bool:
        """Lend the shared memory to this context; whether it is another than at the last run."""
        scratch = self._device.scratch
        scratch.at_least(max(self._needed, 1))
        lent = (scratch.address, scratch.size)
        if lent == self._lent:
            return False
        self._context.set_device_memory(scratch.address, scratch.size)
        self._lent = lent
        return True

    def _fetch(self) -> Arrays:
        outputs = {}
        for spec in self.record.outputs:
            array = np.empty(tuple(self._context.get_tensor_shape(spec.name)), np.dtype(spec.dtype))
            self._device.cuda.download(array, self._buffers[spec.name].address, self._device.stream)
            outputs[spec.name] = array
        return outputs

    def _words(self) -> str:
        return "; ".join(self._device.said[-2:]) or "it does not say why"
