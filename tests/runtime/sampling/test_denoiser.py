"""Batches of evaluations: padding, shared inputs, and a denoiser in parts that hoists constant values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends import onnxruntime as ort
from latentrt.backends.session import Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BackendError, FeedError
from latentrt.sampling.denoiser import Conditioning, Denoiser, Evaluation, SplitDenoiser, WholeDenoiser
from latentrt.sampling.guidance import ClassifierFree, Guidance, Unguided
from latentrt.sampling.loop import Sample, step
from latentrt.sampling.samplers import schedule
from latentrt.sampling.schedule import Recurrence
from tests.runtime.fake_sessions import FunctionSession
from tests.runtime.sampling import fakes

Floats = NDArray[np.float32]

SHAPE = (4, 3, 5)
TIMESTEPS = np.array([981, 741, 501, 261, 21], np.float32)


def evaluation(seed: int, tokens: int = 3, concat: Floats | None = None) -> Evaluation:
    return Evaluation(fakes.conditioning(seed, tokens, concat), SHAPE, TIMESTEPS)


def latents(count: int) -> list[Floats]:
    return [*np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)]


def expected(evaluations: list[Evaluation], x: list[Floats], t: list[np.float32]) -> Floats:
    """Compute each by itself."""
    rows = zip(evaluations, x, t, strict=True)
    return np.stack([fakes.whole(each, time, one.conditioning.inputs["text"]) for one, each, time in rows])


def evaluate(
    denoiser: Denoiser, evaluations: list[Evaluation], t: float | list[float] = 501.0
) -> tuple[Floats, Floats]:
    """Return the outputs for random latents, and those of each by itself."""
    times = [np.float32(each) for each in (t if isinstance(t, list) else [t] * len(evaluations))]
    x = latents(len(evaluations))
    return denoiser.evaluate(evaluations, x, times), expected(evaluations, x, times)


@pytest.mark.parametrize(
    ("sizes", "count", "batches"),
    [
        (None, 5, [5]),
        ((1, 2, 4), 1, [1]),
        ((1, 2, 4), 3, [4]),
        ((1, 2, 4), 4, [4]),
        ((1, 2, 4), 5, [4, 1]),
        ((1, 2, 4), 11, [4, 4, 4]),
        ((2,), 1, [2]),
        ((2,), 5, [2, 2, 2]),
        ((8,), 3, [8]),
        (range(1, 12), 1, [1]),
        (range(1, 12), 3, [4]),
        (range(1, 12), 8, [8]),
        (range(1, 12), 9, [11]),
        (range(1, 12), 14, [11, 4]),
        (range(3, 7), 1, [4]),
        ((3,), 1, [3]),
    ],
)
def test_batches_are_padded_to_sizes_that_the_backend_has(
    sizes: Sequence[int] | None, count: int, batches: list[int]
) -> None:
    """To powers of two and the largest."""
    session = fakes.FakeSession(sizes=None if sizes is None else tuple(sizes))
    denoiser, evaluations = fakes.open_whole(session), [evaluation(seed) for seed in range(count)]
    found, alone = evaluate(denoiser, evaluations, [float(t) for t in range(100, 100 + count)])
    assert session.batches == batches
    assert found.shape == (count, *SHAPE), "copies are dropped"
    np.testing.assert_array_equal(found, alone)
    for feeds in session.fed:  # the copies are of the last evaluation
        used = len({*feeds["t"].tolist()})
        for array in feeds.values():
            np.testing.assert_array_equal(array[used:], np.repeat(array[used - 1 : used], len(array) - used, axis=0))


def test_whatever_a_batch_needs_is_prepared_at_the_padded_size() -> None:
    session = fakes.FakeSession(sizes=(1, 4))
    fakes.open_whole(session).prepare([evaluation(seed) for seed in range(6)])
    assert [shapes["t"] for shapes in session.prepared] == [(4,), (4,)]
    assert session.prepared[0] == {"x": (4, *SHAPE), "t": (4,), "text": (4, 3, fakes.WIDTH)}


def test_a_batch_of_a_size_that_was_prepared_is_not_padded() -> None:
    session = fakes.FakeSession(sizes=tuple(range(1, 9)))
    denoiser, evaluations = fakes.open_whole(session), [evaluation(seed) for seed in range(8)]
    longer = [evaluation(seed, tokens=6) for seed in range(5)]
    denoiser.prepare(evaluations[:5])
    for members in (evaluations[:5], evaluations[:3], evaluations[:6], longer):
        evaluate(denoiser, members)
    assert session.batches == [5, 4, 8, 8]


def test_extra_channels_follow_the_latents() -> None:
    session = fakes.FakeSession()
    x = latents(2)
    concat = [np.full((5, *SHAPE[1:]), value, np.float32) for value in (1, 2)]
    evaluations = [evaluation(seed, concat=each) for seed, each in enumerate(concat)]
    fakes.open_whole(session).evaluate(evaluations, x, [np.float32(1)] * 2)
    for fed, own, extra in zip(session.fed[0]["x"], x, concat, strict=True):
        np.testing.assert_array_equal(fed[:4], own)
        np.testing.assert_array_equal(fed[4:], extra)


def test_signatures_tell_which_evaluations_fit_in_one_batch() -> None:
    same, other, longer = evaluation(1), evaluation(2), evaluation(3, tokens=6)
    extra = evaluation(4, concat=np.zeros((5, *SHAPE[1:]), np.float32))
    elsewhere = Evaluation(fakes.conditioning(5), (4, 5, 3), TIMESTEPS)
    assert same.signature == other.signature
    assert len({each.signature for each in (same, other, longer, extra, elsewhere)}) == 4


def test_the_same_batch_hands_over_the_same_read_only_array() -> None:
    session = fakes.FakeSession(sizes=(4,))
    denoiser, evaluations = fakes.open_whole(session), [evaluation(seed) for seed in range(6)]
    for t in TIMESTEPS:
        evaluate(denoiser, evaluations[:3], float(t))
    texts = [feeds["text"] for feeds in session.fed]
    assert all(text is texts[0] for text in texts)
    assert not texts[0].flags.writeable
    # Another order is another batch, and so is another member.
    for chosen in ([2, 1, 0], [0, 1, 3]):
        evaluate(denoiser, [evaluations[index] for index in chosen])
    changed = [feeds["text"] for feeds in session.fed[-2:]]
    assert texts[0] is not changed[0]
    assert changed[0] is not changed[1]
    evaluate(denoiser, evaluations[:3])
    assert session.fed[-1]["text"] is texts[0]
    assert session.fed[0]["x"] is not session.fed[1]["x"]


def test_the_cache_of_stacked_inputs_is_bounded_and_safe_for_reused_ids() -> None:
    session = fakes.FakeSession()
    denoiser = fakes.open_whole(session)
    for seed in range(200):
        session.fed.clear()
        found, alone = evaluate(denoiser, [evaluation(seed)])  # whose arrays may be where the last ones were
        np.testing.assert_array_equal(found, alone)
    assert len(denoiser._stacks["text"]) <= 4


def test_conditioning_cannot_be_written_to() -> None:
    array = np.zeros((3, fakes.WIDTH), np.float32)
    conditioning = Conditioning({"text": array})
    with pytest.raises(ValueError, match="read-only"):
        conditioning.inputs["text"][0] = 1


def test_feeds_are_checked() -> None:
    wrong = Conditioning({"text": np.zeros((3, fakes.WIDTH + 1), np.float32)})
    denoiser = fakes.open_whole(fakes.FakeSession())
    with pytest.raises(FeedError, match="text"):
        denoiser.evaluate([Evaluation(wrong, SHAPE, TIMESTEPS)], latents(1), [np.float32(1)])


def test_an_output_that_is_not_finite_names_its_own_timestep() -> None:
    denoiser, x = fakes.open_whole(fakes.FakeSession(sizes=(2,))), latents(3)
    x[2][0, 0, 0] = np.inf
    with pytest.raises(BackendError, match="timestep 21 "), np.errstate(invalid="ignore"):
        denoiser.evaluate([evaluation(seed) for seed in range(3)], x, [*TIMESTEPS[[0, 1, 4]]])


# In parts.


@pytest.fixture
def parts() -> fakes.FakeParts:
    return fakes.FakeParts()


def test_a_run_embeds_its_timesteps_and_encodes_its_prompts_once(parts: fakes.FakeParts) -> None:
    evaluations = [evaluation(seed) for seed in range(2)]
    for t in TIMESTEPS:
        found, alone = evaluate(parts.denoiser, evaluations, float(t))
        np.testing.assert_array_equal(found, alone)
    assert parts.batches("time_embedding") == [len(TIMESTEPS)]
    assert parts.batches("cross_attention_kv") == [2]
    assert parts.batches("body") == [2] * len(TIMESTEPS)
    assert sorted(parts.parts["time_embedding"].fed[0]["t"].tolist()) == sorted(TIMESTEPS.tolist())
    keys = [feeds["keys"] for feeds in parts.parts["body"].fed]
    assert all(each is keys[0] for each in keys)
    assert "shallow_body" not in parts.parts, "a part is loaded when it is needed"


def test_many_keys_and_values_are_all_kept_stacked() -> None:
    """A large denoiser has dozens of them."""
    session = fakes.FakeSession()
    denoiser = fakes.open_whole(session)
    arrays = {f"keys{number}": [np.full(3, number + each) for each in (0.0, 0.5)] for number in range(64)}
    first = {name: denoiser._stack(name, each) for name, each in arrays.items()}
    for _ in range(2):
        for name, each in arrays.items():
            denoiser._stack(name, each[::-1])  # as unguided rows between guided ones
            assert denoiser._stack(name, each) is first[name]


def test_samples_that_join_are_encoded_once_and_by_themselves(parts: fakes.FakeParts) -> None:
    evaluations = [evaluation(seed) for seed in range(4)]
    for members in ([0], [0, 1], [1, 0], [2, 0, 3, 1], [2, 3]):
        found, alone = evaluate(parts.denoiser, [evaluations[index] for index in members], 981.0)
        np.testing.assert_array_equal(found, alone)
    assert parts.batches("cross_attention_kv") == [1, 1, 2]
    assert parts.batches("time_embedding") == [len(TIMESTEPS)], "they have the same timesteps"
    own = Evaluation(fakes.conditioning(9), SHAPE, np.array([900, 741], np.float32))
    found, alone = evaluate(parts.denoiser, [evaluations[0], own], [741.0, 900.0])
    np.testing.assert_array_equal(found, alone)
    assert parts.batches("time_embedding") == [5, 1], "one more timestep, beside those from before"
    found, alone = evaluate(parts.denoiser, [own, evaluations[2]], [741.0, 21.0])
    np.testing.assert_array_equal(found, alone)
    assert len(parts.batches("time_embedding")) == 2


def test_alternating_groups_keep_their_time_embeddings(parts: fakes.FakeParts) -> None:
    first = evaluation(1)
    second = Evaluation(fakes.conditioning(2, tokens=6), SHAPE, np.array([900, 741], np.float32))
    for t in (900.0, 741.0):
        for each in (first, second):
            found, alone = evaluate(parts.denoiser, [each], 981.0 if each is first else t)
            np.testing.assert_array_equal(found, alone)
    assert parts.batches("time_embedding") == [5, 1]


def test_samples_of_a_batch_may_be_at_different_timesteps(parts: fakes.FakeParts) -> None:
    evaluations = [evaluation(seed) for seed in range(3)]
    found, alone = evaluate(parts.denoiser, evaluations, [21.0, 981.0, 501.0])
    np.testing.assert_array_equal(found, alone)


def test_a_timestep_that_is_not_in_the_schedule_is_computed_too(parts: fakes.FakeParts) -> None:
    for t in (981.0, 7.0, 741.0, 7.0):
        found, alone = evaluate(parts.denoiser, [evaluation(1)], t)
        np.testing.assert_array_equal(found, alone)
    assert parts.batches("time_embedding") == [5, 1]


def test_a_loop_shares_no_evaluation_with_another(parts: fakes.FakeParts) -> None:
    for _ in range(2):
        evaluate(parts.open_denoiser(), [evaluation(1)], 981.0)
    assert parts.batches("cross_attention_kv") == [1, 1]
    assert parts.batches("time_embedding") == [5, 5]


def test_any_batch_runs_in_parts(parts: fakes.FakeParts) -> None:
    evaluate(parts.denoiser, [evaluation(seed) for seed in range(7)])
    assert parts.batches("body") == [7]
    parts.denoiser.prepare([evaluation(1)])


def test_parts_are_opened_anew_at_each_row() -> None:
    """So a component that was released where memory is short is loaded again."""
    opened: list[str] = []
    parts = fakes.FakeParts()

    def open_part(name: str) -> Session:
        opened.append(name)
        return parts.open(name)

    denoiser = SplitDenoiser(fakes.INPUTS, open_part, latents="x", timestep="t", output="y")
    evaluations = [evaluation(1)]
    for _ in range(2):
        evaluate(denoiser, evaluations)
    assert opened == ["time_embedding", "cross_attention_kv", "body", "body"]
    assert not denoiser.reuses_features


# Deep features: DeepCache (Ma et al. 2023) with its uniform interval.


def sample(guidance: Guidance, *, deep_cache: int, tokens: int = 3, seed: int = 0) -> Sample:
    """Return a sample of six rows of DDIM."""
    table = schedule("ddim", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 6)
    given = {name: fakes.conditioning(seed + place, tokens) for place, name in enumerate(guidance.all_evaluations())}
    return Sample(table, latents(1)[0], given, guidance, deep_cache=deep_cache)


def run(denoiser: Denoiser, *samples: Sample) -> None:
    while not samples[0].done:
        step(samples, denoiser)


@pytest.mark.parametrize(("interval", "deep"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3]), (6, [0])])
def test_deep_layers_are_computed_every_n_rows(parts: fakes.FakeParts, interval: int, deep: list[int]) -> None:
    one = sample(Unguided(), deep_cache=interval)
    text = fakes.conditioning(0).inputs["text"]
    features, x, table = np.zeros(SHAPE, np.float32), one.latents, Recurrence(one.schedule)
    while not one.done:
        row = one.row
        if row in deep:
            features = fakes.deep_layers(x, text)
        m = fakes.shallow_layers(x, one.schedule.t[row], features)
        before = one.latents
        step([one], parts.denoiser)
        fed = parts.parts["body" if row in deep else "shallow_body"].fed[-1]
        np.testing.assert_array_equal(fed["x"][0], before)
        if row not in deep:
            np.testing.assert_array_equal(fed["deep_features"][0], features)
        x = table.step(row, before, m)
        np.testing.assert_array_equal(one.latents, x)
    assert (len(parts.batches("body")), len(parts.batches("shallow_body"))) == (len(deep), 6 - len(deep))


def test_deep_features_of_the_same_latents_change_nothing(parts: fakes.FakeParts) -> None:
    evaluations, x = [evaluation(seed) for seed in range(2)], latents(2)
    whole = parts.denoiser.evaluate(evaluations, x, [TIMESTEPS[0]] * 2)
    reused = parts.denoiser.evaluate(evaluations, x, [TIMESTEPS[0]] * 2, reuse=True)
    np.testing.assert_array_equal(reused, whole)


def test_each_sample_keeps_its_own_features_and_interval(parts: fakes.FakeParts) -> None:
    samples = [
        sample(Unguided(), deep_cache=1),
        sample(Unguided(), deep_cache=2, seed=10),
        sample(ClassifierFree(scale=3.0), deep_cache=3, seed=20),
        sample(Unguided(), deep_cache=3, seed=30, tokens=6),
    ]
    run(parts.denoiser, *samples)
    assert sorted(parts.batches("body")) == sorted([4, 1, 1, 2, 3, 1, 2, 1])
    assert sorted(parts.batches("shallow_body")) == sorted([3, 1, 2, 1, 1, 2, 1, 3, 1])


def test_where_guidance_ends_the_positive_features_go_on(parts: fakes.FakeParts) -> None:
    """Deep layers at rows 0 and 3, guidance at rows 0 and 1; row 2 takes the positive half of row 0's features."""
    run(parts.denoiser, sample(ClassifierFree(scale=3.0, end=0.4), deep_cache=3))
    assert parts.batches("body") == [2, 1]
    assert parts.batches("shallow_body") == [2, 1, 1, 1]
    guided, *rest = (feeds["deep_features"] for feeds in parts.parts["shallow_body"].fed)
    np.testing.assert_array_equal(rest[0][0], guided[1])


def test_deep_features_are_not_reused_where_guidance_begins(parts: fakes.FakeParts) -> None:
    """Row 0 has no negative half, so row 3, the first with guidance, computes the deep layers of both."""
    run(parts.denoiser, sample(ClassifierFree(scale=3.0, start=0.5), deep_cache=6))
    assert parts.batches("body") == [1, 2]
    assert parts.batches("shallow_body") == [1, 1, 2, 2]


def test_a_whole_denoiser_reuses_nothing() -> None:
    session = fakes.FakeSession()
    denoiser = fakes.open_whole(session)
    assert not denoiser.reuses_features
    run(denoiser, sample(Unguided(), deep_cache=3))
    assert session.batches == [1] * 6


# The sample bundle's denoiser.


def test_parts_compute_the_same_as_the_whole() -> None:
    bundle = Bundle.open(bundle_path())
    record, opened = bundle.manifest.components["unet"], dict[str, Any]()
    names = {"latents": "sample", "timestep": "timestep", "output": "noise_pred"}

    def open_part(name: str) -> Session:
        opened.setdefault(name, ort.open_session(bundle, "unet", part=name, threads=1))
        session: Session = opened[name]
        return session

    whole = WholeDenoiser(ort.open_session(bundle, "unet", threads=1), **names)
    split = SplitDenoiser(record.inputs, open_part, reuses_features=True, **names)
    rng = np.random.default_rng(0)
    evaluations, x = [], [rng.standard_normal((4, 8, 12), dtype=np.float32) for _ in range(3)]
    for _ in range(3):
        text = rng.standard_normal((154, 128), dtype=np.float32)
        evaluations.append(Evaluation(Conditioning({"encoder_hidden_states": text}), (4, 8, 12), TIMESTEPS))
    for t in TIMESTEPS:
        times = [t, TIMESTEPS[0], TIMESTEPS[2]]
        one, other = (each.evaluate(evaluations, x, times) for each in (whole, split))
        # The same operators on the same values; only their fusions may differ.
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.abs(one).max())
        reused = split.evaluate(evaluations, x, times, reuse=True)
        np.testing.assert_allclose(reused, one, rtol=0, atol=2e-5 * np.abs(one).max())
    assert {*opened} == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}


VECTORS = (TensorSpec("w", "float32", ("evaluations",)), TensorSpec("sizes", "float32", ("evaluations", 3)))


class TimeParts:
    """A denoiser whose time embedding depends on a number and a vector of each evaluation, and is its output."""

    def __init__(self) -> None:
        self.fed: list[dict[str, Floats]] = []
        text, row = fakes.INPUTS[2], TensorSpec("rows", "float32", ("evaluations",))
        sessions = {
            "time_embedding": FunctionSession((fakes.INPUTS[1], *VECTORS), (row,), self._embed),
            "cross_attention_kv": FunctionSession((text,), (text,), lambda feeds: {"keys": feeds["text"]}),
            "body": FunctionSession((row,), (row,), lambda feeds: {"y": feeds["rows"]}),
        }
        self.denoiser = SplitDenoiser(
            (*fakes.INPUTS, *VECTORS),
            sessions.__getitem__,
            latents="x",
            timestep="t",
            output="y",
            time_inputs=[spec.name for spec in VECTORS],
        )

    def _embed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.fed.append(dict(feeds))
        return {"rows": feeds["t"] + 10_000 * feeds["w"] + 100_000 * feeds["sizes"].sum(axis=1)}

    def evaluate(self, evaluations: list[Evaluation], times: list[float]) -> list[float]:
        y = self.denoiser.evaluate(evaluations, latents(len(times)), [np.float32(each) for each in times])
        return [*map(float, y)]


def timed(weight: float, *sizes: float, timesteps: Floats = TIMESTEPS, seed: int = 0) -> Evaluation:
    vectors = {"w": np.array(weight, np.float32), "sizes": np.array(sizes, np.float32)}
    return Evaluation(Conditioning({**fakes.conditioning(seed).inputs, **vectors}), SHAPE, timesteps)


def test_a_time_embedding_may_depend_on_numbers_and_vectors_of_each_evaluation() -> None:
    """The weight of a distilled guidance, for instance, or micro-conditioning."""
    parts = TimeParts()
    evaluations = [timed(1.5, 1, 0, 1), timed(2.5, 1, 0, 1), timed(1.5, 3, 0, 1), timed(1.5, 1, 0, 1, seed=1)]
    for t in (981, 741, 501):
        found = parts.evaluate(evaluations, [t, t, t, t])
        assert found == [215_000 + t, 225_000 + t, 415_000 + t, 215_000 + t]
    (once,) = parts.fed
    assert len(once["t"]) == 3 * len(TIMESTEPS), "equal ones are embedded once"
    joined = timed(0.5, 1, 1, 1)
    assert parts.evaluate([evaluations[0], joined], [21, 981]) == [215_021, 305_981]
    assert len(parts.fed[-1]["t"]) == len(TIMESTEPS), "only the new ones are"


def test_time_embeddings_are_bounded_whatever_the_schedules_and_the_vectors_are() -> None:
    parts, timesteps = TimeParts(), np.arange(4000, 0, -1).astype(np.float32)
    for row in (0, 1, 63, 64, 3999):
        members = [timed(0, size, 0, 0, timesteps=timesteps) for size in range(40)]
        found = parts.evaluate(members, [float(timesteps[row])] * 40)
        assert found == [np.float32(100_000 * size) + timesteps[row] for size in range(40)]
        assert len(parts.denoiser._rows["rows"]) == len(parts.denoiser._places) <= 1024 + 40
    assert sum(len(fed["t"]) for fed in parts.fed) <= 5 * 1064
