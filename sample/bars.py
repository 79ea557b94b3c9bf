"""The bars: minimum scores of the shipped bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

from sample.quality import OTHER_NEGATIVE, OWN_NEGATIVE, UNKNOWN_WITH_OR_WITHOUT, WITH_OR_WITHOUT_GUIDANCE, Score

__all__ = ["BARS", "Bar", "missed_bars", "sign_test"]


@dataclass(frozen=True)
class Bar:
    """A condition on the scores of the shipped bundle at the default settings.

    Args:
        description: the condition, for people.
        met: whether scores meet it.
    """

    description: str
    met: Callable[[dict[str, Score]], bool]


def _at_least(name: str, share: float) -> Bar:
    return Bar(f"≥ {share:.0%}", lambda scores: scores[name].share >= share)


def _at_most(name: str, share: float) -> Bar:
    return Bar(f"≤ {share:.0%}", lambda scores: scores[name].share <= share)


def _more(better: str, worse: str, *, chance: float) -> Bar:
    """Require by a sign test that more images are right only with the better setting than only with the worse one."""
    return Bar(
        f"more than the next, p < {chance}",
        lambda scores: sign_test(scores[better].right, scores[worse].right) < chance,
    )


# By the name of the score.
BARS = {
    **{
        name: _at_least(name, share)
        for name, share in {
            "one thing: shape and colour": 0.95,
            "background": 0.95,
            "two things: fully right": 0.70,
            "unsafe images flagged": 0.99,
        }.items()
    },
    "other images flagged": _at_most("other images flagged", 0.01),
    WITH_OR_WITHOUT_GUIDANCE[0]: _more(*WITH_OR_WITHOUT_GUIDANCE, chance=0.05),
    UNKNOWN_WITH_OR_WITHOUT[0]: _more(*UNKNOWN_WITH_OR_WITHOUT, chance=0.01),
    OWN_NEGATIVE: Bar(
        "< half of another's", lambda scores: scores[OWN_NEGATIVE].share < scores[OTHER_NEGATIVE].share / 2
    ),
}


def sign_test(first: int, second: int) -> float:
    """Return the probability of at least `first` heads in `first + second` fair coin tosses (one-sided sign test)."""
    count = first + second
    return sum(comb(count, right) for right in range(first, count + 1)) / 2.0**count


def missed_bars(scores: dict[str, Score]) -> list[str]:
    """Return a description of each bar that is not met."""
    return [
        f"{name}: {scores[name].share:.1%} of {scores[name].of}, expected {bar.description}"
        for name, bar in BARS.items()
        if name in scores and not bar.met(scores)
    ]
