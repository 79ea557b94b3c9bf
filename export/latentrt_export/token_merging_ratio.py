"""How many tokens may be merged, and what is the module called that says which? No torch is needed to ask."""

from __future__ import annotations

from latentrt.errors import RequestError

__all__ = ["MATCHING", "check_ratio"]

# What the cells would leave nothing of: three of four tokens are sources.
MAX_RATIO = 0.75
# The module that decides what is merged: `precision.py` keeps it in float32.
MATCHING = "token_matching"


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that merges nothing, or more than there are sources.

    Raises:
        RequestError: naming those that are possible.
    """
    if not 0 < ratio < MAX_RATIO:
        raise RequestError(
            f"found the token merging ratio {ratio:g}, expected one above 0 and below {MAX_RATIO}: of each four tokens "
            "three may be merged into the fourth; 0.5 is what its authors recommend"
        )
