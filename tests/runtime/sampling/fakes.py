"""A denoiser of a few numpy operations, whole and in parts, that records its inputs.

Each sample of a batch is computed by itself, so its output does not depend on the batch, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.bundle.tensors import TensorSpec
from latentrt.sampling.denoiser import Conditioning, SplitDenoiser, WholeDenoiser

Floats = NDArray[np.float32]

WIDTH = 6  # of the embeddings
NAMES = {"latents": "x", "timestep": "t", "output": "y"}

_LATENTS = ("evaluations", "channels", "height", "width")
_OUTPUT = ("evaluations", 4, "height", "width")
_X = TensorSpec("x", "float32", _LATENTS)
_TEXT = TensorSpec("text", "float32", ("evaluations", "tokens", WIDTH))
_ROWS = TensorSpec("rows", "float32", ("evaluations", 2))
_KEYS = TensorSpec("keys", "float32", ("evaluations", WIDTH, "tokens"))
_DEEP = TensorSpec("deep_features", "float32", _OUTPUT)
_Y = TensorSpec("y", "float32", _OUTPUT)
INPUTS = (_X, TensorSpec("t", "float32", ("evaluations",)), _TEXT)
_PARTS: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    "time_embedding": ((TensorSpec("t", "float32", ("timesteps",)),), (_ROWS,)),
    "cross_attention_kv": ((_TEXT,), (_KEYS,)),
    "body": ((_X, _ROWS, _KEYS), (_Y, _DEEP)),
    "shallow_body": ((_X, _ROWS, _DEEP), (_Y,)),
}


def deep_layers(x: Floats, text: Floats) -> Floats:
    """x [C, H, W], text [tokens, width] → deep features [4, H, W]."""
    mixed: Floats = x[:4] * np.tanh(text.mean(dtype=np.float32)) + x[4:].sum(axis=0, dtype=np.float32)
    return np.asarray(np.tanh(mixed[::-1]), np.float32)


def shallow_layers(x: Floats, t: np.float32, deep: Floats) -> Floats:
    """x [C, H, W], deep features [4, H, W] → output [4, H, W]."""
    return np.asarray(deep + x[:4] * (t / np.float32(1000)), np.float32)


def whole(x: Floats, t: np.float32, text: Floats) -> Floats:
    """Compute one sample's output."""
    return shallow_layers(x, t, deep_layers(x, text))


class FakeSession(Session):
    """The whole denoiser, or a part of it.

    Attributes:
        fed: the inputs of each run. prepared: the shapes of each call of `prepare`.
    """

    def __init__(self, part: str | None = None, sizes: tuple[int, ...] | None = None) -> None:
        self.inputs, self.outputs = (INPUTS, (_Y,)) if part is None else _PARTS[part]
        self.part, self._sizes = part, sizes
        self.fed, self.prepared = list[Arrays](), list[Shapes]()

    @property
    def batches(self) -> list[int]:
        """The batch of each run."""
        return [len(next(iter(feeds.values()))) for feeds in self.fed]

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return self._sizes

    def prepare(self, shapes: Shapes) -> None:
        self.prepared.append(shapes)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        assert {*feeds} == {spec.name for spec in self.inputs}
        self.fed.append(dict(feeds))
        rows = zip(*(feeds[spec.name] for spec in self.inputs), strict=True)
        outputs = [self._one(*row) for row in rows]
        return {spec.name: np.stack(each) for spec, each in zip(self.outputs, zip(*outputs, strict=True), strict=True)}

    def _one(self, *row: Any) -> tuple[Floats, ...]:
        if self.part is None:
            return (whole(*row),)
        if self.part == "time_embedding":
            return (np.full(2, row[0], np.float32),)
        if self.part == "cross_attention_kv":
            return (np.ascontiguousarray(row[0].T),)
        x, rows, last = row
        if self.part == "shallow_body":
            return (shallow_layers(x, rows[0], last),)
        deep = deep_layers(x, np.ascontiguousarray(last.T))
        return shallow_layers(x, rows[0], deep), deep


class FakeParts:
    """The parts of a split denoiser, each made when it is first opened."""

    def __init__(self) -> None:
        self.parts: dict[str, FakeSession] = {}
        self.denoiser = self.open_denoiser()

    def open_denoiser(self) -> SplitDenoiser:
        """Return another denoiser on the same parts."""
        return SplitDenoiser(INPUTS, self.open, reuses_features=True, **NAMES)

    def open(self, name: str) -> FakeSession:
        return self.parts.setdefault(name, FakeSession(name))

    def batches(self, name: str) -> list[int]:
        """The batch of each run of a part."""
        return self.parts[name].batches if name in self.parts else []


def open_whole(session: Session) -> WholeDenoiser:
    """Return a denoiser on a session of the whole."""
    return WholeDenoiser(session, **NAMES)


def conditioning(seed: int, tokens: int = 3, concat: Floats | None = None) -> Conditioning:
    """Return random text embeddings [tokens, WIDTH]."""
    text = np.random.default_rng(seed).standard_normal((tokens, WIDTH), dtype=np.float32)
    return Conditioning({"text": text}, concat)
