"""The safety check of generated images.

The classifier's graph scores images and never changes them. The policy decides about a flagged image:

- `block`: a black image replaces it;
- `blur`: it is blurred until nothing in it can be recognised;
- `report`: it is returned, and the result says that it was flagged;
- `off`: no image is checked. Only by explicit choice, and the image's metadata records it.

A check that fails stops the run: no classifier in the bundle, a graph that fails, scores that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.bundle.printable import quote
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

_ADVICE = (
    "Put a working classifier into the bundle (latentrt export CHECKPOINT BUNDLE --safety-checker PATH), "
    "or run without one, which the image's metadata records (--safety off; in Python, safety='off')"
)
# As a share of the longer side. At an eighth, an image is left with about four blots of colour along each side.
_BLUR_RADIUS = 1 / 8


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The classifier's result for one image.

    A score is a cosine similarity less its threshold: above 0 the image shows the concept, and `concepts` holds its
    index. A special-care concept above 0 lowers the thresholds of the others; on its own it flags nothing.
    """

    flagged: bool
    concepts: tuple[int, ...]
    concept_scores: tuple[float, ...]
    special_care_scores: tuple[float, ...]


class SafetyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The check as an image's metadata records it. Under `off` there was none, and `flagged` is None.

    `concepts` are the indices of the detected concepts, `highest_score` is the largest score of any.
    """

    policy: Policy
    flagged: bool | None = None
    concepts: tuple[int, ...] = ()
    highest_score: float | None = None


def check_policy(policy: str) -> Policy:
    """Return the policy of that name.

    Raises:
        RequestError: there is no such policy.
    """
    for known in get_args(Policy):
        if isinstance(policy, str) and policy == known:
            return known  # type: ignore[no-any-return]
    raise RequestError(f"`safety`: got {quote(policy)}, expected one of {', '.join(get_args(Policy))}")


def require_classifier(manifest: Manifest, policy: Policy) -> None:
    """Require a classifier unless the policy is `off`.

    Raises:
        SafetyError: the bundle has no classifier.
    """
    if policy != "off" and CLASSIFIER not in manifest.components:
        raise SafetyError(
            f"the safety policy is {policy} and the bundle of {manifest.source.name!r} has no classifier. {_ADVICE}"
        )


def judge(load_classifier: Callable[[], Session], pixels: Pixels) -> tuple[Verdict, ...]:
    """Run the classifier on pixels, uint8 [batch, height, width, 3], and return a verdict for each image.

    Raises:
        SafetyError: the graph cannot be loaded, fails, or returns unusable scores.
        BundleError: its files do not match the manifest.
    """
    try:
        outputs = run(load_classifier(), pixels=pixels)
    except BundleError:
        raise
    # Whatever a backend raises, the images were not checked.
    except Exception as error:
        raise SafetyError(f"the safety classifier failed: {type(error).__name__}: {error}. {_ADVICE}") from error
    return read_verdicts(outputs, len(pixels))


def read_verdicts(outputs: Mapping[str, NDArray[Any]], batch: int) -> tuple[Verdict, ...]:
    """Return a verdict for each image from the classifier's outputs.

    Args:
        outputs: `concept_scores` float32 [batch, concepts], `special_care_scores` float32 [batch, special-care
            concepts], `flagged` bool [batch].

    Raises:
        SafetyError: an output is missing, has another shape, or is not finite.
    """
    # A classifier may lack special-care concepts; without concepts it would never flag anything.
    concept_scores = _read_scores(outputs, "concept_scores", batch, fewest=1)
    special_care_scores = _read_scores(outputs, "special_care_scores", batch, fewest=0)
    flagged = _get_output(outputs, "flagged")
    if flagged.dtype != np.bool_ or flagged.shape != (batch,):
        raise _unusable("flagged", flagged, f"bool ({batch},)")
    return tuple(map(_verdict, flagged, concept_scores, special_care_scores))


def apply_policy(policy: Policy, pixels: Pixels, verdicts: Sequence[Verdict]) -> Pixels:
    """Return the pixels, uint8 [batch, height, width, 3], with flagged images replaced; the array itself if none is.

    Raises:
        SafetyError: there is not one verdict for each image.
    """
    if policy == "off":
        return pixels
    if len(verdicts) != len(pixels):
        raise SafetyError(f"got {len(verdicts)} verdicts for {len(pixels)} images, expected one each. {_ADVICE}")
    if policy == "report" or not any(verdict.flagged for verdict in verdicts):
        return pixels
    cover = np.zeros_like if policy == "block" else _blur
    return np.stack(
        [cover(image) if verdict.flagged else image for image, verdict in zip(pixels, verdicts, strict=True)]
    )


def safety_record(policy: Policy, verdict: Verdict | None) -> SafetyRecord:
    """Return the record of a check for an image's metadata; `verdict` is None where there was none."""
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
        # If the graph and its scores disagree, the stricter holds.
        flagged=bool(flagged) or bool(concepts),
        concepts=concepts,
        concept_scores=tuple(concept_scores.tolist()),
        special_care_scores=tuple(special_care_scores.tolist()),
    )


def _read_scores(outputs: Mapping[str, NDArray[Any]], name: str, batch: int, fewest: int) -> NDArray[Any]:
    scores = _get_output(outputs, name)
    if scores.dtype != np.float32 or scores.ndim != 2 or len(scores) != batch or scores.shape[1] < fewest:
        raise _unusable(name, scores, f"float32 ({batch}, concepts)")
    if not np.isfinite(scores).all():
        raise SafetyError(f"the safety classifier's {name} are not finite, so no image was checked. {_ADVICE}")
    return scores


def _get_output(outputs: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in outputs:
        raise SafetyError(f"the safety classifier returned {sorted(outputs)}, expected {name} among them. {_ADVICE}")
    return outputs[name]


def _unusable(name: str, found: NDArray[Any], expected: str) -> SafetyError:
    return SafetyError(f"the safety classifier's {name} is {found.dtype} {found.shape}, expected {expected}. {_ADVICE}")


def _blur(image: Pixels) -> Pixels:
    """Return an image [height, width, 3] blurred beyond recognition."""
    from PIL import Image, ImageFilter

    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(max(image.shape) * _BLUR_RADIUS)))
