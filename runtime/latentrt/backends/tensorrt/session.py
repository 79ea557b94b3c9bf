"""Engines on TensorRT or TensorRT-RTX: plans that were hashed, device memory that is shared, CUDA graphs.

A pipeline's engines share one `EngineDevice`: a stream, on which one engine runs at a time, and one piece of memory for
activations, as large as the largest submodule needs. Inputs and outputs have buffers that are kept
(`engine_context.py`). An input that is the very array it was at the last run, as the prompt's embeddings are at each
step, is not copied again.

`engine_host_code_allowed` stays off, so that a plan brings kernels and no host code.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.cuda.device_loop import DeviceTrajectory, LoopShape
from latentrt.backends.session import Arrays
from latentrt.backends.tensorrt.context import EngineContext
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.refit import refit
from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.record import EngineRecord
from latentrt.errors import BackendError, EngineError
from latentrt.sampling.trajectory import Denoising

__all__ = ["EngineSession", "NamedWeights"]

# Each set of shapes in use has a context, with inputs and outputs of its own.
_MOST_SHAPES = 4
_log = logging.getLogger("latentrt")


@dataclass(frozen=True)
class NamedWeights:
    """Arrays by their names, and the SHA-256 of the file they were mapped from."""

    arrays: Mapping[str, NDArray[Any]]
    sha256: str


class EngineSession:
    """One engine, ready to run; threads may share it.

    Args:
        device: what it shares with the others.
        plan: bytes that were hashed and compared.
        record: of the engine.
        cache: where TensorRT-RTX keeps what it compiles just in time; None keeps nothing.
        weights: for a plan that is kept without its own.

    Attributes:
        weights: the SHA-256 of the weights' file that the engine holds; None after a refit that failed half-way.
        records_runs: whether a run can be recorded here: TensorRT-RTX records its own, and weights that are streamed
            are no work that can be recorded.
    """

    def __init__(
        self,
        device: EngineDevice,
        plan: bytes,
        record: EngineRecord,
        cache: RuntimeCache | None = None,
        weights: NamedWeights | None = None,
    ) -> None:
        self.record, self.device, self._cache = record, device, cache
        self._name = record.identity.component
        self._is_rtx = device.library.name == "tensorrt_rtx"
        self.records_runs = not self._is_rtx and not record.identity.options.weight_streaming
        self._engine = device.deserialize(plan, record)
        self.largest_scratch = int(self._engine.device_memory_size_v2)
        self.weights = record.identity.weights
        if weights is not None:
            self._replace(weights)
        self._config = self._make_config() if self._is_rtx else None
        self._contexts: OrderedDict[tuple[tuple[int, ...], ...], EngineContext] = OrderedDict()
        self._saves_left = 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.record.inputs

    def covers(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes may be fed."""
        return all(self.record.identity.profile[name].covers(shape) for name, shape in shapes.items())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        shapes = {name: array.shape for name, array in feeds.items()}
        with self.device.lock:
            outputs = self.context(shapes).run(feeds)
        self.keep_compiled()
        return outputs

    def trajectory(self, job: Denoising) -> DeviceTrajectory | None:
        """A denoising loop whose latents stay on the device (`latentrt.sampling.trajectory.KeepsLatents`); None where
        the driver does not take its kernels, or has no memory left for it."""
        shape = LoopShape.of(job)
        try:
            with self.device.lock:
                context = self.context(shape.engine_shapes)
            return DeviceTrajectory(context, shape, job)
        except BackendError as error:
            _log.info("latents do not stay on the device: %s", error)
            return None

    def context(self, shapes: Mapping[str, tuple[int, ...]]) -> EngineContext:
        """What runs inputs of these shapes, made where there is none. The device's lock is held."""
        key = self._key(shapes)
        if key not in self._contexts:
            while len(self._contexts) >= _MOST_SHAPES:
                self.device.cuda.synchronize(self.device.stream)  # it may be under way
                self._contexts.popitem(last=False)  # a loop may still hold it; its memory goes with it
            made = self._engine.create_execution_context(self._config or self.device.user_managed)
            if made is None:
                raise EngineError(f"{self._name}: no context for the engine: {self.device.words()}")
            self._contexts[key] = EngineContext(self, made, shapes)
            self._saves_left = 3
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def refit(self, weights: NamedWeights) -> None:
        """Replace all weights, by those of another checkpoint of the same architecture or by the first ones again.

        Raises:
            EngineError: as `latentrt.backends.tensorrt.refit` says.
        """
        with self.device.lock:
            # What is on the stream still computes with the former weights, and so does what was recorded.
            self.device.cuda.synchronize(self.device.stream)
            for context in self._contexts.values():
                context.begin_anew()
            self._replace(weights)

    def check_usable(self) -> None:
        """Refuse an engine whose weights were replaced in part.

        Raises:
            EngineError: it has to be loaded anew.
        """
        if self.weights is None:
            raise EngineError(f"{self._name}: replacing the engine's weights failed half-way; load the engine anew")

    def keep_compiled(self) -> None:
        """Write down what TensorRT-RTX compiled: after the first run with some shapes, and after the next few, as
        kernels for just these shapes come some time later."""
        if self._cache is not None and self._saves_left > 0:
            self._saves_left -= 1
            with self.device.lock:
                self._cache.save()

    def close(self) -> None:
        """Give the device's memory back; contexts first, then what they were made of."""
        with self.device.lock:
            if self._cache is not None:
                self._cache.save()
            while self._contexts:
                self._contexts.popitem()[1].close()
            self._engine = self._config = self._cache = None

    def _replace(self, weights: NamedWeights) -> None:
        def replace_all() -> None:
            self.weights = None  # until all of them are replaced

        refit(self.device.library, self._engine, self.device.logger, self._name, weights.arrays, replace_all)
        self.weights = weights.sha256

    def _make_config(self) -> Any:
        """TensorRT-RTX's runtime configuration; contexts are made with it, and it outlives them."""
        trt, config = self.device.library.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.device.user_managed)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is not None:
            self._cache.attach(config)
        return config

    def _key(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(shapes[spec.name]) for spec in self.record.inputs)
