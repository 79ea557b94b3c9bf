"""What does the exporter ask of a submodule?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latentrt.bundle.manifest import PartName, TokenMerging
from latentrt.bundle.tensors import TensorSpec
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["Arrays", "Case", "Submodule"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of one set of inputs.

    Height and width are the submodule's own: of latents for the UNet and the decoder, of pixels for the rest.
    """

    batch: int
    height: int = 0
    width: int = 0
    tokens: int = 77


class Submodule(nn.Module):
    """A torch module with a signature: what it takes and gives, what its weights are called, and inputs to judge it on.

    Every floating input and output is float32 whatever the precision of the weights: the graph casts inside, so that a
    bundle has one signature per component and the sampling loop one dtype.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    # Inputs whose arithmetic stays float32 until it meets a weight, as in diffusers: the sines of a timestep lose
    # everything in half.
    float32_inputs: ClassVar[frozenset[str]] = frozenset()
    # Inputs that change more slowly than the rest: what depends on one alone becomes a part of this name.
    alone: ClassVar[Mapping[str, PartName]] = {}
    # Whether it is a decoder that is to have parts for decoding in slices.
    sliced: ClassVar[bool] = False
    # Whether an int8 bundle has an int8 graph of it: it takes time, and what it makes is looked at by people alone.
    quantized: ClassVar[bool] = False
    # The sizes it is traced at, and those its graphs are judged at. None of the latter is the former.
    traced: ClassVar[Case]
    judged: ClassVar[tuple[Case, ...]]

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        """Load the weights, in float32 and ready for inference.

        Raises:
            CheckpointError: weights are missing, damaged, or of a kind that is not supported.
        """
        raise NotImplementedError

    def merge_tokens(self, ratio: float) -> TokenMerging | None:
        """Leave a share of the tokens out of self-attention, where a submodule can (`token_merging.py`).

        Returns:
            What the manifest says of it; None where nothing changed.

        Raises:
            RequestError, CheckpointError: the ratio is impossible, or there is nothing to merge.
        """
        return None

    def choices(self) -> Arrays:
        """What the last run decided that either way would have been right (`gates.token_merging`); graphs are told."""
        return {}

    def told(self, choices: Arrays) -> AbstractContextManager[None]:
        """Have runs decide as another one did (`choices`), for as long as this lasts."""
        return nullcontext()

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the model and only this submodule knows."""
        return {}

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        """Inputs of the given sizes. `known` holds what earlier ones passed on."""
        raise NotImplementedError

    def passes_on(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], known: Mapping[str, NDArray[Any]]
    ) -> Arrays:
        """What later submodules may be judged on, made of this one's inputs and outputs."""
        return {}

    def calibrate(
        self, run: Callable[[Arrays], Arrays], known: Mapping[str, NDArray[Any]], quantizing: QuantizationOptions
    ) -> Arrays:
        """Evaluate the module, by `run`, on what it is used for; what later submodules may be calibrated on."""
        raise NotImplementedError

    def canonical_name(self, parameter: str) -> str:
        """The name that a parameter has in a current checkpoint, whatever the installed library calls it."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter under its canonical name."""
        return {self.canonical_name(name): parameter.detach() for name, parameter in self.named_parameters()}

    def torch_outputs(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the module on arrays: the reference that graphs are judged by."""
        with torch.inference_mode():
            results = self(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}
