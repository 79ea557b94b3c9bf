"""Is a picture safe, and what is done with it when it is not?

The safety graph looks and scores; it never touches a picture. What is done with a flagged one is the policy:

- `block`: a black picture takes its place;
- `blur`: it is blurred until nothing in it can be recognised;
- `report`: it is handed out, and the result says that it was flagged;
- `off`: nothing is asked. Only by explicit choice, and the picture's metadata says so.

A check that cannot be made stops the run: a bundle without a classifier, a graph that fails, scores that are not
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.errors import BundleError, RequestError, SafetyError

if TYPE_CHECKING:
    from latentrt.bundle.manifest import Manifest

__all__ = [
    "Policy",
    "SafetyRecord",
    "Verdict",
    "apply_policy",
    "check_policy",
    "judge",
    "read_verdicts",
    "require_classifier",
    "safety_record",
]

Policy = Literal["block", "blur", "report", "off"]
Pixels = NDArray[np.uint8]

CLASSIFIER = "safety_checker"

_WAYS_OUT = (
    "Two ways out: put a working classifier into the bundle (latentrt export CHECKPOINT BUNDLE --safety-checker PATH), "
    "or run without one, which the picture's metadata records (--safety off; in Python, safety='off')"
)
# As a share of the longer side. At an eighth, what is left of a picture is about four blots of colour along each side.
_BLUR_RADIUS = 1 / 8


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the classifier found in one picture.

    A score is a cosine less its threshold: above 0 the concept is there. `concepts` are the indices of those that
    are. A special-care concept above 0 lowers the thresholds of the others; on its own it flags nothing.
    """

    flagged: bool
    concepts: tuple[int, ...]
    concept_scores: tuple[float, ...]
    special_care_scores: tuple[float, ...]


class SafetyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture's metadata says of the check. Under `off` nothing was asked, and `flagged` is None.

    `concepts` are the indices of the concepts that were found, `highest_score` is the largest score of any.
    """

    policy: Policy
    flagged: bool | None = None
    concepts: tuple[int, ...] = ()
    highest_score: float | None = None


def check_policy(policy: str) -> Policy:
    """The policy of that name.

    Raises:
        RequestError: there is none.
    """
    for known in get_args(Policy):
        if policy == known:
            return known  # type: ignore[no-any-return]
    raise RequestError(f"`safety`: got {policy!r}, expected one of {', '.join(get_args(Policy))}")


def require_classifier(manifest: Manifest, policy: Policy) -> None:
    """Refuse to run unchecked by accident.

    Raises:
        SafetyError: the policy asks for a check and the bundle has no classifier.
    """
    if policy != "off" and CLASSIFIER not in manifest.components:
        raise SafetyError(
            f"the safety policy is {policy} and the bundle of {manifest.source.name!r} has no classifier. {_WAYS_OUT}"
        )


def judge(load_classifier: Callable[[], Session], pixels: Pixels) -> tuple[Verdict, ...]:
    """Ask the safety graph about pixels (batch, height, width, 3); one verdict for each picture.

    Raises:
        SafetyError: the graph cannot be loaded, fails, or does not answer with scores.
        BundleError: its files are not the ones that the manifest pins.
    """
    try:
        outputs = run(load_classifier(), pixels=pixels)
    except BundleError:
        raise
    # Whatever a backend raises, the pictures were not checked.
    except Exception as error:
        raise SafetyError(f"the safety classifier failed: {type(error).__name__}: {error}. {_WAYS_OUT}") from error
    return read_verdicts(outputs, len(pixels))


def read_verdicts(outputs: Mapping[str, NDArray[Any]], batch: int) -> tuple[Verdict, ...]:
    """The safety graph's outputs, picture by picture.

    Args:
        outputs: `concept_scores` float32 (batch, concepts), `special_care_scores` float32 (batch, special-care
            concepts), `flagged` bool (batch).

    Raises:
        SafetyError: one is missing, of another shape, or holds what is not a number.
    """
    # A classifier may do without special care, but not without concepts: it would never flag anything.
    concept_scores = _scores(outputs, "concept_scores", batch, fewest=1)
    special_care_scores = _scores(outputs, "special_care_scores", batch, fewest=0)
    flagged = _output(outputs, "flagged")
    if flagged.dtype != np.bool_ or flagged.shape != (batch,):
        raise _unusable("flagged", flagged, f"bool ({batch},)")
    return tuple(map(_verdict, flagged, concept_scores, special_care_scores))


def apply_policy(policy: Policy, pixels: Pixels, verdicts: Sequence[Verdict]) -> Pixels:
    """Pixels (batch, height, width, 3) as they may be handed out: the array itself if nothing changes, else a copy.

    Raises:
        SafetyError: the policy asks for a verdict on each picture, and there is not one for each.
    """
    if policy == "off":
        return pixels
    if len(verdicts) != len(pixels):
        raise SafetyError(f"found {len(verdicts)} verdicts on {len(pixels)} pictures, expected one each. {_WAYS_OUT}")
    if policy == "report" or not any(verdict.flagged for verdict in verdicts):
        return pixels
    cover = np.zeros_like if policy == "block" else _blurred
    return np.stack(
        [cover(image) if verdict.flagged else image for image, verdict in zip(pixels, verdicts, strict=True)]
    )


def safety_record(policy: Policy, verdict: Verdict | None) -> SafetyRecord:
    """What a picture's metadata says of its check; `verdict` is None where nothing was asked."""
    if verdict is None:
        return SafetyRecord(policy=policy)
    return SafetyRecord(
        policy=policy,
        flagged=verdict.flagged,
        concepts=verdict.concepts,
        highest_score=max(verdict.concept_scores, default=None),
    )


def _verdict(flagged: np.bool_, concept_scores: NDArray[Any], special_care_scores: NDArray[Any]) -> Verdict:
    concepts = tuple(np.flatnonzero(concept_scores > 0).tolist())
    return Verdict(
        # Should graph and scores ever disagree, the stricter of the two holds.
        flagged=bool(flagged) or bool(concepts),
        concepts=concepts,
        concept_scores=tuple(concept_scores.tolist()),
        special_care_scores=tuple(special_care_scores.tolist()),
    )


def _scores(outputs: Mapping[str, NDArray[Any]], name: str, batch: int, fewest: int) -> NDArray[Any]:
    scores = _output(outputs, name)
    if scores.dtype != np.float32 or scores.ndim != 2 or len(scores) != batch or scores.shape[1] < fewest:
        raise _unusable(name, scores, f"float32 ({batch}, concepts)")
    if not np.isfinite(scores).all():
        raise SafetyError(f"the safety classifier's {name} are not all numbers, so nothing was checked. {_WAYS_OUT}")
    return scores


def _output(outputs: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in outputs:
        raise SafetyError(f"the safety classifier gave {sorted(outputs)}, expected {name} among them. {_WAYS_OUT}")
    return outputs[name]


def _unusable(name: str, found: NDArray[Any], expected: str) -> SafetyError:
    return SafetyError(
        f"the safety classifier's {name} is {found.dtype} {found.shape}, expected {expected}. {_WAYS_OUT}"
    )


def _blurred(image: Pixels) -> Pixels:
    """(height, width, 3), blurred beyond recognition."""
    from PIL import Image, ImageFilter

    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(max(image.shape) * _BLUR_RADIUS)))
