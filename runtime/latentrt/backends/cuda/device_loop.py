"""The device-resident loop: the latents of a batch of samples stay on the device from row to row.

A step is a run of the denoiser's engine between small kernels (`row.cu`): `model_input` writes the engine's inputs from
the latents, `advance` applies guidance and the row of the schedule, `next_row` moves on. Each sample has a slot: its
latents, its history, its table of coefficients and its row index, all in device memory. A short list of slots, in
device memory too, says which of them take part in a step. So one recorded step serves every sampler, every row and
every mix of samples, and samples join and leave between steps; nothing returns to the host until it is fetched.

The host stays one step ahead of the device, so that ending a loop early wastes at most one step.
"""

from __future__ import annotations

import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.cuda.api import Cuda, DeviceBuffer
from latentrt.backends.cuda.recorded_work import RecordedWork
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BackendError, FeedError

__all__ = ["COLUMNS", "DeviceContext", "DeviceLoop", "LoopPool", "Slot", "TensorNames", "loop_table"]

Latents = NDArray[np.float32]

# The columns of row.cu, in its order; the guidance scale and the weights of the history follow.
_SCALARS = ("t", "c_in", "p", "q", "limit", "u", "w", "a", "e", "d", "s")
_HISTORY = len(_SCALARS) + 1
COLUMNS = (*_SCALARS, "quantile", "b")

_KERNELS = ("model_input", "advance", "next_row")
_MAX_IDLE = 4
_MAX_THREADS = 2**31 - 256  # thread indices are C ints
_NOTHING: Mapping[Any, Any] = MappingProxyType({})

# `Slot` of row.cu.
_ADDRESSES = ("latents", "previous", "history", "noise", "table", "row_index", "nonfinite_row")
_NUMBERS = ("width", "memory", "positive", "negative")
_SLOT = np.dtype([(name, np.uint64) for name in _ADDRESSES] + [(name, np.int32) for name in _NUMBERS])


def loop_table(columns: Mapping[str, NDArray[Any]], guidance_scale: NDArray[Any] | float = 1.0) -> NDArray[np.float32]:
    """Return the rows of a schedule as the kernels read them, float32 [rows, 12 + memory].

    Args:
        columns: those named in `COLUMNS`: `b` [rows, memory], the others [rows].
        guidance_scale: w in negative + w · (positive − negative): one number, or one for each row. Rows that are
            evaluated without guidance ignore it.

    Raises:
        ValueError: a column is missing, or a row has a `quantile`, which depends on the whole sample and is computed on
            the host only.
    """
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f"columns: got no {', '.join(missing)}, expected {', '.join(COLUMNS)}")
    if np.any(columns["quantile"]):
        raise ValueError("quantile: got dynamic thresholding, which the device does not compute; run it on the host")
    scalars = [columns[name] for name in _SCALARS]
    scale = np.broadcast_to(guidance_scale, len(scalars[0]))
    columns_in_order = [*scalars, scale, columns["b"]]
    return np.ascontiguousarray(np.column_stack([each.astype(np.float32) for each in columns_in_order]), np.float32)


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """Names of a denoiser's tensors: the latents' input, the timesteps' input, the output. All are float32.

    The input of the latents is [batch, channels, …], where channels beyond those of the latents are `concat`; the
    timesteps are [batch]; the output is [batch, …] with the shape of the latents.
    """

    latents: str
    timesteps: str
    output: str


class DeviceContext(ABC):
    """Inputs and outputs of an engine in device memory, for one set of shapes.

    The lock of the device is held during every call, but for `keep_compiled`.

    Attributes:
        inputs, outputs: the engine's signature.
        shapes: of the inputs, by name.
        records_runs: whether a run can be recorded as part of a CUDA graph.
        epoch: changes whenever recorded runs have become invalid.
        loops: device-resident loops for contexts of the same device.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Mapping[str, tuple[int, ...]]
    records_runs: bool
    epoch: int
    loops: LoopPool

    @abstractmethod
    def prepare(self) -> None:
        """Make the context ready to run; called before each run.

        Raises:
            EngineError: the engine cannot be used any more.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an input or output."""

    @abstractmethod
    def address(self, name: str) -> int:
        """Return the device address of an input or output."""

    @abstractmethod
    def feed(self, name: str, array: NDArray[Any], *, first_channel: int = 0) -> NDArray[Any]:
        """Copy an input to the device, unless it is the same read-only array as the last time.

        Args:
            array: in the shape of the input, whose channels before `first_channel` are left out.
            first_channel: where along the second axis the copy begins.

        Returns:
            The array to keep until the stream has been synchronized.
        """

    @abstractmethod
    def forget(self, *names: str) -> None:
        """Do not rely on the contents of these inputs any more: something else writes to them."""

    @abstractmethod
    def enqueue(self) -> None:
        """Put a run of the engine on the stream."""

    @abstractmethod
    def keep_compiled(self) -> None:
        """Store kernels that were compiled just in time. Called after a loop, without the lock."""


class Slot:
    """One sample on the device, made by `DeviceLoop.add`.

    Attributes:
        row: index of the next row. rows: of its table.
        adds_noise: bool [rows], whether a row needs noise.
    """

    def __init__(self, buffer: DeviceBuffer, count: int, table: NDArray[np.float32], row: int) -> None:
        self.buffer, self.row, (self.rows, self.width) = buffer, row, table.shape
        self.memory = self.width - _HISTORY
        self.adds_noise = table[:, _SCALARS.index("s")] != 0
        # In words of four bytes. `add` uploads the first four fields in one copy, `fetch` downloads the first three.
        sizes = {
            "row_index": 1,
            "nonfinite_row": 1,
            "latents": count,
            "table": table.size,
            "noise": count,
            "previous": count,
            "history": count * self.memory,
        }
        self._offsets, self.words = {}, 0
        for name, words in sizes.items():
            self._offsets[name] = self.words
            self.words += words

    def address(self, name: str) -> int:
        """Return the device address of a field."""
        return self.buffer.address + 4 * self._offsets[name]

    def describe(self, evaluations: tuple[int, ...]) -> tuple[int, ...]:
        """Return the slot as a value of `_SLOT`."""
        *negative, positive = evaluations
        return (*map(self.address, _ADDRESSES), self.width, self.memory, positive, negative[0] if negative else -1)


class _RecordedStep:
    """The step of one context, and device memory for the list of slots that take part in it."""

    def __init__(self, cuda: Cuda, stream: Any, context: DeviceContext, names: TensorNames, count: int) -> None:
        self.work = RecordedWork(cuda, stream, "a step", records=context.records_runs)
        self.epoch = context.epoch
        self.batch, *rest = context.shapes[names.latents]
        self.stride = math.prod(rest)
        self.channels = self._latent_channels(context, names, count)
        self._participants = DeviceBuffer(cuda, stream)
        self._participants.reserve(self.batch * (_SLOT.itemsize + 4))
        self.uploaded = b""

    @property
    def slots(self) -> int:
        """Device address of the slots."""
        return self._participants.address

    @property
    def slot_of(self) -> int:
        """Device address of the slot's index of each evaluation."""
        return self._participants.address + self.batch * _SLOT.itemsize

    def _latent_channels(self, context: DeviceContext, names: TensorNames, count: int) -> int:
        specs = {spec.name: spec for spec in (*context.inputs, *context.outputs)}
        for name in (names.latents, names.timesteps, names.output):
            if name not in specs or specs[name].dtype != "float32":
                got = specs[name].dtype if name in specs else "no such tensor"
                raise BackendError(f"{name}: got {got}, but the device-resident loop computes in float32 only")
        shape = context.shapes[names.latents]
        channels, remainder = divmod(count, math.prod(shape[2:]))
        output, timesteps = context.shape(names.output), context.shapes[names.timesteps]
        if remainder or channels > shape[1] or math.prod(output) != self.batch * count or timesteps != (self.batch,):
            raise BackendError(
                f"got {names.latents} {shape}, {names.timesteps} {timesteps} and {names.output} {output}, expected "
                f"{self.batch} samples of {count} values each"
            )
        if self.batch * count > _MAX_THREADS:
            raise BackendError(f"{names.latents}: got {self.batch} × {count} values, expected at most {_MAX_THREADS}")
        return channels


class DeviceLoop:
    """Samples whose latents stay on the device, all of one shape; they join and leave between steps.

    One thread uses a loop at a time; other threads may use the same engine meanwhile. `LoopPool.take` makes loops.

    Args:
        lock: of the device, held while a step is put on the stream.
        latents: shape of one sample's latents, without a batch axis: (C, H, W).
        names: of the denoiser's tensors.
        kernels: of row.cu.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: Any,
        lock: threading.Lock,
        latents: tuple[int, ...],
        names: TensorNames,
        kernels: tuple[Any, ...],
    ) -> None:
        self._cuda, self._stream, self._lock = cuda, stream, lock
        self.latents, self.names = tuple(latents), names
        self._count = math.prod(latents)
        self._model_input, self._advance, self._next_row = kernels
        self._slots: set[Slot] = set()
        self._free: list[DeviceBuffer] = []
        # Weak, as contexts belong to their session; a recorded step ends with its context.
        self._recorded = weakref.WeakKeyDictionary[DeviceContext, _RecordedStep]()
        self._event = cuda.make_event()
        # Arrays that copies read: those of the step on the stream, and those since.
        self._in_flight: list[Any] = []
        self._pending: list[Any] = []

    def add(self, latents: Latents, table: NDArray[np.float32], *, row: int = 0) -> Slot:
        """Let a sample join.

        Args:
            latents: before `row`, float32 in the loop's shape.
            table: of `loop_table`.
            row: where the sample begins; no row from there on may look back beyond it.

        Returns:
            The slot of the sample, for the other methods.

        Raises:
            ValueError: the latents have another shape or dtype, or the row cannot be begun at.
            BackendError: the device has no memory left.
        """
        self._check_latents("latents", latents)
        if not 0 <= row < len(table):
            raise ValueError(f"row: got {row} of a table of {len(table)}, expected 0 to {len(table) - 1}")
        if _looks_back_beyond(table, row):
            raise ValueError(f"row: got {row}, but the table looks back beyond it; begin at an earlier row")
        with self._lock:
            slot = Slot(
                self._free.pop() if self._free else DeviceBuffer(self._cuda, self._stream), self._count, table, row
            )
            slot.buffer.reserve(4 * slot.words)
            start = np.array([row, 0], np.int32).view(np.float32)
            self._upload(slot.address("row_index"), np.concatenate([start, latents.ravel(), table.ravel()]))
            self._slots.add(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        """Remove a sample. Its latents are lost unless they were fetched."""
        self._check_slots([slot])
        self._slots.remove(slot)
        self._free.append(slot.buffer)  # work already on the stream precedes the next owner's first copy

    def prepare(self, context: DeviceContext) -> None:
        """Allocate the memory of a step with this context ahead of time; `step` does so otherwise.

        Raises:
            BackendError: the engine's tensors do not suit this loop, or the device has no memory left.
        """
        with self._lock:
            self._recorded_step(context)

    def step(
        self,
        context: DeviceContext,
        evaluations: Mapping[Slot, tuple[int, ...]],
        inputs: Mapping[str, NDArray[Any]],
        *,
        concat: NDArray[np.float32] | None = None,
        noise: Mapping[Slot, Latents] = _NOTHING,
    ) -> None:
        """Put one row of some samples on the stream, each at its own row.

        Args:
            context: of the engine (`Session.device_context`), for the shapes of this batch. It may be another one at
                each step.
            evaluations: for each sample that takes part, the places of its evaluations in the batch: (negative,
                positive) for a guided row, (positive,) for a row without guidance. Places that belong to no sample pad
                the batch; their outputs are ignored.
            inputs: the engine's inputs beside latents and timesteps, for the whole batch. A read-only array that is the
                same object as at the context's last run is not copied again.
            concat: float32 [batch, C', H, W], the channels of the latents' input that follow the latents' own; copied
                as `inputs` are. None if there are none.
            noise: float32 in the loop's shape, z of every sample whose row adds noise.

        Raises:
            ValueError: a slot is not of this loop or has no rows left, or the places are not distinct places of the
                batch.
            FeedError: inputs, `concat` or noise are not those that the context and the loop expect.
            BackendError, EngineError: CUDA or the engine failed, or the engine's tensors do not suit this loop.
        """
        self._check_slots(evaluations)
        with self._lock:
            context.prepare()
            recorded = self._recorded_step(context)
            participants = _participants(evaluations, recorded.batch)
            self._check_feeds(context, recorded, inputs, concat)
            self._check_noise(evaluations, noise)
            self._feed(context, recorded, inputs, concat)
            for slot, z in noise.items():
                self._upload(slot.address("noise"), np.ascontiguousarray(z))
            if participants != recorded.uploaded:
                self._upload(recorded.slots, np.frombuffer(participants, np.uint8))
                recorded.uploaded = participants
            recorded.work.run(lambda: self._enqueue(context, recorded))
            if recorded.work.runs == 1:
                self._synchronize()
            else:
                self._cuda.wait(self._event)  # for the previous step, with this one on the stream already
                self._in_flight, self._pending = self._pending, []
            self._cuda.record(self._event, self._stream)
        for slot in evaluations:
            slot.row += 1

    def fetch(self, slot: Slot) -> tuple[Latents, int | None]:
        """Return the latents of a sample after its last row, and the first row that gave a value that is not finite.

        Returns:
            float32 in the loop's shape, the caller's own; and the index of the row, or None where all were finite.
        """
        self._check_slots([slot])
        words = np.empty(2 + self._count, np.float32)
        with self._lock:
            self._cuda.download(words, slot.address("row_index"), self._stream)
            self._synchronize()
        nonfinite_row = int(words[1:2].view(np.int32)[0])
        return words[2:].reshape(self.latents), nonfinite_row - 1 if nonfinite_row else None

    def replace(self, slot: Slot, latents: Latents) -> None:
        """Continue a sample from other latents, float32 in the loop's shape; its history stays."""
        self._check_slots([slot])
        self._check_latents("latents", latents)
        with self._lock:
            self._upload(slot.address("latents"), np.array(latents, order="C"))

    def close(self) -> None:
        """Free the loop's device memory. No slot is valid afterwards."""
        with self._lock:
            self._synchronize()
            for recorded in self._recorded.values():
                recorded.work.reset()
            self._recorded.clear()
            for buffer in (*self._free, *(slot.buffer for slot in self._slots)):
                buffer.close()
            self._free, self._slots = [], set()

    def contexts(self) -> list[DeviceContext]:
        """Return the contexts that the loop has recorded steps of."""
        return list(self._recorded)

    def clear(self) -> None:
        """Remove all samples."""
        for slot in list(self._slots):
            self.remove(slot)

    def _recorded_step(self, context: DeviceContext) -> _RecordedStep:
        if context not in self._recorded:
            self._recorded[context] = _RecordedStep(self._cuda, self._stream, context, self.names, self._count)
        recorded = self._recorded[context]
        if recorded.epoch != context.epoch:
            recorded.work.reset()
            recorded.epoch = context.epoch
        return recorded

    def _feed(
        self,
        context: DeviceContext,
        recorded: _RecordedStep,
        inputs: Mapping[str, NDArray[Any]],
        concat: NDArray[np.float32] | None,
    ) -> None:
        context.forget(self.names.timesteps)
        if concat is None:
            context.forget(self.names.latents)
        else:
            self._pending.append(context.feed(self.names.latents, concat, first_channel=recorded.channels))
        self._pending += [context.feed(name, array) for name, array in inputs.items()]

    def _enqueue(self, context: DeviceContext, recorded: _RecordedStep) -> None:
        names, count, batch = self.names, self._count, recorded.batch
        tensors = (context.address(names.latents), context.address(names.timesteps))
        launch, stream = self._cuda.launch_kernel, self._stream
        addresses = (*tensors, recorded.slots, recorded.slot_of)
        launch(self._model_input, batch * count, stream, addresses, (count, recorded.stride, batch))
        context.enqueue()
        launch(self._advance, batch * count, stream, (recorded.slots, context.address(names.output)), (count, batch))
        launch(self._next_row, batch, stream, (recorded.slots,), (batch,))

    def _upload(self, address: int, array: NDArray[Any]) -> None:
        self._pending.append(array)
        self._cuda.upload(address, array, self._stream)

    def _synchronize(self) -> None:
        self._cuda.synchronize(self._stream)
        self._in_flight, self._pending = [], []

    def _check_slots(self, slots: Any) -> None:
        for slot in slots:
            if slot not in self._slots:
                raise ValueError("slot: got one that was removed or belongs to another loop")

    def _check_latents(self, name: str, latents: Latents) -> None:
        if latents.dtype != np.float32 or latents.shape != self.latents:
            raise ValueError(f"{name}: got {latents.dtype} {latents.shape}, expected float32 {self.latents}")

    def _check_noise(self, evaluations: Mapping[Slot, tuple[int, ...]], noise: Mapping[Slot, Latents]) -> None:
        if any(slot.adds_noise[slot.row] and slot not in noise for slot in evaluations):
            raise FeedError(f"noise: got none for a row that adds noise, expected float32 {self.latents}")
        for slot, z in noise.items():
            if slot not in evaluations or z.dtype != np.float32 or z.shape != self.latents:
                raise FeedError(
                    f"noise: got {z.dtype} {z.shape}, expected float32 {self.latents} for a slot that steps"
                )

    def _check_feeds(
        self,
        context: DeviceContext,
        recorded: _RecordedStep,
        inputs: Mapping[str, NDArray[Any]],
        concat: NDArray[np.float32] | None,
    ) -> None:
        expected = {
            spec.name: (spec.dtype, context.shapes[spec.name])
            for spec in context.inputs
            if spec.name not in (self.names.latents, self.names.timesteps)
        }
        got = {name: (array.dtype.name, array.shape) for name, array in inputs.items()}
        if got != expected:
            raise FeedError(f"inputs: got {got}, expected {expected}")
        batch, channels, *rest = context.shapes[self.names.latents]
        extra = channels - recorded.channels
        wanted = ("float32", (batch, extra, *rest)) if extra else None
        found = None if concat is None else (concat.dtype.name, concat.shape)
        if found != wanted:
            raise FeedError(f"concat: got {found}, expected {wanted}")


class LoopPool:
    """Idle device-resident loops of one device, kept with their memory and their recorded steps.

    Args:
        lock: of the device, held while work that belongs together is put on the stream.
    """

    def __init__(self, cuda: Cuda, stream: Any, lock: threading.Lock) -> None:
        self._cuda, self._stream, self._device_lock = cuda, stream, lock
        self._lock = threading.Lock()
        self._idle: list[DeviceLoop] = []
        self._kernels: tuple[Any, ...] | None = None

    def take(self, latents: tuple[int, ...], names: TensorNames) -> DeviceLoop:
        """Return an idle loop, or a new one.

        Args:
            latents: shape of one sample's latents, without a batch axis: (C, H, W).
            names: of the denoiser's tensors.

        Raises:
            BackendError: the driver does not load the kernels.
        """
        with self._lock:
            for loop in self._idle:
                if (loop.latents, loop.names) == (tuple(latents), names):
                    self._idle.remove(loop)
                    return loop
        return DeviceLoop(self._cuda, self._stream, self._device_lock, latents, names, self.load_kernels())

    def put_back(self, loop: DeviceLoop) -> None:
        """Remove the loop's samples and keep it for others. The loop idle for longest is closed when there are many."""
        loop.clear()
        for context in loop.contexts():
            context.keep_compiled()
        with self._lock:
            self._idle.append(loop)
            evicted = self._idle.pop(0) if len(self._idle) > _MAX_IDLE else None
        if evicted is not None:
            evicted.close()

    def load_kernels(self) -> tuple[Any, ...]:
        """Compile the kernels for this GPU, once.

        Raises:
            BackendError: the driver does not load them.
        """
        with self._lock:
            if self._kernels is None:
                self._kernels = self._cuda.load_kernels(_ptx(), *_KERNELS)
            return self._kernels


def _ptx() -> bytes:
    return resources.files("latentrt.backends.cuda").joinpath("row.ptx").read_bytes()


def _looks_back_beyond(table: NDArray[np.float32], row: int) -> bool:
    """Return whether a row from `row` on uses latents or history from before it."""
    age = np.arange(len(table) - row)[:, np.newaxis]  # rows computed before each row, from `row` on
    weights = table[row:, _HISTORY:]
    return bool(table[row, _SCALARS.index("e")] != 0 or np.any(weights[np.arange(weights.shape[1]) > age] != 0))


def _participants(evaluations: Mapping[Slot, tuple[int, ...]], batch: int) -> bytes:
    """Return the slots [batch] that take part in a step, and the slot's index of each evaluation, int32 [batch]."""
    places = [place for each in evaluations.values() for place in each]
    if not places or len({*places}) != len(places) or not all(0 <= place < batch for place in places):
        raise ValueError(f"evaluations: got places {places}, expected distinct ones in a batch of {batch}")
    slots, slot_of = np.zeros(batch, _SLOT), np.zeros(batch, np.int32)
    slots["positive"] = -1
    for index, (slot, own) in enumerate(evaluations.items()):
        if len(own) not in (1, 2) or slot.row >= slot.rows:
            raise ValueError(
                f"evaluations: got {len(own)} for row {slot.row} of {slot.rows}, expected one or two for a row that is "
                "left"
            )
        slots[index] = slot.describe(own)
        slot_of[list(own)] = index
    return slots.tobytes() + slot_of.tobytes()
