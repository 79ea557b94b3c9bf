"""The pipeline as a user calls it, on the sample bundle. That its images equal diffusers' is tested in tests/parity."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import pickle
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import (
    BackendError,
    Bundle,
    BundleError,
    Pipeline,
    Request,
    RequestError,
    SafetyError,
    Sample,
    Step,
    migration,
)
from latentrt.backends.models import Components
from latentrt.backends.onnxruntime import OnnxRuntimeSession
from latentrt.backends.placement import place_components
from latentrt.backends.session import Session
from latentrt.bundle.sample import bundle_path
from latentrt.errors import FeedError, IntegrityError, MissingAttributeError
from latentrt.pipeline import call_signature
from tests.runtime.fake_sessions import ChangedSession, pipeline_with

PROMPT = "a red circle"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler", "seed": 3}
LATENTS = (4, 16, 16)  # of the sample model's 64 × 64 pixels
WIDTH = 128  # of its text embeddings

OpenReal = Callable[[], Session]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu")


def with_changed(component: str, **changes: Callable[[NDArray[Any]], NDArray[Any]]) -> Pipeline:
    """Return a pipeline with a component whose outputs pass through functions."""

    return pipeline_with(lambda name, part, open_real: ChangedSession(open_real(), **changes), component)


def flagging() -> Pipeline:
    """Return a pipeline whose classifier flags every image, for concept 0 with score 0.125."""

    def high(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([np.full_like(scores[:, :1], 0.125), scores[:, 1:]], axis=1)

    return with_changed("safety_checker", concept_scores=high, flagged=np.ones_like)


def test_the_call_of_the_readme(pipeline: Pipeline) -> None:
    result = pipeline(PROMPT, seed=7, num_inference_steps=2)
    assert isinstance(result.images[0], Image.Image)
    assert result.images[0].size == (64, 64)
    assert result.nsfw_content_detected == [False]
    assert result.seeds == (7,)


def test_load_reports_where_each_component_runs(pipeline: Pipeline) -> None:
    assert {*pipeline.runs_on} == {*pipeline.bundle.manifest.components}
    for placement in pipeline.runs_on.values():
        assert (placement.backend, placement.device) == ("onnxruntime", "cpu")
    with pytest.raises(TypeError):
        pipeline.runs_on["unet"] = pipeline.runs_on["unet"]  # type: ignore[index]


def test_an_image_of_a_batch_is_the_image_alone(pipeline: Pipeline) -> None:
    """Each has its own generator and row: only the order of float32 sums may differ with the batch."""
    for sampler, eta in (("euler_a", None), ("ddim", 0.5)):
        call: dict[str, Any] = {"num_inference_steps": 4, "sampler": sampler, "eta": eta, "output_type": "latent"}
        batch = pipeline([PROMPT, "a blue star"], num_images_per_prompt=2, seed=40, **call).images
        for index, prompt in enumerate([PROMPT, PROMPT, "a blue star", "a blue star"]):
            alone = pipeline(prompt, seed=40 + index, **call).images
            assert np.abs(batch[index] - alone[0]).max() <= 1e-5 * np.abs(alone).max()


def test_a_longer_prompt_beside_it_does_not_change_an_image(pipeline: Pipeline) -> None:
    long = " ".join(["star"] * 100)
    call: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler_a", "output_type": "latent"}
    batch = pipeline(
        [PROMPT, long, "blue"], negative_prompt=["", "", long], num_images_per_prompt=2, seed=3, **call
    ).images
    for index, (prompt, negative) in enumerate([(PROMPT, ""), (long, ""), ("blue", long)]):
        alone = pipeline(prompt, negative_prompt=negative, num_images_per_prompt=2, seed=3 + 2 * index, **call).images
        assert np.abs(batch[2 * index : 2 * index + 2] - alone).max() <= 1e-5 * np.abs(alone).max()


def test_the_same_request_gives_the_same_image(pipeline: Pipeline) -> None:
    first, second = (pipeline(PROMPT, output_type="np", **QUICK).images for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_steps_is_a_generator_that_can_be_left(pipeline: Pipeline) -> None:
    steps = pipeline.steps(Request.of(prompt=PROMPT, num_inference_steps=50, sampler="ddim", seed=1))
    first = next(steps)
    assert (first.index, first.total, first.latents.shape) == (0, 50, (1, *LATENTS))
    steps.close()
    assert next(steps, None) is None


def test_nothing_is_loaded_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def refuse(name: str, part: str | None, open_real: OpenReal) -> Session:
        opened.append(name)
        raise AssertionError

    pipeline = pipeline_with(refuse)
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


def test_latents_of_another_float_type_are_accepted_at_every_step(pipeline: Pipeline) -> None:
    def widen(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].astype(np.float64)}

    call: dict[str, Any] = {"output_type": "np", **QUICK}
    found = pipeline(PROMPT, callback_on_step_end=widen, **call).images
    np.testing.assert_array_equal(found, pipeline(PROMPT, **call).images)


@pytest.mark.parametrize(
    "changed",
    [None, [0.0], np.zeros((2, *LATENTS)), np.full((1, *LATENTS), np.nan)],
    ids=["None", "list", "two", "nan"],
)
def test_latents_that_a_callback_must_not_return(pipeline: Pipeline, changed: Any) -> None:
    with pytest.raises(RequestError, match=r"the callback returned latents .*expected"):
        pipeline(PROMPT, callback_on_step_end=lambda *_: {"latents": changed}, **QUICK)


def test_latents_replace_the_noise_of_the_seed(pipeline: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((2, *LATENTS)).astype(np.float32)
    call: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 2, "sampler": "ddim"}
    first = pipeline(PROMPT, latents=noise, seed=1, output_type="latent", **call).images
    second = pipeline(PROMPT, latents=noise, seed=2, output_type="latent", **call).images
    np.testing.assert_array_equal(first, second)


def test_the_samplers_own_table_gives_its_image(pipeline: Pipeline) -> None:
    named = pipeline("a red circle", seed=3, num_inference_steps=4, output_type="np")
    table = pipeline.resolve(Request.of(prompt="a red circle", num_inference_steps=4)).schedule
    given = pipeline("a red circle", seed=3, schedule=table, output_type="np")
    np.testing.assert_array_equal(given.images, named.images)
    (record,) = given.records
    assert record.given == ("schedule",)
    assert (record.options["sampler"], record.options["num_inference_steps"]) == ("custom", 4)
    assert "sampler_options" not in record.options


def test_output_types(pipeline: Pipeline) -> None:
    pixels = pipeline(PROMPT, output_type="np", **QUICK).images
    image = pipeline(PROMPT, **QUICK).images[0]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.rint(pixels[0] * 255), np.asarray(image))
    latents = pipeline(PROMPT, output_type="latent", **QUICK).images
    assert (latents.shape, latents.dtype) == ((1, *LATENTS), np.float32)


def test_an_unknown_output_type_is_refused_before_the_work() -> None:
    opened: list[str] = []

    def refuse(name: str, part: str | None, open_real: OpenReal) -> Session:
        opened.append(name)
        raise AssertionError

    with pytest.raises(RequestError, match="`output_type`: got 'pt', expected one of pil, np, latent"):
        pipeline_with(refuse)(PROMPT, output_type="pt", **QUICK)  # type: ignore[arg-type]
    assert opened == []


def test_embeddings_replace_the_prompts(pipeline: Pipeline) -> None:
    embeds = np.zeros((1, 80, WIDTH), np.float32)
    with pytest.raises(RequestError, match="`negative_prompt_embeds`"):
        pipeline(prompt_embeds=embeds, **QUICK)
    result = pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds, output_type="latent", **QUICK)
    assert np.isfinite(result.images).all()
    with pytest.raises(RequestError, match="`negative_prompt_embeds`: got 77 tokens, expected 80"):
        pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds[:, :77], **QUICK)


def test_negative_embeddings_are_ignored_without_guidance(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", **QUICK}
    other = np.ones((1, 154, WIDTH), np.float32)
    np.testing.assert_array_equal(
        pipeline(PROMPT, negative_prompt_embeds=other, **call).images, pipeline(PROMPT, **call).images
    )


def test_the_strength_decides_how_much_of_an_image_is_kept(pipeline: Pipeline) -> None:
    """The farther from 1 the strength is, the nearer is the result."""
    original = np.zeros((64, 64, 3), np.uint8)
    original[16:48, 16:48] = (255, 128, 0)
    call: dict[str, Any] = {"image": original, "num_inference_steps": 10, "seed": 3, "safety": "off"}
    distances = [
        np.abs(pipeline(PROMPT, strength=strength, output_type="np", **call).images[0] - original / 255).mean()
        for strength in (0.2, 0.6, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.15


def test_a_mask_is_repainted_and_the_rest_is_kept(pipeline: Pipeline) -> None:
    original = np.full((64, 64, 3), 255, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    call: dict[str, Any] = {"image": original, "num_inference_steps": 10, "seed": 3, "output_type": "np"}
    changed = np.abs(pipeline("a black square", mask_image=mask, **call).images[0] - 1)
    assert changed[:, :24].mean() < 0.1
    assert changed[:, 40:].mean() > 0.2


def test_a_crop_is_pasted_back_to_the_pixel(pipeline: Pipeline) -> None:
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    mask = np.zeros((96, 128), np.uint8)
    mask[20:40, 30:50] = 255
    image = pipeline(PROMPT, image=original, mask_image=mask, padding_mask_crop=8, **QUICK).images[0]
    assert image.size == (128, 96)
    np.testing.assert_array_equal(np.asarray(image)[mask == 0], original[mask == 0])
    assert (np.asarray(image)[mask == 255] != original[mask == 255]).any()


def test_a_flagged_image_is_black() -> None:
    result = flagging()(PROMPT, num_images_per_prompt=2, num_inference_steps=2)
    assert result.nsfw_content_detected == [True, True]
    assert all(image.getextrema() == ((0, 0),) * 3 for image in result.images)
    assert result.verdicts is not None
    assert result.verdicts[0].concepts == (0,)
    assert result.verdicts[0].concept_scores[0] == 0.125
    assert (result.records[0].safety.flagged, result.records[0].safety.concepts) == (True, (0,))


def test_a_flagged_crop_is_black_inside_the_image() -> None:
    """The policy is applied to the generated pixels, not to the image around them."""
    original, mask = np.full((96, 128, 3), 200, np.uint8), np.zeros((96, 128), np.uint8)
    mask[20:40, 30:50] = 255
    image = np.asarray(flagging()(PROMPT, image=original, mask_image=mask, padding_mask_crop=8, **QUICK).images[0])
    assert (image[mask == 255] == 0).all()
    assert (image[mask == 0] == 200).all()


def test_a_flagged_image_can_be_blurred_or_only_reported() -> None:
    pipeline = flagging()
    plain = np.asarray(pipeline(PROMPT, safety="off", **QUICK).images[0])
    reported = pipeline(PROMPT, safety="report", **QUICK)
    blurred = np.asarray(pipeline(PROMPT, safety="blur", **QUICK).images[0])
    np.testing.assert_array_equal(np.asarray(reported.images[0]), plain)
    assert reported.nsfw_content_detected == [True]
    assert np.abs(np.diff(blurred.astype(float), axis=0)).max() < np.abs(np.diff(plain.astype(float), axis=0)).max() / 4


def test_pixels_as_an_array_are_checked_too() -> None:
    np.testing.assert_array_equal(flagging()(PROMPT, output_type="np", **QUICK).images, 0)


def test_a_classifier_that_fails_stops_the_run() -> None:
    def fail(_: NDArray[Any]) -> NDArray[Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(SafetyError, match="out of memory"):
        with_changed("safety_checker", flagged=fail)(PROMPT, **QUICK)
    with pytest.raises(SafetyError, match="concept_scores"):
        with_changed("safety_checker", concept_scores=lambda scores: scores * np.nan)(PROMPT, **QUICK)


def test_a_classifier_that_cannot_be_loaded_stops_the_run() -> None:
    def fail(name: str, part: str | None, open_real: OpenReal) -> Session:
        raise FeedError("no such provider")

    with pytest.raises(SafetyError, match="no such provider"):
        pipeline_with(fail, "safety_checker")(PROMPT, **QUICK)


def test_safety_is_off_only_by_name_and_that_is_logged(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="latentrt"):
        result = pipeline(PROMPT, safety="off", **QUICK)
    assert "switched off" in caplog.text
    assert result.nsfw_content_detected is None
    assert result.records[0].safety.policy == "off"


def test_a_graph_is_loaded_once_and_only_if_needed() -> None:
    opened: list[str] = []

    def open_one(name: str, part: str | None, open_real: OpenReal) -> Session:
        opened.append(f"{name}/{part}")
        return open_real()

    pipeline = pipeline_with(open_one)
    pipeline(PROMPT, output_type="latent", safety="off", **QUICK)
    parts = {"unet/body", "unet/cross_attention_kv", "unet/time_embedding"}
    assert {"text_encoder/None", *parts} <= {*opened}
    for _ in range(2):
        pipeline(PROMPT, **QUICK)
    assert sorted(opened) == sorted({*parts, "text_encoder/None", "vae_decoder/None", "safety_checker/None"})


def test_low_memory_releases_each_component_when_its_work_is_done() -> None:
    events: list[str] = []

    class Watched(ChangedSession):
        def __init__(self, name: str, real: Session) -> None:
            super().__init__(real)
            self.name = name
            events.append(f"open {name}")

        def close(self) -> None:
            events.append(f"close {self.name}")

    pipeline = pipeline_with(lambda name, part, open_real: Watched(name, open_real()), low_memory=True)
    pipeline(PROMPT, **QUICK)
    names = ["text_encoder", "unet", "vae_decoder", "safety_checker"]
    assert list(dict.fromkeys(events)) == [f"{event} {name}" for name in names for event in ("open", "close")]


def test_a_denoiser_that_overflows_is_an_error() -> None:
    overflowing = with_changed("unet", noise_pred=lambda noise: noise * np.inf)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(BackendError, match=r"timestep \d+ gave values that are not finite"),
    ):
        overflowing(PROMPT, **QUICK)


def test_the_sample_bundle_has_a_name(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Pipeline.load("sample", device="cpu").bundle.digest == pipeline.bundle.digest
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        Pipeline.load("./sample")


def test_reprs_are_short(pipeline: Pipeline, tmp_path: Path) -> None:
    assert repr(pipeline) == ("<Pipeline 'sample': text-to-image, image-to-image, inpainting; ONNX Runtime on the CPU>")
    assert repr(pipeline.bundle).startswith(f"<Bundle 'sample': '{pipeline.bundle.folder}', sha256:")
    assert len(repr(pipeline.bundle)) < len(str(pipeline.bundle.folder)) + 60
    copied = Bundle.open(shutil.copytree(bundle_path(), tmp_path / "my\x1b-bundle"))
    assert repr(copied).startswith("<Bundle 'my\\x1b-bundle': ")
    assert len(repr(pipeline.runs_on["safety_checker"])) < 200
    step = next(pipeline.steps(Request.of(prompt=PROMPT, **QUICK)))
    assert repr(step) == f"<Step 1 of 2, timestep {step.timestep:g}>"


def test_arguments_of_another_kind_are_refused_before_the_work(pipeline: Pipeline) -> None:
    anything: Any = pipeline
    for keyword in ("preview", "callback_on_step_end"):
        with pytest.raises(RequestError, match=f"`{keyword}`: got True, expected a function"):
            anything(PROMPT, **{keyword: True}, **QUICK)
    with pytest.raises(RequestError, match=r"got 'a red circle', expected a request, such as Request\.of"):
        next(anything.steps(PROMPT))
    request, latents = pipeline.resolve(Request.of(prompt=PROMPT, **QUICK)), np.zeros((1, *LATENTS), np.float32)
    with pytest.raises(RequestError, match=r"expected a request that `Pipeline\.resolve` returned"):
        anything.finish(Request.of(prompt=PROMPT), latents)
    for wrong in (None, latents[0], latents[..., :8], [latents]):
        with pytest.raises(RequestError, match=r"got latents of .*, expected .*\(1, 4, 16, 16\)"):
            anything.finish(request, wrong)


def test_a_closed_pipeline_says_so() -> None:
    with Pipeline.load("sample", device="cpu", threads=1) as pipeline:
        image = pipeline(PROMPT, **QUICK).image
        other = Pipeline.load("sample", device="cpu", threads=1)
    assert repr(pipeline) == "<Pipeline 'sample': closed>"
    pipeline.close()
    for use in (
        lambda: pipeline(PROMPT, **QUICK),
        lambda: next(pipeline.steps(Request.of(prompt=PROMPT))),
        lambda: pipeline.finish(pipeline.resolve(Request.of(prompt=PROMPT)), np.zeros((1, *LATENTS), np.float32)),
        lambda: pickle.dumps(pipeline),
    ):
        with pytest.raises(RequestError, match=r"this pipeline is closed; load it again with Pipeline\.load"):
            use()
    np.testing.assert_array_equal(np.asarray(other(PROMPT, **QUICK).image), np.asarray(image))


def test_a_run_goes_on_while_another_thread_closes_the_pipeline() -> None:
    closed: list[str] = []

    class Watched(ChangedSession):
        def close(self) -> None:
            closed.append("closed")

    pipeline = pipeline_with(lambda name, part, open_real: Watched(open_real()))
    request = pipeline.resolve(Request.of(prompt=PROMPT, **QUICK))
    steps = pipeline.steps(request)
    next(steps)
    pipeline.close()
    assert closed == []
    assert len([*steps]) == 1
    assert closed


def test_a_call_is_finished_although_the_pipeline_is_closed_meanwhile() -> None:
    """Sampling and decoding are two runs, with a moment between them."""
    closed: list[str] = []

    class Watched(ChangedSession):
        def close(self) -> None:
            closed.append("closed")

    pipeline = pipeline_with(lambda name, part, open_real: Watched(open_real()))

    def close(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        pipeline.close()
        thread = threading.Thread(target=call_from_another_thread)
        thread.start()
        thread.join()

    def call_from_another_thread() -> None:
        with pytest.raises(RequestError, match="closed"):
            pipeline(PROMPT, **QUICK)
        with pytest.raises(RequestError, match="closed"):
            next(pipeline.steps(Request.of(prompt=PROMPT, **QUICK)))
        assert closed == []
        refused.append("both")

    refused: list[str] = []
    assert len(pipeline(PROMPT, callback_on_step_end=close, **QUICK)) == 1
    assert closed
    assert len(refused) == 2


def test_a_callback_that_fails_ends_the_run_while_its_error_is_kept() -> None:
    closed: list[str] = []

    class Watched(ChangedSession):
        def close(self) -> None:
            closed.append("closed")

    pipeline = pipeline_with(lambda name, part, open_real: Watched(open_real()))
    with pytest.raises(ZeroDivisionError) as kept:
        pipeline(PROMPT, callback_on_step_end=lambda *_: 1 / 0, **QUICK)  # type: ignore[arg-type]
    pipeline.close()
    assert closed
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
def test_a_copy_loads_the_same_bundle(copied: Callable[[Pipeline], Pipeline]) -> None:
    first = Pipeline.load("sample", device="cpu", threads=1, low_memory=True, progress=False)
    second = copied(first)
    assert second.bundle.digest == first.bundle.digest
    assert (second.components.low_memory, second.progress) == (True, False)
    assert second._load_arguments == first._load_arguments
    first.close()
    assert len(second(PROMPT, **QUICK)) == 1


def test_a_pickled_pipeline_is_pinned_by_its_digest(tmp_path: Path) -> None:
    folder = shutil.copytree(bundle_path(), tmp_path / "bundle")
    pickled = pickle.dumps(Pipeline.load(folder, device="cpu"))
    assert len(pickled) < 1_000
    with (folder / "bundle.json").open("a") as manifest:
        manifest.write("\n")
    with pytest.raises(IntegrityError, match="expected the pinned"):
        pickle.loads(pickled)


def test_a_pipeline_of_sessions_cannot_be_pickled() -> None:
    with pytest.raises(RequestError, match=r"expected one of Pipeline\.load"):
        pickle.dumps(flagging())


def generate_elsewhere(pipeline: Pipeline, seed: int) -> tuple[NDArray[Any], str]:
    result = pipeline(PROMPT, **{**QUICK, "seed": seed})
    return np.asarray(result.image), result.record.to_json()


def test_another_process_gets_a_pipeline_and_returns_results(pipeline: Pipeline) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        image, record = pool.submit(generate_elsewhere, pipeline, 3).result()
    here, record_here = generate_elsewhere(pipeline, 3)
    np.testing.assert_array_equal(image, here)
    assert record == record_here


def test_a_result_can_be_pickled(pipeline: Pipeline) -> None:
    result = pipeline(PROMPT, **QUICK)
    again = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(result.image))
    assert (again.records, again.timings, again.verdicts) == (result.records, result.timings, result.verdicts)


def test_previews_are_called_at_their_interval(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, tuple[int, int]]] = []

    def preview(step: Step, images: list[Image.Image]) -> None:
        seen.append((step.index, len(images), images[0].size))

    call: dict[str, Any] = {"num_inference_steps": 5, "sampler": "euler", "seed": 3, "output_type": "latent"}
    watched = pipeline(PROMPT, preview=preview, preview_interval=2, num_images_per_prompt=2, **call)
    assert seen == [(1, 2, (64, 64)), (3, 2, (64, 64))]
    plain = pipeline(PROMPT, num_images_per_prompt=2, **call)
    np.testing.assert_array_equal(watched.images, plain.images)
    with pytest.raises(RequestError, match="`preview_interval`"):
        pipeline(PROMPT, preview=preview, preview_interval=0, **call)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_a", "heun"])
def test_a_preview_approaches_the_image(pipeline: Pipeline, sampler: str) -> None:
    """Its latents are scaled to those of an image at every step, whatever the sampler's scale of noise."""
    previews: list[NDArray[Any]] = []
    result = pipeline(
        PROMPT,
        num_inference_steps=12,
        sampler=sampler,
        seed=3,
        decoder="preview",
        preview=lambda _, images: previews.append(np.asarray(images[0], np.float32)),
    )
    final = np.asarray(result.image, np.float32)
    distances = [float(np.abs(preview - final).mean()) for preview in previews]
    assert distances[-1] == 0, "after the last step it is the image, by the same decoder"
    third = len(distances) // 3
    assert np.mean(distances[:third]) > np.mean(distances[-third:]) * 2
    assert max(np.std(preview) for preview in previews) < 1.5 * np.std(final), "noise is not shown at its full scale"


def test_a_step_of_the_generator_has_its_preview_too(pipeline: Pipeline) -> None:
    request = pipeline.resolve(Request.of(prompt=PROMPT, **QUICK))
    previews = [step.preview()[0].size for step in pipeline.steps(request)]
    assert previews == [(64, 64)] * 2
    with pytest.raises(RequestError, match=r"expected one of `Pipeline\.steps`"):
        Step(first_samples(pipeline)).preview()


def first_samples(pipeline: Pipeline) -> list[Sample]:
    """Return samples that have advanced by one row."""
    (stage,) = pipeline.family.stages
    samples = stage.begin(pipeline.resolve(Request.of(prompt=PROMPT, **QUICK)))
    for sample in samples:
        sample.row += 1
    return samples


def test_a_preview_shows_what_the_callback_changed(pipeline: Pipeline) -> None:
    shown: list[NDArray[Any]] = []

    def zero(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(values["latents"])}

    def wrong(_: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros(3)}

    def preview(_: Step, images: list[Image.Image]) -> None:
        shown.append(np.asarray(images[0]))

    pipeline(PROMPT, callback_on_step_end=zero, preview=preview, **QUICK)
    np.testing.assert_array_equal(shown[0], shown[1])
    with pytest.raises(RequestError, match="the callback returned latents"):
        pipeline(PROMPT, callback_on_step_end=wrong, preview=preview, **QUICK)


@pytest.mark.parametrize("policy", ["block", "blur", "report", "off"])
def test_the_safety_policy_holds_for_previews(pipeline: Pipeline, policy: str) -> None:
    def previews(pipeline: Pipeline, policy: str) -> list[NDArray[Any]]:
        seen: list[NDArray[Any]] = []
        pipeline(PROMPT, safety=policy, preview=lambda _, images: seen.append(np.asarray(images[0])), **QUICK)
        return seen

    plain, seen = previews(pipeline, "off"), previews(flagging(), policy)
    assert len(seen) == 2
    for shown, unchecked in zip(seen, plain, strict=True):
        if policy == "block":
            assert not shown.any()
        elif policy == "blur":
            assert np.abs(np.diff(shown.astype(float), axis=0)).max() < np.abs(np.diff(unchecked.astype(float))).max()
        else:
            np.testing.assert_array_equal(shown, unchecked)


def test_a_preview_that_cannot_be_checked_is_not_shown() -> None:
    shown: list[object] = []

    def fail(_: NDArray[Any]) -> NDArray[Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(SafetyError, match="out of memory"):
        with_changed("safety_checker", flagged=fail)(PROMPT, preview=lambda *each: shown.append(each), **QUICK)
    assert shown == []


def test_a_bundle_without_a_preview_decoder_names_the_command(tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_path())
    components = {name: each for name, each in bundle.manifest.components.items() if name != "preview_decoder"}
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components=components)
    pipeline = Pipeline(bundle, Components(place_components(bundle, "cpu")))
    with pytest.raises(RequestError, match=r"got `preview`, .*latentrt export CHECKPOINT BUNDLE --preview-decoder"):
        pipeline(PROMPT, preview=lambda *_: None, **QUICK)
    step = next(pipeline.steps(Request.of(prompt=PROMPT, **QUICK)))
    with pytest.raises(RequestError, match=r"`Step\.preview`, .*--preview-decoder"):
        step.preview()


def test_timings_say_what_took_how_long(pipeline: Pipeline) -> None:
    """Each phase is longer where its session waits; nothing is counted twice."""
    waits = {"text_encoder": 0.03, "vae_encoder": 0.05, "unet": 0.02, "vae_decoder": 0.07, "safety_checker": 0.09}

    class Waiting(ChangedSession):
        def __init__(self, real: Session, seconds: float) -> None:
            super().__init__(real)
            self.seconds = seconds

        def run(self, feeds: Any) -> Any:
            time.sleep(self.seconds)
            return super().run(feeds)

    slow = pipeline_with(lambda name, part, open_real: Waiting(open_real(), waits[name]), *waits)
    image = np.zeros((64, 64, 3), np.uint8)
    call: dict[str, Any] = {"image": image, "strength": 1.0, "sampler": "euler", "seed": 3, "num_inference_steps": 3}
    for _ in range(2):
        first = slow(PROMPT, **call).timings
    assert first.text_encoding_s >= 2 * 0.03, "the prompt and the negative one"
    assert first.image_encoding_s >= 0.05
    assert first.sampling_s >= 3 * 0.02
    assert first.decoding_s >= 0.07
    assert first.safety_check_s >= 0.09
    parts = {name: value for name, value in vars(first).items() if name != "total_s"}
    assert sum(parts.values()) <= first.total_s

    plain = slow(PROMPT, **{**call, "image": None, "strength": None}, safety="off").timings
    assert (plain.image_encoding_s, plain.safety_check_s) == (0, 0)
    assert slow(PROMPT, output_type="latent", **call).timings.decoding_s == 0


def test_a_callback_s_time_is_in_the_total_alone(pipeline: Pipeline) -> None:
    def wait(*_: Any) -> None:
        time.sleep(0.2)

    timings = pipeline(PROMPT, callback_on_step_end=wait, preview=wait, **QUICK).timings
    assert timings.total_s >= 0.8
    assert timings.total_s - sum(value for name, value in vars(timings).items() if name != "total_s") >= 0.8


def test_loading_is_timed_on_its_own() -> None:
    def open_slowly(name: str, part: str | None, open_real: OpenReal) -> Session:
        time.sleep(0.2)
        return open_real()

    pipeline = pipeline_with(open_slowly, "text_encoder")
    timings = [pipeline(PROMPT, **QUICK).timings for _ in range(2)]
    assert timings[0].loading_s >= 0.2
    assert timings[0].loading_s > timings[1].loading_s + 0.1
    step = [*pipeline.steps(request := pipeline.resolve(Request.of(prompt=PROMPT, **QUICK)))][-1]
    whole, decoding = pipeline.finish(request, step).timings, pipeline.finish(request, step.latents).timings
    assert whole.sampling_s > 0
    assert whole.decoding_s > 0
    assert (decoding.sampling_s, decoding.text_encoding_s) == (0, 0)
    assert decoding.decoding_s > 0


def test_habits_of_diffusers_get_the_right_call(pipeline: Pipeline) -> None:
    for name, advice in migration._ATTRIBUTES.items():
        with pytest.raises(MissingAttributeError, match=re.escape(advice)):
            getattr(pipeline, name)
        with pytest.raises(MissingAttributeError, match=re.escape(advice)):
            getattr(Pipeline, name)
        with pytest.raises(MissingAttributeError, match=re.escape(advice)):
            setattr(pipeline, name, None)
        assert not hasattr(pipeline, name)
        assert name not in dir(pipeline)
    untyped: Any = pipeline
    with pytest.raises(AttributeError, match=r"Pipeline\.load\('my-bundle', device='cuda'\)"):
        untyped.to("cuda")
    with pytest.raises(AttributeError, match="latentrt export CHECKPOINT my-bundle"):
        Pipeline.from_pretrained("runwayml/stable-diffusion-v1-5")  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="sampler='euler_a'"):
        untyped.scheduler = object()
    with pytest.raises(AttributeError, match=r"^'Pipeline' object has no attribute 'schedulr'$"):
        untyped.schedulr  # noqa: B018
    assert getattr(pipeline, "scheduler", "none") == "none"


def test_calls_that_are_advised_exist() -> None:
    """Every call in the advice is of the real signature."""
    sentences = [*migration._ATTRIBUTES.values(), *migration._KEYWORDS.values()]
    calls = {call for sentence in sentences for call in re.findall(r"(?:Pipeline\.load|pipeline)\([^)]*\)", sentence)}
    assert len(calls) > 4
    for call in calls:
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call)
        target = Pipeline.load if isinstance(node.func, ast.Attribute) else call_signature()
        known = (target if isinstance(target, inspect.Signature) else inspect.signature(target)).parameters
        assert {keyword.arg for keyword in node.keywords} <= {*known}, call


def test_sampling_stays_few_frames_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most six frames from the call to the model: `Pipeline.__call__` is the first, `Session.run` the last."""
    stacks: list[list[str]] = []
    run = OnnxRuntimeSession.run

    def record(self: OnnxRuntimeSession, feeds: Any) -> Any:
        frames: list[str] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not Pipeline.__call__.__code__:
            frames.append(frame.f_code.co_qualname)
            frame = frame.f_back
        if frame is not None and "step" in frames:
            stacks.append(["run", *frames, "Pipeline.__call__"])
        return run(self, feeds)

    monkeypatch.setattr(OnnxRuntimeSession, "run", record)
    Pipeline.load(device="cpu")(PROMPT, **QUICK)
    assert len(stacks) == 4, "time_embedding and cross_attention_kv once, body in each of two steps"
    assert max(map(len, stacks[2:])) <= 6, stacks
