"""The limits of the token merging ratio, and the name of the module that matches tokens. Importing this needs no
torch."""

from __future__ import annotations

from latentrt.errors import RequestError

__all__ = ["MATCHING", "check_ratio"]

# Of the 64 tokens of an image of 64 pixels, this merges three. Where none are merged, the graph would compute empty
# tensors, of which backends compute different results.
MIN_RATIO = 0.05
# Three of the four tokens of a cell are sources; a larger ratio would merge destinations.
MAX_RATIO = 0.75
# The name of the module that decides which tokens are merged; `graphs.precision` keeps it in float32.
MATCHING = "token_matching"


def check_ratio(ratio: float) -> None:
    """Reject a ratio that merges no tokens, or more tokens than there are sources.

    Raises:
        RequestError: the ratio is below `MIN_RATIO`, or not below `MAX_RATIO`.
    """
    if not MIN_RATIO <= ratio < MAX_RATIO:
        raise RequestError(
            f"got the token merging ratio {ratio:g}, expected at least {MIN_RATIO} and below {MAX_RATIO}, because at "
            "most three of four tokens can be merged; its authors recommend 0.5"
        )
