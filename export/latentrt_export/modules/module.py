"""The interface of a traceable torch module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from numpy.typing import NDArray
from torch import nn

from latentrt.bundle.manifest import PartName, TokenMerging
from latentrt.bundle.tensors import TensorSpec
from latentrt_export.modules.streamed import Read, WeightsByName, streamed_weights
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["Arrays", "ComponentModule", "Shapes"]

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, int]
"""The size of each named axis of a component's inputs."""


class ComponentModule(nn.Module):
    """A torch module with the signature of a component: its inputs, its outputs, and the names of its weights.

    Every floating input and output is float32 for every precision of the weights: the graph casts inside, so that a
    bundle has one signature per component and the sampling loop one dtype.

    Attributes:
        inputs, outputs: the signature, in the order of `forward`.
        float32_inputs: inputs whose arithmetic stays float32 until it meets a weight, as in diffusers: the sines of a
            timestep lose all their precision in half.
        loop_invariant_inputs: input → part, for inputs that change less often than the latents; the part computes the
            values that depend on its inputs alone.
        is_sliced: whether it is a decoder that is split into parts for decoding in slices.
        is_quantized: whether an int8 bundle has an int8 graph of it. Other modules are small, their outputs are
            compared with thresholds, or calibration does not support them; their weights are half.
        trace_shapes: the sizes at which it is traced.
        gate_shapes: the sizes at which its graphs are compared with it; none of them equals `trace_shapes`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    float32_inputs: ClassVar[frozenset[str]] = frozenset()
    loop_invariant_inputs: ClassVar[Mapping[str, PartName]] = {}
    is_sliced: ClassVar[bool] = False
    is_quantized: ClassVar[bool] = False
    trace_shapes: ClassVar[Shapes]
    gate_shapes: ClassVar[tuple[Shapes, ...]]

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        """Build the module of its configuration, ready for inference; its weights stay in their files.

        Raises:
            CheckpointError: weights are missing, damaged, or of an unsupported kind.
        """
        raise NotImplementedError

    def merge_tokens(self, ratio: float) -> TokenMerging | None:
        """Merge a share of the tokens in self-attention, if the module supports it (`token_merging.py`).

        Returns:
            The record for the manifest; None if nothing changed.

        Raises:
            RequestError: the ratio is out of range.
            CheckpointError: the module has no attention to merge tokens in.
        """
        return None

    def matchings(self) -> Arrays:
        """Return the token matchings of the last evaluation, which the graph uses as inputs when it is compared.

        Between nearly equal tokens either choice is valid (`latentrt_export.gates.token_merging`).
        """
        return {}

    def forced(self, matchings: Arrays) -> AbstractContextManager[None]:
        """Force these token matchings in every evaluation inside the context."""
        return nullcontext()

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Evaluate the module on realistic inputs, so that the ranges of its activations can be measured.

        Args:
            run: evaluates the module.
            gate_inputs: the text embeddings of the calibration prompts (the empty prompt first), and other outputs of
                text encoders for them, under the names of the module's inputs; the micro-conditioning of an image of
                the default size under that of its input; for a denoiser `noise_schedule` (JSON) and `latent_size`, the
                height and width of the latents of an image of the default size; `latents` of encoded images; and the
                arrays that earlier components returned from this method.
            options: the number of steps and the guidance scale.

        Returns:
            Arrays for the calibration of later components.
        """
        raise NotImplementedError

    def canonical_name(self, parameter: str) -> str:
        """Return a parameter's name in current checkpoints, which the installed library's name may differ from."""
        raise NotImplementedError

    def weights(self) -> WeightsByName:
        """Return every parameter under its canonical name; each is read when it is looked up."""
        return WeightsByName(self, self.canonical_name)

    def torch_outputs(self, feeds: Mapping[str, NDArray[Any]], read: Read | None = None) -> Arrays:
        """Run the module on arrays and return its outputs by name, the reference for its graphs.

        Args:
            feeds: its inputs by name.
            read: returns other values for the parameters (`streamed_weights`); None uses its own.
        """
        with torch.inference_mode(), streamed_weights(self, read):
            results = self(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}
