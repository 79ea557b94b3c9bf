"""What does a user get?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt import __version__
from latentrt.bundle.bundle import Bundle
from latentrt.decode.safety import Policy, Verdict, safety_record
from latentrt.errors import RequestError
from latentrt.images import files as images
from latentrt.images.metadata import ImageRecord, record_texts
from latentrt.request import Order
from latentrt.sampling import samplers

__all__ = ["OutputType", "Result", "check_places", "make_result", "numbered"]

OutputType = Literal["pil", "np", "latent"]
_ARRAYS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures and what is known of them.

    Attributes:
        images: a list of Pillow's pictures, or an array, as `output_type` asked.
        seeds: of each picture.
        verdicts: the classifier's, of each picture; None where none was asked.
        records: what each picture's file says of it.
    """

    images: Any  # `output_type` decides at run time, and a union would have every caller narrow it
    seeds: tuple[int, ...]
    verdicts: tuple[Verdict, ...] | None
    records: tuple[ImageRecord, ...]

    @property
    def nsfw_content_detected(self) -> list[bool] | None:
        """Whether each picture was flagged; None where nothing was asked. diffusers' name."""
        return None if self.verdicts is None else [verdict.flagged for verdict in self.verdicts]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the pictures with their records: one to `path`, several to `path` with their number before the
        extension.

        Raises:
            OutputError: they cannot be written. RequestError: these are arrays, not pictures.
        """
        if not isinstance(self.images, list):
            raise RequestError("found arrays, expected pictures; ask for output_type='pil' to save files")
        paths = numbered(Path(path), len(self.images))
        for picture, record, place in zip(self.images, self.records, paths, strict=True):
            images.save(picture, place, record_texts(record))
        return paths


def numbered(path: Path, count: int) -> list[Path]:
    """Where `count` pictures go that were asked for under one name."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def make_result(
    bundle: Bundle,
    order: Order,
    values: NDArray[Any],
    verdicts: tuple[Verdict, ...] | None,
    output_type: OutputType,
    backend: str | None,
) -> Result:
    """Wrap latents, or pixels that the safety policy has been applied to: uint8 [pictures, height, width, 3].
    `backend` is what ran the denoiser, in words."""
    pictures: Any = values
    if output_type == "pil":
        pictures = images.to_images(values)
    elif output_type == "np":
        pictures = values.astype(np.float32) / np.float32(255)
    policy = "off" if output_type == "latent" else order.safety  # nobody looks at latents
    records = [_record(bundle, order, index, policy, verdicts, backend) for index in range(len(order.seeds))]
    return Result(images=pictures, seeds=order.seeds, verdicts=verdicts, records=tuple(records))


def check_places(bundle: Bundle, order: Order, path: Path) -> None:
    """Ask, before the work of drawing, whether the pictures and what they say of themselves can be written.

    Raises:
        OutputError: they cannot.
    """
    for index, place in enumerate(numbered(path, len(order.seeds))):
        images.check_output(place, record_texts(_record(bundle, order, index, order.safety, None, None)))


def _record(
    bundle: Bundle,
    order: Order,
    index: int,
    policy: Policy,
    verdicts: Sequence[Verdict] | None,
    backend: str | None,
) -> ImageRecord:
    prompt = index // order.images_per_prompt
    negatives = order.negative_prompts if order.guided else None
    chosen = samplers.choose(order.sampler)
    merging = bundle.manifest.components["unet"].token_merging
    return ImageRecord(
        prompt=order.prompts[prompt] if order.prompts else None,
        negative_prompt=negatives[prompt] if negatives else None,
        seed=order.seeds[index],
        sampler=chosen.name,
        sampler_options={name: _written(value) for name, value in {**chosen.options, **order.sampler_options}.items()},
        karras=order.karras,
        num_inference_steps=order.steps,
        guidance_scale=order.guidance_scale,
        guidance_rescale=order.guidance_rescale,
        guidance_start=order.approximation.guidance_start,
        guidance_end=order.approximation.guidance_end,
        deep_cache=order.approximation.deep_cache,
        decoder=order.approximation.decoder,
        token_merging=merging.ratio if merging else 0.0,
        backend=backend,
        eta=order.eta,
        clip_skip=order.asked_clip_skip,
        width=order.width,
        height=order.height,
        bundle_digest=bundle.digest,
        bundle_name=bundle.manifest.source.name,
        latentrt_version=__version__,
        safety=safety_record(policy, verdicts[index] if verdicts else None),
        given=tuple(name for name in _ARRAYS if getattr(order, name) is not None),
    )


def _written(value: object) -> object:
    """As JSON can carry it, which knows no infinity: that is a text, as diffusers' configurations name it."""
    return json.dumps(value) if isinstance(value, float) and not np.isfinite(value) else value
