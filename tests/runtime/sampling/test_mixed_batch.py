"""Samples of different tables in one batch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentrt.sampling.mixed_batch import MixedBatch, Sample

from latentrt.sampling import samplers
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents, Schedule, denoise
from tests.runtime.sampling.sampler_grid import ON_DISK, ORDINARY

SHAPE = (4, 3, 5)
MORE: dict[str, Any] = {"thresholding": True, "sample_max_value": 1.7}


def model(timesteps: Any, shown: Latents) -> Latents:
    """Not linear, different for each timestep, and each sample's output its own."""
    scale = np.asarray(timesteps, np.float32).reshape(-1, 1, 1, 1) / np.float32(1000)
    return np.asarray(np.tanh(shown[:, ::-1]) + scale * shown)


class Request:
    """A table, a row to begin at, and noise of its own."""

    def __init__(self, seed: int, schedule: Schedule, row: int = 0) -> None:
        self.seed, self.schedule, self.row = seed, schedule, row

    def start(self) -> tuple[Latents, Any]:
        generator = Generator(self.seed)
        scale = np.hypot(self.schedule.alpha[self.row], self.schedule.sigma[self.row])
        return generator.normal(SHAPE) * np.float32(scale), lambda: generator.normal(SHAPE)

    def alone(self) -> Latents:
        latents, noise = self.start()
        table = self.schedule.starting_at(self.row)
        *_, last = denoise(table, latents[np.newaxis], lambda t, x: model([t], x), lambda: noise()[np.newaxis])
        return np.asarray(last[0])

    def join(self, batch: MixedBatch) -> Sample:
        latents, noise = self.start()
        return batch.add(self.schedule, latents, row=self.row, noise=noise)


def request(seed: int, name: str, steps: Steps, config: dict[str, Any] | None = None) -> Request:
    return Request(seed, samplers.schedule(name, ON_DISK | (config or {}), steps))


def drawn(requests: list[Request], joins: list[int]) -> dict[int, Latents]:
    """What each request gets if it joins at its step."""
    batch, waiting, done = MixedBatch(), sorted(zip(joins, range(len(requests)), strict=True)), {}
    seeds: dict[Sample, int] = {}
    step = 0
    while waiting or batch.samples:
        while waiting and (waiting[0][0] <= step or not batch.samples):
            index = waiting.pop(0)[1]
            seeds[requests[index].join(batch)] = requests[index].seed
        timesteps, shown = batch.show()
        for sample in batch.step(model(timesteps, shown)):
            done[seeds[sample]] = sample.latents
        step += 1
    return done


def test_every_sampler_at_once_is_as_if_alone() -> None:
    """All samplers of a trained model, each with another number of steps, some from the middle, one with limits."""
    requests = [
        request(seed, name, Steps(count=3 + 2 * seed, begin=seed % 3)) for seed, name in enumerate(ORDINARY, start=1)
    ]
    requests.append(request(90, "ddim", Steps(count=7, eta=1.0), MORE))
    requests.append(request(91, "dpmpp_2m", Steps(count=9), MORE | {"solver_order": 3}))
    requests.append(request(92, "unipc", Steps(count=11, begin=4), {"use_karras_sigmas": True}))
    done = drawn(requests, [seed % 5 for seed in range(len(requests))])
    for each in requests:
        np.testing.assert_array_equal(done[each.seed], each.alone())


@settings(deadline=None, max_examples=30)
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from(ORDINARY), st.integers(5, 12), st.integers(0, 4), st.integers(0, 15)),
        min_size=1,
        max_size=6,
    )
)
def test_any_mixture_is_as_if_alone(wanted: list[tuple[str, int, int, int]]) -> None:
    requests = [
        request(seed, name, Steps(count=count, begin=begin)) for seed, (name, count, begin, _) in enumerate(wanted)
    ]
    done = drawn(requests, [join for *_, join in wanted])
    for each in requests:
        np.testing.assert_array_equal(done[each.seed], each.alone())


def test_a_table_without_memory_may_be_entered_at_any_row() -> None:
    schedule = samplers.schedule("euler_a", ON_DISK, 9)
    entered = [Request(seed, schedule, row) for seed, row in enumerate((0, 4, 8))]
    done = drawn(entered, [0, 1, 2])
    for each in entered:
        np.testing.assert_array_equal(done[each.seed], each.alone())


def test_one_sample_s_infinity_is_its_own() -> None:
    batch, schedule = MixedBatch(), samplers.schedule("dpmpp_2m", ON_DISK, 4)
    broken = batch.add(schedule, np.full(SHAPE, np.inf, np.float32))
    whole = Request(3, samplers.schedule("pndm", ON_DISK, 6))
    sample = whole.join(batch)
    while batch.samples:
        timesteps, shown = batch.show()
        with np.errstate(invalid="ignore"):
            batch.step(model(timesteps, shown))
    np.testing.assert_array_equal(sample.latents, whole.alone())
    assert not np.all(np.isfinite(broken.latents))


@pytest.mark.parametrize(
    ("latents", "more", "words"),
    [
        (np.zeros((4, 3, 6), np.float32), {}, "found float32 (4, 3, 6), expected float32 (4, 3, 5)"),
        (np.zeros(SHAPE, np.float64), {}, "found float64"),
        (np.zeros(SHAPE, np.float32), {"row": 6}, "found row 6 of a table of 6, expected 0 to 5"),
        (np.zeros(SHAPE, np.float32), {}, "found no noise for a table that draws some"),
    ],
    ids=str,
)
def test_what_cannot_join_is_refused(latents: Any, more: dict[str, Any], words: str) -> None:
    batch = MixedBatch()
    Request(1, samplers.schedule("ddim", ON_DISK, 3)).join(batch)
    with pytest.raises(ValueError, match=re.escape(words)):
        batch.add(samplers.schedule("euler_a", ON_DISK, 6), latents, **more)


def test_a_row_that_looks_back_too_far_is_refused() -> None:
    batch = MixedBatch()
    for name, row in (("dpmpp_2m", 4), ("heun", 3), ("pndm", 4)):
        with pytest.raises(ValueError, match=rf"found row {row} of a table that looks back .*`Steps\.begin`"):
            Request(1, samplers.schedule(name, ON_DISK, 8), row=row).join(batch)
    assert not batch.samples


def test_samples_may_join_and_leave_while_the_model_is_asked() -> None:
    batch = MixedBatch()
    stays, leaves, joins = (request(seed, "dpmpp_2m", Steps(count=5)) for seed in (1, 2, 3))
    kept, left = stays.join(batch), leaves.join(batch)
    shown = batch.show()
    batch.cancel(left)
    late = joins.join(batch)
    batch.step(model(*shown))
    assert (kept.row, left.row, late.row) == (1, 0, 0)
    while batch.samples:
        batch.step(model(*batch.show()))
    for each, sample in ((stays, kept), (joins, late)):
        np.testing.assert_array_equal(sample.latents, each.alone())
    with pytest.raises(ValueError, match="not in list"):
        batch.cancel(left)


def test_outputs_of_another_shape_are_refused_and_asked_for_again() -> None:
    batch = MixedBatch()
    asked = Request(1, samplers.schedule("ddim", ON_DISK, 1))
    sample = asked.join(batch)
    with pytest.raises(ValueError, match=r"outputs: found .* expected a call of show before"):
        batch.step(np.zeros((1, *SHAPE), np.float32))
    shown = batch.show()
    with pytest.raises(ValueError, match=r"outputs: found \(2, 4, 3, 5\), expected \(1, 4, 3, 5\)"):
        batch.step(np.zeros((2, *SHAPE), np.float32))
    assert batch.step(model(*shown)) == [sample]
    np.testing.assert_array_equal(sample.latents, asked.alone())
    with pytest.raises(ValueError, match="found no samples under way"):
        batch.show()
