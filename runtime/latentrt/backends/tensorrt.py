"""Engines on TensorRT or TensorRT-RTX: plans that were hashed, device memory that is shared, CUDA graphs.

A pipeline's engines share one `EngineDevice`: a stream, on which one engine runs at a time, and one piece of memory for
activations, as large as the largest submodule needs. Inputs and outputs have buffers that are kept. An input that is
the very array it was at the last run, as the prompt's embeddings are at each step, is not copied again.

`engine_host_code_allowed` stays off, so that a plan brings kernels and no host code.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda import Cuda, DeviceBuffer, load_cuda
from latentrt.backends.refit import refit
from latentrt.backends.runtime_cache import RuntimeCache
from latentrt.engine_record import EngineRecord
from latentrt.errors import BackendError, EngineError
from latentrt.session import Arrays
from latentrt.tensorrt_library import LoadedLibrary
from latentrt.tensors import TensorSpec

__all__ = ["EngineDevice", "EngineSession", "NamedWeights"]

_log = logging.getLogger("latentrt")


@dataclass(frozen=True)
class NamedWeights:
    """Arrays by their names, and the SHA-256 of the file they were mapped from."""

    arrays: Mapping[str, NDArray[Any]]
    sha256: str


class EngineDevice:
    """What the engines of a pipeline share.

    Args:
        library: TensorRT or TensorRT-RTX.
        cuda: the bindings, or what a test puts in their place.

    Attributes:
        lock: held while an engine runs.
    """

    def __init__(self, library: LoadedLibrary, cuda: Cuda | None = None) -> None:
        self.library, self.cuda = library, cuda or load_cuda()
        self.lock = threading.Lock()
        self.stream = self.cuda.make_stream()
        self.scratch = DeviceBuffer(self.cuda)
        self.said: list[str] = []
        self.logger = _make_logger(library, self.said)
        self.runtime = library.module.Runtime(self.logger)
        if self.runtime.engine_host_code_allowed:
            raise EngineError(f"{library} would run host code out of a plan; latentrt does not")

    def deserialize(self, plan: bytes, record: EngineRecord) -> Any:
        """A plan whose hash was checked → the library's engine.

        Raises:
            EngineError: with what the library says of it.
        """
        self.said.clear()
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            words = "; ".join(self.said[-2:]) or "it does not say why"
            raise EngineError(
                f"{record.identity.component}: {self.library} does not load the engine {record.key[:12]}: {words}. "
                "Build it again: latentrt build --force"
            )
        return engine


class EngineSession:
    """One engine, ready to run.

    Args:
        device: what it shares with the others.
        plan: bytes that were hashed and compared.
        record: of the engine.
        cache: where TensorRT-RTX keeps what it compiles just in time; None keeps nothing.
        weights: for a plan that is kept without its own.

    Attributes:
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
        self._captures_itself = device.library.name == "tensorrt_rtx"
        self._context = self._make_context()
        self._buffers = {spec.name: DeviceBuffer(device.cuda) for spec in (*record.inputs, *record.outputs)}
        self._fed: dict[str, NDArray[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Any = None
        self._runs_of_shape = 0
        self._graphs_work = True
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
            self._forget_graph()
            self._runs_of_shape = 0

    def _replace(self, weights: NamedWeights) -> None:
        refit(self._device.library, self._engine, self._device.logger, self._name, weights.arrays)
        self.weights = weights.sha256

    def covers(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes may be fed."""
        return all(self.record.identity.profile[name].covers(shape) for name, shape in shapes.items())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        with self._device.lock:
            self._prepare({name: array.shape for name, array in feeds.items()})
            held = self._feed(feeds)
            self._execute()
            outputs = self._fetch()
            self._device.cuda.synchronize(self._device.stream)
            del held
            self._keep_compiled()
            return outputs

    def close(self) -> None:
        """Give the device's memory back."""
        self._forget_graph()
        for buffer in self._buffers.values():
            buffer.close()

    def _make_context(self) -> Any:
        trt, engine = self._device.library.module, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._captures_itself:
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

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell the context shapes and addresses, where they are other than at the last run."""
        changed = shapes != self._shapes
        if changed:
            self._shapes = {}  # of no use if what follows fails
            self._set_shapes(shapes)
            self._set_addresses()
            self._shapes = shapes
        if self._lend_scratch() or changed:
            self._forget_graph()
            self._runs_of_shape = 0

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

    def _feed(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Copy what changed; the arrays that have to stay until the copies are done."""
        held = []
        for name, array in feeds.items():
            if self._fed.get(name) is array and not array.flags.writeable:
                continue
            held.append(np.ascontiguousarray(array))
            self._device.cuda.upload(self._buffers[name].address, held[-1], self._device.stream)
            self._fed[name] = array
        return held

    def _execute(self) -> None:
        """Run, the third time and later by launching what the second run recorded."""
        cuda, stream = self._device.cuda, self._device.stream
        if self._graph is not None:
            cuda.launch(self._graph, stream)
            return
        if self._runs_of_shape == 1 and self._graphs_work and not self._captures_itself:
            self._capture()
        self._runs_of_shape += 1
        if self._graph is not None:
            cuda.launch(self._graph, stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self._name}: the engine failed: {self._words()}")

    def _capture(self) -> None:
        """Record a run as a CUDA graph; an engine that cannot be recorded goes on without."""
        cuda, stream = self._device.cuda, self._device.stream
        try:
            cuda.begin_capture(stream)
            try:
                self._enqueue()
            finally:
                graph = cuda.end_capture(stream)
            self._graph = graph
        except BackendError as error:
            self._graphs_work = False
            _log.info("%s runs without a CUDA graph: %s", self._name, error)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._device.cuda.destroy_graph(graph)

    def _fetch(self) -> Arrays:
        outputs = {}
        for spec in self.record.outputs:
            array = np.empty(tuple(self._context.get_tensor_shape(spec.name)), np.dtype(spec.dtype))
            self._device.cuda.download(array, self._buffers[spec.name].address, self._device.stream)
            outputs[spec.name] = array
        return outputs

    def _keep_compiled(self) -> None:
        if self._cache is not None and self._runs_of_shape == 1:
            self._cache.save()

    def _words(self) -> str:
        return "; ".join(self._device.said[-2:]) or "it does not say why"


def _make_logger(library: LoadedLibrary, said: list[str]) -> Any:
    trt = library.module
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # the library's classes have no types
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                said.append(message)
                _log.debug("%s: %s", library.name, message)

    return Logger()
