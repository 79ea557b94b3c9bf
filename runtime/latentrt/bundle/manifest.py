"""What does a bundle say of itself?

`bundle.json` is one `Manifest`, and these are its parts. The schema beside this file (`bundle.schema.json`) is
generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from latentrt.bundle.tensors import TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "Component",
    "Count",
    "Defaults",
    "FileRecord",
    "GateFigure",
    "GraphRecord",
    "LatentGeometry",
    "Licence",
    "Limits",
    "Manifest",
    "Part",
    "PartName",
    "Positive",
    "Precision",
    "Quantization",
    "QuantizationMethod",
    "QuantizedLayer",
    "Record",
    "SchedulerRecord",
    "SealedEngine",
    "Sha256",
    "Source",
    "TokenMerging",
    "TokenizerRecord",
    "WeightsRecord",
]

FORMAT_VERSION = 1

Precision = Literal["float16", "float32", "int8"]
QuantizationMethod = Literal["static", "weights"]
PartName = Annotated[
    str, msgspec.Meta(pattern=r"^(timestep|prompt|loop|shallow|head|attention|neck|stage\.(0|[1-9][0-9]?))$")
]
Family = Literal["stable-diffusion-1", "stable-diffusion-2"]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the manifest: immutable, and strict about its keys."""


class FileRecord(Record, frozen=True, kw_only=True):
    """What pins one file: its SHA-256 in lower-case hexadecimal and its size in bytes."""

    sha256: Sha256
    size: Count


class GateFigure(Record, frozen=True, kw_only=True):
    """How far a graph's output was from the torch module's, on one set of inputs.

    Of a denoiser's `timestep`, `prompt` and `loop` it says how far the three together were from the whole graph, on
    that one's inputs, and of `shallow` how far it was from `loop` with the features of the same step.

    `measure` is `relative` (largest absolute difference over the reference's largest absolute value), `absolute`
    (largest absolute difference), `levels` (largest difference of uint8 pixels) or `rms` (root mean square of the
    difference over that of the reference).
    """

    output: str
    shapes: dict[str, tuple[int, ...]]
    measure: Literal["relative", "absolute", "levels", "rms"]
    figure: float
    bound: float


class QuantizedLayer(Record, frozen=True, kw_only=True):
    """What a linear layer or a convolution of an int8 graph computes in, and what decided it.

    `method` is `static` (weights and activations are int8), `weights` (only its weights are) or `float32`. `error` is
    the relative RMS error of the network's output with this layer alone quantised by the graph's method; `share` is
    the layer's share of the multiplications of all layers.
    """

    method: Literal["static", "weights", "float32"]
    error: float
    share: float


class Quantization(Record, frozen=True, kw_only=True):
    """How an int8 graph was quantised, layer by layer.

    Activations were calibrated by `evaluations` of the network, in runs of `steps` steps; both are 0 where only weights
    are quantised.
    """

    method: QuantizationMethod
    weight_bits: Positive
    steps: Count
    evaluations: Count
    layers: dict[str, QuantizedLayer]


class GraphRecord(Record, frozen=True, kw_only=True):
    """One graph over a component's weights.

    `float32_nodes` names the nodes that compute in float32 in a float16 graph; `quantization` is an int8 graph's.
    """

    file: RelativePath
    opset: Positive
    nodes: Positive
    float32_nodes: tuple[str, ...] = ()
    gate: tuple[GateFigure, ...] = ()
    quantization: Quantization | None = None


class WeightsRecord(Record, frozen=True, kw_only=True):
    """A component's parameters: a safetensors file, under their checkpoint names.

    In a file of int8 a quantised weight stands under its own name, its scale beside it as `…weight_scale`, those of
    activations as `…input_scale`, `…input_zero_point` and `…output_…`; the rest is half.

    `layouts` tells of each that a rewrite stored in another layout than the checkpoint's, and how.
    """

    file: RelativePath
    dtype: Precision
    tensors: Count
    parameters: Count
    layouts: dict[str, str] = {}


class Part(Record, frozen=True, kw_only=True):
    """Another graph of a submodule, over the same weights: a piece of the whole one, or another way to its outputs.

    Of a denoiser, `timestep` is what depends on the timestep alone, `prompt` what depends on the embeddings alone, and
    `loop` the rest, which takes their outputs as inputs: together they are the whole graph. `shallow` is of `loop` what
    is left for a step that takes the deep features of an earlier one.

    Of a decoder, `head`, `attention`, `neck`, `stage.0`, `stage.1`, … are run one after the other, most of them a band
    at a time (`latentrt.decode.slices`). The figure of the last says how far all of them together were from the whole
    graph.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graphs: dict[Precision, GraphRecord]


class TokenMerging(Record, frozen=True, kw_only=True):
    """What a denoiser leaves out of its self-attention (ToMe): `ratio` of the tokens is merged in the blocks named."""

    ratio: Annotated[float, msgspec.Meta(gt=0, lt=0.75)]
    blocks: tuple[str, ...]


class Component(Record, frozen=True, kw_only=True):
    """A submodule: one signature, one weights file, and a graph for each precision it can compute in.

    `token_merging` is what its graphs leave out, None for nothing; that the parts do as the whole goes without saying.
    `export_peak_bytes` is the largest resident set of the process that exported it, `export_seconds` its wall time.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: WeightsRecord
    graphs: dict[Precision, GraphRecord]
    parts: dict[PartName, Part] = {}
    token_merging: TokenMerging | None = None
    export_peak_bytes: Count
    export_seconds: float


class TokenizerRecord(Record, frozen=True, kw_only=True):
    """The tokenizer, and the ids that frame a chunk of `length` tokens.

    A chunk is `begin`, up to `length` − 2 tokens of text, `end`, then `pad`.
    """

    file: RelativePath
    begin: Count
    end: Count
    pad: Count
    length: Annotated[int, msgspec.Meta(ge=3)]


class SchedulerRecord(Record, frozen=True, kw_only=True):
    """The checkpoint's scheduler as it was read from disk: its diffusers class and its configuration, key by key.

    The training noise schedule and the prediction type are in it; keys that are absent mean the defaults of
    whichever sampler reads it.
    """

    class_name: str
    config: dict[str, Any]


class LatentGeometry(Record, frozen=True, kw_only=True):
    """How latents are laid out.

    `factor` pixels of a picture's side are one latent; it has `channels` values, `scaling_factor` times the
    autoencoder's.
    """

    channels: Positive
    factor: Positive
    scaling_factor: float


class Defaults(Record, frozen=True, kw_only=True):
    """What a request means when it does not say. Height and width in pixels."""

    height: Positive
    width: Positive
    num_inference_steps: Positive = 50
    guidance_scale: float = 7.5


class Limits(Record, frozen=True, kw_only=True):
    """What a request may ask for at most (and for sides, in pixels, at least).

    `max_clip_skip` is the number of the encoder's layers.
    """

    min_side: Positive
    max_side: Positive
    max_batch: Positive
    max_steps: Positive
    max_clip_skip: Count = 0


class Licence(Record, frozen=True, kw_only=True):
    """The licence's name as the checkpoint states it (`unknown` if it does not), and the file of its text if any."""

    name: str
    file: RelativePath | None = None


class Source(Record, frozen=True, kw_only=True):
    """Where the weights came from: the checkpoint's own name, its layout, the SHA-256 of each weight file read."""

    name: str
    layout: Literal["diffusers", "single-file"]
    weights: dict[str, Sha256]


class SealedEngine(Record, frozen=True, kw_only=True):
    """An engine that travels with the bundle: the files of its record and of its plan.

    What it is built of and for is in the record (`latentrt.engines.record`).
    """

    record: RelativePath
    plan: RelativePath


class Manifest(Record, frozen=True, kw_only=True):
    """The whole of `bundle.json`. `engines` are by their keys."""

    format_version: Positive
    created_by: str
    family: Family
    source: Source
    licence: Licence
    precision: Precision
    components: dict[str, Component]
    tokenizer: TokenizerRecord
    scheduler: SchedulerRecord
    latents: LatentGeometry
    defaults: Defaults
    limits: Limits
    safety: Literal["block", "blur", "report"] = "block"
    engines: dict[Sha256, SealedEngine] = {}
    files: dict[RelativePath, FileRecord]
