"""What of the denoiser does not depend on the latents, and so is computed once?

A bundle's denoiser may come in parts (`latentrt.bundle.manifest.Part`): `time_embedding` for what depends on the
timestep alone, `cross_attention_kv` for the keys and values of cross-attention, and `body` for the rest. A run knows
its table, so all of its timesteps go through the first part at once, and each array of embeddings goes through the
second when it is first met.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session
from latentrt.backends.submodules import Prepares
from latentrt.bundle.manifest import PartName
from latentrt.bundle.tensors import TensorSpec

__all__ = ["DEEP_FEATURES", "DenoiserRun", "InParts", "ReusesFeatures", "SplitDenoiser"]

DEEP_FEATURES = "deep_features"

OpenPart = Callable[[PartName], Session]
# Embeddings whose keys and values are remembered: a run has few, one or two for each number of tokens.
_MOST_PROMPTS = 16


@runtime_checkable
class ReusesFeatures(Protocol):
    """A denoiser that can take deep features of an earlier row."""

    def run_reusing(self, feeds: Mapping[str, NDArray[Any]], deep_features: NDArray[np.float32]) -> Arrays:
        """The denoiser's outputs, of which only the shallow layers are computed."""


@runtime_checkable
class InParts(Protocol):
    """A denoiser that computes once what a whole run needs."""

    def begin(self, timesteps: NDArray[np.float32]) -> Session:
        """The denoiser for one run, which will meet these timesteps."""


class SplitDenoiser:
    """A denoiser in parts, with the signature of the whole. Threads may share it; each run has its own `begin`.

    Args:
        inputs: of the whole denoiser.
        open_part: loads a part when it is first needed.
    """

    def __init__(self, inputs: tuple[TensorSpec, ...], open_part: OpenPart) -> None:
        self._inputs, self._open_part = inputs, open_part
        self._parts: dict[PartName, Session] = {}
        self._loading = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    def part(self, name: PartName) -> Session:
        """A part, loaded."""
        with self._loading:
            if name not in self._parts:
                self._parts[name] = self._open_part(name)
            return self._parts[name]

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """`latentrt.backends.submodules.Prepares`, of the part that a step runs first; whoever cannot wait loads
        another meanwhile."""
        of_timesteps = {"timesteps": sizes["timesteps"]}
        wanted: dict[PartName, Mapping[str, int]] = {
            "body": sizes,
            "cross_attention_kv": sizes,
            "time_embedding": of_timesteps,
        }
        for name, each in wanted.items():
            part = self.part(name)
            if isinstance(part, Prepares):
                part.prepare(each)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self.begin(feeds["timestep"]).run(feeds)

    def begin(self, timesteps: NDArray[np.float32]) -> DenoiserRun:
        """The denoiser for one run. Nothing is computed yet."""
        return DenoiserRun(self, timesteps)


class DenoiserRun:
    """A denoiser in parts during one run: it remembers what its timesteps and prompts became."""

    def __init__(self, denoiser: SplitDenoiser, timesteps: NDArray[np.float32]) -> None:
        self._denoiser, self._wanted = denoiser, timesteps.tolist()
        self._places: dict[float, int] = {}
        self._rows: Arrays = {}
        self._prompts: dict[int, tuple[NDArray[Any], Arrays]] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._denoiser.inputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._run("body", feeds, {})

    def run_reusing(self, feeds: Mapping[str, NDArray[Any]], deep_features: NDArray[np.float32]) -> Arrays:
        """`ReusesFeatures`."""
        return self._run("shallow_body", feeds, {DEEP_FEATURES: deep_features})

    def _run(self, name: PartName, feeds: Mapping[str, NDArray[Any]], more: Arrays) -> Arrays:
        part = self._denoiser.part(name)
        known = {**feeds, **more, **self._of_timesteps(feeds["timestep"]), **self._of_prompts(feeds)}
        return part.run({spec.name: known[spec.name] for spec in part.inputs})

    def _of_timesteps(self, timestep: NDArray[np.float32]) -> Arrays:
        """What the timestep of each sample became."""
        if not all(each in self._places for each in timestep.tolist()):
            # Not `np.unique`, which imports masked arrays: a tenth of the time that a small model's loop takes.
            wanted = np.array(sorted({*self._places, *self._wanted, *timestep.tolist()}), np.float32)
            self._rows = self._denoiser.part("time_embedding").run({"timestep": wanted})
            self._places = {each: place for place, each in enumerate(wanted.tolist())}
        places = [self._places[each] for each in timestep.tolist()]
        return {name: rows[places] for name, rows in self._rows.items()}

    def _of_prompts(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """The keys and values of embeddings; remembered of an array that nobody can have written to since."""
        embeddings = feeds["encoder_hidden_states"]
        if (known := self._prompts.get(id(embeddings))) is not None:
            return known[1]
        found = self._denoiser.part("cross_attention_kv").run({"encoder_hidden_states": embeddings})
        if not embeddings.flags.writeable:
            while len(self._prompts) >= _MOST_PROMPTS:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[id(embeddings)] = (embeddings, found)  # held, so that its id is nobody else's
        return found
