"""Inputs made from their sources."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.bundle.gate_inputs import (
    PROMPTS,
    collect_outputs,
    make_gate_inputs,
    make_images,
    reference_shapes,
    tokenize_prompts,
)
from latentrt.bundle.manifest import InputSpec, LatentSpace

RNG = np.random.default_rng(1)
ARRAYS: dict[str, NDArray[Any]] = {
    "tokens:clip": np.arange(4 * 77).reshape(4, 77),
    "option:clip_skip": np.array(1),
    "alphas_cumprod:net": np.linspace(0.999, 0.001, 1000, dtype=np.float32),
    "latents": RNG.standard_normal((1, 4, 32, 40)).astype(np.float32),
    "clip.states": RNG.standard_normal((5, 77, 6)).astype(np.float32),
    "clip.pooled": RNG.standard_normal((5, 6)).astype(np.float32),
}


def made(source: str, shape: tuple[int, ...], dtype: Any = "float32", name: str = "net") -> NDArray[Any]:
    spec = InputSpec("x", dtype, shape, source)
    array = make_gate_inputs(name, [spec], {"x": shape}, ARRAYS)["x"]
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous
    return array


def denoiser(shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    inputs = [
        InputSpec("noisy", "float32", ("evaluations", shape[1], "height", "width"), "latents"),
        InputSpec("t", "float32", ("evaluations",), "timestep"),
    ]
    return make_gate_inputs("net", inputs, {"noisy": shape, "t": shape[:1]}, ARRAYS)


def test_tokens_are_the_prompts_over_and_over() -> None:
    found = made("tokens", (6, 77), "int64", "clip")
    np.testing.assert_array_equal(found, ARRAYS["tokens:clip"][[0, 1, 2, 3, 0, 1]])


@pytest.mark.parametrize(("largest", "expected"), [(1, [0, 1, 0, 1]), (11, [0, 1, 2, 0]), (0, [0, 0, 0, 0])])
def test_options_have_several_values_up_to_the_largest(
    monkeypatch: pytest.MonkeyPatch, largest: int, expected: list[int]
) -> None:
    monkeypatch.setitem(ARRAYS, "option:clip_skip", np.array(largest))
    assert made("option:clip_skip", (4,), "int64").tolist() == expected


def test_latents_are_encoded_images_tiled_and_cropped() -> None:
    found = made("latents", (1, 4, 33, 8))
    np.testing.assert_array_equal(found[0, :, :32], ARRAYS["latents"][0, :, :, :8])
    np.testing.assert_array_equal(found[:, :, 32], ARRAYS["latents"][:, :, 0, :8])


def test_every_second_row_of_a_decoders_latents_is_in_the_range_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever range the encoder's own outputs have."""
    monkeypatch.setitem(ARRAYS, "latents", ARRAYS["latents"] * np.float32(1e-4) + np.float32(3))
    found = made("latents", (4, 4, 32, 8))
    np.testing.assert_array_equal(found[::2], np.repeat(ARRAYS["latents"][:, :, :, :8], 2, axis=0))
    np.testing.assert_allclose(found[1::2].mean(axis=(2, 3)), 0, atol=1e-2)  # the range is 3e-5 of the mean in float32
    np.testing.assert_allclose(found[1::2].std(axis=(2, 3)), 1, rtol=1e-3)
    monkeypatch.setitem(ARRAYS, "latents", np.ones_like(ARRAYS["latents"]))
    assert (made("latents", (2, 4, 8, 8))[1] == 0).all(), "a constant has no variance"


def test_a_denoisers_latents_have_the_noise_of_their_timesteps() -> None:
    feeds = denoiser((4, 4, 32, 40))
    assert feeds["t"].tolist() == [981, 21, 401, 801]
    clean = ARRAYS["latents"][0]
    for noisy, t in zip(feeds["noisy"], feeds["t"], strict=True):
        alpha_bar = float(ARRAYS["alphas_cumprod:net"][int(t)])
        noise = (noisy - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
        # 5,120 standard normal values: four standard errors of their mean and of their deviation.
        assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
        assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)


def test_timesteps_are_within_a_shorter_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARRAYS, "alphas_cumprod:net", ARRAYS["alphas_cumprod:net"][:100])
    assert denoiser((4, 4, 8, 8))["t"].tolist() == [98, 2, 40, 80]


def test_c_noise_is_that_of_the_timesteps() -> None:
    t, c_noise = (made(source, (4,)) for source in ("timestep", "c-noise"))
    alpha_bar = ARRAYS["alphas_cumprod:net"][t.astype(int)]
    np.testing.assert_allclose(np.exp(4 * c_noise) ** 2, 1 / alpha_bar - 1, rtol=1e-5)


@pytest.mark.parametrize("channels", [5, 7, 8, 9])
def test_channels_of_the_conditioning_have_no_noise(channels: int) -> None:
    plain, more = denoiser((2, 4, 8, 8))["noisy"], denoiser((2, channels, 8, 8))["noisy"]
    np.testing.assert_array_equal(more[:, :4], plain)
    clean = np.tile(ARRAYS["latents"][:, :, :8, :8], (2, 2, 1, 1))[:, : channels - 4]
    np.testing.assert_array_equal(more[:, 4:8], clean[:, :4])
    assert more[:, 4:].std() > 0.1


def test_outputs_of_other_components_are_repeated_and_joined() -> None:
    states = ARRAYS["clip.states"]
    np.testing.assert_array_equal(made("clip.states", (7, 77, 6)), states[[0, 1, 2, 3, 4, 0, 1]])
    np.testing.assert_array_equal(made("clip.pooled", (6, 6)), ARRAYS["clip.pooled"][[0, 1, 2, 3, 4, 0]])
    long = made("clip.states", (2, 154, 6))
    np.testing.assert_array_equal(long[0], np.concatenate([states[0], states[1]]))
    np.testing.assert_array_equal(long[1], np.concatenate([states[2], states[3]]))


def test_images_are_bytes_or_between_minus_one_and_one() -> None:
    pixels = made("images", (2, 24, 16, 3), "uint8")
    scaled = made("image", (2, 3, 24, 16))
    np.testing.assert_allclose(scaled, pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)  # float32
    assert scaled.min() < -0.9
    assert scaled.max() > 0.9
    assert not np.array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels, make_images(2, 24, 16))


def test_they_do_not_depend_on_earlier_calls() -> None:
    first = denoiser((2, 4, 8, 8))["noisy"]
    denoiser((3, 4, 16, 8))
    np.testing.assert_array_equal(denoiser((2, 4, 8, 8))["noisy"], first)


def test_an_encoder_gives_the_latents_of_the_loop() -> None:
    mean = RNG.standard_normal((1, 4, 2, 3)).astype(np.float32)
    space = LatentSpace(channels=4, downscale=8, scale=0.5, shift=0.25)
    found = collect_outputs("vae", "encoder", {"mean": mean, "logvar": mean + 1}, space)
    assert set(found) == {"vae.mean", "vae.logvar", "latents"}
    np.testing.assert_allclose(found["latents"], (mean - 0.25) * 0.5, rtol=1e-6)  # float32
    assert set(collect_outputs("clip", "text-encoder", {"states": mean}, space)) == {"clip.states"}


def test_reference_shapes_follow_from_the_axes() -> None:
    specs = [
        InputSpec("ids", "int64", ("chunks", 77), "tokens"),
        InputSpec("pixels", "float32", ("batch", 3, "8*height", "8*width"), "image"),
    ]
    assert reference_shapes(specs) == {"ids": (5, 77), "pixels": (1, 3, 256, 320)}


def test_of_a_long_prompt_the_first_chunk_is_taken() -> None:
    def chunks(prompt: str) -> NDArray[np.int64]:
        return np.full((3, 77), len(prompt))

    assert tokenize_prompts(chunks)[:, 0].tolist() == [len(prompt) for prompt in PROMPTS]
    assert tokenize_prompts(chunks, ["a"]).shape == (1, 77)


def test_guidance_weights_differ_and_one_is_of_a_scale_of_one() -> None:
    weights = made("guidance-weight", (4,))
    assert len({*weights.tolist()}) == 4
    assert weights.min() == 0


@pytest.mark.parametrize("count", [6, 5])
def test_micro_conditioning_differs_by_row(count: int) -> None:
    rows = made("micro-conditioning", (6, count))
    assert len({*map(tuple, rows[:4].tolist())}) == 4
    np.testing.assert_array_equal(rows[4:], rows[:2])
    assert (rows[:, :4] == made("micro-conditioning", (6, 6))[:, :4]).all()
    assert (rows[:, 4:] <= 10).all() == (count == 5), "a score, or a target size"


def test_outputs_are_joined_along_the_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    other = RNG.standard_normal((5, 77, 3)).astype(np.float32)
    monkeypatch.setitem(ARRAYS, "clip_2.states", other)
    found = made("clip.states+clip_2.states", (2, 154, 9))
    np.testing.assert_array_equal(found[..., :6], made("clip.states", (2, 154, 6)))
    np.testing.assert_array_equal(found[..., 6:], made("clip_2.states", (2, 154, 3)))


def test_masks_are_a_box_and_in_every_second_row_the_whole_image() -> None:
    masks = made("mask", (3, 1, 24, 16))
    np.testing.assert_array_equal(masks[0], masks[2])
    assert (masks[1] == 1).all()
    assert {*np.unique(masks[0])} == {0, 1}
    assert (masks[0, 0, 6:18, 5:] == 1).all()
    assert masks[0].sum() == 12 * 11
