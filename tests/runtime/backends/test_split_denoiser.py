"""What does not depend on the latents is computed once."""

from __future__ import annotations

import numpy as np
import pytest
from latentrt.backends.split_denoiser import InParts, ReusesFeatures

from latentrt.backends.session import Arrays, run
from tests.runtime.backends.split_fakes import FakeParts, whole

TIMESTEPS = np.array([981, 741, 501, 261, 21], np.float32)


@pytest.fixture
def parts() -> FakeParts:
    return FakeParts()


def feeds(batch: int = 2, timestep: float = 501.0, *, frozen: bool = True) -> Arrays:
    rng = np.random.default_rng(batch)
    embeddings = rng.standard_normal((batch, 7, 8), dtype=np.float32)
    embeddings.setflags(write=not frozen)
    sample = rng.standard_normal((batch, 4, 8, 8), dtype=np.float32)
    return {
        "sample": sample,
        "timestep": np.full(batch, timestep, np.float32),
        "encoder_hidden_states": embeddings,
    }


def expected(given: Arrays) -> np.ndarray:
    return whole(given["sample"], given["timestep"], given["encoder_hidden_states"])


def test_it_is_a_denoiser_like_any_other(parts: FakeParts) -> None:
    given = feeds()
    np.testing.assert_allclose(run(parts.denoiser, **given)["noise_pred"], expected(given), rtol=1e-6)


def test_a_run_asks_for_its_table_and_its_prompt_once(parts: FakeParts) -> None:
    denoiser, given = parts.denoiser.begin(TIMESTEPS), feeds()
    for timestep in TIMESTEPS:
        given["timestep"] = np.full(2, timestep, np.float32)
        np.testing.assert_allclose(run(denoiser, **given)["noise_pred"], expected(given), rtol=1e-6)
    assert (parts.runs("time_embedding"), parts.runs("cross_attention_kv"), parts.runs("body")) == (
        1,
        1,
        len(TIMESTEPS),
    )
    (table,) = parts.parts["time_embedding"].fed
    assert sorted(table["timestep"]) == sorted(TIMESTEPS)
    assert "shallow_body" not in parts.opened


def test_a_timestep_that_was_not_announced_is_computed_too(parts: FakeParts) -> None:
    denoiser = parts.denoiser.begin(TIMESTEPS)
    for timestep in (981.0, 7.0, 741.0, 7.0):
        given = feeds(timestep=timestep)
        np.testing.assert_allclose(run(denoiser, **given)["noise_pred"], expected(given), rtol=1e-6)
    assert parts.runs("time_embedding") == 2


def test_samples_of_a_batch_may_stand_at_different_timesteps(parts: FakeParts) -> None:
    given = feeds(batch=3)
    given["timestep"] = np.array([21, 981, 501], np.float32)
    found = run(parts.denoiser.begin(TIMESTEPS), **given)["noise_pred"]
    np.testing.assert_allclose(found, expected(given), rtol=1e-6)


def test_embeddings_that_may_have_been_written_to_are_looked_at_again(parts: FakeParts) -> None:
    denoiser, given = parts.denoiser.begin(TIMESTEPS), feeds(frozen=False)
    run(denoiser, **given)
    given["encoder_hidden_states"] += 1
    np.testing.assert_allclose(run(denoiser, **given)["noise_pred"], expected(given), rtol=1e-6)


def test_each_prompt_has_its_own_keys(parts: FakeParts) -> None:
    denoiser = parts.denoiser.begin(TIMESTEPS)
    # More than are remembered, twice.
    several = [feeds(batch=batch) for batch in range(1, 21)] * 2
    for given in several:
        np.testing.assert_allclose(run(denoiser, **given)["noise_pred"], expected(given), rtol=1e-6)


def test_a_run_is_nobody_elses(parts: FakeParts) -> None:
    """Threads share a denoiser; what one run remembers is not another's."""
    first, second = (parts.denoiser.begin(TIMESTEPS) for _ in range(2))
    given = feeds()
    run(first, **given)
    run(second, **given)
    assert parts.runs("cross_attention_kv") == 2
    assert set(parts.opened) == {"time_embedding", "cross_attention_kv", "body"}


def test_it_says_what_it_can(parts: FakeParts) -> None:
    assert isinstance(parts.denoiser, InParts)
    assert isinstance(parts.denoiser.begin(TIMESTEPS), ReusesFeatures)


def test_deep_features_of_the_same_step_change_nothing(parts: FakeParts) -> None:
    denoiser, given = parts.denoiser.begin(TIMESTEPS), feeds()
    outputs = denoiser.run(given)
    again = denoiser.run_reusing(given, outputs["deep_features"])
    np.testing.assert_array_equal(again["noise_pred"], outputs["noise_pred"])
