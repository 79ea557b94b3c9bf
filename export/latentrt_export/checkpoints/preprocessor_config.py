"""What does a classifier's `preprocessor_config.json` ask for? Known before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["PreprocessorConfig", "check_crop", "read_preprocessor_config"]

PILLOW_BICUBIC = 3
PROCESSORS = {"CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"}
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class PreprocessorConfig:
    """What `preprocessor_config.json` asks for, resolved.

    `resize` is the length in pixels of the shorter edge, or a fixed (height, width). `crop` is (height, width). A
    pixel p of 0 … 255 becomes (p · rescale_factor − mean) / std, per channel.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_preprocessor_config(path: Path) -> PreprocessorConfig:
    """Read a CLIP image processor's configuration, in the form transformers writes now or wrote before 4.25.

    Keys that are absent mean what `CLIPImageProcessor` means by them.

    Raises:
        CheckpointError: the file cannot be read, or asks for something that the graph does not do.
    """
    config = read_object(path)
    try:
        return _resolve(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_crop(preprocessing: PreprocessorConfig, side: int, folder: Path) -> None:
    """Refuse a configuration that is not of a classifier that looks at pictures of `side` pixels a side.

    Raises:
        CheckpointError: it crops to another size.
    """
    if preprocessing.crop != (side, side):
        raise CheckpointError(
            f"{folder} crops to {preprocessing.crop}, the classifier looks at {side} × {side}; the two are not of one "
            "model"
        )


def _resolve(config: dict[str, Any]) -> PreprocessorConfig:
    _refuse_the_unsupported(config)
    resize = _resize(config.get("size", {"shortest_edge": 224}))
    crop = _edges("crop_size", config.get("crop_size", 224)) if config.get("do_center_crop", True) else resize
    if not isinstance(crop, tuple):
        raise CheckpointError("do_center_crop is false, expected true where size gives only the shorter edge")
    shortest = resize if isinstance(resize, tuple) else (resize, resize)
    if crop[0] > shortest[0] or crop[1] > shortest[1]:
        raise CheckpointError(f"crop_size {crop} is larger than the resized picture {shortest}, expected at most that")
    normalize = config.get("do_normalize", True)
    return PreprocessorConfig(
        resize=resize,
        crop=crop,
        rescale_factor=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        mean=_channels("image_mean", config.get("image_mean", OPENAI_MEAN)) if normalize else (0.0, 0.0, 0.0),
        std=_channels("image_std", config.get("image_std", OPENAI_STD)) if normalize else (1.0, 1.0, 1.0),
    )


def _refuse_the_unsupported(config: dict[str, Any]) -> None:
    processor = config.get("image_processor_type", config.get("feature_extractor_type", "CLIPImageProcessor"))
    if processor not in PROCESSORS:
        raise CheckpointError(f"found image processor {processor}, expected one of {', '.join(sorted(PROCESSORS))}")
    if not config.get("do_resize", True):
        raise CheckpointError("do_resize is false, expected true: the classifier sees pictures of one size only")
    if config.get("do_pad"):
        raise CheckpointError("do_pad is true, expected false: CLIP crops and does not pad")
    if config.get("resample", PILLOW_BICUBIC) != PILLOW_BICUBIC:
        raise CheckpointError(f"found resample {config['resample']}, expected {PILLOW_BICUBIC} (bicubic)")


def _resize(size: object) -> int | tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    if isinstance(size, int):
        return _edges("size", size)[0]
    return _edges("size", size)


def _edges(key: str, size: object) -> tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        edges = size["height"], size["width"]
    else:
        edges = size, size
    if not all(isinstance(edge, int) and edge > 0 for edge in edges):
        raise CheckpointError(f"found {key} {size!r}, expected a number of pixels, or height and width")
    return edges


def _channels(key: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError):
        raise CheckpointError(f"found {key} {values!r}, expected three numbers") from None
    return red, green, blue
