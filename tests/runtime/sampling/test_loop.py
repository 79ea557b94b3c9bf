"""The loop: samples of unlike schedules in one batch, each as if it were alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BackendError
from latentrt.sampling import samplers
from latentrt.sampling.denoiser import Conditioning, Denoiser, SplitDenoiser, WholeDenoiser
from latentrt.sampling.guidance import ClassifierFree, Guidance, ImageAndText, Unguided
from latentrt.sampling.loop import Resident, Sample, Step, prepare, step
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import SAMPLERS, Steps
from latentrt.sampling.schedule import Recurrence, Schedule, denoise
from tests.runtime.sampling import fakes

Floats = NDArray[np.float32]

# Of Stable Diffusion 1.5.
CONFIG: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
# Every sampler that takes its noise levels from such a configuration and starts from noise.
TRAINED = [
    name
    for name, sampler in SAMPLERS.items()
    if hasattr(sampler, "beta_start") and "inverse" not in name and name != "repaint"
]
THRESHOLDED = {"thresholding": True, "sample_max_value": 1.7}
SHAPE = (4, 3, 5)
GUIDED = ClassifierFree(scale=5.0)
STRATEGIES: list[Guidance] = [
    Unguided(),
    GUIDED,
    ClassifierFree(scale=3.0, rescale=0.7),
    ClassifierFree(scale=7.5, start=0.3, end=0.8),
    ImageAndText(scale=4.0, image_scale=1.5),
]


# Seed, tokens and extra channels → conditioning.
MakeText = Callable[[int, int, Floats | None], Conditioning]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sample to be made, again and again the same.

    Attributes:
        join: the step of the loop at which it joins. leave: rows after which it leaves; None: when it is done.
        inpaint: blend an image into the latents after each row. concat: extra channels of the denoiser's input.
    """

    seed: int
    sampler: str = "euler"
    steps: Steps = field(default_factory=lambda: Steps(count=5))
    config: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance = GUIDED
    tokens: int = 3
    shape: tuple[int, ...] = SHAPE
    inpaint: bool = False
    concat: int = 0
    deep_cache: int = 1
    row: int = 0
    join: int = 0
    leave: int | None = None

    def schedule(self) -> Schedule:
        return samplers.schedule(self.sampler, CONFIG | dict(self.config), self.steps)

    def make(self, text: MakeText | None = None) -> Sample:
        """Return the sample before its first row."""
        schedule, generator = self.schedule(), Generator(self.seed)
        clean, noise = generator.normal(self.shape), generator.normal(self.shape)
        rng = np.random.default_rng(self.seed)
        given: dict[str, Conditioning] = {}
        for place, name in enumerate(self.guidance.all_evaluations()):
            extra = rng.standard_normal((self.concat, *self.shape[1:]), dtype=np.float32) if self.concat else None
            given[name] = (text or fakes.conditioning)(10 * self.seed + place, self.tokens, extra)
        begins_clean = self.row > 0 or self.steps.begin > 0
        mask = rng.integers(0, 2, (1, *self.shape[1:])).astype(np.float32)

        def blend(sample: Sample) -> None:
            kept = clean if sample.done else schedule.first_latents(noise, clean, row=sample.row)
            sample.latents = (1 - mask) * kept + mask * sample.latents

        return Sample(
            schedule,
            schedule.first_latents(noise, clean if begins_clean else None, row=self.row),
            given,
            self.guidance,
            lambda: generator.normal(self.shape),
            deep_cache=self.deep_cache,
            after_row=blend if self.inpaint else None,
            row=self.row,
        )


def generate(wanted: Sequence[Wanted], denoiser: Denoiser, text: MakeText | None = None) -> list[Floats]:
    """Return the last latents of samples that join and leave one loop."""
    samples, under_way = dict[int, Sample](), list[int]()
    for count in range(500):
        joins = [index for index, each in enumerate(wanted) if each.join == count]
        for index in joins:
            samples[index] = wanted[index].make(text)
        # Nor may their order in the batch matter.
        under_way = [*under_way[1:], *joins, *under_way[:1]]
        if under_way:
            step([samples[index] for index in under_way], denoiser)
        under_way = [
            index
            for index in under_way
            if not samples[index].done and samples[index].row - wanted[index].row != wanted[index].leave
        ]
        if len(samples) == len(wanted) and not under_way:
            return [samples[index].latents for index in range(len(wanted))]
    raise AssertionError("the samples should have been done")


def alone(wanted: Wanted, denoiser: Denoiser, text: MakeText | None = None) -> Floats:
    """Return the last latents of a sample in a loop of its own."""
    sample = wanted.make(text)
    while not sample.done and sample.row - wanted.row != wanted.leave:
        step([sample], denoiser)
    return sample.latents


def fake_denoisers() -> list[Callable[[], Denoiser]]:
    parts = fakes.FakeParts()
    return [lambda: fakes.open_whole(fakes.FakeSession()), parts.open_denoiser]


def assert_as_if_alone(wanted: Sequence[Wanted]) -> None:
    """To the bit: on a denoiser whose outputs do not depend on the batch, nothing else does."""
    for make in fake_denoisers():
        for each, found in zip(wanted, generate(wanted, make()), strict=True):
            np.testing.assert_array_equal(found, alone(each, make()), err_msg=str(each))


UNLIKE = [
    Wanted(seed=1, sampler="euler_a", steps=Steps(count=7), guidance=Unguided()),
    Wanted(seed=2, sampler="dpmpp_2m", steps=Steps(count=9), config={"solver_order": 3}, join=1),
    Wanted(seed=3, sampler="dpmpp_sde", steps=Steps(count=4), guidance=STRATEGIES[2], tokens=6, join=2),
    Wanted(seed=4, sampler="unipc", steps=Steps(count=11, begin=4), config={"use_karras_sigmas": True}, join=2),
    Wanted(seed=5, sampler="heun", steps=Steps(count=6), guidance=STRATEGIES[3], tokens=9, inpaint=True, join=3),
    Wanted(seed=6, sampler="ddim", steps=Steps(count=7, eta=1.0), config=THRESHOLDED, inpaint=True, leave=4),
    Wanted(seed=7, sampler="euler", steps=Steps(count=8), deep_cache=3, join=4),
    Wanted(seed=8, sampler="ddim", steps=Steps(count=8), guidance=STRATEGIES[3], deep_cache=2, join=1),
    Wanted(seed=9, sampler="pndm", steps=Steps(count=5), guidance=STRATEGIES[4], concat=4),
    Wanted(seed=10, sampler="lcm", steps=Steps(count=4), guidance=STRATEGIES[0], concat=5, join=5, leave=2),
    Wanted(seed=11, sampler="euler_a", steps=Steps(count=9), row=4, join=2),
    Wanted(seed=12, sampler="dpmpp_2m", steps=Steps(count=5), shape=(4, 5, 3)),
    Wanted(seed=13, sampler="dpmpp_2m", steps=Steps(count=5), inpaint=True, guidance=STRATEGIES[2]),
]


def test_different_samples_in_a_batch_equal_single_runs() -> None:
    assert_as_if_alone(UNLIKE)


def test_all_samplers_in_a_batch_equal_single_runs() -> None:
    """Each with another number of steps, some from the middle."""
    assert len(TRAINED) > 15
    assert_as_if_alone(
        [
            Wanted(
                seed=seed,
                sampler=name,
                steps=Steps(count=3 + seed, begin=seed % 3),
                guidance=STRATEGIES[seed % 4],
                tokens=3 * (1 + seed % 2),
                join=seed % 5,
            )
            for seed, name in enumerate(TRAINED, start=1)
        ]
    )


@settings(deadline=None, max_examples=25)
@given(
    wanted=st.lists(
        st.builds(
            Wanted,
            seed=st.integers(0, 10**6),
            sampler=st.sampled_from(TRAINED),
            steps=st.builds(Steps, count=st.integers(5, 9), begin=st.integers(0, 4)),
            guidance=st.sampled_from(STRATEGIES),
            tokens=st.sampled_from([3, 6]),
            inpaint=st.booleans(),
            concat=st.sampled_from([0, 0, 5]),
            deep_cache=st.integers(1, 4),
            join=st.integers(0, 12),
            leave=st.one_of(st.none(), st.integers(1, 5)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_mixture_equals_single_runs(wanted: list[Wanted]) -> None:
    assert_as_if_alone(wanted)


@pytest.mark.parametrize("sampler", TRAINED)
def test_a_sample_is_its_table_run_by_itself(sampler: str) -> None:
    """`schedule.denoise` is the same recurrence without samples, groups and batches."""
    wanted = Wanted(seed=3, sampler=sampler, steps=Steps(count=6), guidance=Unguided())
    generator = Generator(wanted.seed)
    _, noise = generator.normal(SHAPE), generator.normal(SHAPE)
    text = fakes.conditioning(10 * wanted.seed).inputs["text"]
    schedule = wanted.schedule()
    *_, expected = denoise(
        schedule,
        schedule.first_latents(noise),
        lambda t, x: fakes.whole(x, t, text),
        lambda: generator.normal(SHAPE),
    )
    np.testing.assert_array_equal(alone(wanted, fake_denoisers()[0]()), expected)


@pytest.mark.parametrize("guidance", STRATEGIES, ids=str)
def test_guidance_is_applied_to_each_sample_by_its_own_strategy(guidance: Guidance) -> None:
    """One row of DDIM from the first latents, by hand."""
    wanted = Wanted(seed=4, sampler="ddim", steps=Steps(count=4), guidance=guidance)
    sample = wanted.make()
    schedule, x = sample.schedule, sample.latents
    places = [guidance.all_evaluations().index(name) for name in guidance.evaluations(0, 4)]
    texts = [fakes.conditioning(40 + place).inputs["text"] for place in places]
    m = guidance.combine([fakes.whole(x, schedule.t[0], text) for text in texts])
    step([sample, Wanted(seed=5).make()], fakes.open_whole(fakes.FakeSession()))
    np.testing.assert_array_equal(sample.latents, Recurrence(schedule).step(0, x, m))


def test_the_denoiser_runs_once_for_each_set_of_shapes() -> None:
    session = fakes.FakeSession()
    denoiser = fakes.open_whole(session)
    samples = [
        Wanted(seed=1, guidance=GUIDED).make(),
        Wanted(seed=2, guidance=Unguided(), sampler="ddim", steps=Steps(count=9)).make(),
        Wanted(seed=3, guidance=GUIDED, tokens=6).make(),
        Wanted(seed=4, guidance=STRATEGIES[4], concat=4).make(),
        Wanted(seed=5, guidance=Unguided(), shape=(4, 5, 3)).make(),
        Wanted(seed=6, guidance=STRATEGIES[3]).make(),  # its guidance begins at row 2
    ]
    step(samples, denoiser)
    assert [(feeds["x"].shape, feeds["text"].shape[1]) for feeds in session.fed] == [
        ((4, 4, 3, 5), 3),
        ((2, 4, 3, 5), 6),
        ((3, 8, 3, 5), 3),
        ((1, 4, 5, 3), 3),
    ]
    first = session.fed[0]["t"]
    assert first.tolist() == [samples[index].schedule.t[0] for index in (0, 0, 1, 5)]
    assert len({*first.tolist()}) > 1, "samples of one batch may be at different timesteps"
    step(samples, denoiser)
    session.fed.clear()
    step(samples, denoiser)
    assert session.batches == [5, 2, 3, 1], "the last sample is guided by now"


def test_latents_are_scaled_for_the_denoiser() -> None:
    session = fakes.FakeSession()
    sample = Wanted(seed=1, sampler="euler", guidance=Unguided()).make()
    before = sample.latents
    step([sample], fakes.open_whole(session))
    c_in = np.float32(sample.schedule.c_in[0])
    assert c_in < 0.5
    np.testing.assert_array_equal(session.fed[0]["x"][0], c_in * before)


def test_every_kind_of_row_is_prepared_before_the_first() -> None:
    session = fakes.FakeSession()
    samples = [Wanted(seed=seed, guidance=STRATEGIES[3], steps=Steps(count=10)).make() for seed in (1, 2)]
    samples.append(Wanted(seed=3, guidance=Unguided(), tokens=6, concat=5).make())
    prepare(samples, fakes.open_whole(session))
    assert session.fed == []
    assert session.prepared == [
        {"x": (2, 4, 3, 5), "t": (2,), "text": (2, 3, fakes.WIDTH)},
        {"x": (4, 4, 3, 5), "t": (4,), "text": (4, 3, fakes.WIDTH)},
        {"x": (1, 9, 3, 5), "t": (1,), "text": (1, 6, fakes.WIDTH)},
    ]
    # Rows that are over are not prepared: guidance ends after row 7.
    late = Wanted(seed=1, guidance=STRATEGIES[3], steps=Steps(count=10), row=8).make()
    session.prepared.clear()
    prepare([late], fakes.open_whole(session))
    assert [shapes["t"] for shapes in session.prepared] == [(1,)]


def test_after_row_sees_the_finished_row_and_replaces_the_latents() -> None:
    seen: list[tuple[int, bool]] = []

    def fill(sample: Sample) -> None:
        seen.append((sample.row, sample.done))
        sample.latents = np.full(SHAPE, sample.row, np.float32)

    wanted = Wanted(seed=1, sampler="ddim", steps=Steps(count=3), guidance=Unguided())
    sample, session = wanted.make(), fakes.FakeSession()
    sample.after_row = fill
    denoiser = fakes.open_whole(session)
    while not sample.done:
        step([sample], denoiser)
    assert seen == [(1, False), (2, False), (3, True)]
    np.testing.assert_array_equal(sample.latents, 3)
    np.testing.assert_array_equal(session.fed[2]["x"], 2 * np.float32(sample.schedule.c_in[2]))


def test_noise_is_sampled_as_often_as_the_table_says() -> None:
    for sampler, count in (("ddim", 0), ("euler_a", 5), ("sa_solver", 5), ("dpmpp_sde", None)):
        wanted = Wanted(seed=1, sampler=sampler, guidance=Unguided())
        sample, rows = wanted.make(), list[int]()

        def sample_noise(sample: Sample = sample, rows: list[int] = rows) -> Floats:
            rows.append(sample.row)
            return np.zeros(SHAPE, np.float32)

        sample.noise = sample_noise
        denoiser = fakes.open_whole(fakes.FakeSession())
        while not sample.done:
            step([sample], denoiser)
        assert rows == np.repeat(np.arange(len(sample.schedule)), sample.schedule.noise_draws).tolist()
        assert count is None or len(rows) == count


def test_a_row_that_samples_noise_twice_uses_the_second() -> None:
    schedule = samplers.schedule("euler_a", CONFIG, 3)
    schedule = replace(schedule, noise_draws=np.array([2, 1, 0]))
    noise = [np.full(SHAPE, value, np.float32) for value in (1, 2, 3)]
    latents = np.zeros(SHAPE, np.float32)
    sample = Sample(schedule, latents, {"positive": fakes.conditioning(1)}, Unguided(), iter(noise).__next__)
    step([sample], fakes.open_whole(fakes.FakeSession()))
    m = fakes.whole(latents, schedule.t[0], fakes.conditioning(1).inputs["text"])
    np.testing.assert_array_equal(sample.latents, Recurrence(schedule).step(0, latents, m, noise[1]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_denoiser_that_is_not_finite_is_an_error_that_names_the_timestep(value: float) -> None:
    class Overflows(fakes.FakeSession):
        def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
            outputs = super().run(feeds)
            outputs["y"][feeds["t"] == broken.schedule.t[0], 0, 0, 0] = value
            return outputs

    whole = Wanted(seed=1, sampler="heun", steps=Steps(count=7), guidance=Unguided()).make()
    broken = Wanted(seed=2, sampler="ddim", steps=Steps(count=3), guidance=Unguided()).make()
    with pytest.raises(BackendError, match=f"timestep {broken.schedule.t[0]:g} "):
        step([whole, broken], fakes.open_whole(Overflows()))
    assert (whole.row, broken.row) == (0, 0), "no sample was advanced, so the others may go on"
    step([whole], fakes.open_whole(fakes.FakeSession()))
    assert whole.row == 1


def test_latents_that_are_not_finite_are_an_error() -> None:
    sample = Wanted(seed=1, sampler="ddim", guidance=ClassifierFree(scale=3e38)).make()
    with pytest.raises(BackendError, match="guidance_scale"), np.errstate(over="ignore", invalid="ignore"):
        step([sample], fakes.open_whole(fakes.FakeSession()))


@pytest.mark.parametrize(
    ("latents", "more", "fragment"),
    [
        (np.zeros(SHAPE, np.float64), {}, "float64"),
        (np.zeros((1, *SHAPE), np.float32), {}, "(1, 4, 3, 5)"),
        (np.zeros(SHAPE, np.float32), {"row": 6}, "row: got 6"),
        (np.zeros(SHAPE, np.float32), {"row": -1}, "row: got -1"),
        (np.zeros(SHAPE, np.float32), {"noise": None}, "noise: got None"),
    ],
    ids=str,
)
def test_a_sample_is_refused(latents: Any, more: dict[str, Any], fragment: str) -> None:
    schedule = samplers.schedule("euler_a", CONFIG, 6)
    given: dict[str, Any] = {"noise": lambda: latents, **more}
    with pytest.raises(ValueError, match=re.escape(fragment)):
        Sample(schedule, latents, {"positive": fakes.conditioning(1)}, Unguided(), **given)


def test_a_table_without_noise_needs_none() -> None:
    schedule = samplers.schedule("ddim", CONFIG, 6)
    Sample(schedule, np.zeros(SHAPE, np.float32), {"positive": fakes.conditioning(1)}, Unguided())


@pytest.mark.parametrize(("sampler", "row"), [("dpmpp_2m", 4), ("heun", 3), ("pndm", 4)])
def test_a_row_that_needs_history_cannot_be_the_first(sampler: str, row: int) -> None:
    with pytest.raises(ValueError, match=f"row: got {row}"):
        Wanted(seed=1, sampler=sampler, steps=Steps(count=8), row=row).make()


# The sample bundle, on the backends of a CPU.

SIDE = 8  # latents


def open_bundle_denoiser(bundle: Bundle, backend: Any, *, split: bool) -> Denoiser:
    """Return the sample bundle's denoiser on a backend, whole or in parts."""
    record, parts = bundle.manifest.components["unet"], dict[str, Session]()
    names = {"latents": "sample", "timestep": "timestep", "output": "noise_pred"}

    def open_part(part: str) -> Session:
        if part not in parts:
            parts[part] = backend.open_session(bundle, "unet", part=part, threads=1)
        return parts[part]

    if split:
        return SplitDenoiser(record.inputs, open_part, reuses_features=True, **names)
    return WholeDenoiser(backend.open_session(bundle, "unet", threads=1), **names)


def bundle_text(seed: int, chunks: int, concat: Floats | None) -> Conditioning:
    """Return random embeddings of chunks of 77 tokens."""
    text = np.random.default_rng(seed).standard_normal((77 * chunks, 128), dtype=np.float32)
    return Conditioning({"encoder_hidden_states": text}, concat)


def of_bundle(wanted: Wanted) -> Wanted:
    """Return the same with the sample bundle's shapes."""
    config = {**wanted.config, "prediction_type": "v_prediction"}
    return replace(wanted, shape=(4, SIDE, SIDE), tokens=wanted.tokens // 3, config=config)


@pytest.fixture(params=["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)])
def backend(request: pytest.FixtureRequest) -> Any:
    """The module of one of a CPU's backends."""
    return {"onnxruntime": ort, "openvino": ov}[request.param]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_different_samples_of_the_sample_bundle_equal_single_runs(backend: Any, split: bool) -> None:
    chosen = [each for each in UNLIKE if each.seed in (1, 2, 3, 5, 6, 7, 8)]
    if backend is not ort:  # which compiles for each batch
        chosen = [replace(each, join=0, tokens=3) for each in UNLIKE if each.seed in (1, 5, 7, 13)]
    wanted = [of_bundle(each) for each in chosen]
    denoiser = open_bundle_denoiser(Bundle.open(bundle_path()), backend, split=split)
    for each, found in zip(wanted, generate(wanted, denoiser, bundle_text), strict=True):
        expected = alone(each, denoiser, bundle_text)
        # A backend may order sums otherwise in another batch, and the rows that follow carry that on. With one thread
        # both were exact: the difference was 0.
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max(), each
        assert np.abs(expected).max() > 0.1


def test_a_sample_that_is_done_or_given_twice_is_refused_before_any_work() -> None:
    session = fakes.FakeSession()
    denoiser = fakes.open_whole(session)
    live, done = (Wanted(seed=3, steps=Steps(count=2)).make() for _ in range(2))
    done.row = len(done.schedule)
    for samples in ([done, live], [live, live]):
        with pytest.raises(ValueError, match="done, or one sample twice"):
            step(samples, denoiser)
    assert (live.row, session.fed) == (0, [])


class SlowDevice(Resident):
    """A device that computes until its latents are fetched, and counts what is written to it."""

    def __init__(self, latents: Floats) -> None:
        self.latents, self.written = latents, 0

    def fetch(self) -> Floats:
        time.sleep(0.05)
        return self.latents

    def replace(self, latents: Floats) -> None:
        self.latents, self.written = latents, self.written + 1


def step_on_device(decoded: list[Floats]) -> tuple[Step, SlowDevice]:
    sample = Wanted(sampler="euler", seed=1).make()
    device = SlowDevice(np.full(sample.shape, 3, np.float32))
    sample.row = 1
    sample.join_device(device)

    return Step([sample], decode_preview=keep_in(decoded)), device


def keep_in(decoded: list[Floats]) -> Callable[[Floats], list[Any]]:
    """Return a decoder that keeps its latents and has no images."""

    def decode(latents: Floats) -> list[Any]:
        decoded.append(latents)
        return []

    return decode


def test_waiting_for_a_device_is_sampling() -> None:
    made, _ = step_on_device([])
    assert made.stopwatch.timings().sampling_s == 0
    assert made.latents.shape[0] == 1
    assert made.stopwatch.timings().sampling_s >= 0.05


def test_a_preview_leaves_the_latents_on_the_device() -> None:
    """Latents that were read are written back, as the reader may have changed them."""
    decoded: list[Floats] = []
    made, device = step_on_device(decoded)
    assert made.preview() == []
    made.write_back()
    assert device.written == 0
    made.latents += 1
    made.write_back()
    assert device.written == 1
    made.preview()
    np.testing.assert_allclose(decoded[1], decoded[0] * 4 / 3, rtol=1e-6)


def test_a_preview_is_the_best_linear_estimate_of_the_image() -> None:
    """Clean latents of variance 1 and noise as the table adds it: no other factor is nearer to the clean latents."""
    rng = np.random.default_rng(0)
    for sampler in ("euler", "ddim", "dpmpp_2m"):
        sample = Wanted(sampler=sampler, seed=1).make()
        decoded: list[Floats] = []
        sample.row = row = len(sample.schedule) // 2
        clean, noise = rng.standard_normal((2, *sample.shape)).astype(np.float32)
        # The sample's own covariance, so that the bound is exact enough for a few numbers.
        noise -= clean * (clean * noise).sum() / (clean**2).sum()
        clean, noise = (each / np.sqrt((each**2).mean()) for each in (clean, noise))
        sample.latents = noisy = sample.schedule.first_latents(noise, clean, row=row)
        Step([sample], decode_preview=keep_in(decoded)).preview()
        factor = float(decoded[0].sum() / noisy.sum())

        def distance(factor: float, noisy: Floats = noisy, clean: Floats = clean) -> float:
            return float(((factor * noisy - clean) ** 2).mean())

        assert distance(factor) < min(distance(factor * 1.05), distance(factor * 0.95), 1.0)
