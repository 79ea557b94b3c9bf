"""Reads a `preprocessor_config.json` of CLIP or of a depth estimator. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.manifest import PillowFilter, Preprocessing
from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.json_file import read_object

__all__ = [
    "DEPTH_PROCESSORS",
    "PROCESSORS",
    "PreprocessorConfig",
    "check_crop",
    "read_depth_preprocessing",
    "read_preprocessor_config",
]

PROCESSORS = {"CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"}
DEPTH_PROCESSORS = {"DPTFeatureExtractor", "DPTImageProcessor", "DPTImageProcessorFast", "DPTImageProcessorPil"}
# Pillow's filters by their numbers in configurations.
FILTERS: tuple[PillowFilter, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# The only values that a depth estimator's graph and the runtime support, which are also the defaults.
DEPTH_REQUIRED = {"do_resize": True, "do_rescale": True, "do_pad": False, "keep_aspect_ratio": False}
# The manifest's bounds of such factors.
_SMALLEST_FACTOR, _MAX_FACTOR = 1e-6, 1e6
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class PreprocessorConfig:
    """The preprocessing of an image for CLIP. A pixel p of 0 … 255 becomes (p · rescale_factor − mean) / std.

    Attributes:
        resize: the length of the shorter edge, or a fixed (height, width), in pixels.
        crop: (height, width) in pixels.
        rescale_factor: the factor of all channels.
        mean, std: the mean and the standard deviation of each channel.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_preprocessor_config(path: Path) -> PreprocessorConfig:
    """Read a CLIP image processor's configuration, in the form that transformers writes now or wrote before 4.25.

    Missing keys have the defaults of `CLIPImageProcessor`; a flag that is null is false, as in transformers.

    Raises:
        CheckpointError: the file cannot be read, or has a setting that the graph does not support.
    """
    config = read_object(path)
    try:
        return _resolve(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_depth_preprocessing(path: Path) -> Preprocessing:
    """Read a DPT image processor's configuration. Missing keys have the defaults of `DPTImageProcessor`.

    Raises:
        CheckpointError: the file cannot be read, or has a setting that the runtime does not support.
    """
    config = read_object(path)
    try:
        return _resolve_depth(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_crop(preprocessing: PreprocessorConfig, side: int, folder: Path) -> None:
    """Check that a configuration crops to the size of its model's input, `side` pixels square.

    Raises:
        CheckpointError: it crops to another size.
    """
    if preprocessing.crop != (side, side):
        raise CheckpointError(
            f"{folder} crops to {preprocessing.crop}, expected {(side, side)}, the input of its model; the two "
            "must belong together"
        )


def _resolve(config: dict[str, Any]) -> PreprocessorConfig:
    _check_supported(config)
    square = bool(config.get("default_to_square", False))
    size = 2 * [224] if config.get("use_square_size") else config.get("size", {"shortest_edge": 224})
    resize = _resize(2 * [size] if square and isinstance(size, int) else size)
    crop = _edges("crop_size", config.get("crop_size", 224)) if config.get("do_center_crop", True) else resize
    if not isinstance(crop, tuple):
        raise CheckpointError("do_center_crop is false, expected true where size gives only the shorter edge")
    shortest = resize if isinstance(resize, tuple) else (resize, resize)
    if crop[0] > shortest[0] or crop[1] > shortest[1]:
        raise CheckpointError(f"crop_size {crop} is larger than the resized image {shortest}, expected at most that")
    normalize = config.get("do_normalize", True)
    return PreprocessorConfig(
        resize=resize,
        crop=crop,
        rescale_factor=_rescale_factor(config) if config.get("do_rescale", True) else 1.0,
        mean=_channels("image_mean", config.get("image_mean", OPENAI_MEAN)) if normalize else (0.0, 0.0, 0.0),
        std=_channels("image_std", config.get("image_std", OPENAI_STD)) if normalize else (1.0, 1.0, 1.0),
    )


def _resolve_depth(config: dict[str, Any]) -> Preprocessing:
    processor = config.get("image_processor_type", config.get("feature_extractor_type", "DPTImageProcessor"))
    if not isinstance(processor, str) or processor not in DEPTH_PROCESSORS:
        raise CheckpointError(
            f"got image processor {quote(processor)}, expected one of {', '.join(sorted(DEPTH_PROCESSORS))}"
        )
    for key, expected in DEPTH_REQUIRED.items():
        if bool(config.get(key, expected)) is not expected:
            raise CheckpointError(
                f"got {key} {quote(config[key])}, expected {expected}: the estimator has inputs of one size"
            )
    if abs(_rescale_factor(config) - 1 / 255) > 1e-9:
        raise CheckpointError(f"got rescale_factor {quote(config['rescale_factor'])}, expected 1 / 255")
    height, width = _edges("size", config.get("size", 384))
    multiple = config.get("ensure_multiple_of", 1)
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise CheckpointError(f"got ensure_multiple_of {quote(multiple)}, expected a number of pixels")
    if height % multiple or width % multiple:
        raise CheckpointError(f"got size {height} × {width}, expected multiples of ensure_multiple_of, {multiple}")
    normalize = config.get("do_normalize", True)
    return Preprocessing(
        height=height,
        width=width,
        resample=_filter(config.get("resample", "bicubic")),
        mean=_channels("image_mean", config.get("image_mean", (0.5, 0.5, 0.5))) if normalize else (0.0, 0.0, 0.0),
        std=_channels("image_std", config.get("image_std", (0.5, 0.5, 0.5))) if normalize else (1.0, 1.0, 1.0),
    )


def _check_supported(config: dict[str, Any]) -> None:
    processor = config.get("image_processor_type", config.get("feature_extractor_type", "CLIPImageProcessor"))
    if not isinstance(processor, str) or processor not in PROCESSORS:
        raise CheckpointError(
            f"got image processor {quote(processor)}, expected one of {', '.join(sorted(PROCESSORS))}"
        )
    if not config.get("do_resize", True):
        raise CheckpointError("do_resize is false, expected true: the classifier has inputs of one size")
    if config.get("do_pad"):
        raise CheckpointError("do_pad is true, expected false: CLIP crops and does not pad")
    if _filter(config.get("resample", "bicubic")) != "bicubic":
        raise CheckpointError(
            f"got resample {quote(config['resample'])}, expected {FILTERS.index('bicubic')} (bicubic)"
        )


def _filter(resample: object) -> PillowFilter:
    """Return a filter by its number in Pillow, or by its name, also that of its class (`Resampling.BICUBIC`)."""
    if isinstance(resample, int) and not isinstance(resample, bool) and 0 <= resample < len(FILTERS):
        return FILTERS[resample]
    name = resample.rpartition(".")[2].lower() if isinstance(resample, str) else None
    for each in FILTERS:
        if name == each:
            return each
    raise CheckpointError(
        f"got resample {quote(resample)}, expected a number below {len(FILTERS)}, one of Pillow's, or a name: "
        f"{', '.join(FILTERS)}"
    )


def _resize(size: object) -> int | tuple[int, int]:
    """Return the shorter edge, or height and width: transformers before 4.25 wrote a number or a list."""
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    if isinstance(size, int):
        return _edges("size", size)[0]
    return _edges("size", size)


def _edges(key: str, size: object) -> tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        edges = size["height"], size["width"]
    elif isinstance(size, list) and len(size) == 2:
        edges = size[0], size[1]
    else:
        edges = size, size
    if not all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in edges):
        raise CheckpointError(f"got {key} {quote(size)}, expected a number of pixels, or height and width")
    return edges


def _channels(key: str, values: Any) -> tuple[float, float, float]:
    least = _SMALLEST_FACTOR if key == "image_std" else -_MAX_FACTOR
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(_is_factor(each, least) for each in values):
        raise CheckpointError(f"got {key} {quote(values)}, expected three numbers of {least:g} to {_MAX_FACTOR:g}")
    red, green, blue = map(float, values)
    return red, green, blue


def _rescale_factor(config: dict[str, Any]) -> float:
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_factor(factor, _SMALLEST_FACTOR):
        raise CheckpointError(
            f"got rescale_factor {quote(factor)}, expected a number of {_SMALLEST_FACTOR:g} to {_MAX_FACTOR:g}, such "
            f"as {1 / 255:g}"
        )
    return float(factor)


def _is_factor(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _MAX_FACTOR
