"""The device-resident loop: row.cu, compiled for the host, compared with numpy's recurrence.

Both round every product and every sum to float32 in the same order, so they agree to the bit.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.cuda import device_loop
from latentrt.backends.cuda.device_loop import COLUMNS, DeviceLoop, Slot, TensorNames, loop_table
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.tensorrt.context import EngineContext
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.backends.tensorrt.session import EngineSession
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.record import LibraryName, ShapeRange
from latentrt.errors import BackendError, FeedError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents, Recurrence, Schedule
from latentrt_engines.profiles import component_profile, image_profile
from tests.engines import made_up
from tests.runtime.backends import fake_cuda
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import FUNCTIONS, fake_library, fake_plan, function_plan

Arrays = dict[str, NDArray[Any]]

SHAPE = (2, 3, 5)
NAMES = TensorNames(latents="x", timesteps="t", output="y")
TRAINING = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
# One for each way to fill a row: history, earlier latents, noise, mixtures, second stages.
SAMPLERS = ["ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_sde", "dpmpp_2s", "deis", "unipc"]
SAMPLERS += ["sa_solver", "lms", "tcd"]


def evaluate(x: NDArray[np.float32], t: np.float32, text: NDArray[np.float32]) -> Latents:
    """Return the output of a made-up denoiser for one evaluation; not linear, and different for each input."""
    x = x.copy()
    latents, concat = x[: SHAPE[0]], x[SHAPE[0] :]
    with np.errstate(invalid="ignore"):
        bent = latents[::-1] / (1 + np.abs(latents)) + t / np.float32(1000) * latents
        return np.asarray(bent + text.copy().sum() / 8 + concat.sum(axis=0) / 4, np.float32)


def evaluate_batch(feeds: Arrays) -> Arrays:
    return {"y": np.stack([evaluate(*each) for each in zip(feeds["x"], feeds["t"], feeds["text"], strict=True)])}


FUNCTIONS["a denoiser"] = evaluate_batch


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def api() -> FakeCudaApi:
    return FakeCudaApi()


def made_up_device(api: FakeCudaApi, library: LibraryName = "tensorrt") -> EngineDevice:
    return EngineDevice(fake_library(api, library), api.cuda)


def denoiser(
    device: EngineDevice,
    bundle: Bundle,
    *,
    concat: int = 0,
    dtype: Any = "float32",
    cache: RuntimeCache | None = None,
) -> EngineSession:
    """Return an engine of the made-up denoiser, whose latents' input has `concat` channels beside the latents' own."""
    shapes: dict[str, tuple[int, ...]] = {"x": (SHAPE[0] + concat, *SHAPE[1:]), "t": (), "text": (3, 2)}
    profile = {name: ShapeRange(min=(1, *rest), opt=(2, *rest), max=(12, *rest)) for name, rest in shapes.items()}
    inputs = tuple(TensorSpec(name, dtype, ("batch", *rest)) for name, rest in shapes.items())
    record = msgspec.structs.replace(
        made_up.record(bundle, made_up.identity(bundle, "unet", profile=profile)),
        inputs=inputs,
        outputs=(TensorSpec("y", "float32", ("batch", *SHAPE)),),
    )
    return EngineSession(device, function_plan("a denoiser", record), record, cache)


def context_of(session: EngineSession, batch: int) -> EngineContext:
    shapes = {spec.name: (batch, *(int(axis) for axis in spec.shape[1:])) for spec in session.inputs}
    context = session.device_context(shapes)
    assert context is not None
    return context


def open_loop(device: EngineDevice) -> DeviceLoop:
    return device.loops.take(SHAPE, NAMES)


def columns(schedule: Schedule) -> Arrays:
    return {name: getattr(schedule, name) for name in COLUMNS}


def sampler(name: str, count: int) -> Schedule:
    return samplers.schedule(name, TRAINING, Steps(count=count, eta=0.7 if name == "ddim" else None))


def random_schedule(rng: np.random.Generator) -> Schedule:
    """Return a table in which any coefficient may be zero, with a history of none to four rows."""
    rows, memory = int(rng.integers(1, 8)), int(rng.integers(0, 5))

    def column() -> NDArray[np.float64]:
        return np.where(rng.random(rows) < 0.3, 0.0, rng.uniform(-0.6, 0.6, rows))

    e, weights = column(), np.array([column() for _ in range(memory)]).reshape(memory, rows).T
    e[0], weights[np.arange(memory) > np.arange(rows)[:, np.newaxis]] = 0.0, 0.0
    limit = np.where(rng.random(rows) < 0.5, np.inf, rng.uniform(0.1, 1.0, rows))
    names = ("p", "q", "u", "w", "a", "d", "s")
    return Schedule(
        t=rng.integers(0, 1000, rows).astype(np.float32),
        c_in=rng.uniform(0.5, 1.0, rows),
        limit=limit,
        quantile=np.zeros(rows),
        e=e,
        b=weights,
        noise_draws=np.ones(rows, np.int64),
        alpha=np.ones(rows),
        sigma=np.zeros(rows),
        init_noise_sigma=1.0,
        **{name: column() for name in names},
    )


@dataclass(eq=False)
class Sample:
    """A sample of the made-up denoiser.

    Attributes:
        guided: whether each row is guided.
        texts: of the negative and the positive evaluation.
        joins: the step at which it joins.
        waits: steps in which it takes no part.
    """

    schedule: Schedule
    seed: int
    scale: float = 3.7
    guided: Sequence[bool] = ()
    concat: int = 0
    joins: int = 0
    waits: frozenset[int] = frozenset()
    texts: tuple[NDArray[np.float32], ...] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.guided = self.guided or [True] * len(self.schedule)
        self.start = rng.standard_normal(SHAPE, np.float32)
        self.texts = tuple(rng.standard_normal((3, 2), np.float32) for _ in range(2))
        self.channels = rng.standard_normal((self.concat, *SHAPE[1:]), np.float32)
        self.noise = [rng.standard_normal(SHAPE, np.float32) for _ in self.schedule.t]

    def used_texts(self, row: int) -> tuple[NDArray[np.float32], ...]:
        return self.texts if self.guided[row] else self.texts[1:]

    def on_host(self) -> list[Latents]:
        """Return the latents after each row, of `Recurrence`."""
        x, recurrence, steps = self.start, Recurrence(self.schedule), []
        for k, t in enumerate(self.schedule.t):
            shown = np.concatenate([np.zeros_like(x) + np.float32(self.schedule.c_in[k]) * x, self.channels])
            *negative, positive = (evaluate(shown, t, text) for text in self.used_texts(k))
            m = negative[0] + np.float32(self.scale) * (positive - negative[0]) if negative else positive
            x = recurrence.step(k, x, m, self.noise[k])
            steps.append(x)
        return steps

    def join(self, loop: DeviceLoop) -> Slot:
        return loop.add(self.start, loop_table(columns(self.schedule), self.scale))


class Batch:
    """Runs samples on the device, step by step. Padding has values that are not numbers.

    Args:
        rng: shuffles the places in the batch and pads it by up to two; None for neither.
    """

    def __init__(self, session: EngineSession, loop: DeviceLoop, rng: np.random.Generator | None = None) -> None:
        self.session, self.loop, self.rng, self.slots = session, loop, rng, dict[Sample, Slot]()

    def step(self, samples: Sequence[Sample]) -> None:
        texts = [text for sample in samples for text in sample.used_texts(self.slots[sample].row)]
        owners = [sample for sample in samples for _ in sample.used_texts(self.slots[sample].row)]
        batch = len(texts) + (int(self.rng.integers(0, 3)) if self.rng else 0)
        places = [int(each) for each in (self.rng.permutation(batch) if self.rng else range(batch))]
        stacked = np.full((batch, 3, 2), np.nan, np.float32)
        channels = np.full((batch, *owners[0].channels.shape), np.nan, np.float32)
        evaluations: dict[Slot, tuple[int, ...]] = {}
        for place, owner, text in zip(places, owners, texts, strict=False):
            slot = self.slots[owner]
            evaluations[slot] = (*evaluations.get(slot, ()), place)
            stacked[place], channels[place] = text, owner.channels
        self.loop.step(
            context_of(self.session, batch),
            evaluations,
            {"text": stacked},
            concat=channels if channels.size else None,
            noise={self.slots[sample]: sample.noise[self.slots[sample].row] for sample in samples},
        )

    def run(self, samples: Sequence[Sample]) -> list[Latents]:
        """Return each sample's last latents; each joins at its step and leaves when it is done."""
        done: dict[Sample, Latents] = {}
        step = 0
        while len(done) < len(samples):
            for sample in samples:
                if sample.joins == step:
                    self.slots[sample] = sample.join(self.loop)
            if active := [sample for sample in self.slots if step not in sample.waits]:
                self.step(active)
            for sample in active:
                if self.slots[sample].row == len(sample.schedule):
                    done[sample], nonfinite = self.loop.fetch(self.slots[sample])
                    assert nonfinite is None
                    self.loop.remove(self.slots.pop(sample))
            step += 1
        return [done[sample] for sample in samples]


def assert_same_bits(found: Latents, expected: Latents) -> None:
    np.testing.assert_array_equal(found, expected)  # for its message
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("concat", [0, 3])
@pytest.mark.parametrize("seed", range(12))
def test_a_mix_of_samples_equals_each_alone_and_the_recurrence(
    bundle: Bundle, api: FakeCudaApi, seed: int, concat: int
) -> None:
    """Tables of different lengths and depths, guided and unguided rows, noise, padding; samples join and wait."""
    rng = np.random.default_rng([seed, concat])
    samples = []
    for index in range(5):
        schedule = random_schedule(rng) if index else sampler(SAMPLERS[seed], 4)
        guided = [bool(each) for each in rng.random(len(schedule)) < 0.6]
        waits = frozenset(int(each) for each in rng.integers(0, 9, 2))
        scale = float(rng.uniform(1, 9))
        joins = int(rng.integers(0, 6))
        samples.append(Sample(schedule, 100 * seed + index, scale, guided, concat, joins, waits))
    session = denoiser(made_up_device(api), bundle, concat=concat)
    loop = open_loop(session.device)
    mixed = Batch(session, loop, rng).run(samples)
    for sample, found in zip(samples, mixed, strict=True):
        (alone,) = Batch(session, loop).run([replace(sample, joins=0, waits=frozenset())])
        assert_same_bits(found, alone)
        assert_same_bits(found, sample.on_host()[-1])


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_row_of_every_sampler_equals_the_recurrence(
    bundle: Bundle, api: FakeCudaApi, name: str, guided: bool
) -> None:
    schedule = sampler(name, 6)
    sample = Sample(schedule, 3, guided=[guided] * len(schedule))
    session = denoiser(made_up_device(api), bundle)
    run = Batch(session, open_loop(session.device))
    run.slots[sample] = sample.join(run.loop)
    for expected in sample.on_host():
        run.step([sample])
        assert_same_bits(run.loop.fetch(run.slots[sample])[0], expected)


def test_a_sample_begins_at_a_later_row(bundle: Bundle, api: FakeCudaApi) -> None:
    schedule = sampler("euler", 6)
    part = Sample(schedule.starting_at(2), 3)
    session = denoiser(made_up_device(api), bundle)
    run = Batch(session, open_loop(session.device))
    whole = Sample(schedule, 3)
    whole.noise = [*part.noise[:2], *part.noise]
    run.slots[whole] = run.loop.add(whole.start, loop_table(columns(schedule), whole.scale), row=2)
    for _ in part.schedule.t:
        run.step([whole])
    assert_same_bits(run.loop.fetch(run.slots[whole])[0], part.on_host()[-1])


def test_the_guidance_scale_may_change_from_row_to_row() -> None:
    schedule = sampler("euler", 3)
    table = loop_table(columns(schedule), np.array([1.0, 7.5, 3.0]))
    assert table.dtype == np.float32
    assert table[:, 11].tolist() == [1.0, 7.5, 3.0]
    assert table[:, 0].tolist() == schedule.t.tolist()
    np.testing.assert_array_equal(table[:, 12:], schedule.b.astype(np.float32))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_nothing_is_copied_between_steps_and_a_step_is_one_launch(
    bundle: Bundle, api: FakeCudaApi, library: LibraryName
) -> None:
    session = denoiser(made_up_device(api, library), bundle, concat=1)
    context = context_of(session, 2)
    text, concat = np.ones((2, 3, 2), np.float32), np.ones((2, 1, *SHAPE[1:]), np.float32)
    for array in (text, concat):
        array.setflags(write=False)
    counts = []
    for seed in (1, 2):
        before = dict(api.counts)
        sample = Sample(sampler("dpmpp_2m", 8), seed)
        loop = open_loop(session.device)
        slot = sample.join(loop)
        for _ in range(8):
            loop.step(context, {slot: (0, 1)}, {"text": text}, concat=concat)
        assert np.isfinite(loop.fetch(slot)[0]).all()
        session.device.loops.put_back(loop)
        counts.append({name: api.counts[name] - before[name] for name in before})
    # First the sample, the text, the concat channels of two evaluations and the list of slots; the second sample needs
    # only itself.
    assert [each["uploads"] for each in counts] == [5, 1]
    assert [each["downloads"] for each in counts] == [1, 1]
    assert counts[1]["allocations"] == 0
    if library == "tensorrt":
        # The first step is executed, the second recorded; the next sample launches that recording.
        assert [(each["captures"], each["launches"]) for each in counts] == [(1, 7), (0, 8)]
        assert counts[1]["kernels"] == 0
    else:  # it records its engine's runs itself
        assert [(each["captures"], each["kernels"]) for each in counts] == [(0, 3 * 8), (0, 3 * 8)]


def test_one_recording_serves_every_mix(bundle: Bundle, api: FakeCudaApi) -> None:
    """Samples of other samplers join and leave, guided or not, and the step is recorded once."""
    session = denoiser(made_up_device(api), bundle)
    loop, context, text = open_loop(session.device), context_of(session, 3), np.ones((3, 3, 2), np.float32)
    first, second = (Sample(sampler(name, 5), seed) for seed, name in enumerate(("euler", "dpmpp_2m")))
    slot = first.join(loop)
    for _ in range(3):
        loop.step(context, {slot: (0, 1)}, {"text": text})
    other = second.join(loop)
    loop.step(context, {slot: (2, 0), other: (1,)}, {"text": text})
    loop.remove(slot)
    loop.step(context, {other: (0, 2)}, {"text": text})
    loop.fetch(other)
    assert (api.counts["captures"], api.counts["launches"]) == (1, 4)


def test_the_host_is_one_step_ahead(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    loop, context, sample = open_loop(session.device), context_of(session, 2), Sample(sampler("euler", 6), 1)
    slot = sample.join(loop)
    left = []
    text = np.ones((2, 3, 2), np.float32)
    text.setflags(write=False)
    for _ in range(6):
        loop.step(context, {slot: (0, 1)}, {"text": text})
        left.append(len(api.queue))
    # The first step is waited for; after each later one, that one (three kernels, one run) is left on the stream.
    assert left[0] == 0
    assert left[1:] == [4, 4, 4, 4, 4]


def test_replaced_latents_are_those_the_sample_continues_from(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    sample = Sample(sampler("dpmpp_2m", 5), 3)
    run = Batch(session, open_loop(session.device))
    slot = run.slots[sample] = sample.join(run.loop)
    recurrence, x = Recurrence(sample.schedule), sample.start
    for k, t in enumerate(sample.schedule.t):
        run.step([sample])
        shown = np.float32(sample.schedule.c_in[k]) * x
        negative, positive = (evaluate(shown, t, text) for text in sample.texts)
        x = recurrence.step(k, x, negative + np.float32(sample.scale) * (positive - negative))
        if k == 1:
            x = x * np.float32(0.5)
            changed = x.copy()
            run.loop.replace(slot, changed)
            changed[:] = np.nan  # the caller's own again
    assert_same_bits(run.loop.fetch(slot)[0], x)


def test_memory_of_a_sample_that_left_serves_the_next(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    loop = open_loop(session.device)
    Batch(session, loop).run([Sample(sampler("dpmpp_2m", 5), 1)])
    allocations = api.counts["allocations"]
    sample = Sample(sampler("dpmpp_2m", 5), 2)
    (found,) = Batch(session, loop).run([sample])
    assert api.counts["allocations"] == allocations
    assert_same_bits(found, sample.on_host()[-1])


def test_loops_at_once_have_memory_of_their_own(bundle: Bundle, api: FakeCudaApi) -> None:
    """Two loops take turns on one context."""
    session = denoiser(made_up_device(api), bundle)
    samples = [Sample(sampler("unipc", 4), seed) for seed in (1, 2)]
    runs = [Batch(session, open_loop(session.device)) for _ in samples]
    for run, sample in zip(runs, samples, strict=True):
        run.slots[sample] = sample.join(run.loop)
    for _ in range(4):
        for run, sample in zip(runs, samples, strict=True):
            run.step([sample])
    for run, sample in zip(runs, samples, strict=True):
        assert_same_bits(run.loop.fetch(run.slots[sample])[0], sample.on_host()[-1])


@pytest.mark.parametrize("concat", [0, 2])
def test_a_run_of_the_engine_between_steps_changes_nothing(bundle: Bundle, api: FakeCudaApi, concat: int) -> None:
    """Another thread may run the same context, with latents, concat channels and text of its own."""
    session = denoiser(made_up_device(api), bundle, concat=concat)
    sample = Sample(sampler("dpmpp_2m", 5), 3, concat=concat)
    run = Batch(session, open_loop(session.device))
    run.slots[sample] = sample.join(run.loop)
    text, channels = np.stack(sample.texts), np.stack([sample.channels] * 2)
    feeds = {"x": np.ones((2, 2 + concat, 3, 5), np.float32), "t": np.ones(2, np.float32), "text": np.ones_like(text)}
    for array in (text, channels, *feeds.values()):
        array.setflags(write=False)
    expected = evaluate_batch(feeds)["y"]
    for _ in range(5):
        slot = run.slots[sample]
        run.loop.step(context_of(session, 2), {slot: (0, 1)}, {"text": text}, concat=channels if concat else None)
        assert_same_bits(session.run(feeds)["y"], expected)
    assert_same_bits(run.loop.fetch(run.slots[sample])[0], sample.on_host()[-1])


def test_a_value_that_is_not_finite_is_reported_for_its_sample_and_row(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    loop, context = open_loop(session.device), context_of(session, 3)
    samples = [Sample(sampler("euler", 4), seed, guided=[False] * 4) for seed in (1, 2)]
    healthy, broken = (sample.join(loop) for sample in samples)
    for row in range(3):
        text = np.stack([samples[0].texts[1], samples[1].texts[1], np.full((3, 2), np.nan, np.float32)])
        if row == 1:
            text[1] = np.inf
        loop.step(context, {healthy: (0,), broken: (1,)}, {"text": text})
    assert loop.fetch(healthy)[1] is None
    assert_same_bits(loop.fetch(healthy)[0], samples[0].on_host()[2])
    assert loop.fetch(broken)[1] == 1


def test_a_recorded_step_ends_with_its_context(bundle: Bundle, api: FakeCudaApi) -> None:
    """A session keeps four sets of shapes; a loop does not keep more alive."""
    session = denoiser(made_up_device(api), bundle)
    samples = [Sample(sampler("dpmpp_2m", 12), seed) for seed in range(3)]
    run = Batch(session, open_loop(session.device))
    for sample in samples:
        run.slots[sample] = sample.join(run.loop)
    for row in range(12):
        for sample in samples:
            sample.guided = [(row + sample.seed) % 3 != 0] * 12
        run.step(samples[: 1 + row % 3])
        gc.collect()
        assert len(run.loop.contexts()) <= 4
    for batch in range(1, 9):
        context_of(session, batch)
    gc.collect()
    assert len(run.loop.contexts()) <= 4


def test_a_step_whose_activations_moved_is_recorded_anew(bundle: Bundle, api: FakeCudaApi) -> None:
    """The engine of another component needs more scratch memory, and a context that is larger too."""
    session = denoiser(made_up_device(api), bundle)
    sample = Sample(sampler("dpmpp_2m", 6), 3)
    run = Batch(session, open_loop(session.device))
    run.slots[sample] = sample.join(run.loop)
    captures = []
    for row in range(6):
        if row == 3:
            session.run(
                {
                    "x": np.ones((9, *SHAPE), np.float32),
                    "t": np.ones(9, np.float32),
                    "text": np.ones((9, 3, 2), np.float32),
                }
            )
        run.step([sample])
        captures.append(api.counts["captures"])
    assert captures == [0, 1, 1, 1, 2, 2]
    assert_same_bits(run.loop.fetch(run.slots[sample])[0], sample.on_host()[-1])


def test_closing_frees_all_memory(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    run = Batch(session, open_loop(session.device), np.random.default_rng(0))
    run.run([Sample(sampler("dpmpp_2m", 4), seed, joins=seed) for seed in range(3)])
    late = Sample(sampler("euler", 4), 9)
    run.slots[late] = late.join(run.loop)
    run.step([late])
    run.loop.close()
    session.close()
    session.device.scratch.close()
    assert api.allocated == {}
    with pytest.raises(ValueError, match="removed"):
        run.loop.fetch(run.slots[late])


def test_memory_of_an_unreferenced_loop_is_freed(bundle: Bundle, api: FakeCudaApi) -> None:
    device = made_up_device(api)
    session = denoiser(device, bundle)
    run = Batch(session, open_loop(device))
    sample = Sample(sampler("dpmpp_2m", 4), 1)
    run.slots[sample] = sample.join(run.loop)
    for _ in range(3):
        run.step([sample])
    device.loops.put_back(run.loop)
    del run, session, device
    gc.collect()
    assert api.allocated == {}


def test_kernels_compiled_just_in_time_are_stored_when_a_loop_is_put_back(
    bundle: Bundle, api: FakeCudaApi, tmp_path: Path
) -> None:
    session = denoiser(made_up_device(api, "tensorrt_rtx"), bundle, cache=RuntimeCache(tmp_path / "an engine"))
    loop = open_loop(session.device)
    Batch(session, loop).run([Sample(sampler("euler", 2), 1)])
    session.device.loops.put_back(loop)
    assert len(list((tmp_path / "an engine").glob("*.rtcache"))) == 1


def test_idle_loops_are_reused_and_bounded(bundle: Bundle, api: FakeCudaApi) -> None:
    device = made_up_device(api)
    loops = [device.loops.take((size, 4, 4), NAMES) for size in range(1, 7)]
    for size, loop in enumerate(loops, start=1):
        loop.add(np.zeros((size, 4, 4), np.float32), loop_table(columns(sampler("euler", 2))))
        device.loops.put_back(loop)
    assert len(api.allocated) == 4
    assert device.loops.take((6, 4, 4), NAMES) is loops[5]
    assert device.loops.take((6, 4, 4), NAMES) is not loops[5]
    assert device.loops.take((5, 4, 4), replace(NAMES, output="z")) is not loops[4]


def test_a_slot_belongs_to_its_loop_until_it_is_removed(bundle: Bundle, api: FakeCudaApi) -> None:
    device = made_up_device(api)
    loop, other = open_loop(device), open_loop(device)
    slot = Sample(sampler("euler", 2), 1).join(loop)
    with pytest.raises(ValueError, match="another loop"):
        other.fetch(slot)
    loop.remove(slot)
    for use in (loop.fetch, loop.remove, lambda slot: loop.replace(slot, np.zeros(SHAPE, np.float32))):
        with pytest.raises(ValueError, match="removed"):
            use(slot)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((0, 0), "distinct"),
        ((0, 2), "batch of 2"),
        ((-1,), "batch of 2"),
        ((), "distinct"),
    ],
)
def test_places_have_to_be_distinct_places_of_the_batch(
    bundle: Bundle, api: FakeCudaApi, places: tuple[int, ...], message: str
) -> None:
    session = denoiser(made_up_device(api), bundle)
    loop = open_loop(session.device)
    slot = Sample(sampler("euler", 2), 1).join(loop)
    with pytest.raises(ValueError, match=message):
        loop.step(context_of(session, 2), {slot: places}, {"text": np.ones((2, 3, 2), np.float32)})
    assert (slot.row, api.counts["kernels"]) == (0, 0)


def test_a_step_of_a_finished_sample_or_of_three_evaluations_is_rejected(bundle: Bundle, api: FakeCudaApi) -> None:
    session = denoiser(made_up_device(api), bundle)
    loop, context, text = open_loop(session.device), context_of(session, 3), np.ones((3, 3, 2), np.float32)
    slot = Sample(sampler("euler", 1), 1).join(loop)
    with pytest.raises(ValueError, match="got 3 for row 0 of 1"):
        loop.step(context, {slot: (0, 1, 2)}, {"text": text})
    loop.step(context, {slot: (0,)}, {"text": text})
    with pytest.raises(ValueError, match="got 1 for row 1 of 1"):
        loop.step(context, {slot: (0,)}, {"text": text})


@pytest.mark.parametrize(
    ("concat", "given", "message"),
    [
        (0, {"inputs": {}}, "inputs"),
        (0, {"inputs": {"text": np.ones((1, 3, 2), np.float32)}}, "inputs"),
        (0, {"inputs": {"text": np.ones((2, 3, 2))}}, "float64"),
        (0, {"concat": np.ones((2, 1, 3, 5), np.float32)}, "concat.*expected None"),
        (1, {}, "concat: got None"),
        (1, {"concat": np.ones((2, 2, 3, 5), np.float32)}, "concat"),
        (0, {"noise": {}}, "noise: got none"),
        (0, {"noise": np.ones((1, *SHAPE), np.float32)}, "noise: got float32"),
    ],
)
def test_feeds_have_to_be_those_of_the_context(
    bundle: Bundle, api: FakeCudaApi, concat: int, given: dict[str, Any], message: str
) -> None:
    session = denoiser(made_up_device(api), bundle, concat=concat)
    loop = open_loop(session.device)
    slot = Sample(sampler("euler_a", 2), 1).join(loop)
    noise = given.get("noise", np.ones(SHAPE, np.float32))
    with pytest.raises(FeedError, match=message):
        loop.step(
            context_of(session, 2),
            {slot: (0, 1)},
            given.get("inputs", {"text": np.ones((2, 3, 2), np.float32)}),
            concat=given.get("concat"),
            noise=noise if isinstance(noise, dict) else {slot: noise},
        )
    assert (slot.row, api.counts["kernels"]) == (0, 0)


def test_a_table_or_latents_that_do_not_suit_are_rejected(api: FakeCudaApi) -> None:
    loop, table = open_loop(made_up_device(api)), loop_table(columns(sampler("dpmpp_2m", 4)))
    unsuitable: list[NDArray[Any]] = [np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE)]
    for latents in unsuitable:
        with pytest.raises(ValueError, match="latents"):
            loop.add(latents, table)
    with pytest.raises(ValueError, match="got 4 of a table of 4"):
        loop.add(np.zeros(SHAPE, np.float32), table, row=4)
    with pytest.raises(ValueError, match="looks back beyond it"):
        loop.add(np.zeros(SHAPE, np.float32), table, row=2)
    schedule = columns(sampler("euler", 2))
    with pytest.raises(ValueError, match="quantile"):
        loop_table(schedule | {"quantile": np.array([0.0, 0.9])})
    with pytest.raises(ValueError, match="got no quantile"):
        loop_table({name: column for name, column in schedule.items() if name != "quantile"})


def test_an_engine_that_does_not_suit_the_loop_is_rejected(bundle: Bundle, api: FakeCudaApi) -> None:
    device = made_up_device(api)
    with pytest.raises(BackendError, match="float16"):
        open_loop(device).prepare(context_of(denoiser(device, bundle, dtype="float16"), 1))
    context = context_of(denoiser(device, bundle), 1)
    with pytest.raises(BackendError, match="no such tensor"):
        device.loops.take(SHAPE, replace(NAMES, output="z")).prepare(context)
    for shape in ((1, 3, 5), (3, 3, 5), (2, 3, 4)):
        with pytest.raises(BackendError, match="expected 1 samples of"):
            device.loops.take(shape, NAMES).prepare(context)


def test_a_denoiser_of_a_bundle_equals_its_graph_on_the_host(bundle: Bundle, api: FakeCudaApi) -> None:
    """Compare the sample bundle's engine, which ONNX Runtime computes here, with its graph in a numpy loop."""
    images = image_profile(bundle.manifest, size="32..128", batch="1..4", guidance="both")
    profile = component_profile("unet", bundle.manifest.components["unet"], images, bundle.manifest)
    record = made_up.record(bundle, made_up.identity(bundle, "unet", profile=profile))
    session, graph = (
        EngineSession(made_up_device(api), fake_plan(bundle, record), record),
        open_session(bundle, "unet", threads=1),
    )
    rng, shape = np.random.default_rng(0), (4, 8, 12)
    width = next(spec.shape[2] for spec in session.inputs if spec.name == "encoder_hidden_states")
    embeddings = rng.standard_normal((2, 77, int(width)), np.float32)
    latents, schedule = rng.standard_normal(shape, np.float32), sampler("dpmpp_2m", 5)
    names = TensorNames(latents="sample", timesteps="timestep", output="noise_pred")
    loop = session.device.loops.take(shape, names)
    slot = loop.add(latents, loop_table(columns(schedule), 5.0))
    context = session.device_context(
        {"sample": (2, *shape), "timestep": (2,), "encoder_hidden_states": embeddings.shape}
    )
    assert context is not None
    recurrence = Recurrence(schedule)
    for k, t in enumerate(schedule.t):
        loop.step(context, {slot: (0, 1)}, {"encoder_hidden_states": embeddings})
        shown = np.stack([np.float32(schedule.c_in[k]) * latents] * 2)
        feeds = {"sample": shown, "timestep": np.full(2, t, np.float32), "encoder_hidden_states": embeddings}
        negative, positive = graph.run(feeds)["noise_pred"]
        latents = recurrence.step(k, latents, negative + np.float32(5) * (positive - negative))
    np.testing.assert_array_equal(loop.fetch(slot)[0], latents)


def test_a_driver_that_does_not_load_the_kernels_leaves_the_loop_to_the_host(
    bundle: Bundle, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(self: object) -> None:
        raise fake_cuda.FakeCudaError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the PTX is newer than the driver")

    monkeypatch.setattr(fake_cuda.FakeKernel, "compile", reject)
    session = denoiser(made_up_device(api), bundle)
    assert session.device_context({"x": (1, *SHAPE), "t": (1,), "text": (1, 3, 2)}) is None
    with pytest.raises(BackendError, match="CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
        open_loop(session.device)


def test_a_gpu_without_room_for_a_context_leaves_the_loop_to_the_host(bundle: Bundle) -> None:
    session = denoiser(made_up_device(FakeCudaApi(limit=100)), bundle)
    assert session.device_context({"x": (1, *SHAPE), "t": (1,), "text": (1, 3, 2)}) is None


def test_the_kernels_are_compiled_from_this_source() -> None:
    """`nvcc -ptx -arch=compute_75 --fmad=false`, `.version 6.4`, and this line in front."""
    source = Path(device_loop.__file__).with_name("row.cu").read_bytes()
    first, *rest = device_loop._ptx().decode().splitlines()
    assert first == f"// of row.cu, sha256 {hashlib.sha256(source).hexdigest()}"
    assert ".version 6.4" in rest
    assert not any("fma" in line for line in rest)
    assert [name for name in device_loop._KERNELS if f".visible .entry {name}(" in rest] == [*device_loop._KERNELS]


def test_a_slot_has_the_size_of_the_kernels_structure() -> None:
    assert fake_cuda.host_kernels().run_slot_size() == device_loop._SLOT.itemsize
    # In the PTX, slots are this far apart.
    assert f", {device_loop._SLOT.itemsize};" in device_loop._ptx().decode()


def test_backends_know_neither_the_loop_nor_a_family() -> None:
    folder = Path(device_loop.__file__).parents[1]
    for path in (*(folder / "cuda").glob("*.py"), *(folder / "tensorrt").glob("*.py")):
        text = path.read_text()
        assert "latentrt.sampling" not in text
        assert not any(word in text for word in ("encoder_hidden_states", "noise_pred", "unet", "text_encoder"))
        assert not any(f'"{word}"' in text for word in ("sample", "timestep"))
