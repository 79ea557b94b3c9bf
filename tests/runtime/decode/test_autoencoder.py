"""Latents to pixels and back: one image at a time, whole or in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components, Models
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.placement import Preferences, place_components
from latentrt.backends.session import Arrays, Session, run
from latentrt.bundle.tensors import TensorSpec
from latentrt.decode import autoencoder
from latentrt.decode.slices import SlicedDecoder
from latentrt.sampling.noise import Generator
from tests.runtime.fake_sessions import FunctionSession

DEFAULT_SIDE = 64  # of the sample model
CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 3, "safety": "off"}


class FakeDecoder(Session):
    """A decoder of two pixels a latent, whose first channel is the level; records the shapes of its inputs."""

    inputs = (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),)
    outputs = (TensorSpec("pixels", "uint8", ("batch", "2*height", "2*width", 3)),)

    def __init__(self) -> None:
        self.shapes = list[tuple[int, ...]]()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self.shapes.append(feeds["latents"].shape)
        pixels = feeds["latents"][:, 0].repeat(2, axis=1).repeat(2, axis=2)
        return {"pixels": pixels[..., None].repeat(3, axis=3).astype(np.uint8)}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu")


def test_images_are_decoded_one_at_a_time() -> None:
    decoder = FakeDecoder()
    latents = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) * np.ones((1, 4, 5, 6), np.float32)
    pixels = autoencoder.decode(decoder, latents, downscale=2)
    assert decoder.shapes == [(1, 4, 5, 6)] * 3
    assert pixels.shape == (3, 10, 12, 3)
    assert pixels.dtype == np.uint8
    assert [int(image.mean()) for image in pixels] == [0, 1, 2]


def test_tiles_have_the_size_that_was_announced() -> None:
    decoder = FakeDecoder()
    latents = np.full((1, 4, 12, 20), 7, np.float32)
    pixels = autoencoder.decode(decoder, latents, downscale=2, largest_tile=8)
    assert (pixels == 7).all()
    assert pixels.shape == (1, 24, 40, 3)
    announced = autoencoder.sizes((12, 20), 8)
    assert {*decoder.shapes} == {(announced["batch"], 4, announced["height"], announced["width"])}
    assert autoencoder.sizes((12, 20), None) == {"batch": 1, "height": 12, "width": 20}


def test_tiles_are_for_images_larger_than_the_model_was_trained_for(pipeline: Pipeline) -> None:
    whole, tiled = (pipeline(**CALL, output_type="np", decoder=decoder).images for decoder in ("full", "tiled"))
    np.testing.assert_array_equal(whole, tiled)
    size: dict[str, Any] = {"width": 2 * DEFAULT_SIDE, "height": DEFAULT_SIDE}
    whole, tiled = (pipeline(**CALL, **size, output_type="np", decoder=name).images for name in ("full", "tiled"))
    assert whole.shape == tiled.shape == (1, DEFAULT_SIDE, 2 * DEFAULT_SIDE, 3)
    assert 0 < np.abs(whole - tiled).mean() < 0.1


def test_an_image_records_its_decoder(pipeline: Pipeline) -> None:
    for decoder in ("tiled", "preview"):
        assert pipeline(**CALL, decoder=decoder).records[0].options["decoder"] == decoder


def test_a_decoder_is_opened_in_slices_where_its_placement_says_so(bundle: Bundle) -> None:
    for low_memory in (False, True):
        placements = place_components(bundle, "cpu", preferences=Preferences(low_memory=low_memory))
        own = Components(placements, low_memory=low_memory, models=Models())
        decoder = autoencoder.open_decoder(bundle, own, "vae_decoder")
        assert isinstance(decoder, SlicedDecoder) == low_memory
        record = bundle.manifest.components["vae_decoder"]
        assert (decoder.inputs, decoder.outputs) == (record.inputs, record.outputs)
        own.close()


def test_an_encoded_image_is_a_distribution_that_is_sampled_with_the_images_own_generator(bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    encoder = open_session(bundle, "vae_encoder", threads=1)
    found, outputs = autoencoder.encode(encoder, pixels), run(encoder, pixels=pixels)
    np.testing.assert_array_equal(found.mean, outputs["mean"][0])
    assert found.logvar is not None
    np.testing.assert_array_equal(found.logvar, outputs["logvar"][0])
    assert found.mean.shape == found.logvar.shape == (4, 8, 12)
    latents = found.sample(Generator(5))
    expected = found.mean + np.exp(found.logvar.astype(np.float64) / 2) * Generator(5).normal((4, 8, 12))
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert not np.array_equal(latents, found.sample(Generator(6)))


def test_a_decoded_image_resembles_the_encoded_one(bundle: Bundle) -> None:
    """A circle in two colours that the sample model was trained on."""
    y, x = np.mgrid[0:64, 0:64]
    red, blue = np.array([214, 45, 44]), np.array([62, 103, 192])
    image = np.where((np.hypot(x - 32, y - 32) < 16)[..., np.newaxis], red, blue).astype(np.float32)
    pixels = (image / 127.5 - 1).transpose(2, 0, 1)[np.newaxis]
    mean = autoencoder.encode(open_session(bundle, "vae_encoder", threads=1), pixels).mean
    scaled = mean[np.newaxis] * np.float32(bundle.manifest.latent_spaces["unet"].scale)
    decoded = autoencoder.decode(open_session(bundle, "vae_decoder", threads=1), scaled, downscale=4)[0]
    assert np.abs(decoded - image).mean() < 16  # 11 was seen


def test_an_encoder_without_a_distribution_draws_nothing() -> None:
    mean = np.random.default_rng(0).standard_normal((1, 4, 2, 3)).astype(np.float32)
    session = FunctionSession(
        (TensorSpec("pixels", "float32", ("batch", 3, "height", "width")),),
        (TensorSpec("mean", "float32", ("batch", 4, "height", "width")),),
        lambda feeds: {"mean": mean},
    )
    found, generator = autoencoder.encode(session, np.zeros((1, 3, 16, 24), np.float32)), Generator(5)
    np.testing.assert_array_equal(found.sample(generator), mean[0])
    np.testing.assert_array_equal(generator.normal((4,)), Generator(5).normal((4,)))


def test_further_inputs_are_those_of_every_image() -> None:
    seen = list[NDArray[np.float32]]()
    mask = np.random.default_rng(0).uniform(size=(1, 1, 10, 12)).astype(np.float32)

    def record(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        seen.append(feeds["mask"])
        return FakeDecoder().run(feeds)

    spec = TensorSpec("mask", "float32", ("batch", 1, "2*height", "2*width"))
    decoder = FunctionSession((*FakeDecoder.inputs, spec), FakeDecoder.outputs, record)
    autoencoder.decode(decoder, np.ones((2, 4, 5, 6), np.float32), downscale=2, images={"mask": mask})
    np.testing.assert_array_equal(np.stack(seen), np.stack([mask, mask]))
