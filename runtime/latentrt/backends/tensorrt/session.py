"""Engines on TensorRT or TensorRT-RTX: hashed plans, shared device memory, CUDA graphs.

A pipeline's engines share one `EngineDevice`: a stream, on which one engine runs at a time, and one block of memory for
activations, as large as the largest component needs. Inputs and outputs have buffers of their own (`context.py`). A
read-only input that is the same array as at the last run, such as the prompt's embeddings at each step, is not copied
again.

`engine_host_code_allowed` stays off, so that a plan contains kernels and no host code.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes, translating_library_errors
from latentrt.backends.tensorrt.context import EngineContext
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.profile import batch_sizes, covers
from latentrt.backends.tensorrt.refit import refit
from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.engines.record import EngineRecord
from latentrt.errors import BackendError, EngineError

__all__ = ["EngineSession", "NamedWeights"]

# Each set of shapes in use has a context, with inputs and outputs of its own.
_MAX_SHAPES = 4
_log = logging.getLogger("latentrt")


@dataclass(frozen=True)
class NamedWeights:
    """Weights by name, and the SHA-256 of the file they were mapped from."""

    arrays: Mapping[str, NDArray[Any]]
    sha256: str


class EngineSession(Session):
    """One loaded engine.

    Args:
        device: shared with the other engines.
        plan: bytes whose hash was checked.
        record: of the engine.
        cache: of kernels that TensorRT-RTX compiles just in time; None stores nothing.
        weights: for a plan that is stored without weights.

    Attributes:
        weights: the SHA-256 of the weights' file that the engine holds; None after a refit that failed half-way.
        records_runs: whether runs are recorded as CUDA graphs here: TensorRT-RTX records its own, and streaming of
            weights cannot be recorded.
        largest_scratch: bytes of activations for the largest shapes of the profile.
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
        self.inputs, self.outputs = record.inputs, record.outputs
        self._component = record.identity.component
        self._is_rtx = device.library.name == "tensorrt_rtx"
        self.records_runs = not self._is_rtx and not record.identity.options.weight_streaming
        self._engine = device.deserialize(plan, record)
        self.largest_scratch = int(self._engine.device_memory_size_v2)
        self.weights = record.identity.weights
        if weights is not None:
            self._replace_weights(weights)
        self._config = self._make_config() if self._is_rtx else None
        self._contexts: OrderedDict[tuple[tuple[int, ...], ...], EngineContext] = OrderedDict()
        self._saves_left = 0

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        with self.device.lock, translating_library_errors(str(self.device.library)):
            outputs = self.context({name: array.shape for name, array in feeds.items()}).run(feeds)
        self.keep_compiled()
        return outputs

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the batch sizes of the profile; () where it does not cover the other axes."""
        return batch_sizes(self.record.identity, shapes)

    def prepare(self, shapes: Shapes) -> None:
        """Allocate a context for inputs of these shapes.

        Raises:
            EngineError: the profile does not cover them.
        """
        if not covers(self.record.identity, shapes):
            profile = self.record.identity.profile
            allowed = ", ".join(f"{name} {each}" for name, each in profile.items())
            raise EngineError(f"{self._component}: got {dict(shapes)}, the engine was built for {allowed}")
        with self.device.lock:
            self.context(shapes)

    def device_context(self, shapes: Shapes) -> EngineContext | None:
        """Return the context of these shapes; None where the device-resident loop cannot run: the driver does
        not load its kernels or no memory is left."""
        try:
            self.device.loops.load_kernels()
            with self.device.lock:
                return self.context(shapes)
        except BackendError as error:
            _log.info("%s: latents do not stay on the device: %s", self._component, error)
            return None

    def context(self, shapes: Shapes) -> EngineContext:
        """Return the context of these shapes, allocated if necessary. The device's lock is held.

        Raises:
            BackendError: the profile does not cover them, or no memory is left. EngineError: the library failed.
        """
        key = self._key(shapes)
        if key not in self._contexts:
            while len(self._contexts) >= _MAX_SHAPES:
                self.device.cuda.synchronize(self.device.stream)  # the oldest may be running
                self._contexts.popitem(last=False)  # not closed: a device-resident loop may still hold it
            made = self._engine.create_execution_context(self._config or self.device.user_managed)
            if made is None:
                raise EngineError(f"{self._component}: no context for the engine: {self.device.reason()}")
            self._contexts[key] = EngineContext(self, made, shapes)
            self._saves_left = 3
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def refit(self, weights: NamedWeights) -> None:
        """Replace all weights by those of another checkpoint of the same architecture.

        Raises:
            EngineError: see `latentrt.backends.tensorrt.refit.refit`.
        """
        with self.device.lock:
            # Work on the stream still uses the former weights, and so do recorded runs.
            self.device.cuda.synchronize(self.device.stream)
            for context in self._contexts.values():
                context.invalidate()
            self._replace_weights(weights)

    def check_usable(self) -> None:
        """Reject an engine whose weights were replaced in part.

        Raises:
            EngineError: a refit has failed half-way.
        """
        if self.weights is None:
            raise EngineError(f"{self._component}: replacing the weights failed half-way; load the engine again")

    def keep_compiled(self) -> None:
        """Store the kernels that TensorRT-RTX compiled, after each of the first few runs with new shapes: kernels
        specialised for these shapes are compiled in the background."""
        if self._cache is not None and self._saves_left > 0:
            self._saves_left -= 1
            with self.device.lock:
                self._cache.save()

    def close(self) -> None:
        """Free the device memory: contexts first, then the engine that made them."""
        with self.device.lock:
            if self._cache is not None:
                self._cache.save()
            while self._contexts:
                self._contexts.popitem()[1].close()
            self._engine = self._config = self._cache = None

    def _replace_weights(self, weights: NamedWeights) -> None:
        def begin() -> None:
            self.weights = None  # until all of them are replaced

        refit(self.device.library, self._engine, self.device.logger, self._component, weights.arrays, begin)
        self.weights = weights.sha256

    def _make_config(self) -> Any:
        """Return TensorRT-RTX's runtime configuration, which must outlive the contexts made with it."""
        trt, config = self.device.library.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.device.user_managed)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is not None:
            self._cache.attach(config)
        return config

    def _key(self, shapes: Shapes) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(shapes[spec.name]) for spec in self.inputs)
