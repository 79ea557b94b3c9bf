"""Image metadata: the record of a generated image, and the line of parameters that other tools read.

Every image file carries two texts. `latentrt` is the record as JSON and is read back exactly. `parameters` is the text
of AUTOMATIC1111's web UI (`modules/infotext_utils.py`)::

    a red circle on a blue background
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 512x512, Model: my-model, Version: latentrt 0.1.0

That format cannot escape a prompt, so lines of a prompt that look like its fields are altered slightly; the record
holds the prompt unaltered.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from latentrt.bundle.printable import printable
from latentrt.bundle.strict_json import StrictDecoder
from latentrt.decode.safety import SafetyRecord
from latentrt.errors import RequestError
from latentrt.images.files import PARAMETERS, RECORD, open_image, read_texts

__all__ = ["ImageMetadata", "ImageRecord", "InputRecord", "parameters_line", "read_metadata", "record_texts"]

MAX_RECORD_BYTES = 4 << 20
"""Longest record that is read from an image: its prompts, escaped, and a few kB."""


class InputRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An input image: `sha256:…` of its file or pixels, and the `parameters` text that it carried."""

    digest: str
    parameters: str | None = None


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to generate an image again. `bundle_digest` is `sha256:…`.

    `options` holds the resolved request's options by their Python keywords (`latentrt.request`), except those at their
    default. `given` names options that were given as arrays, whose values are not recorded. `inputs` has the input
    images by keyword. `backend` describes the denoiser's backend and arithmetic. A prompt is None if embeddings were
    given instead. `model_sha256` is that of the checkpoint's single file; None if it was a folder. Reading ignores keys
    that a later version adds.
    """

    prompt: str | None
    negative_prompt: str | None = None
    seed: int
    task: str = "text-to-image"
    options: dict[str, Any]
    given: tuple[str, ...] = ()
    inputs: dict[str, InputRecord] = {}
    token_merging: float = 0.0
    backend: str | None = None
    bundle_digest: str
    bundle_name: str
    model_sha256: str | None = None
    latentrt_version: str
    safety: SafetyRecord

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dicts, lists, texts and numbers, as JSON has them."""
        fields: dict[str, Any] = json.loads(self.to_json())
        return fields

    def to_json(self) -> str:
        """Return the record as JSON in ASCII, the text that an image file carries."""
        # ASCII with \u escapes: EXIF has a plain field for it, and a lone surrogate in a prompt survives.
        return json.dumps(msgspec.to_builtins(self), ensure_ascii=True)


# `record_texts` escapes half a surrogate pair.
_DECODER = StrictDecoder(ImageRecord, half_surrogates=True, max_bytes=MAX_RECORD_BYTES)


class ImageMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of an image file: the record if latentrt wrote it, and the parameters that any tool wrote."""

    file_format: str
    width: int
    height: int
    record: ImageRecord | None = None
    parameters: str | None = None


def record_texts(record: ImageRecord) -> dict[str, str]:
    """Return the texts that the file of an image carries (`latentrt.images.files.save`)."""
    return {PARAMETERS: parameters_line(record), RECORD: record.to_json()}


def read_metadata(path: str | os.PathLike[str]) -> ImageMetadata:
    """Read the metadata of a PNG, JPEG or WebP file of unknown origin, without decoding its pixels.

    Raises:
        RequestError: the file is not an image of these formats, or its record is not one of latentrt's.
    """
    with open_image(path) as image:
        texts = read_texts(image)
        return ImageMetadata(
            file_format=image.format or "",
            width=image.width,
            height=image.height,
            record=_decode(path, texts.get(RECORD)),
            parameters=texts.get(PARAMETERS),
        )


def parameters_line(record: ImageRecord) -> str:
    """Return the text that other tools read: the prompt, the negative prompt, and a last line of fields."""
    lines = [_escape_prompt(record.prompt)] if record.prompt else []
    if record.negative_prompt:
        lines.append(f"Negative prompt: {_escape_prompt(record.negative_prompt)}")
    lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in _fields(record)))
    return "\n".join(lines)


# AUTOMATIC1111's names for the samplers.
_SAMPLER_NAMES = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "lcm": "LCM",
}
_SCHEDULE_TYPES = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}
# The digits of a checkpoint file's SHA-256 by which other tools find the model.
_MODEL_HASH_DIGITS = 10
# A line that begins with one of these begins another section of the text.
_MARKERS = ("Negative prompt:", "Steps:")


def _fields(record: ImageRecord) -> Iterator[tuple[str, str]]:
    options = record.options
    yield "Steps", str(options.get("num_inference_steps"))
    yield "Sampler", _sampler_name(options)
    spacing = {"use_karras_sigmas": options.get("karras")} | options.get("sampler_options", {})
    yield from (("Schedule type", name) for key, name in _SCHEDULE_TYPES.items() if spacing.get(key))
    yield "CFG scale", f"{options.get('guidance_scale', 0):g}"
    if "image_guidance_scale" in options:
        yield "Image CFG scale", f"{options['image_guidance_scale']:g}"
    yield "Seed", str(record.seed)
    yield "Size", f"{options.get('width')}x{options.get('height')}"
    if record.model_sha256 is not None:
        yield "Model hash", record.model_sha256[:_MODEL_HASH_DIGITS]
    yield "Model", record.bundle_name
    if "strength" in options:
        yield "Denoising strength", f"{options['strength']:g}"
    if "clip_skip" in options:
        # In the web UI, 1 is the last layer; in diffusers, whose count this is, 1 is the layer before the last.
        yield "Clip skip", str(options["clip_skip"] + 1)
    if options.get("eta"):
        yield "Eta", f"{options['eta']:g}"
    if "guidance_rescale" in options:
        yield "CFG Rescale phi", f"{options['guidance_rescale']:g}"
    yield "RNG", "CPU"
    yield "Safety", _describe_safety(record.safety)
    yield "Bundle", record.bundle_digest
    yield "Version", f"latentrt {record.latentrt_version}"


def _sampler_name(options: Mapping[str, Any]) -> str:
    sampler = options.get("sampler", "")
    algorithm = options.get("sampler_options", {}).get("algorithm_type")
    name = _SAMPLER_NAMES.get(sampler, sampler)
    return f"{name} SDE" if sampler == "dpmpp_2m" and algorithm == "sde-dpmsolver++" else name


def _describe_safety(safety: SafetyRecord) -> str:
    return f"{safety.policy} (flagged)" if safety.flagged else safety.policy


def _escape_prompt(text: str) -> str:
    """Escape a prompt so that none of its lines is mistaken for another section of the text."""
    return "\n".join(map(_escape_line, text.splitlines()))


def _escape_line(line: str) -> str:
    line = _replace_controls(line).strip()
    for marker in _MARKERS:
        if line.lower().startswith(marker.lower()):
            line = f"{line[: len(marker) - 1]} :{line[len(marker) :]}"
    return line


def _quote(value: str) -> str:
    """Quote a field's value as a JSON string if it would otherwise end early or be mistaken for another field."""
    value = _replace_controls(value)
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\\') or value != value.strip() else value


def _replace_controls(text: str) -> str:
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)


def _decode(path: str | os.PathLike[str], text: str | None) -> ImageRecord | None:
    if text is None:
        return None
    try:
        return _DECODER.decode(text.encode())
    except ValueError as error:
        raise RequestError(
            f"the latentrt record of {path} cannot be read ({printable(str(error))}), expected one written by "
            "latentrt; if a newer latentrt wrote it, upgrade: pip install -U latentrt"
        ) from None
