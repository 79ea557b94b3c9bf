"""The manifest of a bundle, `bundle.json`, in format 2: its records, its reader and writer, and its checks.

Reading is strict, because a manifest determines which graphs run. A text has one meaning only (UTF-8, no duplicate key,
no NaN), the format version is checked before anything else, and unknown keys are rejected. After the types,
`check_manifest` checks the rules that types cannot express: every file has a pin, paths stay inside the bundle, the
source of every input exists.

The JSON schema beside this file (`bundle.schema.json`) is generated from the records by `schema`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from latentrt.bundle.signatures import find_signature_problems
from latentrt.bundle.strict_json import AmbiguousJSONError, StrictDecoder, parse_json
from latentrt.bundle.tensors import MAX_AXES, TensorSpec
from latentrt.errors import ManifestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "FORMAT_VERSION",
    "LOW_RES_SCHEDULER",
    "MANIFEST_NAME",
    "MAX_BATCH",
    "MAX_BOUNDS",
    "MAX_MANIFEST_BYTES",
    "MAX_PROMPT_CHUNKS",
    "MAX_SIDE",
    "MAX_STEPS",
    "MAX_TIMESTEPS",
    "Component",
    "ComponentName",
    "ConfigChange",
    "Count",
    "Defaults",
    "FileRecord",
    "GateMetric",
    "GateResult",
    "GraphRecord",
    "InputSpec",
    "LatentSpace",
    "Licence",
    "Limits",
    "Manifest",
    "Part",
    "PartName",
    "PillowFilter",
    "Positive",
    "Precision",
    "Preprocessing",
    "Quantization",
    "QuantizationMethod",
    "QuantizedLayer",
    "Record",
    "Role",
    "SafetyPolicy",
    "SchedulerRecord",
    "SealedEngine",
    "Sha256",
    "Source",
    "TokenMerging",
    "TokenizerRecord",
    "WeightsRecord",
    "check_manifest",
    "decode_manifest",
    "encode_manifest",
    "named_files",
    "schema",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "bundle.json"
LOW_RES_SCHEDULER = "low_res_scheduler"
"""The key in `schedulers` of the noise that an upscaler adds to its input image."""
# Manifests of large models have a few thousand file and node names; a file a hundred times larger is not a manifest.
MAX_MANIFEST_BYTES = 16 << 20
MAX_PROMPT_CHUNKS = 16
"""The longest prompt in chunks, unless a manifest has another limit: 1,200 tokens of text."""

Precision = Literal["float16", "float32", "int8"]
QuantizationMethod = Literal["static", "weights"]
GateMetric = Literal["relative", "absolute", "levels", "rms"]
MAX_BOUNDS: Mapping[GateMetric, float] = {"relative": 0.01, "absolute": 0.02, "levels": 4, "rms": 0.05}
"""The exporter's largest bound of each metric; no manifest may have a larger one, as engines are compared by them."""
SafetyPolicy = Literal["block", "blur", "report"]
Role = Literal[
    "text-encoder",
    "image-encoder",
    "denoiser",
    "encoder",
    "decoder",
    "preview-decoder",
    "classifier",
    "depth-estimator",
]
PillowFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


def _match_whole(pattern: str) -> str:
    """Return a pattern of a whole text, in the dialects of Python and of JSON schemas.

    Python's `$` also matches before a newline at the end; its `\\Z` is not in the other dialect.
    """
    return f"^{pattern}$(?!\\n)"


ComponentName = Annotated[str, msgspec.Meta(max_length=64, pattern=_match_whole("[a-z][a-z0-9_]*"))]
PartName = Annotated[str, msgspec.Meta(max_length=64, pattern=_match_whole(r"[a-z][a-z0-9_]*(\.(0|[1-9][0-9]?))?"))]
FamilyName = Annotated[str, msgspec.Meta(max_length=64, pattern=_match_whole("[a-z0-9][a-z0-9.-]*"))]
TaskName = Annotated[str, msgspec.Meta(max_length=64, pattern=_match_whole("[a-z][a-z0-9]*(-[a-z0-9]+)*"))]
InputSource = Annotated[
    str,
    msgspec.Meta(
        pattern=_match_whole(
            "(latents|timestep|c-noise|guidance-weight|micro-conditioning|tokens|image|images|mask|noise-level"
            r"|option:[a-z][a-z0-9_]*|[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*(\+[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*)*)"
        ),
        max_length=256,
    ),
]
Sha256 = Annotated[str, msgspec.Meta(pattern=_match_whole("[0-9a-f]{64}"))]
Repository = Annotated[
    str, msgspec.Meta(pattern=_match_whole(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"))
]
Commit = Annotated[str, msgspec.Meta(pattern=_match_whole("[0-9a-f]{40}"))]
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
# Bounds of the sizes in a manifest: far beyond every known model, and small enough that no value that is computed
# from them overflows, takes hours, or fills the memory before a graph is opened.
MAX_SIDE = 16_384
"""Largest side of an image, in pixels."""
MAX_STEPS = 10_000
"""Largest number of steps."""
MAX_BATCH = 1024
"""Largest number of images in a request."""
MAX_TIMESTEPS = 1_000_000
"""Largest number of training timesteps."""
MAX_CHUNK_TOKENS = 1024
"""Longest chunk of a prompt, in tokens."""
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Small = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
StepCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Factor = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
PositiveFactor = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the manifest: immutable, and strict about its keys."""


class FileRecord(Record, frozen=True, kw_only=True):
    """The pin of one file: its SHA-256 in lower-case hexadecimal and its size in bytes."""

    sha256: Sha256
    size: Count


class GateResult(Record, frozen=True, kw_only=True):
    """The difference between a graph's output and its reference, on one set of inputs.

    The reference of a whole graph is the torch module. The reference of the parts `time_embedding`,
    `cross_attention_kv` and `body` is the whole graph, compared with the three parts together; that of `shallow_body`
    is `body`, with the deep features of the same step.

    `metric` is `relative` (largest absolute difference over the reference's largest absolute value), `absolute`
    (largest absolute difference), `levels` (largest difference of uint8 pixels) or `rms` (root mean square of the
    difference over that of the reference). The gate passes if `value` ≤ `bound`.
    """

    output: Name
    shapes: dict[Name, Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_AXES)]]
    metric: GateMetric
    value: float
    bound: float


class QuantizedLayer(Record, frozen=True, kw_only=True):
    """The arithmetic of one linear layer or convolution of an int8 graph, and the metrics that decided it.

    `method` is `static` (weights and activations are int8), `weights` (only the weights are) or `float32`. `error` is
    the relative RMS error of the network's output with this layer alone quantised by the graph's method; `share` is
    the layer's share of the multiplications of all layers.
    """

    method: Literal["static", "weights", "float32"]
    error: float
    share: float


class Quantization(Record, frozen=True, kw_only=True):
    """The quantisation of an int8 graph, layer by layer.

    Activations were calibrated by `evaluations` of the network, in runs of `steps` steps; both are 0 where only weights
    are quantised.
    """

    method: QuantizationMethod
    weight_bits: Small
    steps: Count
    evaluations: Count
    layers: dict[Name, QuantizedLayer]


class GraphRecord(Record, frozen=True, kw_only=True):
    """One graph over a component's weights.

    `float32_nodes` names the nodes that compute in float32 in a float16 graph; `quantization` is set for int8 graphs.
    """

    file: RelativePath
    opset: Small
    nodes: Positive
    float32_nodes: tuple[Name, ...] = ()
    gate: tuple[GateResult, ...] = ()
    quantization: Quantization | None = None


class WeightsRecord(Record, frozen=True, kw_only=True):
    """A component's parameters: a safetensors file, under their checkpoint names.

    In an int8 file a quantised weight is stored under its own name, its scale as `…weight_scale`, and the scales and
    zero points of activations as `…input_scale`, `…input_zero_point` and `…output_…`; all other tensors are float16.
    A weight that float16 cannot hold, because it overflows or vanishes, is float32 in every file.
    """

    file: RelativePath
    dtype: Precision
    tensors: Count
    parameters: Count


class InputSpec(TensorSpec, frozen=True, forbid_unknown_fields=True):
    """An input of a component, and where its values come from.

    `source` is one of

    - `latents`: latents of the component's latent space; a denoiser whose input has more channels than that space takes
      the conditioning's extra channels after them;
    - `timestep`: the timestep of each evaluation;
    - `c-noise`: in place of the timestep, c_noise = ln(σ) / 4, for latents x0 + σ · ε (Karras et al. 2022, table 1);
    - `guidance-weight`: w = `guidance_scale` − 1 of each evaluation, for a denoiser with guidance distilled into it
      (Meng et al. 2023), which needs no evaluation of a negative prompt;
    - `micro-conditioning`: sizes in pixels, as those of a training image (Podell et al. 2023, section 2.2): original
      height and width, top and left of the crop, target height and width; or, for a refiner, an aesthetic score in
      place of the last two;
    - `tokens`: token ids of the component's tokenizer, one chunk of `length` ids per row;
    - `image`: an input image, float32 in −1 … 1 (channels first) or uint8 (channels last); where the component has a
      `preprocessing`, float32 as that makes it;
    - `mask`: the mask of inpainting, float32 of one channel and the size of the image, 1 where it is repainted and 0
      where the input image is kept; ones for another task, whose `image` input has no effect then;
    - `images`: the finished images of a request, uint8 (channels last);
    - `noise-level`: the level of the noise that is added to the input image (upscaling) or its embedding;
    - `option:NAME`: a request option, such as `option:clip_skip`;
    - `COMPONENT.OUTPUT`: the output of another component, such as `encoder.hidden_states`; several with `+` between
      them are joined along their last axis, in this order.

    Named axes count: `evaluations` (rows of a denoiser), `chunks` (of a prompt), `tokens`, `batch`, `images`, `height`
    and `width` (in latents), `pixel_height` and `pixel_width`, `timesteps` (of a schedule).
    """

    source: InputSource

    @property
    def tensor(self) -> TensorSpec:
        """The tensor alone, without its source."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def made_by(self) -> tuple[tuple[str, str], ...]:
        """Component and output of each array that the source joins; empty if it is no component's output."""
        if "." not in self.source:
            return ()
        pairs = (each.partition(".") for each in self.source.split("+"))
        return tuple((component, output) for component, _, output in pairs)


class Part(Record, frozen=True, kw_only=True):
    """Another graph of a component, over the same weights: a piece of the whole graph, or a shorter way to its outputs.

    A denoiser's `time_embedding` depends on the timestep alone, or also on a guidance weight, a pooled text and
    micro-conditioning, where the denoiser takes them; `cross_attention_kv` depends on the text embeddings alone, and
    `body` takes the outputs of both as inputs; the three together are the whole graph. `shallow_body` is what remains
    of `body` in a step that reuses the deep features of an earlier one (DeepCache).

    A decoder's `head`, `attention`, `neck`, `slice.0`, `slice.1`, … run one after the other, most of them on a band of
    rows at a time (`latentrt.decode.slices`). The gate of the last one compares all of them together with the whole
    graph.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graphs: dict[Precision, GraphRecord]


class TokenMerging(Record, frozen=True, kw_only=True):
    """Token merging (ToMe) in a denoiser's self-attention: `ratio` of the tokens is merged in the named blocks."""

    ratio: Annotated[float, msgspec.Meta(gt=0, lt=0.75)]
    blocks: tuple[Name, ...]


class Preprocessing(Record, frozen=True, kw_only=True):
    """The preprocessing of an input image for one component: resize, then normalize.

    The image is resized to `height` × `width` pixels, whatever its aspect ratio, with Pillow's filter `resample`. A
    value p of 0 … 1 becomes (p − `mean`) / `std` of its channel.
    """

    height: Side
    width: Side
    resample: PillowFilter
    mean: tuple[Factor, Factor, Factor]
    std: tuple[PositiveFactor, PositiveFactor, PositiveFactor]


class Component(Record, frozen=True, kw_only=True):
    """A network of the bundle: one signature, one weights file, and a graph for each precision it can compute in.

    `token_merging` applies to the graphs of the parts as well; None if no tokens are merged. `preprocessing` is that of
    the `image` input; None where the input has the size and the range of the autoencoder's.
    """

    role: Role
    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: WeightsRecord
    graphs: dict[Precision, GraphRecord]
    parts: dict[PartName, Part] = {}
    token_merging: TokenMerging | None = None
    preprocessing: Preprocessing | None = None

    def input_from(self, source: str) -> InputSpec | None:
        """Return the first input with this source, None if there is none."""
        return next((spec for spec in self.inputs if spec.source == source), None)


class TokenizerRecord(Record, frozen=True, kw_only=True):
    """A tokenizer, and the ids that frame a chunk of `length` tokens.

    A chunk is `begin`, up to `length` − 2 tokens of text, `end`, then `pad`. `rows` is the number of rows of the text
    encoder's embedding, larger than every id.
    """

    file: RelativePath
    begin: TokenId
    end: TokenId
    pad: TokenId
    length: Annotated[int, msgspec.Meta(ge=3, le=MAX_CHUNK_TOKENS)]
    rows: Positive


class ConfigChange(Record, frozen=True, kw_only=True):
    """A key of the checkpoint's configuration whose value the constructor of diffusers' pipeline changes.

    `found` is the checkpoint's value, or the default of its class where the checkpoint has none; `used` is the
    pipeline's; `tasks` are those whose pipelines make the change.
    """

    key: str
    found: Any
    used: bool | int
    tasks: tuple[TaskName, ...]


class SchedulerRecord(Record, frozen=True, kw_only=True):
    """The checkpoint's scheduler: its diffusers class, and its configuration as read from disk, key by key.

    The configuration holds the training noise schedule and the prediction type; an absent key means the default of the
    sampler that reads it. JSON has no infinity: the texts `Infinity` and `-Infinity` stand for it. `changes` are those
    that diffusers' pipelines make.
    """

    class_name: Name
    config: dict[str, Any]
    changes: tuple[ConfigChange, ...] = ()

    @classmethod
    def of(cls, class_name: str, config: Mapping[str, Any], changes: tuple[ConfigChange, ...] = ()) -> SchedulerRecord:
        """Return the record of a configuration whose numbers may be infinite."""
        return cls(
            class_name=class_name,
            config=_replace_infinities(dict(config)),
            changes=tuple(msgspec.structs.replace(each, found=_replace_infinities(each.found)) for each in changes),
        )

    def config_for(self, task: str, class_name: str) -> dict[str, Any]:
        """Return the configuration that a sampler reads in a task, with infinities as numbers.

        It is that of diffusers' pipeline of the task for the checkpoint's own class, and for another class that which
        `from_config(pipeline.scheduler.config)` reads: a key that the checkpoint does not have takes that class's
        default, whether the pipeline changes it or not.

        Args:
            task: one of the bundle's.
            class_name: the diffusers class of the sampler.
        """
        config: dict[str, Any] = _restore_infinities(self.config)
        defaulted = config.get("_use_default_values", [])
        if not isinstance(defaulted, list):
            return config  # which no sampler accepts
        used = {
            change.key: change.used
            for change in self.changes
            if task in change.tasks
            and (class_name == self.class_name or (change.key in config and change.key not in defaulted))
        }
        if defaulted:
            config["_use_default_values"] = [key for key in defaulted if key not in used]
        return {**config, **used}


_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def _replace_infinities(value: Any) -> Any:
    """Replace infinite numbers by their texts, in lists and objects too."""
    if isinstance(value, dict):
        return {key: _replace_infinities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_replace_infinities(each) for each in value]
    return next((text for text, number in _INFINITIES.items() if type(value) is float and value == number), value)


def _restore_infinities(value: Any) -> Any:
    """Return the inverse of `_replace_infinities`."""
    if isinstance(value, dict):
        return {key: _restore_infinities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_restore_infinities(each) for each in value]
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


class LatentSpace(Record, frozen=True, kw_only=True):
    """The layout and scale of a denoiser's latents.

    One latent stands for `downscale` × `downscale` pixels in `frames` frames and has `channels` values. With z of the
    autoencoder, the sampling loop's latents are `scale` · (z − `shift`), or (z − `mean`) · `scale` / `std` where each
    channel has a `mean` and a `std` of its own. A denoiser that works on tokens takes `patch` × `patch` latents as one
    token. A denoiser that halves its input and cannot pad it takes latents whose height and width are multiples of
    `multiple`.
    """

    channels: Small
    downscale: Small
    scale: PositiveFactor
    shift: Factor = 0.0
    mean: tuple[Factor, ...] | None = None
    std: tuple[PositiveFactor, ...] | None = None
    patch: Small = 1
    multiple: Small = 1
    frames: Small = 1

    @property
    def side_multiple(self) -> int:
        """The number of pixels of which an image's sides are multiples."""
        return self.downscale * math.lcm(self.patch, self.multiple)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents of an image of `height` × `width` pixels."""
        return self.channels, height // self.downscale, width // self.downscale

    def normalize(self, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the sampling loop's latents (…, C, H, W) of the autoencoder's, in float32."""
        import numpy as np  # reading a manifest needs no numpy

        if self.mean is None or self.std is None:
            return (encoded - np.float32(self.shift)) * np.float32(self.scale)
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        return (encoded - mean) * np.float32(self.scale) / std

    def pack(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Arrange latents (…, C, H, W) as tokens of p × p latents: (…, H/p · W/p, C · p²).

        A token's values are ordered by channel, then row, then column, as in diffusers' `FluxPipeline._pack_latents`.
        """
        *batch, channels, height, width = latents.shape
        p = self.patch
        patches = latents.reshape(*batch, channels, height // p, p, width // p, p)
        first = len(batch)
        order = (*range(first), *(first + axis for axis in (1, 3, 0, 2, 4)))  # (…, H/p, W/p, C, p, p)
        return patches.transpose(order).reshape(*batch, height // p * (width // p), channels * p * p)

    def unpack(self, tokens: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
        """Arrange tokens (…, H/p · W/p, C · p²) as latents (…, C, H, W); the inverse of `pack`.

        Args:
            tokens: as `pack` returns them.
            height, width: of the latents, H and W.
        """
        *batch, _, values = tokens.shape
        p = self.patch
        patches = tokens.reshape(*batch, height // p, width // p, values // (p * p), p, p)
        first = len(batch)
        order = (*range(first), *(first + axis for axis in (2, 0, 3, 1, 4)))  # (…, C, H/p, p, W/p, p)
        return patches.transpose(order).reshape(*batch, values // (p * p), height, width)


class Defaults(Record, frozen=True, kw_only=True):
    """The values of request options that are omitted. Height and width in pixels.

    `changes` are those that diffusers' pipelines make to the configuration that the size follows from.
    `force_zeros_for_empty_prompt`: a request without a negative prompt is guided against zeros in place of the
    embeddings of an empty text.
    """

    height: Side
    width: Side
    num_inference_steps: StepCount = 50
    guidance_scale: Annotated[float, msgspec.Meta(ge=-1e4, le=1e4)] = 7.5
    changes: tuple[ConfigChange, ...] = ()
    force_zeros_for_empty_prompt: bool = False


class Limits(Record, frozen=True, kw_only=True):
    """The largest values of request options; `min_side` and `max_side` bound an image's sides, in pixels.

    `max_clip_skip` is the number of layers that the text encoder can skip. `max_noise_level` is the highest level of
    the noise that is added to an input image or its embedding, in training timesteps of that noise's scheduler; 0 where
    none is.
    `max_prompt_characters` and `max_prompt_chunks` bound each prompt and negative prompt, the latter with the vectors
    of textual inversions written out.
    """

    min_side: Side
    max_side: Side
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
    max_steps: StepCount
    max_clip_skip: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    max_noise_level: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMESTEPS)] = 0
    max_prompt_characters: Annotated[int, msgspec.Meta(ge=1, le=20_000)] = 10_000
    max_prompt_chunks: Annotated[int, msgspec.Meta(ge=1, le=256)] = MAX_PROMPT_CHUNKS


class Licence(Record, frozen=True, kw_only=True):
    """The licence's name as the checkpoint states it (`unknown` if it does not), and the file with its text, if any."""

    name: Name
    file: RelativePath | None = None


class Source(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The origin of the weights: the checkpoint's own name, its layout, the SHA-256 of each weight file read.

    `repository` (`owner/name`) and `revision` (a commit) are those of a checkpoint from the Hugging Face hub.
    """

    name: Name
    layout: Literal["diffusers", "single-file"]
    weights: dict[Name, Sha256]
    repository: Repository | None = None
    revision: Commit | None = None


class SealedEngine(Record, frozen=True, kw_only=True):
    """An engine that ships with the bundle: the files of its record (`latentrt.engines.record`) and of its plan."""

    record: RelativePath
    plan: RelativePath


class Manifest(Record, frozen=True, kw_only=True):
    """The content of `bundle.json`.

    `family` names the module under `latentrt.families` that runs the bundle, and `tasks` what it can do, such as
    `text-to-image` or `inpainting`. `tokenizers` are by the component that takes their tokens; `schedulers` and
    `latent_spaces` by denoiser; a scheduler of another purpose has its name in the checkpoint (`low_res_scheduler`: the
    noise that an upscaler adds to its input image); `engines` by their keys.
    """

    format_version: Positive
    created_by: Name
    family: FamilyName
    tasks: tuple[TaskName, ...]
    source: Source
    licence: Licence
    precision: Precision
    components: dict[ComponentName, Component]
    tokenizers: dict[ComponentName, TokenizerRecord]
    schedulers: dict[ComponentName, SchedulerRecord]
    latent_spaces: dict[ComponentName, LatentSpace]
    defaults: Defaults
    limits: Limits
    safety: SafetyPolicy = "block"
    engines: dict[Sha256, SealedEngine] = {}
    files: dict[RelativePath, FileRecord]

    def by_role(self, role: Role) -> tuple[str, ...]:
        """Return the names of the components with this role, in the manifest's order."""
        return tuple(name for name, component in self.components.items() if component.role == role)

    @property
    def size_bytes(self) -> int:
        """The size of all files that the manifest pins."""
        return sum(record.size for record in self.files.values())

    @property
    def side_multiple(self) -> int:
        """The number of pixels of which an image's sides are multiples."""
        return math.lcm(*(space.side_multiple for space in self.latent_spaces.values()))


_DECODER = StrictDecoder(Manifest)


def decode_manifest(data: bytes) -> Manifest:
    """Read `bundle.json`.

    Raises:
        ManifestError: it is too large, not strict JSON, of another format version, or describes an impossible bundle.
    """
    tree = _parse(data)
    _check_version(tree)
    # The text is parsed once, so that a second parser cannot read the bytes differently from the checks above.
    try:
        manifest = _DECODER.convert(tree)
    except AmbiguousJSONError as error:
        raise ManifestError(
            f"bundle.json is not a manifest of format {FORMAT_VERSION}: {error}; expected the form that "
            f"bundle.schema.json describes. {_REMEDY}"
        ) from None
    check_manifest(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Write a manifest in its one form: UTF-8, indented by two spaces, keys of mappings sorted, a final newline.

    Raises:
        ManifestError: `decode_manifest` would reject the text, or read another manifest from it.
    """
    try:
        data = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"
    except UnicodeEncodeError:
        raise ManifestError(
            "a name in the manifest is not valid Unicode, expected UTF-8; rename the checkpoint's files"
        ) from None
    if decode_manifest(data) != manifest:
        raise ManifestError(
            "the manifest holds a value that JSON cannot represent (a tuple or a NaN in a scheduler's configuration)"
        )
    return data


def schema() -> bytes:
    """Return the JSON schema of `bundle.json`, the content of `bundle.schema.json`."""
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:latentrt:bundle:{FORMAT_VERSION}",
        **msgspec.json.schema(Manifest),
    }
    return json.dumps(described, indent=2, ensure_ascii=False).encode() + b"\n"


def check_manifest(manifest: Manifest) -> None:
    """Reject a manifest that describes an impossible bundle.

    Raises:
        ManifestError: the message names the first contradiction, the expected value and the remedy.
    """
    for problem in _find_problems(manifest):
        raise ManifestError(f"bundle.json: {problem}. Export the bundle again: latentrt export CHECKPOINT BUNDLE")


def named_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield each file that the manifest assigns a purpose, and a description of the purpose."""
    for name, component in manifest.components.items():
        yield component.weights.file, f"the weights of {name}"
        for precision, graph in component.graphs.items():
            yield graph.file, f"the {precision} graph of {name}"
        for part_name, part in component.parts.items():
            for precision, graph in part.graphs.items():
                yield graph.file, f"the {precision} graph of {name}'s {part_name} part"
    for key, engine in manifest.engines.items():
        yield engine.record, f"the record of the engine {key[:12]}"
        yield engine.plan, f"the plan of the engine {key[:12]}"
    for name, tokenizer in manifest.tokenizers.items():
        yield tokenizer.file, f"the tokenizer of {name}"
    if manifest.licence.file is not None:
        yield manifest.licence.file, "the licence"


_REMEDY = "Copy or download the bundle again, or write a new one: latentrt export CHECKPOINT BUNDLE"


def _parse(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"bundle.json is larger than {MAX_MANIFEST_BYTES:,} bytes, the limit. {_REMEDY}")
    try:
        return parse_json(data, max_bytes=MAX_MANIFEST_BYTES)
    except AmbiguousJSONError as error:
        raise ManifestError(f"bundle.json {error}. {_REMEDY}") from None


def _check_version(tree: Any) -> None:
    """Check the version before anything else, because another format may differ in everything else."""
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if type(version) is not int or version < 1:
        raise ManifestError(
            f"bundle.json has no format_version, expected {FORMAT_VERSION}: it is not a bundle's manifest. {_REMEDY}"
        )
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"this bundle is format {version}, this latentrt reads {FORMAT_VERSION}; upgrade latentrt: "
            "pip install -U latentrt"
        )
    if version < FORMAT_VERSION:
        raise ManifestError(
            f"this bundle is format {version}, this latentrt reads {FORMAT_VERSION}; export it again: "
            "latentrt export CHECKPOINT BUNDLE"
        )


def _find_problems(manifest: Manifest) -> Iterator[str]:
    for name in manifest.files:
        yield from _check_path(name)
    for name, purpose in named_files(manifest):
        if name not in manifest.files:
            yield f"{name!r} is {purpose} but is not pinned in files, expected its SHA-256 and size there"
    if (manifest.source.repository is None) != (manifest.source.revision is None):
        yield "source has one of repository and revision, expected both or neither"
    if not manifest.tasks or len(set(manifest.tasks)) != len(manifest.tasks):
        yield f"got the tasks {list(manifest.tasks)}, expected at least one and each name once"
    for role in ("denoiser", "decoder"):
        if not manifest.by_role(role):
            yield f"got the components {sorted(manifest.components)}, expected a {role} among them"
    yield from _check_owners(manifest)
    yield from _check_tokenizers(manifest)
    for name, component in manifest.components.items():
        yield from _check_component(name, component, manifest.precision)
    yield from find_signature_problems(manifest)
    yield from _check_defaults(manifest)
    yield from _check_changes(manifest)
    yield from _check_graph_files(manifest)


def _check_path(name: str) -> Iterator[str]:
    if problem := _find_path_problem(name):
        yield f"the path {name!r} {problem}, expected a relative path inside the bundle, such as denoiser/model.onnx"


def _find_path_problem(name: str) -> str | None:
    if "\\" in name or ":" in name:
        return "has a backslash or a colon (a drive)"
    if not name.isprintable():
        return "has a character that cannot be printed"
    if name.startswith("/"):
        return "is absolute"
    # An empty segment (a double or a trailing slash) would give one file two names.
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "has an empty segment, '.' or '..'"
    if name.casefold() == MANIFEST_NAME:
        return "is the manifest itself"
    return None


def _check_graph_files(manifest: Manifest) -> Iterator[str]:
    """Check that no two graphs are one file, as each must agree with one signature."""
    named = set[str]()
    for component in manifest.components.values():
        for graphs in (component.graphs, *(part.graphs for part in component.parts.values())):
            for graph in graphs.values():
                if graph.file in named:
                    yield f"{graph.file!r} is named as two graphs, expected a file for each"
                named.add(graph.file)


def _check_owners(manifest: Manifest) -> Iterator[str]:
    """Check that each denoiser has a scheduler and a latent space, and each component that takes tokens a tokenizer.

    Further schedulers must have names that no component has. An upscaler must have the scheduler of its input image's
    noise, and a depth estimator the preprocessing of its input.
    """
    denoisers = sorted(manifest.by_role("denoiser"))
    readers = sorted(name for name, each in manifest.components.items() if each.input_from("tokens") is not None)
    for key, owners, expected in (
        ("schedulers", {*manifest.schedulers} & {*manifest.components}, denoisers),
        ("latent_spaces", manifest.latent_spaces, denoisers),
        ("tokenizers", manifest.tokenizers, readers),
    ):
        if sorted(owners) != expected:
            yield f"{key} are of {sorted(owners)}, expected one of each of {expected}"
    for name, component in manifest.components.items():
        noised = component.role == "denoiser" and component.input_from("noise-level") is not None
        if noised and LOW_RES_SCHEDULER not in manifest.schedulers:
            yield f"{name} takes a noise level, expected {LOW_RES_SCHEDULER} among schedulers"
        if component.role == "depth-estimator" and component.preprocessing is None:
            yield f"{name} has no preprocessing, expected one, as every depth-estimator has"


def _check_tokenizers(manifest: Manifest) -> Iterator[str]:
    """Check that a chunk has the length of the encoder's input, and that its special ids have rows."""
    for name, tokenizer in manifest.tokenizers.items():
        component = manifest.components.get(name)
        tokens = None if component is None else component.input_from("tokens")
        if tokens is not None and tokens.shape[-1:] != (tokenizer.length,):
            yield f"the tokenizer of {name} has length {tokenizer.length}, expected that of {tokens.tensor}"
        for key, index in (("begin", tokenizer.begin), ("end", tokenizer.end), ("pad", tokenizer.pad)):
            if index >= tokenizer.rows:
                yield f"the tokenizer of {name} has {key} {index}, expected an id below its {tokenizer.rows} rows"


def _check_component(name: str, component: Component, precision: str) -> Iterator[str]:
    # In an int8 bundle some components stay in float32.
    wanted = {"int8", "float32"} if precision == "int8" else {precision}
    if wanted.isdisjoint(component.graphs):
        yield f"{name} has graphs for {sorted(component.graphs)}, expected one for the bundle's precision, {precision}"
    yield from _check_gates(component, component.graphs)
    for part_name, part in component.parts.items():
        yield from _check_gates(component, part.graphs)
        if not part.graphs:
            yield f"{name}'s {part_name} part has no graph, expected at least one"


def _check_gates(component: Component, graphs: Mapping[Precision, GraphRecord]) -> Iterator[str]:
    for precision, graph in graphs.items():
        for gate in graph.gate:
            value, bound, most = gate.value, gate.bound, MAX_BOUNDS[gate.metric]
            if not 0 <= value <= bound:
                yield f"{graph.file!r} missed its gate, {value:g} for {gate.output!r}, expected 0 to {bound:g}"
            if bound > most:
                yield (
                    f"{graph.file!r} has the {gate.metric} bound {bound:g} for {gate.output!r}, expected at most "
                    f"{most:g}"
                )
            metric = _find_metric(component, gate.output)
            if metric not in (gate.metric, None) and not (precision == "int8" and gate.metric == "rms"):
                yield f"{graph.file!r} has the metric {gate.metric!r} for {gate.output!r}, expected {metric!r}"


def _find_metric(component: Component, output: str) -> GateMetric | None:
    """Return the metric by which an output of a component is compared, other than the `rms` of int8 graphs.

    A bound means another thing in each: 4 levels of a pixel are little, 4 of a denoiser's output are everything.

    Returns:
        None for another output, such as a token matching's of a part, of which no engine is made.
    """
    dtype = next((spec.dtype for spec in component.outputs if spec.name == output), None)
    if dtype is None:
        return None
    if dtype == "uint8":
        return "levels"
    return "absolute" if component.role == "classifier" else "relative"  # cosines and scores have a scale of their own


def _check_defaults(manifest: Manifest) -> Iterator[str]:
    limits, defaults, multiple = manifest.limits, manifest.defaults, manifest.side_multiple
    if limits.min_side > limits.max_side:
        yield f"got the limits {limits.min_side} … {limits.max_side} of a side, expected them in order"
    for name, space in manifest.latent_spaces.items():
        if space.side_multiple > MAX_SIDE:
            yield f"{name}'s sides are multiples of {space.side_multiple}, expected a multiple of at most {MAX_SIDE}"
        yield from _check_latent_statistics(name, space)
    for side, pixels in (("height", defaults.height), ("width", defaults.width)):
        if not limits.min_side <= pixels <= limits.max_side:
            yield f"the default {side} is {pixels}, expected it within the limits {limits.min_side} … {limits.max_side}"
        if pixels % multiple:
            yield f"the default {side} is {pixels}, expected a multiple of {multiple}"
    if defaults.num_inference_steps > limits.max_steps:
        yield f"the default is {defaults.num_inference_steps} steps, expected {limits.max_steps} at most, the limit"


def _check_latent_statistics(name: str, space: LatentSpace) -> Iterator[str]:
    if (space.mean is None) != (space.std is None):
        yield f"{name}'s latent space has one of mean and std, expected both or neither"
    for key, values in (("mean", space.mean), ("std", space.std)):
        if values is not None and len(values) != space.channels:
            yield f"{name}'s latent space has a {key} of {len(values)} values, expected {space.channels}, one a channel"
    if space.mean is not None and space.shift:
        yield f"{name}'s latent space has mean and shift {space.shift:g}, expected one of them"


def _check_changes(manifest: Manifest) -> Iterator[str]:
    """Check that a configuration's changes are of the bundle's tasks, and at most one for a key and a task."""
    for owner, changes in (
        *((f"the scheduler {name}", record.changes) for name, record in manifest.schedulers.items()),
        ("the default size", manifest.defaults.changes),
    ):
        pairs = [(change.key, task) for change in changes for task in change.tasks]
        if not {task for _, task in pairs} <= {*manifest.tasks}:
            yield f"{owner} has changes for {sorted({task for _, task in pairs})}, expected the bundle's tasks"
        if len(set(pairs)) != len(pairs):
            yield f"{owner} has two changes of one key for one task, expected at most one"
