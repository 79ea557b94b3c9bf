"""Which few combinations of options hold every two values of every two of them?"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

__all__ = ["pairwise"]


def pairwise(sizes: list[int], least: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Rows such that every pair of values of every two options is in one, and at least so many of them: greedily, the
    best of some random ones."""
    pairs = itertools.combinations(range(len(sizes)), 2)
    open_pairs = {(a, i, b, j) for a, b in pairs for i in range(sizes[a]) for j in range(sizes[b])}
    for count in itertools.count():
        if not open_pairs and count >= least:
            return
        candidates = [tuple(rng.randrange(size) for size in sizes) for _ in range(40)]
        if open_pairs:
            a, i, b, j = min(open_pairs)
            forced = [(*row[:a], i, *row[a + 1 :]) for row in candidates]
            candidates = [(*row[:b], j, *row[b + 1 :]) for row in forced]
        best = max(candidates, key=lambda row: len(open_pairs & _pairs(row)))
        open_pairs -= _pairs(best)
        yield best


def _pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}
