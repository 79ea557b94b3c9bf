"""The pipeline as a user drives it. That its pictures are diffusers' is `tests/test_parity.py`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Bundle, Pipeline, Request
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BackendError, FeedError, RequestError, SafetyError
from latentrt.images.metadata import read_metadata
from tests.exported import Exported

PROMPT = "a red circle"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler", "seed": 3}


@pytest.fixture(scope="module")
def pipeline(sd1: Exported) -> Pipeline:
    return Pipeline.load(sd1.bundle)


class Fake:
    """A session of someone else's making, at the same seam: it passes on what a real one says, changed."""

    def __init__(self, real: Session, **changed: Any) -> None:
        self._real, self._changed = real, changed

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._real.inputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        outputs = self._real.run(feeds)
        for name, change in self._changed.items():
            outputs[name] = change(outputs[name])
        return outputs


def with_classifier(model: Exported, **changed: Any) -> Pipeline:
    bundle = Bundle.open(model.bundle)

    def open_one(component: str) -> Session:
        session = open_session(bundle, component)
        return Fake(session, **changed) if component == "safety_checker" else session

    return Pipeline(bundle, open_one)


def flagging(model: Exported) -> Pipeline:
    def high(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([np.full_like(scores[:, :1], 0.125), scores[:, 1:]], axis=1)

    return with_classifier(model, concept_scores=high, flagged=np.ones_like)


def test_the_call_of_the_readme(pipeline: Pipeline) -> None:
    result = pipeline(PROMPT, seed=7, num_inference_steps=2)
    assert isinstance(result.images[0], Image.Image)
    assert result.images[0].size == (64, 64)
    assert result.nsfw_content_detected == [False]
    assert result.seeds == (7,)


def test_an_image_of_a_batch_is_the_image_alone(pipeline: Pipeline) -> None:
    """Its own generator, its own row: only the order of float32 sums may differ with the batch."""
    for sampler, eta in (("euler_a", 0.0), ("ddim", 0.5)):
        call: dict[str, Any] = {"num_inference_steps": 4, "sampler": sampler, "eta": eta, "output_type": "latent"}
        batch = pipeline([PROMPT, "a blue star"], num_images_per_prompt=2, seed=40, **call).images
        for index, prompt in enumerate([PROMPT, PROMPT, "a blue star", "a blue star"]):
            alone = pipeline(prompt, seed=40 + index, **call).images
            assert np.abs(batch[index] - alone[0]).max() <= 1e-5 * np.abs(alone).max()


def test_the_same_request_is_the_same_picture(pipeline: Pipeline) -> None:
    first, second = (pipeline(PROMPT, output_type="np", **QUICK).images for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_steps_is_a_generator_that_can_be_left(pipeline: Pipeline) -> None:
    steps = pipeline.steps(Request.of(prompt=PROMPT, num_inference_steps=50, sampler="ddim", seed=1))
    first = next(steps)
    assert (first.index, first.total, first.latents.shape) == (0, 50, (1, 4, 8, 8))
    steps.close()
    assert next(steps, None) is None


def test_nothing_is_done_before_the_first_step_is_asked_for(sd1: Exported) -> None:
    opened: list[str] = []

    def refuse(component: str) -> Session:
        opened.append(component)
        raise AssertionError

    pipeline = Pipeline(Bundle.open(sd1.bundle), refuse)
    pipeline.steps(Request.of(prompt=PROMPT))
    with pytest.raises(RequestError):
        next(pipeline.steps(Request.of(prompt=PROMPT, height=65)))
    assert opened == []


def test_the_callback_sees_every_step_and_may_change_the_latents(pipeline: Pipeline) -> None:
    seen: list[tuple[int, float]] = []

    def zero(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, timestep))
        return {"latents": np.zeros_like(values["latents"])}

    result = pipeline(PROMPT, callback_on_step_end=zero, output_type="latent", **QUICK)
    assert [index for index, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]
    np.testing.assert_array_equal(result.images, 0)
    plain = pipeline(PROMPT, callback_on_step_end=lambda *_: None, output_type="latent", **QUICK).images
    assert np.abs(plain).max() > 0


def test_latents_handed_back_can_be_given_again(pipeline: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    call: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 2, "sampler": "ddim"}
    first = pipeline(PROMPT, latents=noise, seed=1, output_type="latent", **call).images
    second = pipeline(PROMPT, latents=noise, seed=2, output_type="latent", **call).images
    np.testing.assert_array_equal(first, second)


def test_output_types(pipeline: Pipeline) -> None:
    pixels = pipeline(PROMPT, output_type="np", **QUICK).images
    picture = pipeline(PROMPT, **QUICK).images[0]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.rint(pixels[0] * 255), np.asarray(picture))
    with pytest.raises(RequestError, match="expected one of pil, np, latent"):
        pipeline(PROMPT, output_type="pt", **QUICK)  # type: ignore[arg-type]


def test_an_unknown_sampler_is_refused_with_the_known_ones(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"ddim, .*pndm, euler, euler_a, .*dpmpp_2m"):
        pipeline(PROMPT, sampler="eular")


def test_embeddings_of_odd_length_need_negative_ones(pipeline: Pipeline) -> None:
    embeds = np.zeros((1, 80, 32), np.float32)
    with pytest.raises(RequestError, match="negative_prompt_embeds"):
        pipeline(prompt_embeds=embeds, **QUICK)
    result = pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds, output_type="latent", **QUICK)
    assert np.isfinite(result.images).all()
    with pytest.raises(RequestError, match="expected one shape"):
        pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds[:, :77], **QUICK)


def test_a_flagged_picture_is_black(sd1: Exported) -> None:
    result = flagging(sd1)(PROMPT, num_images_per_prompt=2, num_inference_steps=2)
    assert result.nsfw_content_detected == [True, True]
    assert all(picture.getextrema() == ((0, 0),) * 3 for picture in result.images)
    assert result.verdicts is not None
    assert result.verdicts[0].concepts == (0,)
    assert result.verdicts[0].concept_scores[0] == 0.125


def test_a_flagged_picture_can_be_blurred_or_only_reported(sd1: Exported) -> None:
    pipeline = flagging(sd1)
    plain = np.asarray(pipeline(PROMPT, safety="off", **QUICK).images[0])
    reported = pipeline(PROMPT, safety="report", **QUICK)
    blurred = np.asarray(pipeline(PROMPT, safety="blur", **QUICK).images[0])
    np.testing.assert_array_equal(np.asarray(reported.images[0]), plain)
    assert reported.nsfw_content_detected == [True]
    assert np.abs(np.diff(blurred.astype(float), axis=0)).max() < np.abs(np.diff(plain.astype(float), axis=0)).max() / 4


def test_pixels_as_an_array_are_checked_too(sd1: Exported) -> None:
    np.testing.assert_array_equal(flagging(sd1)(PROMPT, output_type="np", **QUICK).images, 0)


def test_a_classifier_that_fails_stops_the_run(sd1: Exported) -> None:
    def fail(_: NDArray[Any]) -> NDArray[Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(SafetyError, match=r"out of memory.*Two ways out"):
        with_classifier(sd1, flagged=fail)(PROMPT, **QUICK)
    with pytest.raises(SafetyError, match="not all numbers"):
        with_classifier(sd1, concept_scores=lambda scores: scores * np.nan)(PROMPT, **QUICK)


def test_a_classifier_that_cannot_be_loaded_stops_the_run(sd1: Exported) -> None:
    bundle = Bundle.open(sd1.bundle)

    def open_one(component: str) -> Session:
        if component == "safety_checker":
            raise FeedError("no such provider")
        return open_session(bundle, component)

    with pytest.raises(SafetyError, match="no such provider"):
        Pipeline(bundle, open_one)(PROMPT, **QUICK)


def test_safety_is_off_only_by_name_and_that_is_logged(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="latentrt"):
        result = pipeline(PROMPT, safety="off", **QUICK)
    assert "switched off" in caplog.text
    assert result.nsfw_content_detected is None
    assert result.records[0].safety.policy == "off"


def test_a_file_says_what_it_is(pipeline: Pipeline, tmp_path: Path) -> None:
    result = pipeline([PROMPT, "a star"], negative_prompt="blue", clip_skip=1, karras=True, **QUICK)
    paths = result.save(tmp_path / "picture.png")
    assert [path.name for path in paths] == ["picture-0.png", "picture-1.png"]
    record = read_metadata(paths[1]).record
    assert record is not None
    assert (record.prompt, record.negative_prompt, record.seed, record.clip_skip) == ("a star", "blue", 4, 1)
    assert (record.sampler, record.karras, record.num_inference_steps) == ("euler", True, 2)
    assert record.bundle_digest == pipeline.bundle.digest
    assert (record.safety.policy, record.safety.flagged) == ("block", False)
    with pytest.raises(RequestError, match="arrays"):
        pipeline(PROMPT, output_type="np", **QUICK).save(tmp_path / "no.png")


def test_a_graph_is_loaded_once_and_only_if_needed(sd1: Exported) -> None:
    bundle, opened = Bundle.open(sd1.bundle), []

    def open_one(component: str) -> Session:
        opened.append(component)
        return open_session(bundle, component)

    pipeline = Pipeline(bundle, open_one)
    pipeline(PROMPT, output_type="latent", **QUICK)
    assert sorted(opened) == ["text_encoder", "unet"]  # the second may be opened while the first is
    pipeline(PROMPT, **QUICK)
    assert sorted(opened) == ["safety_checker", "text_encoder", "unet", "vae_decoder"]


def test_a_prompt_of_other_length_beside_it_does_not_change_a_picture(pipeline: Pipeline) -> None:
    long = " ".join(["star"] * 100)
    call: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler_a", "output_type": "latent"}
    batch = pipeline(
        [PROMPT, long, "blue"], negative_prompt=["", "", long], num_images_per_prompt=2, seed=3, **call
    ).images
    for index, (prompt, negative) in enumerate([(PROMPT, ""), (long, ""), ("blue", long)]):
        alone = pipeline(prompt, negative_prompt=negative, num_images_per_prompt=2, seed=3 + 2 * index, **call).images
        assert np.abs(batch[2 * index : 2 * index + 2] - alone).max() <= 1e-5 * np.abs(alone).max()


def test_negative_embeddings_are_ignored_without_guidance(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", **QUICK}
    other = np.ones((1, 154, 32), np.float32)
    np.testing.assert_array_equal(
        pipeline(PROMPT, negative_prompt_embeds=other, **call).images, pipeline(PROMPT, **call).images
    )


def test_latents_of_another_float_type_are_taken_at_every_step(pipeline: Pipeline) -> None:
    def widened(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].astype(np.float64)}

    call: dict[str, Any] = {"output_type": "np", **QUICK}
    found = pipeline(PROMPT, callback_on_step_end=widened, **call).images
    np.testing.assert_array_equal(found, pipeline(PROMPT, **call).images)


@pytest.mark.parametrize("changed", [None, [0.0], np.zeros((2, 4, 8, 8)), np.full((1, 4, 8, 8), np.nan)], ids=str)
def test_a_callback_gives_back_latents_or_is_told_so(pipeline: Pipeline, changed: Any) -> None:
    with pytest.raises(RequestError, match="latents to go on with: found"):
        pipeline(PROMPT, callback_on_step_end=lambda *_: {"latents": changed}, **QUICK)


def test_a_denoiser_that_overflows_is_not_a_black_picture(sd1: Exported) -> None:
    bundle = Bundle.open(sd1.bundle)

    def open_one(component: str) -> Session:
        session = open_session(bundle, component)
        return Fake(session, noise_pred=lambda noise: noise * np.inf) if component == "unet" else session

    with pytest.raises(BackendError, match="timestep 999 gave values that are not finite"):
        Pipeline(bundle, open_one)(PROMPT, **QUICK)


def test_what_cannot_be_drawn_is_refused_before_it_is_begun(pipeline: Pipeline) -> None:
    for asked in (
        {"sampler": "nope"},
        {"sampler": ""},
        {"sampler": "pndm", "karras": True},
        {"sampler": "euler", "eta": 0.5},
        {"karras": "yes"},
    ):
        with pytest.raises(RequestError):
            pipeline.resolve(Request.of(prompt=PROMPT, **asked))


def test_what_was_given_as_arrays_is_on_record(pipeline: Pipeline) -> None:
    noise = np.zeros((1, 4, 8, 8), np.float32)
    assert pipeline(PROMPT, latents=noise, **QUICK).records[0].given == ("latents",)
    assert pipeline(PROMPT, output_type="latent", **QUICK).records[0].safety.policy == "off"
