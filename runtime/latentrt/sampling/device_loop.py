"""The sampling loop on a device: latents, schedules and rows of samples stay there from row to row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.backends.cuda.device_loop import COLUMNS, DeviceLoop, LoopPool, Slot, TensorNames, loop_table
from latentrt.sampling.denoiser import Conditioning, Evaluation, WholeDenoiser, not_finite
from latentrt.sampling.loop import Resident, Sample

if TYPE_CHECKING:
    from latentrt.backends.session import Session
    from latentrt.sampling.schedule import Latents

__all__ = ["DeviceDenoiser"]


class _OnDevice(Resident):
    """A sample in a slot of a device-resident loop."""

    def __init__(self, loop: DeviceLoop, slot: Slot, sample: Sample) -> None:
        self.loop, self.slot, self._schedule = loop, slot, sample.schedule

    def fetch(self) -> Latents:
        latents, nonfinite_row = self.loop.fetch(self.slot)
        if nonfinite_row is not None:
            raise not_finite(self._schedule.t[nonfinite_row])
        return latents

    def replace(self, latents: Latents) -> None:
        self.loop.replace(self.slot, latents)


class DeviceDenoiser(WholeDenoiser):
    """A denoiser on engines. Samples whose every row the device can compute stay there; others go through the host.

    The device computes every row but dynamic thresholding, and guidance of the form negative + w · (positive −
    negative). A sample that something is done to after each row (the blend of inpainting) goes through the host.
    """

    def __init__(self, session: Session, *, latents: str, timestep: str, output: str) -> None:
        super().__init__(session, latents=latents, timestep=timestep, output=output)
        self._names = TensorNames(latents=latents, timesteps=timestep, output=output)
        self._loops: dict[tuple[int, ...], tuple[LoopPool, DeviceLoop]] = {}
        self._residents: dict[Sample, _OnDevice] = {}
        self._through_host: set[Sample] = set()

    def step_on_device(self, samples: Sequence[Sample]) -> list[Sample]:
        groups: dict[Any, list[tuple[Sample, list[Evaluation]]]] = {}
        left = []
        for sample in samples:
            evaluations = sample.evaluations()
            if sample in self._residents or self._join(sample, evaluations):
                groups.setdefault(evaluations[0].signature, []).append((sample, evaluations))
            else:
                left.append(sample)
        for signature, group in groups.items():
            for batch, size in self._split(signature, group):
                self._step_batch(signature, batch, size)
        return left

    def close(self) -> None:
        for sample in self._residents:
            sample.leave_device()
        self._residents.clear()
        for pool, loop in self._loops.values():
            pool.put_back(loop)
        self._loops.clear()

    def _join(self, sample: Sample, evaluations: list[Evaluation]) -> bool:
        """Move a sample to the device, if every one of its rows can be computed there."""
        if sample in self._through_host:
            return False
        scale = sample.guidance.device_scale()
        signatures = {evaluation.signature for evaluation in evaluations}
        on_host = scale is None or sample.after_row is not None or sample.deep_cache > 1 or len(signatures) > 1
        context = None
        if not on_host and not np.any(sample.schedule.quantile):
            (signature,) = signatures
            sizes = self._session_sizes(signature, len(evaluations))
            fitting = [size for size in sizes or () if size >= len(evaluations)]
            if fitting:
                context = self.session.device_context(self.shapes(signature, fitting[0]))
        if context is None or scale is None:
            self._through_host.add(sample)
            return False
        shape = sample.latents.shape
        if shape not in self._loops:
            self._loops[shape] = (context.loops, context.loops.take(shape, self._names))
        _, loop = self._loops[shape]
        table = loop_table({name: getattr(sample.schedule, name) for name in COLUMNS}, scale)
        slot = loop.add(sample.latents, table, row=sample.row)
        self._residents[sample] = resident = _OnDevice(loop, slot, sample)
        sample.join_device(resident)
        return True

    def _session_sizes(self, signature: Any, count: int) -> tuple[int, ...] | None:
        if signature not in self._sizes:
            self._sizes[signature] = self._batch_sizes(self.shapes(signature, count))
        return self._sizes[signature]

    def _split(
        self, signature: Any, group: list[tuple[Sample, list[Evaluation]]]
    ) -> Iterator[tuple[list[tuple[Sample, list[Evaluation]]], int]]:
        """Split into batches of whole samples, each with the size to pad to."""
        sizes = self._session_sizes(signature, 1) or ()
        batch: list[tuple[Sample, list[Evaluation]]] = []
        count = 0
        for sample, evaluations in group:
            if batch and count + len(evaluations) > sizes[-1]:
                yield batch, next(size for size in sizes if size >= count)
                batch, count = [], 0
            batch.append((sample, evaluations))
            count += len(evaluations)
        yield batch, next(size for size in sizes if size >= count)

    def _step_batch(self, signature: Any, batch: list[tuple[Sample, list[Evaluation]]], size: int) -> None:
        places: dict[Slot, tuple[int, ...]] = {}
        noise: dict[Slot, Latents] = {}
        conditionings: list[Conditioning] = []
        for sample, evaluations in batch:
            slot = self._residents[sample].slot
            places[slot] = tuple(range(len(conditionings), len(conditionings) + len(evaluations)))
            conditionings += [evaluation.conditioning for evaluation in evaluations]
            z = sample.draw_noise()
            if z is not None and slot.adds_noise[slot.row]:
                noise[slot] = z
        conditionings += [conditionings[-1]] * (size - len(conditionings))
        inputs = {
            name: self._stack(name, [each.inputs[name] for each in conditionings]) for name in conditionings[0].inputs
        }
        extra = [each.concat for each in conditionings if each.concat is not None]
        context = self.session.device_context(self.shapes(signature, size))
        assert context is not None, "the sample joined with a context of this engine"
        loop = self._residents[batch[0][0]].loop
        loop.step(context, places, inputs, concat=self._stack("concat", extra) if extra else None, noise=noise)
        for sample, _ in batch:
            sample.row += 1
