"""What does a picture say of itself?

Every picture carries two texts. `latentrt` is our record as JSON and comes back exactly. `parameters` is the line
that the tools of this field read, as AUTOMATIC1111's web UI (`modules/infotext_utils.py`) writes it::

    a red circle on a blue background
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 512x512, Model: my-model, Version: latentrt 0.1.0

That line has no way to escape a prompt, so a prompt's own lines that look like its fields are bent a little; the
record has them as they were.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from typing import Any

import msgspec

from latentrt.bundle.printable import printable
from latentrt.decode.safety import SafetyRecord
from latentrt.errors import RequestError
from latentrt.images.files import open_picture
from latentrt.images.texts import PARAMETERS, RECORD, carried_texts

__all__ = ["PictureMetadata", "PictureRecord", "parameters_line", "read_metadata", "record_texts"]


class PictureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to draw a picture again. Sizes are in pixels, `bundle_digest` is `sha256:…`.

    A prompt is None where embeddings were given instead. Keys that a later version adds are passed over in reading.
    """

    prompt: str | None
    negative_prompt: str | None = None
    seed: int
    sampler: str
    # What of its configuration the request changed, by diffusers' names.
    sampler_options: dict[str, Any] = {}
    karras: bool | None = None
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_cache: int = 1
    decoder: str = "full"
    token_merging: float = 0.0
    # What ran the denoiser and in what arithmetic, in words, where it is known; another draws another picture.
    backend: str | None = None
    eta: float | None = None
    clip_skip: int | None = None
    width: int
    height: int
    bundle_digest: str
    bundle_name: str
    latentrt_version: str
    safety: SafetyRecord
    # What was given as an array, of which a file cannot say more: `latents` (then no seed draws this picture again), ….
    given: tuple[str, ...] = ()


class PictureMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture file says: our record if latentrt wrote it, the parameters if it or another tool did."""

    file_format: str
    width: int
    height: int
    record: PictureRecord | None = None
    parameters: str | None = None


def record_texts(record: PictureRecord) -> dict[str, str]:
    """The texts that a picture carries (`latentrt.images.files.save`)."""
    # ASCII, with \u escapes: EXIF has a plain field for it, and a lone surrogate of a prompt survives.
    return {PARAMETERS: parameters_line(record), RECORD: json.dumps(msgspec.to_builtins(record), ensure_ascii=True)}


def read_metadata(path: str | os.PathLike[str]) -> PictureMetadata:
    """Read what a PNG, JPEG or WebP file says of itself, without decoding its pixels. Anyone may have written it.

    Raises:
        RequestError: it is not such a picture, or its record is not one of latentrt's.
    """
    with open_picture(path) as picture:
        texts = carried_texts(picture)
        return PictureMetadata(
            file_format=picture.format or "",
            width=picture.width,
            height=picture.height,
            record=_decode(path, texts.get(RECORD)),
            parameters=texts.get(PARAMETERS),
        )


def parameters_line(record: PictureRecord) -> str:
    """The text that other tools read: the prompt, the negative prompt, and last one line of fields."""
    lines = [_prompt(record.prompt)] if record.prompt else []
    if record.negative_prompt:
        lines.append(f"Negative prompt: {_prompt(record.negative_prompt)}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in _fields(record)))
    return "\n".join(lines)


# Those tools' names for the samplers.
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
# What begins a part of the text, if it begins a line.
_MARKS = ("Negative prompt:", "Steps:")


def _fields(record: PictureRecord) -> Iterator[tuple[str, str]]:
    yield "Steps", str(record.num_inference_steps)
    yield "Sampler", _sampler_name(record)
    spread = {"use_karras_sigmas": record.karras} | record.sampler_options
    yield from (("Schedule type", words) for key, words in _SCHEDULE_TYPES.items() if spread.get(key))
    yield "CFG scale", f"{record.guidance_scale:g}"
    yield "Seed", str(record.seed)
    yield "Size", f"{record.width}x{record.height}"
    yield "Model", record.bundle_name
    if record.clip_skip is not None:
        # There, 1 is the last layer; in diffusers, whose count this is, it is the one before the last.
        yield "Clip skip", str(record.clip_skip + 1)
    if record.eta:
        yield "Eta", f"{record.eta:g}"
    if record.guidance_rescale:
        yield "CFG Rescale phi", f"{record.guidance_rescale:g}"
    yield "RNG", "CPU"
    yield "Safety", _safety_words(record.safety)
    yield "Bundle", record.bundle_digest
    yield "Version", f"latentrt {record.latentrt_version}"


def _sampler_name(record: PictureRecord) -> str:
    name, algorithm = _SAMPLER_NAMES.get(record.sampler, record.sampler), record.sampler_options.get("algorithm_type")
    return f"{name} SDE" if record.sampler == "dpmpp_2m" and algorithm == "sde-dpmsolver++" else name


def _safety_words(safety: SafetyRecord) -> str:
    return f"{safety.policy} (flagged)" if safety.flagged else safety.policy


def _prompt(text: str) -> str:
    """A prompt, such that no line of it passes for another part of the text."""
    return "\n".join(map(_prompt_line, text.splitlines()))


def _prompt_line(line: str) -> str:
    line = _without_controls(line).strip()
    for mark in _MARKS:
        if line.lower().startswith(mark.lower()):
            line = f"{line[: len(mark) - 1]} :{line[len(mark) :]}"
    return line


def _quoted(value: str) -> str:
    """A field's value, as a JSON string where it would otherwise end early or pass for another field."""
    value = _without_controls(value)
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\\') or value != value.strip() else value


def _without_controls(text: str) -> str:
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)


def _decode(path: str | os.PathLike[str], text: str | None) -> PictureRecord | None:
    if text is None:
        return None
    try:
        return msgspec.convert(json.loads(text), PictureRecord)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the latentrt record of {path} cannot be read ({printable(str(error))}), expected one that latentrt "
            "wrote; if a newer latentrt did, upgrade: pip install -U latentrt"
        ) from None
