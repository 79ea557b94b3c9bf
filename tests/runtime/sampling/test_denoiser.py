"""What the denoiser is asked, row after row, and what may be left out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from latentrt.sampling.approximation import Approximation
from numpy.typing import NDArray

from latentrt.errors import BackendError
from latentrt.request import Order, Request, resolve
from latentrt.sampling.denoiser import Asking
from latentrt.sampling.guidance import guide
from latentrt.text.clip import Conditioning
from tests.runtime import small_bundle
from tests.runtime.backends.split_fakes import WHOLE, FakeParts, shallow, whole

TIMESTEPS = np.array([981, 741, 501, 261, 21, 1], np.float32)
RNG = np.random.default_rng(7)
SCALE = 5.0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_bundle.manifest(small_bundle.write_bundle(tmp_path_factory.mktemp("bundle")))


def order(manifest: Any, *, guided: bool = True, **approximation: Any) -> Order:
    asked = Request.of(prompt="a", seed=1, guidance_scale=SCALE if guided else 1.0)
    return replace(resolve(asked, manifest), approximation=Approximation(**approximation))


def told(pictures: int, tokens: int = 7, *, first: int = 0, guided: bool = True) -> Conditioning:
    embeddings = RNG.standard_normal((2 * pictures if guided else pictures, tokens, 8), dtype=np.float32)
    embeddings.setflags(write=False)
    return Conditioning(np.arange(first, first + pictures), embeddings)


def latents(pictures: int) -> NDArray[np.float32]:
    return RNG.standard_normal((pictures, 4, 8, 8), dtype=np.float32)


def repeated(timestep: float, count: int) -> NDArray[np.float32]:
    return np.full(count, timestep, np.float32)


def guided_by_hand(sample: NDArray[Any], timestep: float, embeddings: NDArray[Any]) -> NDArray[np.float32]:
    doubled = np.concatenate([sample, sample])
    return guide(whole(doubled, repeated(timestep, len(doubled)), embeddings), SCALE, 0.0)


def test_every_row_is_guided_where_nothing_else_is_said(manifest: Any) -> None:
    parts, prompt, sample = FakeParts(), told(2), latents(2)
    ask = Asking(parts.denoiser, TIMESTEPS, [prompt], order(manifest))
    for timestep in TIMESTEPS:
        expected = guided_by_hand(sample, timestep, prompt.embeddings)
        np.testing.assert_allclose(ask(timestep, sample), expected, rtol=1e-5, atol=1e-6)
    assert (parts.runs("time_embedding"), parts.runs("cross_attention_kv")) == (1, 1)


def test_outside_of_its_interval_guidance_costs_nothing(manifest: Any) -> None:
    """Of six rows the second to the fourth lie within 0.16 … 0.67, as diffusers counts for a ControlNet."""
    parts, prompt, sample = FakeParts(), told(2), latents(2)
    ask = Asking(parts.denoiser, TIMESTEPS, [prompt], order(manifest, guidance_start=0.16, guidance_end=0.67))
    for row, timestep in enumerate(TIMESTEPS):
        alone = whole(sample, repeated(timestep, 2), prompt.embeddings[2:])
        expected = guided_by_hand(sample, timestep, prompt.embeddings) if 1 <= row <= 3 else alone
        np.testing.assert_allclose(ask(timestep, sample), expected, rtol=1e-5, atol=1e-6)
    assert [len(fed["sample"]) for fed in parts.parts["body"].fed] == [2, 4, 4, 4, 2, 2]
    # The keys of both halves, and those of the prompts alone.
    assert parts.runs("cross_attention_kv") == 2


def test_deep_features_are_computed_every_so_many_rows(manifest: Any) -> None:
    parts, prompt = FakeParts(), told(1, guided=False)
    ask = Asking(parts.denoiser, TIMESTEPS, [prompt], order(manifest, guided=False, deep_cache=3))
    deep: NDArray[Any] | None = None
    for row, timestep in enumerate(TIMESTEPS):
        sample, t = latents(1), repeated(timestep, 1)
        if row % 3 == 0:
            deep = np.tanh(sample * prompt.embeddings.mean(axis=(1, 2))[:, None, None, None])
        assert deep is not None
        np.testing.assert_allclose(ask(timestep, sample), shallow(sample, t, deep), rtol=1e-5, atol=1e-6)
    assert (parts.runs("body"), parts.runs("shallow_body")) == (2, 4)


def test_prompts_of_different_lengths_keep_their_own_features(manifest: Any) -> None:
    parts, sample = FakeParts(), latents(3)
    prompts = [told(2, 7), told(1, 14, first=2)]
    ask = Asking(parts.denoiser, TIMESTEPS, prompts, order(manifest, deep_cache=2))
    first, second = ask(TIMESTEPS[0], sample), ask(TIMESTEPS[0], sample)
    # The same row again: features of the same latents are what would have been computed.
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    assert (parts.runs("body"), parts.runs("shallow_body")) == (2, 2)


def test_where_guidance_ends_the_positive_half_goes_on(manifest: Any) -> None:
    """Whole at rows 0 and 3, guided at 0 and 1. Row 2 takes the positive half of what row 0 had."""
    parts, prompt, sample = FakeParts(), told(1), latents(1)
    ask = Asking(parts.denoiser, TIMESTEPS, [prompt], order(manifest, deep_cache=3, guidance_end=0.4))
    found = [ask(timestep, sample) for timestep in TIMESTEPS]
    # The latents stay the same here, so the features of any row are those of every row.
    for row, timestep in enumerate(TIMESTEPS):
        alone = whole(sample, repeated(timestep, 1), prompt.embeddings[1:])
        expected = guided_by_hand(sample, timestep, prompt.embeddings) if row < 2 else alone
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)
    assert [len(fed["sample"]) for fed in parts.parts["shallow_body"].fed] == [2, 1, 1, 1]


def test_where_guidance_begins_there_is_nothing_to_reuse(manifest: Any) -> None:
    """Row 0 is whole and has no negative half, so row 3, the first with guidance, is whole as well."""
    parts, prompt, sample = FakeParts(), told(1), latents(1)
    ask = Asking(parts.denoiser, TIMESTEPS, [prompt], order(manifest, deep_cache=6, guidance_start=0.5))
    for timestep in TIMESTEPS:
        ask(timestep, sample)
    assert [len(fed["sample"]) for fed in parts.parts["body"].fed] == [1, 2]
    assert [len(fed["sample"]) for fed in parts.parts["shallow_body"].fed] == [1, 1, 2, 2]


class Whole:
    """A denoiser that comes in one piece."""

    inputs = WHOLE

    def run(self, feeds: Any) -> Any:
        return {"noise_pred": whole(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"])}


def test_a_denoiser_in_one_piece_reuses_nothing_and_says_so(manifest: Any) -> None:
    with pytest.raises(BackendError, match="found deep_cache 2, and what runs the denoiser here runs it whole"):
        Asking(Whole(), TIMESTEPS, [told(1)], order(manifest, deep_cache=2))


def test_a_denoiser_in_one_piece_is_guided_the_same(manifest: Any) -> None:
    prompt, sample = told(2), latents(2)
    ask = Asking(Whole(), TIMESTEPS, [prompt], order(manifest, guidance_end=0.5))
    found = [ask(timestep, sample) for timestep in TIMESTEPS]
    np.testing.assert_allclose(found[0], guided_by_hand(sample, TIMESTEPS[0], prompt.embeddings), rtol=1e-6)
    np.testing.assert_array_equal(found[-1], whole(sample, repeated(TIMESTEPS[-1], 2), prompt.embeddings[2:]))
