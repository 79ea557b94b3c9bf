"""A denoiser in parts that is a few lines of numpy, and counts what it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from latentrt.backends.split_denoiser import SplitDenoiser
from numpy.typing import NDArray

from latentrt.backends.session import Arrays
from latentrt.bundle.manifest import PartName
from latentrt.bundle.tensors import TensorSpec

LATENTS = ("evaluations", 4, "height", "width")
EMBEDDINGS = TensorSpec("encoder_hidden_states", "float32", ("evaluations", "tokens", 8))
TIMESTEP = TensorSpec("timestep", "float32", ("evaluations",))
SAMPLE = TensorSpec("sample", "float32", LATENTS)
WHOLE = (SAMPLE, TIMESTEP, EMBEDDINGS)
ROWS = TensorSpec("time_emb", "float32", ("evaluations", 3))
KEYS = TensorSpec("keys", "float32", ("evaluations", 8, "tokens"))
DEEP = TensorSpec("deep_features", "float32", LATENTS)
_INPUTS: dict[str, tuple[TensorSpec, ...]] = {
    "time_embedding": (TensorSpec("timestep", "float32", ("timesteps",)),),
    "cross_attention_kv": (EMBEDDINGS,),
    "body": (SAMPLE, ROWS, KEYS),
    # The shallow layers need no keys here.
    "shallow_body": (SAMPLE, ROWS, DEEP),
}


def whole(sample: NDArray[Any], timestep: NDArray[Any], embeddings: NDArray[Any]) -> NDArray[np.float32]:
    """What the parts compute together."""
    deep = np.tanh(sample * embeddings.mean(axis=(1, 2))[:, None, None, None])
    return shallow(sample, timestep, deep)


def shallow(sample: NDArray[Any], timestep: NDArray[Any], deep: NDArray[Any]) -> NDArray[np.float32]:
    """The same with deep features from elsewhere."""
    found: NDArray[np.float32] = (sample * (timestep / 1000)[:, None, None, None] + deep).astype(np.float32)
    return found


class FakePart:
    """One part; `fed` are the inputs of each run."""

    def __init__(self, name: PartName) -> None:
        self.name, self.fed = name, list[Mapping[str, NDArray[Any]]]()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return _INPUTS[self.name]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        assert list(feeds) == [spec.name for spec in self.inputs]
        self.fed.append(feeds)
        if self.name == "time_embedding":
            return {"time_emb": np.repeat(feeds["timestep"][:, None], 3, axis=1)}
        if self.name == "cross_attention_kv":
            return {"keys": np.ascontiguousarray(feeds["encoder_hidden_states"].transpose(0, 2, 1))}
        sample, t = feeds["sample"], feeds["time_emb"][:, 0]
        if self.name == "shallow_body":
            return {"noise_pred": shallow(sample, t, feeds["deep_features"])}
        deep = np.tanh(sample * feeds["keys"].mean(axis=(1, 2))[:, None, None, None]).astype(np.float32)
        return {"noise_pred": shallow(sample, t, deep), "deep_features": deep}


class FakeParts:
    """The parts of a denoiser; `opened` are those that were loaded, in their order."""

    def __init__(self) -> None:
        self.parts: dict[PartName, FakePart] = {}
        self.denoiser = SplitDenoiser(WHOLE, self.open)

    @property
    def opened(self) -> list[PartName]:
        return list(self.parts)

    def open(self, name: PartName) -> FakePart:
        assert name not in self.parts, "a part is loaded once"
        self.parts[name] = FakePart(name)
        return self.parts[name]

    def runs(self, name: PartName) -> int:
        """How often a part was run."""
        return len(self.parts[name].fed) if name in self.parts else 0
