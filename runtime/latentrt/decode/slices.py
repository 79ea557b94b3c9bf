"""Decodes latents in slices: in less memory, with the pixels of the whole decoder.

A decoder's memory peaks at its last levels, where all channels have the image's full size. A bundle may have its
decoder in parts (`latentrt.bundle.manifest.Part`): `head`, `attention` and `neck` up to these levels, then stages
(`slice.0`, `slice.1`, …) that each compute a band of rows from the same rows plus one above and one below. Only the
input and the output of one stage are whole in memory; the output is written band by band, over the input where no later
stage reads that.

Pixels equal those of the whole graph up to the order of sums: they differ by at most 1 of 255, where a value is close
to a rounding boundary.
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

# Memory of a band as a fraction of the whole features' peak: 1 / _BAND_DIVISOR.
_BAND_DIVISOR = 10
# Each band reads two extra rows; with fewer rows that overhead outweighs the memory saved.
_MIN_ROWS = 8
_MIN_QUERIES = 64
# Copies of a band that a backend holds at once. Input: as fed, normalised, packed for the convolution. Output: packed,
# as returned.
_COPIES_IN, _COPIES_OUT = 3, 2


@dataclass(frozen=True)
class _Stage:
    """A stage, with the properties that follow from its signature and the next stage's.

    Attributes:
        inputs: by name. output: its only one.
        keeps_features: whether the next stage reads this one's `features` as its `residual`.
        groups: of the next stage's group normalisation; None where that normalises nothing.
    """

    name: str
    inputs: dict[str, TensorSpec]
    output: TensorSpec
    keeps_features: bool
    groups: int | None

    def shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output's shape for features of shape [B, C, H, W]."""
        return sized(self.output, self._sizes(features))

    def _sizes(self, features: tuple[int, ...]) -> dict[str, int]:
        return {"batch": features[0], "rows": features[2], "width": features[3]}

    @property
    def rows_axis(self) -> int:
        """Return the output's axis of rows: features are [B, C, H, W], pixels [B, H, W, C]."""
        return next(axis for axis, size in enumerate(self.output.shape) if str(size).endswith("rows"))

    def rows(self, features: tuple[int, ...], budget: int) -> int:
        """Return the rows per band for features of shape [B, C, H, W].

        Args:
            budget: bytes that one band may need.
        """
        needed = _bytes(features) * _COPIES_IN + _bytes(self.shape(features)) * _COPIES_OUT
        if "residual" in self.inputs:
            needed += _bytes(sized(self.inputs["residual"], self._sizes(features))) * _COPIES_OUT
        return _piece_size(features[2], max(budget * features[2] // needed, _MIN_ROWS))

    def in_place(self, features: tuple[int, ...]) -> bool:
        """Return whether the output can overwrite features of this shape."""
        return not self.keeps_features and self.output.dtype == "float32" and self.shape(features) == features


@dataclass
class _StageInput:
    """Input of the next stage. It holds the only reference to the features, so that replacing them frees their memory.

    Attributes:
        features: float32 [B, C, H, W].
        statistics: `mean` and `variance`, float32 [B, groups]; empty where the stage does not normalise.
        residual: float32 [B, C', H, W], or None.
    """

    features: Features
    statistics: Mapping[str, Features]
    residual: Features | None = None


class SlicedDecoder(Session):
    """A decoder that runs in parts, with the signature of the whole decoder. Threads may share it.

    Args:
        inputs, outputs: of the whole decoder.
        parts: the manifest's records, by name.
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
        self._stages = _read_stages(parts)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Decode `latents`, float32 [B, C, h, w], to `pixels`, uint8 [B, H, W, 3]."""
        latents: Features = feeds["latents"]
        budget = self._band_budget(latents.shape)
        stage_input = _make_input(self._stages[0], self._run_before_stages(latents, budget))
        *others, last = self._stages
        for stage in others:
            self._run_stage(stage, stage_input, budget)
        return {"pixels": self._run_stage(last, stage_input, budget)}

    def before_stages(self, latents: Features) -> Features:
        """Return the first stage's features, float32 [B, C, H, W], for latents [B, C', h, w]."""
        return self._run_before_stages(latents, self._band_budget(latents.shape))

    def run_stage(
        self, number: int, latents: tuple[int, ...], features: Features, residual: Features | None
    ) -> NDArray[Any]:
        """Run one stage by itself, in the bands that latents of this shape would have; return its output.

        Args:
            number: index of the stage.
            latents: shape [B, C, h, w].
            features, residual: the stage's inputs. They may be overwritten.
        """
        stage = self._stages[number]
        return self._run_stage(stage, _make_input(stage, features, residual), self._band_budget(latents))

    def _band_budget(self, latents: tuple[int, ...]) -> int:
        """Return the bytes that one band may need for latents of this shape."""
        before = self._parts["neck" if "neck" in self._parts else "head"]
        (result,) = before.outputs
        shape = sized(result, {"batch": latents[0], "height": latents[2], "width": latents[3]})
        residual, largest = 0, 0
        for stage in self._stages:
            made = stage.shape(shape)
            largest = max(largest, residual + _bytes(shape) + (0 if stage.in_place(shape) else _bytes(made)))
            residual, shape = _bytes(shape) if stage.keeps_features else 0, made
        return largest // _BAND_DIVISOR

    def _run_before_stages(self, latents: Features, budget: int) -> Features:
        with self._part("head") as head:
            made = head.run({"latents": latents})
        if "attention" not in self._parts:
            return made["result"]
        attended = self._attend(made.pop("queries"), made.pop("keys"), made.pop("values"), budget)
        with self._part("neck") as neck:
            return neck.run({"attended": attended, "features": made.pop("features")})["result"]

    @contextmanager
    def _part(self, name: str) -> Iterator[Session]:
        """Open a part and release it on leaving the block: only one is in memory at a time."""
        try:
            yield self._open_part(name)
        finally:
            self._close_part(name)

    def _attend(self, queries: Features, keys: Features, values: Features, budget: int) -> Features:
        """Attend with a few queries at a time, as the scores, [B, queries, tokens], need most of the memory."""
        attended = np.empty_like(queries)
        batch, tokens, _ = queries.shape
        size = _piece_size(tokens, max(budget // (_COPIES_IN * 4 * batch * tokens), _MIN_QUERIES))
        with self._part("attention") as session:
            for start in range(0, tokens, size):
                first = min(start, tokens - size)  # all of one shape; the last may compute some queries again
                part = np.ascontiguousarray(queries[:, first : first + size])
                feeds = {"queries": part, "keys": keys, "values": values}
                attended[:, first : first + size] = session.run(feeds)["attended"]
        return attended

    def _run_stage(self, stage: _Stage, stage_input: _StageInput, budget: int) -> NDArray[Any]:
        """Run a stage band by band. Return its output, and replace `stage_input` by the next stage's."""
        features, residual = stage_input.features, stage_input.residual
        statistics = GroupStatistics(stage.groups) if stage.groups else None
        shape, axis = stage.shape(features.shape), stage.rows_axis
        result = features if stage.in_place(features.shape) else np.empty(shape, stage.output.dtype)
        factor = shape[axis] // features.shape[2]
        with self._part(stage.name) as session:
            for band in _bands(features, stage.rows(features.shape, budget)):
                feeds = {"features": band.features, "inside": band.inside, **stage_input.statistics}
                if residual is not None:
                    feeds["residual"] = _pad_rows(residual[:, :, band.first : band.end], band.rows)
                made = session.run({name: feeds[name] for name in stage.inputs})[stage.output.name]
                made = _rows(made, axis, 0, factor * (band.end - band.first))
                _rows(result, axis, factor * band.first, factor * band.end)[...] = made
                if statistics is not None:
                    statistics.add(made)
        stage_input.residual = features if stage.keeps_features else None
        stage_input.features = result
        stage_input.statistics = statistics.feeds() if statistics is not None else {}
        return result


@dataclass(frozen=True)
class _Band:
    """The rows from `first` to `end` (exclusive) of features, with one extra row above and below.

    All bands have the same number of rows, so that a backend compiles one shape. Surplus rows of the last band are
    outside the image, and so is the row above the first band.
    """

    first: int
    end: int
    rows: int
    features: Features  # [B, C, rows + 2, W], 0 outside the image
    inside: Features  # [B, 1, rows + 2, 1], 1 inside the image and 0 outside


def _bands(features: Features, rows: int) -> Iterator[_Band]:
    """Yield the bands from top to bottom. When one is yielded, rows of earlier bands may have been overwritten."""
    batch, channels, height, width = features.shape
    above = np.zeros((batch, channels, 1, width), np.float32)
    for first in range(0, height, rows):
        end = min(first + rows, height)
        band = _pad_rows(np.concatenate([above, features[:, :, first : end + 1]], axis=2), rows + 2)
        inside = np.zeros((batch, 1, rows + 2, 1), np.float32)
        inside[:, :, max(1 - first, 0) : min(height - first + 1, rows + 2)] = 1
        above = features[:, :, end - 1 : end].copy()
        yield _Band(first, end, rows, band, inside)


def _rows(array: NDArray[Any], axis: int, first: int, end: int) -> NDArray[Any]:
    return array[(slice(None),) * axis + (slice(first, end),)]


def _pad_rows(features: Features, rows: int) -> Features:
    """Return features [B, C, H, W] padded to this many rows with zeros below, as a contiguous array."""
    missing = rows - features.shape[2]
    return np.pad(features, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else np.ascontiguousarray(features)


def _read_stages(parts: Mapping[str, Part]) -> list[_Stage]:
    names = [name for name in (f"slice.{number}" for number in range(len(parts))) if name in parts]
    inputs = [{spec.name: spec for spec in parts[name].inputs} for name in names]
    stages = []
    for name, own, following in zip(names, inputs, [*inputs[1:], {}], strict=True):
        (output,) = parts[name].outputs
        groups = int(following["mean"].shape[1]) if "mean" in following else None
        stages.append(_Stage(name, own, output, keeps_features="residual" in following, groups=groups))
    return stages


def _make_input(stage: _Stage, features: Features, residual: Features | None = None) -> _StageInput:
    """Return a stage's input for features that no other stage computed, with their statistics."""
    if "mean" not in stage.inputs:
        return _StageInput(features, {}, residual)
    statistics = GroupStatistics(int(stage.inputs["mean"].shape[1]))
    statistics.add(features)
    return _StageInput(features, statistics.feeds(), residual)


def _piece_size(total: int, most: int) -> int:
    """Return the size of equal pieces, as few as possible and each at most `most`; the last may be smaller."""
    return -(-total // -(-total // min(most, total)))


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
