"""The limits of the token merging ratio, and the name of the module that matches tokens. Importing this needs no
torch."""

from __future__ import annotations

from latentrt.errors import RequestError

__all__ = ["MATCHING", "check_ratio"]

# Three of the four tokens of a cell are sources; a larger ratio would merge destinations.
MAX_RATIO = 0.75
# The name of the module that decides which tokens are merged; `graphs.precision` keeps it in float32.
MATCHING = "token_matching"


def check_ratio(ratio: float) -> None:
    """Reject a ratio that merges no tokens, or more tokens than there are sources.

    Raises:
        RequestError: the ratio is outside of 0 … `MAX_RATIO`, both exclusive.
    """
    if not 0 < ratio < MAX_RATIO:
        raise RequestError(
            f"got the token merging ratio {ratio:g}, expected a number above 0 and below {MAX_RATIO}, because at most "
            "three of four tokens can be merged; its authors recommend 0.5"
        )
