"""How are latents decoded in less memory, exactly?

A decoder needs most at its last levels, where all of its channels have the picture's full size. A bundle's decoder may
come in parts (`latentrt.bundle.manifest.Part`): `head`, `attention` and `neck` for everything before, and stages that
each compute a band of rows from a band of rows and one more above and below. Only what one stage takes and gives is
kept whole, in arrays that are written band by band: in place, if nobody needs any more what the stage takes.

It gives the pixels of the whole graph, up to the order of sums. Of the 255 levels that is at most one, where a value
sits on the edge between two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session
from latentrt.bundle.manifest import Part
from latentrt.bundle.tensors import TensorSpec, sized
from latentrt.decode.group_statistics import GroupStatistics

__all__ = ["SlicedDecoder"]

Features = NDArray[np.float32]
OpenPart = Callable[[str], Session]

# What a band needs besides, as a share of the largest that is kept whole.
_SHARE = 10
# Two more are read for each band, so fewer would cost much for little.
_FEWEST_ROWS = 8
_FEWEST_QUERIES = 64
# How often the rows of a band are there at once, inside of a backend: as they come, normalised, packed for the
# convolution; and what that gives, packed and as it goes.
_COPIES_IN, _COPIES_OUT = 3, 2


@dataclass(frozen=True)
class _Stage:
    """A stage, and what follows from its signature and the next one's.

    `kept` says that the next one takes as its residual what this one takes, and `groups` into how many it normalises.
    """

    name: str
    takes: dict[str, TensorSpec]
    gives: TensorSpec
    kept: bool
    groups: int | None

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Of what it makes of features (B, C, H, W)."""
        return sized(self.gives, self._sizes(features))

    def _sizes(self, features: tuple[int, ...]) -> dict[str, int]:
        return {"batch": features[0], "rows": features[2], "width": features[3]}

    @property
    def rows_axis(self) -> int:
        """Where the rows are in what it makes: pixels have their channels last."""
        return next(axis for axis, size in enumerate(self.gives.shape) if str(size).endswith("rows"))

    def rows(self, features: tuple[int, ...], budget: int) -> int:
        """How many rows of features (B, C, H, W) a band has, all as many as the next."""
        needed = _bytes(features) * _COPIES_IN + _bytes(self.shape(features)) * _COPIES_OUT
        if "residual" in self.takes:
            needed += _bytes(sized(self.takes["residual"], self._sizes(features))) * _COPIES_OUT
        return _even(features[2], max(budget * features[2] // needed, _FEWEST_ROWS))

    def in_place(self, features: tuple[int, ...]) -> bool:
        """Whether what it makes of them can take their place."""
        return not self.kept and self.gives.dtype == "float32" and self.shape(features) == features


@dataclass
class _Held:
    """What the stages hand on: features, in the one place that refers to them, so that they go when they are replaced;
    and what a norm needs to know of them."""

    features: Features
    statistics: Mapping[str, Features]
    residual: Features | None = None


class SlicedDecoder(Session):
    """A decoder in parts, with the signature of the whole. Threads may share it.

    Args:
        inputs: of the whole decoder.
        parts: what the manifest says of them.
        open_part, close_part: load and release a part; each is released as soon as it has run.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        parts: Mapping[str, Part],
        open_part: OpenPart,
        close_part: Callable[[str], None],
    ) -> None:
        self.inputs, self.outputs, self._parts = inputs, outputs, parts
        self._open_part, self._close_part = open_part, close_part
        self._stages = _stages(parts)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Latents → pixels."""
        latents: Features = feeds["latents"]
        budget = self._budget(latents.shape)
        held = _held(self._stages[0], self._before_stages(latents, budget))
        *others, last = self._stages
        for stage in others:
            self._run_stage(stage, held, budget)
        return {"pixels": self._run_stage(last, held, budget)}

    def before_stages(self, latents: Features) -> Features:
        """What the first stage takes."""
        return self._before_stages(latents, self._budget(latents.shape))

    def run_stage(
        self, number: int, latents: tuple[int, ...], features: Features, residual: Features | None
    ) -> NDArray[Any]:
        """One stage by itself, as a decode of latents of this shape runs it. What it is given may be overwritten."""
        stage = self._stages[number]
        return self._run_stage(stage, _held(stage, features, residual), self._budget(latents))

    def _budget(self, latents: tuple[int, ...]) -> int:
        """The bytes that a band may need, for latents of this shape."""
        before = self._parts["neck" if "neck" in self._parts else "head"]
        (result,) = before.outputs
        shape = sized(result, {"batch": latents[0], "height": latents[2], "width": latents[3]})
        residual, largest = 0, 0
        for stage in self._stages:
            made = stage.shape(shape)
            largest = max(largest, residual + _bytes(shape) + (0 if stage.in_place(shape) else _bytes(made)))
            residual, shape = _bytes(shape) if stage.kept else 0, made
        return largest // _SHARE

    def _before_stages(self, latents: Features, budget: int) -> Features:
        with self._part("head") as head:
            made = head.run({"latents": latents})
        if "attention" not in self._parts:
            return made["result"]
        attended = self._attend(made.pop("queries"), made.pop("keys"), made.pop("values"), budget)
        with self._part("neck") as neck:
            return neck.run({"attended": attended, "features": made.pop("features")})["result"]

    @contextmanager
    def _part(self, name: str) -> Iterator[Session]:
        """Open a part for as long as it runs: only one is in memory at a time."""
        try:
            yield self._open_part(name)
        finally:
            self._close_part(name)

    def _attend(self, queries: Features, keys: Features, values: Features, budget: int) -> Features:
        """Attention of a few queries at a time: their scores, (B, queries, tokens), are what takes memory."""
        attended = np.empty_like(queries)
        batch, tokens, _ = queries.shape
        size = _even(tokens, max(budget // (_COPIES_IN * 4 * batch * tokens), _FEWEST_QUERIES))
        with self._part("attention") as session:
            for start in range(0, tokens, size):
                first = min(start, tokens - size)  # of one shape, so some of the last ones' are computed again
                part = np.ascontiguousarray(queries[:, first : first + size])
                feeds = {"queries": part, "keys": keys, "values": values}
                attended[:, first : first + size] = session.run(feeds)["attended"]
        return attended

    def _run_stage(self, stage: _Stage, held: _Held, budget: int) -> NDArray[Any]:
        """Run a stage band by band; what it makes is held from then on, in place of what it took."""
        features, residual = held.features, held.residual
        statistics = GroupStatistics(stage.groups) if stage.groups else None
        shape, axis = stage.shape(features.shape), stage.rows_axis
        result = features if stage.in_place(features.shape) else np.empty(shape, stage.gives.dtype)
        factor = shape[axis] // features.shape[2]
        with self._part(stage.name) as session:
            for band in _bands(features, stage.rows(features.shape, budget)):
                feeds = {"features": band.features, "inside": band.inside, **held.statistics}
                if residual is not None:
                    feeds["residual"] = _padded(residual[:, :, band.first : band.end], band.rows)
                made = session.run({name: feeds[name] for name in stage.takes})[stage.gives.name]
                made = _rows(made, axis, 0, factor * (band.end - band.first))
                _rows(result, axis, factor * band.first, factor * band.end)[...] = made
                if statistics is not None:
                    statistics.add(made)
        held.residual = features if stage.kept else None
        held.features, held.statistics = result, statistics.feeds() if statistics is not None else {}
        return result


@dataclass(frozen=True)
class _Band:
    """The rows from `first` to `end` of features, with one more above and below.

    All bands have room for as many rows, so that a backend compiles one shape; what is too much of the last one lies
    outside of the picture, like the row above the first one.
    """

    first: int
    end: int
    rows: int
    features: Features  # (B, C, rows + 2, W), zero outside of the picture
    inside: Features  # (B, 1, rows + 2, 1), one inside of it and zero outside


def _bands(features: Features, rows: int) -> Iterator[_Band]:
    """The bands from top to bottom. Once one is asked for, those before may be overwritten."""
    batch, channels, height, width = features.shape
    above = np.zeros((batch, channels, 1, width), np.float32)
    for first in range(0, height, rows):
        end = min(first + rows, height)
        band = _padded(np.concatenate([above, features[:, :, first : end + 1]], axis=2), rows + 2)
        inside = np.zeros((batch, 1, rows + 2, 1), np.float32)
        inside[:, :, max(1 - first, 0) : min(height - first + 1, rows + 2)] = 1
        above = features[:, :, end - 1 : end].copy()
        yield _Band(first, end, rows, band, inside)


def _rows(array: NDArray[Any], axis: int, first: int, end: int) -> NDArray[Any]:
    return array[(slice(None),) * axis + (slice(first, end),)]


def _padded(features: Features, rows: int) -> Features:
    """Features with rows of zeros below them, as many as are missing; in one piece of memory."""
    missing = rows - features.shape[2]
    return np.pad(features, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else np.ascontiguousarray(features)


def _stages(parts: Mapping[str, Part]) -> list[_Stage]:
    names = [name for name in (f"slice.{number}" for number in range(len(parts))) if name in parts]
    takes = [{spec.name: spec for spec in parts[name].inputs} for name in names]
    stages = []
    for name, own, following in zip(names, takes, [*takes[1:], {}], strict=True):
        (gives,) = parts[name].outputs
        groups = int(following["mean"].shape[1]) if "mean" in following else None
        stages.append(_Stage(name, own, gives, kept="residual" in following, groups=groups))
    return stages


def _held(stage: _Stage, features: Features, residual: Features | None = None) -> _Held:
    """What a stage is handed whose features were not made by another."""
    if "mean" not in stage.takes:
        return _Held(features, {}, residual)
    statistics = GroupStatistics(int(stage.takes["mean"].shape[1]))
    statistics.add(features)
    return _Held(features, statistics.feeds(), residual)


def _even(total: int, most: int) -> int:
    """The size of pieces that are no larger than `most` and, but for the last one, all alike."""
    return -(-total // -(-total // min(most, total)))


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
