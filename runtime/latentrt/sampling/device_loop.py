"""The sampling loop on a device: latents, schedules and row indices stay there from row to row."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.backends.cuda.device_loop import COLUMNS, TensorNames, loop_table
from latentrt.errors import BackendError
from latentrt.sampling.denoiser import Conditioning, WholeDenoiser, not_finite
from latentrt.sampling.loop import Resident, Sample

if TYPE_CHECKING:
    from latentrt.backends.cuda.device_loop import DeviceContext, DeviceLoop, LoopPool, Slot
    from latentrt.backends.session import Session
    from latentrt.sampling.schedule import Latents

__all__ = ["DeviceDenoiser"]

_log = logging.getLogger("latentrt")


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

    The device computes every row without dynamic thresholding, and guidance of the form negative + w · (positive −
    negative). A sample with an `after_row` callback (the blend of inpainting) goes through the host, and so does every
    sample where the driver does not load the kernels or no memory is left.

    A sample joins at its first step, and leaves after its last row, when it is garbage collected, or when the denoiser
    is closed.
    """

    def __init__(self, session: Session, *, latents: str, timestep: str, output: str) -> None:
        super().__init__(session, latents=latents, timestep=timestep, output=output)
        self._names = TensorNames(latents=latents, timesteps=timestep, output=output)
        self._loops: dict[tuple[int, ...], tuple[LoopPool, DeviceLoop]] = {}  # by the shape of the latents
        self._residents: dict[weakref.ref[Sample], _OnDevice] = {}
        self._through_host = weakref.WeakSet[Sample]()
        self._rejected: set[tuple[Any, int]] = set()  # signatures and batch sizes that the device does not run

    def step_on_device(self, samples: Sequence[Sample]) -> list[Sample]:
        self._remove_abandoned()
        groups: dict[Any, list[Sample]] = {}
        left = []
        for sample in samples:
            if self._fits(sample):
                groups.setdefault((sample.evaluations()[0].signature, sample.shape), []).append(sample)
            else:
                left.append(sample)
        for (signature, _), group in groups.items():
            left += self._step_group(signature, group)
        for sample in samples:
            if sample.done:
                self._leave(sample)
        return left

    def close(self) -> None:
        for reference in list(self._residents):
            if (sample := reference()) is not None:
                sample.leave_device()
        self._residents.clear()
        for pool, loop in self._loops.values():
            pool.put_back(loop)
        self._loops.clear()

    def _fits(self, sample: Sample) -> bool:
        """Return whether the device can compute every row that is left."""
        if weakref.ref(sample) in self._residents:
            return True
        if sample in self._through_host:
            return False
        kinds = sample.all_evaluations()
        signature, most = kinds[0][0].signature, max(map(len, kinds))
        fits = (
            sample.guidance.device_scale() is not None
            and sample.after_row is None
            and all(each.signature == signature for kind in kinds for each in kind)
            and not np.any(sample.schedule.quantile)
            and not sample.schedule.looks_back_beyond(sample.row)  # the rows before were computed on the host
            and max(self._device_sizes(signature, most), default=0) >= most
        )
        if not fits:
            self._through_host.add(sample)
        return fits

    def _device_sizes(self, signature: Any, count: int) -> list[int]:
        """Return the batch sizes that the device may run, ascending."""
        sizes = self._sizes_to_use(signature, count) or ()
        return [size for size in sizes if (signature, size) not in self._rejected]

    def _step_group(self, signature: Any, group: list[Sample]) -> list[Sample]:
        """Advance samples of one signature, in batches of whole samples; return those that cannot be on the device.

        Raises:
            BackendError: no memory is left for a sample that is on the device already.
        """
        left, waiting = list[Sample](), group
        while waiting:
            sizes = self._device_sizes(signature, len(waiting))
            batch, waiting = _split(waiting, max(sizes, default=0))
            if not batch:
                sample, *waiting = waiting
                self._go_through_host(sample)
                left.append(sample)
                continue
            size = min(size for size in sizes if size >= sum(len(sample.evaluations()) for sample in batch))
            context = self._open_context(signature, size, batch[0].shape)
            if context is None:
                self._rejected.add((signature, size))
                waiting = batch + waiting
                continue
            joined = [sample for sample in batch if self._join(sample)]
            left += [sample for sample in batch if sample not in joined]
            if joined:
                self._step_batch(context, joined, size)
        return left

    def _open_context(self, signature: Any, size: int, shape: tuple[int, ...]) -> DeviceContext | None:
        """Return the context of a batch, and open a loop for the latents; None if the device does not run it."""
        context: DeviceContext | None = self.session.device_context(self.shapes(signature, size))
        if context is None:
            return None
        try:
            if shape not in self._loops:
                self._loops[shape] = (context.loops, context.loops.take(shape, self._names))
            pool, loop = self._loops[shape]
            if pool is not context.loops:
                return None  # an engine of another library, with a stream of its own
            loop.prepare(context)
        except BackendError as error:
            _log.info("latents do not stay on the device: %s", error)
            return None
        return context

    def _join(self, sample: Sample) -> bool:
        """Move a sample to the device, unless it is there; return False where no memory is left."""
        if weakref.ref(sample) in self._residents:
            return True
        _, loop = self._loops[sample.shape]
        scale = sample.guidance.device_scale()
        assert scale is not None, "checked by _fits"
        table = loop_table({name: getattr(sample.schedule, name) for name in COLUMNS}, scale)
        try:
            slot = loop.add(sample.latents, table, row=sample.row)
        except BackendError as error:
            _log.info("latents do not stay on the device: %s", error)
            self._through_host.add(sample)
            return False
        self._residents[weakref.ref(sample)] = resident = _OnDevice(loop, slot, sample)
        sample.join_device(resident)
        return True

    def _go_through_host(self, sample: Sample) -> None:
        if weakref.ref(sample) in self._residents:
            raise BackendError("no memory is left on the device for the next step; generate fewer or smaller images")
        self._through_host.add(sample)

    def _leave(self, sample: Sample) -> None:
        resident = self._residents.pop(weakref.ref(sample), None)
        if resident is not None:
            sample.leave_device()
            resident.loop.remove(resident.slot)

    def _remove_abandoned(self) -> None:
        for reference in [each for each in self._residents if each() is None]:
            resident = self._residents.pop(reference)
            resident.loop.remove(resident.slot)

    def _step_batch(self, context: DeviceContext, batch: Sequence[Sample], size: int) -> None:
        places: dict[Slot, tuple[int, ...]] = {}
        noise: dict[Slot, Latents] = {}
        conditionings: list[Conditioning] = []
        for sample in batch:
            slot, evaluations = self._residents[weakref.ref(sample)].slot, sample.evaluations()
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
        concat = self._stack(self.latents, extra) if extra else None
        _, loop = self._loops[batch[0].shape]
        loop.step(context, places, inputs, concat=concat, noise=noise)
        for sample in batch:
            sample.row += 1


def _split(samples: list[Sample], largest: int) -> tuple[list[Sample], list[Sample]]:
    """Split into the samples whose evaluations fit in a batch of the largest size, and the others."""
    count = 0
    for index, sample in enumerate(samples):
        count += len(sample.evaluations())
        if count > largest:
            return samples[:index], samples[index:]
    return samples, []
