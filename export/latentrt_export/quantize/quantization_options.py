"""What may be asked of quantisation?"""

from __future__ import annotations

from pathlib import Path

import msgspec

from latentrt.bundle.manifest import QuantizationMethod
from latentrt.errors import RequestError

__all__ = ["Quantizing", "read_options"]

_MOST_STEPS = 1000


class Quantizing(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asks of quantisation.

    Attributes:
        method: `static` rounds activations as well, `weights` weights alone.
        prompts: of the runs that activations are calibrated on; the exporter's own if there are none.
        steps: of each run.
        guidance_scale: of those runs.
    """

    method: QuantizationMethod = "static"
    prompts: tuple[str, ...] = ()
    steps: int = 10
    guidance_scale: float = 7.5


def read_options(
    method: QuantizationMethod | None, prompts: Path | None, steps: int | None, guidance_scale: float
) -> Quantizing | None:
    """The options of a command; None if none was given.

    Args:
        method, steps: None is the default. prompts: a file with one prompt a line.
        guidance_scale: what a run does that does not say, so that the runs are as those will be.

    Raises:
        RequestError: the file cannot be read or has no prompt, the number of steps is impossible, or there is nothing
            to calibrate.
    """
    if (method, prompts, steps) == (None, None, None):
        return None
    defaults = Quantizing()
    if method == "weights" and (prompts, steps) != (None, None):
        option = "--calibration-prompts" if prompts is not None else "--calibration-steps"
        raise RequestError(
            f"found {option} with --quantization weights, which calibrates nothing; leave one of the two out"
        )
    if steps is not None and not 1 <= steps <= _MOST_STEPS:
        raise RequestError(f"found {steps} steps to calibrate in, expected 1 to {_MOST_STEPS}")
    return Quantizing(
        method=method or defaults.method,
        prompts=_prompts(prompts) if prompts is not None else (),
        steps=steps or defaults.steps,
        guidance_scale=guidance_scale,
    )


def _prompts(file: Path) -> tuple[str, ...]:
    try:
        lines = tuple(filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompts to calibrate on cannot be read from {file}: {error}") from error
    if not lines:
        raise RequestError(f"found no prompt in {file}, expected one a line")
    return lines
