from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.backends.session import Arrays, Session
from latentrt.bundle.tensors import TensorSpec
from latentrt.decode.safety import (
    SafetyRecord,
    Verdict,
    apply_policy,
    check_policy,
    judge,
    read_verdicts,
    require_classifier,
    safety_record,
)
from latentrt.errors import RequestError, SafetyError
from tests.runtime.small_bundle import manifest, write_bundle

SAFE = Verdict(flagged=False, concepts=(), concept_scores=(-0.1, -0.2), special_care_scores=(-0.1,))
UNSAFE = Verdict(flagged=True, concepts=(1,), concept_scores=(-0.1, 0.02), special_care_scores=(0.1,))
WAYS_OUT = r"latentrt export CHECKPOINT BUNDLE --safety-checker PATH.*--safety off; in Python, safety='off'"


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


def outputs(batch: int = 3, concepts: int = 17, special_care: int = 3) -> Arrays:
    """Return the outputs of a classifier for harmless images."""
    return {
        "concept_scores": np.full((batch, concepts), -0.1, np.float32),
        "special_care_scores": np.full((batch, special_care), -0.1, np.float32),
        "flagged": np.zeros(batch, bool),
        "concept_cosines": np.zeros((batch, concepts), np.float32),
        "special_care_cosines": np.zeros((batch, special_care), np.float32),
    }


class Classifier(Session):
    """A classifier with a given answer or error."""

    inputs = (TensorSpec("pixels", "uint8", ("batch", "height", "width", 3)),)
    outputs = ()

    def __init__(self, answer: Arrays | Exception) -> None:
        self.answer = answer

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_harmless_images(pixels: NDArray[np.uint8]) -> None:
    verdicts = judge(lambda: Classifier(outputs()), pixels)
    assert [verdict.flagged for verdict in verdicts] == [False] * 3
    assert verdicts[0].concepts == ()
    assert verdicts[0].concept_scores == pytest.approx((-0.1,) * 17)


def test_a_flagged_image_among_others() -> None:
    answer = outputs()
    answer["concept_scores"][1, [4, 9]] = 0.001, 0.2
    answer["special_care_scores"][1, 2] = 0.05
    answer["flagged"][1] = True
    verdicts = read_verdicts(answer, 3)
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]
    assert verdicts[1].concepts == (4, 9)
    assert verdicts[1].special_care_scores[2] == pytest.approx(0.05)


def test_a_score_of_zero_is_no_concept() -> None:
    answer = outputs()
    answer["concept_scores"][:] = 0
    assert not any(verdict.flagged or verdict.concepts for verdict in read_verdicts(answer, 3))


def test_special_care_alone_flags_nothing() -> None:
    answer = outputs()
    answer["special_care_scores"][:] = 0.3
    assert not any(verdict.flagged for verdict in read_verdicts(answer, 3))


def test_the_stricter_of_scores_and_graph_holds() -> None:
    answer = outputs()
    answer["flagged"][0] = True
    answer["concept_scores"][1, 0] = 0.1
    assert [verdict.flagged for verdict in read_verdicts(answer, 3)] == [True, True, False]


@pytest.mark.parametrize(("concepts", "special_care"), [(1, 1), (17, 3), (40, 0)])
def test_a_classifier_has_as_many_concepts_as_it_has(concepts: int, special_care: int) -> None:
    assert len(read_verdicts(outputs(2, concepts, special_care), 2)[0].concept_scores) == concepts


@pytest.mark.parametrize("name", ["concept_scores", "special_care_scores", "flagged"])
def test_an_output_that_is_missing(name: str) -> None:
    answer = outputs()
    del answer[name]
    with pytest.raises(SafetyError, match=rf"expected {name} among them.*{WAYS_OUT}"):
        read_verdicts(answer, 3)


@pytest.mark.parametrize("name", ["concept_scores", "special_care_scores"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite(name: str, number: float) -> None:
    answer = outputs()
    answer[name][2, 0] = number
    with pytest.raises(SafetyError, match=rf"{name} are not finite.*{WAYS_OUT}"):
        read_verdicts(answer, 3)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("concept_scores", np.zeros((2, 17), np.float32)),
        ("concept_scores", np.zeros((3, 0), np.float32)),
        ("concept_scores", np.zeros((3,), np.float32)),
        ("concept_scores", np.zeros((3, 17), np.float16)),
        ("special_care_scores", np.zeros((4, 3), np.float32)),
        ("flagged", np.zeros((2,), bool)),
        ("flagged", np.zeros((3, 1), bool)),
        ("flagged", np.zeros((3,), np.float32)),
    ],
)
def test_an_output_of_the_wrong_form(name: str, array: NDArray[Any]) -> None:
    with pytest.raises(SafetyError, match=rf"{name} is {array.dtype}.*expected.*{WAYS_OUT}"):
        read_verdicts(outputs() | {name: array}, 3)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), KeyError("x")])
def test_a_graph_that_fails(pixels: NDArray[np.uint8], error: Exception) -> None:
    with pytest.raises(SafetyError, match=rf"failed: {type(error).__name__}.*{WAYS_OUT}"):
        judge(lambda: Classifier(error), pixels)


def test_pixels_that_the_graph_does_not_take(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(SafetyError, match="failed: FeedError"):
        judge(lambda: Classifier(outputs()), pixels.astype(np.float32))


@pytest.mark.parametrize("policy", ["off", "report"])
def test_images_that_are_returned_unchanged(pixels: NDArray[np.uint8], policy: str) -> None:
    verdicts = () if policy == "off" else (UNSAFE,) * 3
    assert apply_policy(check_policy(policy), pixels, verdicts) is pixels


@pytest.mark.parametrize("policy", ["block", "blur"])
def test_only_flagged_images_change_and_the_input_does_not(pixels: NDArray[np.uint8], policy: str) -> None:
    before = pixels.copy()
    shown = apply_policy(check_policy(policy), pixels, (SAFE, UNSAFE, SAFE))
    assert np.array_equal(pixels, before)
    assert np.array_equal(shown[[0, 2]], pixels[[0, 2]])
    assert not np.array_equal(shown[1], pixels[1])
    assert (shown.shape, shown.dtype) == (pixels.shape, pixels.dtype)
    assert not np.shares_memory(shown, pixels)


def test_a_blocked_image_is_black(pixels: NDArray[np.uint8]) -> None:
    assert not apply_policy("block", pixels, (UNSAFE,) * 3).any()


@pytest.mark.parametrize("side", [64, 512, 1024])
def test_a_blurred_image_has_no_detail_left(side: int) -> None:
    """Stripes an eighth of the side apart, far coarser than a face's features, all but vanish, at every size."""
    stripes = np.zeros((1, side, side, 3), np.uint8)
    for start in range(0, side, side // 4):
        stripes[:, :, start : start + side // 8] = 255
    shown = apply_policy("blur", stripes, (UNSAFE,)).astype(float)
    middle = shown[0, :, side // 4 : -side // 4]
    # 255 before; measured: at most 11 after.
    assert middle.max() - middle.min() <= 16


def test_a_blurred_image_keeps_its_colour(pixels: NDArray[np.uint8]) -> None:
    plain = np.full_like(pixels, (200, 100, 50))
    assert np.abs(apply_policy("blur", plain, (UNSAFE,) * 3).astype(int) - plain).max() <= 1


def test_a_verdict_that_is_missing(pixels: NDArray[np.uint8]) -> None:
    for policy in ("block", "blur", "report"):
        with pytest.raises(SafetyError, match="2 verdicts"):
            apply_policy(check_policy(policy), pixels, (SAFE, SAFE))


def test_an_unknown_policy() -> None:
    with pytest.raises(RequestError, match="'none', expected one of block, blur, report, off"):
        check_policy("none")


def test_a_bundle_without_classifier_runs_only_with_safety_off(tmp_path: Path) -> None:
    whole = manifest(write_bundle(tmp_path))
    without = msgspec.structs.replace(
        whole, components={name: part for name, part in whole.components.items() if name != "safety_checker"}
    )
    require_classifier(whole, "block")
    require_classifier(without, "off")
    for policy in ("block", "blur", "report"):
        with pytest.raises(SafetyError, match=rf"the safety policy is {policy}.*no classifier.*{WAYS_OUT}"):
            require_classifier(without, check_policy(policy))


def test_what_the_metadata_says() -> None:
    assert safety_record("off", None) == SafetyRecord(policy="off", flagged=None)
    expected = SafetyRecord(policy="blur", flagged=True, concepts=(1,), highest_score=0.02)
    assert safety_record("blur", UNSAFE) == expected


def test_blur_is_pillows(pixels: NDArray[np.uint8]) -> None:
    assert Image.fromarray(apply_policy("blur", pixels, (UNSAFE,) * 3)[0]).size == (64, 48)
