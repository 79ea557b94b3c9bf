"""The options of quantisation. Importing them needs no torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.manifest import QuantizationMethod
from latentrt.errors import RequestError

__all__ = ["QuantizationOptions", "read_options"]

_MAX_STEPS = 1000
_MAX_PROMPTS_BYTES = 1 << 20


class QuantizationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of int8 graphs.

    Attributes:
        method: `static` rounds weights and activations, `weights` weights only.
        prompts: the prompts of the images that are generated to measure activations; empty means the exporter's own.
        steps: the number of steps of each of those images.
        guidance_scale: the guidance scale of those images; None means the bundle's default.
        force_zeros_for_empty_prompt: whether they are guided against zeros in place of the embeddings of an empty text.
    """

    method: QuantizationMethod = "static"
    prompts: tuple[str, ...] = ()
    steps: int = 10
    guidance_scale: float | None = None
    force_zeros_for_empty_prompt: bool = False


def read_options(
    quantization: QuantizationMethod | None,
    calibration_prompts: Path | None,
    calibration_steps: int | None,
) -> QuantizationOptions | None:
    """Build the options from those of the command line; return None if none was given.

    Args:
        quantization, calibration_steps: None means the default.
        calibration_prompts: a text file with one prompt per line.

    Raises:
        RequestError: the file cannot be read or has no prompt, the number of steps is out of range, or calibration is
            configured for a method without it.
    """
    if (quantization, calibration_prompts, calibration_steps) == (None, None, None):
        return None
    defaults = QuantizationOptions()
    if quantization == "weights" and (calibration_prompts, calibration_steps) != (None, None):
        option = "calibration_prompts" if calibration_prompts is not None else "calibration_steps"
        raise RequestError(
            f"got `{option}` with `quantization='weights'`, which does not calibrate; omit one of the two"
        )
    if calibration_steps is not None and not 1 <= calibration_steps <= _MAX_STEPS:
        raise RequestError(f"got `calibration_steps` {calibration_steps}, expected 1 to {_MAX_STEPS}")
    return QuantizationOptions(
        method=quantization or defaults.method,
        prompts=_read_prompts(calibration_prompts) if calibration_prompts is not None else (),
        steps=calibration_steps or defaults.steps,
    )


def _read_prompts(file: Path) -> tuple[str, ...]:
    try:
        with open_regular(file) as stream:
            text = read_at_most(stream, _MAX_PROMPTS_BYTES)
        lines = tuple(filter(None, map(str.strip, text.decode("utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"`calibration_prompts` {file} cannot be read: {error}") from error
    if len(text) > _MAX_PROMPTS_BYTES:
        raise RequestError(
            f"got more than {_MAX_PROMPTS_BYTES:,} bytes of `calibration_prompts` in {file}, expected at "
            "most that; remove some prompts"
        )
    if not lines:
        raise RequestError(f"got no prompt in `calibration_prompts` {file}, expected one per line")
    return lines
