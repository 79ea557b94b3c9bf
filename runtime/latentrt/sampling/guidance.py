"""Guidance: which evaluations of the denoiser a row needs, and how their outputs combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.sampling.schedule import Latents

__all__ = ["ClassifierFree", "Guidance", "ImageAndText", "Unguided"]


class Guidance(ABC):
    """A guidance strategy. It is stateless, so samples may share it."""

    @abstractmethod
    def evaluations(self, row: int, rows: int) -> tuple[str, ...]:
        """Return the names of the evaluations that row `row` of `rows` needs."""

    @abstractmethod
    def all_evaluations(self) -> tuple[str, ...]:
        """Return the names of the evaluations that any row may need."""

    @abstractmethod
    def combine(self, outputs: Sequence[Latents]) -> Latents:
        """Combine the denoiser's outputs, float32 [C, H, W] each, in the order of `evaluations`."""

    def device_scale(self) -> float | None:
        """Return w if `combine` is negative + w · (positive − negative), which a device can apply; else None."""
        return None


@dataclass(frozen=True)
class Unguided(Guidance):
    """No guidance: the prompt's evaluation alone."""

    def evaluations(self, row: int, rows: int) -> tuple[str, ...]:
        return ("positive",)

    def all_evaluations(self) -> tuple[str, ...]:
        return ("positive",)

    def combine(self, outputs: Sequence[Latents]) -> Latents:
        return outputs[0]

    def device_scale(self) -> float | None:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho and Salimans 2022, equation 6) in diffusers' form.

    Attributes:
        scale: w in negative + w · (positive − negative).
        rescale: φ of Lin et al. 2023, equations 15 and 16: the standard deviation of the guided output returns towards
            that of the positive output. 0 leaves it.
        start, end: the interval of rows with guidance, as fractions of all rows (Kynkäänniemi et al. 2024, arXiv
            2404.07724); other rows use the positive evaluation only. The bounds are those of diffusers'
            `control_guidance_start` and `control_guidance_end`.
    """

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def evaluations(self, row: int, rows: int) -> tuple[str, ...]:
        inside = row / rows >= self.start and (row + 1) / rows <= self.end
        return ("negative", "positive") if inside else ("positive",)

    def all_evaluations(self) -> tuple[str, ...]:
        return ("negative", "positive")

    def combine(self, outputs: Sequence[Latents]) -> Latents:
        if len(outputs) == 1:
            return outputs[0]
        negative, positive = outputs
        guided: Latents = negative + np.float32(self.scale) * (positive - negative)
        if self.rescale == 0:
            return guided
        matched = guided * (_deviation(positive) / _deviation(guided))
        phi = np.float32(self.rescale)
        return np.asarray(phi * matched + (1 - phi) * guided, np.float32)

    def device_scale(self) -> float | None:
        return self.scale if self.rescale == 0 else None


@dataclass(frozen=True, kw_only=True)
class ImageAndText(Guidance):
    """Guidance by an image and a text (InstructPix2Pix, Brooks et al. 2023, equation 3).

    unconditional + w_image · (image − unconditional) + w_text · (positive − image), where `image` sees the input image
    with the negative prompt, `unconditional` a zero image.
    """

    scale: float
    image_scale: float

    def evaluations(self, row: int, rows: int) -> tuple[str, ...]:
        return ("positive", "image", "unconditional")

    def all_evaluations(self) -> tuple[str, ...]:
        return ("positive", "image", "unconditional")

    def combine(self, outputs: Sequence[Latents]) -> Latents:
        positive, image, unconditional = outputs
        text = np.float32(self.scale) * (positive - image)
        guided: Latents = unconditional + text + np.float32(self.image_scale) * (image - unconditional)
        return guided


def _deviation(output: Latents) -> np.float32:
    """Return the standard deviation of one sample, with torch's n − 1."""
    return np.float32(output.std(ddof=1))
