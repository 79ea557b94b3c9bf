"""Stable Diffusion XL (Podell et al. 2023, https://arxiv.org/abs/2307.01952): the base, its refiner, and others of
their architecture.

The denoiser takes the embeddings of two text encoders, the pooled one of the second, and micro-conditioning: sizes and
a crop of an image of training, or an aesthetic score in place of the target size (a refiner).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.families.latent_diffusion import LatentDiffusion, find_width
from latentrt.families.tasks import Edit, ImageToImage, Inpainting, Inputs, Side, Task
from latentrt.request import MicroConditioning, declared_options
from latentrt.text.clip import EncodedText

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle
    from latentrt.request import Request, Size
    from latentrt.resolve import ResolvedRequest

__all__ = ["StableDiffusionXL"]

# The denoiser's inputs of pooled text embeddings and micro-conditioning.
POOLED, MICRO_CONDITIONING = "text_embeds", "time_ids"
# The values of a refiner's micro-conditioning, which has an aesthetic score in place of the target size.
_VALUES_WITH_SCORE = 5
# diffusers' defaults.
_SCORE, _NEGATIVE_SCORE = 6.0, 2.5
_TOP_LEFT = (0, 0)
# Options that other families do not take: of all bundles, of those with two text encoders, and of one kind of sizes.
_OPTIONS = {
    *(each.keyword for each in declared_options(MicroConditioning)),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds", "denoising_start", "denoising_end"),
}
_SECOND_TEXTS = {"prompt_2", "negative_prompt_2"}
_SCORES = {"aesthetic_score", "negative_aesthetic_score"}
_TARGETS = {"target_size", "negative_target_size"}


class _MicroConditioned(Task):
    """A task whose denoiser takes the pooled text and micro-conditioning.

    Attributes:
        unused: options of micro-conditioning that diffusers' pipeline of the task does not take, or ignores, but for a
            refiner.
    """

    unused: ClassVar[frozenset[str]] = frozenset({"negative_crops_coords_top_left"})

    def check(self, request: ResolvedRequest) -> None:
        super().check(request)
        unused = frozenset[str]() if _takes_score(self.stage.bundle) else self.unused
        for each in declared_options(MicroConditioning):
            if each.keyword in unused and getattr(request.micro_conditioning, each.path[-1]) is not None:
                raise RequestError(f"`{each.keyword}`: {self.name} does not use it; leave it out")

    def text_inputs(self, request: ResolvedRequest, side: Side, text: EncodedText) -> dict[str, NDArray[Any]]:
        assert text.pooled is not None, "given, or of an encoder with that output"
        values = np.array(self.micro_conditioning(request, side), np.float32)
        return {**super().text_inputs(request, side, text), POOLED: text.pooled, MICRO_CONDITIONING: values}

    def micro_conditioning(self, request: ResolvedRequest, side: Side) -> tuple[float, ...]:
        """Return the numbers that the denoiser takes for the prompt or the negative prompt."""
        given, size = request.micro_conditioning, (request.height, request.width)
        original, target = given.original_size or size, given.target_size or size
        crop = _TOP_LEFT if given.crop is None else given.crop
        if _takes_score(self.stage.bundle):
            score, negative_score = given.aesthetic_score, given.negative_aesthetic_score
            if side == "positive":
                return (*original, *crop, _SCORE if score is None else score)
            crop = _TOP_LEFT if given.negative_crop is None else given.negative_crop
            negative_score = _NEGATIVE_SCORE if negative_score is None else negative_score
            return (*(given.negative_original_size or original), *crop, negative_score)
        if side == "positive":
            return (*original, *crop, *target)
        return self.negative_sizes(given, original, crop, target)

    def negative_sizes(
        self, given: MicroConditioning, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> tuple[int, ...]:
        """Return the numbers for the negative prompt, from those for the prompt."""
        return (*(given.negative_original_size or original), *crop, *(given.negative_target_size or target))


class XLTextToImage(_MicroConditioned):
    """Text to image, where the negative sizes are used together or not at all."""

    unused: ClassVar[frozenset[str]] = frozenset()

    def check(self, request: ResolvedRequest) -> None:
        super().check(request)
        given = request.micro_conditioning
        negatives = {
            "negative_original_size": given.negative_original_size,
            "negative_target_size": given.negative_target_size,
            "negative_crops_coords_top_left": given.negative_crop,
        }
        found = [keyword for keyword, value in negatives.items() if value is not None]
        for needed in ("negative_original_size", "negative_target_size"):
            if found and negatives[needed] is None:
                raise RequestError(f"`{found[0]}`: got a value without `{needed}`; give both, or neither")

    def negative_sizes(
        self, given: MicroConditioning, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> tuple[int, ...]:
        if given.negative_original_size is None or given.negative_target_size is None:
            return (*original, *crop, *target)
        return (*given.negative_original_size, *(given.negative_crop or _TOP_LEFT), *given.negative_target_size)


class XLImageToImage(_MicroConditioned, ImageToImage):
    """Image to image, and the second stage of a base with a refiner."""

    default_strength: ClassVar[float | None] = 0.3


class XLInpainting(_MicroConditioned, Inpainting):
    """Inpainting."""

    default_strength: ClassVar[float | None] = 0.9999


class XLEdit(_MicroConditioned, Edit):
    """InstructPix2Pix, which has the size of the request or the bundle, not of the image."""

    unused: ClassVar[frozenset[str]] = frozenset(
        {"negative_original_size", "negative_target_size", "negative_crops_coords_top_left"}
    )

    def size(self, request: Request, inputs: Inputs | None) -> Size:
        return request.size


class StableDiffusionXL(LatentDiffusion):
    """Stable Diffusion XL."""

    task_classes = (XLTextToImage, XLImageToImage, XLEdit, XLInpainting)

    def __init__(self, bundle: Bundle, components: Components) -> None:
        super().__init__(bundle, components)
        self.pooled_width = find_width(bundle, POOLED, 2)
        options = _OPTIONS - (_TARGETS if _takes_score(bundle) else _SCORES)
        self.options = frozenset(options | (_SECOND_TEXTS if len(self._stage.text_encoders) > 1 else set()))


def _takes_score(bundle: Bundle) -> bool:
    return find_width(bundle, MICRO_CONDITIONING, 2) == _VALUES_WITH_SCORE
