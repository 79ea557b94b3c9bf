"""Two pipelines as one: a base denoises to a share of the noise levels, a refiner goes on from its latents.

Podell et al. 2023, section 2.5, and diffusers' `denoising_end` and `denoising_start`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.images.files import PARAMETERS
from latentrt.images.metadata import InputRecord
from latentrt.pipeline import Pipeline
from latentrt.request import OPTIONS, Request, flat_values
from latentrt.resolve import ResolvedRequest
from latentrt.result import OutputType, Result, expected_texts
from latentrt.sampling.loop import Step
from latentrt.sampling.schedule import Latents
from latentrt.timings import Stopwatch

__all__ = ["DEFAULT_SHARE", "RefinedPipeline", "RefinedRequest"]

DEFAULT_SHARE = 0.8
"""`denoising_end` of the base where a request leaves it out, that of diffusers' documentation."""
# Options of the base alone: the size and the start of sampling, which the latents take the place of.
_OF_BASE = {
    *("height", "width", "latents", "image", "strength", "noise_level", "padding_mask_crop", "depth_map"),
    *("denoising_end", "image_guidance_scale", "deep_cache", "seed", "num_images_per_prompt"),
}
# Options of the refiner alone: the base makes no image.
_OF_REFINER = {"safety", "decoder"}
_EMBEDDINGS = [keyword for keyword in OPTIONS if keyword.endswith("_embeds")]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RefinedRequest(ResolvedRequest):
    """A request that a base can fulfil up to `denoising_end`, and what a refiner is asked to do then.

    Attributes:
        refinement: the refiner's request but for `image`, the latents.
        refinement_rows: number of evaluations of its model.
    """

    refinement: Request
    refinement_rows: int


class RefinedPipeline(Pipeline):
    """A base and a refiner as one pipeline, whose steps are those of both and whose images are the refiner's.

    Each takes the options that its model has (`aesthetic_score` is the refiner's, `prompt_2` the base's); the size and
    the input image are the base's. The record of an image is the refiner's, and has the base's parameters with its
    input image, the latents.

    Args:
        base: generates the latents.
        refiner: goes on from them.

    Raises:
        RequestError: the refiner takes no such latents.
    """

    def __init__(self, base: Pipeline, refiner: Pipeline) -> None:
        super().__init__(base.bundle, base.components, progress=base.progress)
        self.refiner = refiner
        self._refinements: WeakKeyDictionary[RefinedRequest, ResolvedRequest] = WeakKeyDictionary()
        for pipeline, keyword in ((base, "denoising_end"), (refiner, "denoising_start")):
            if keyword not in pipeline.family.options:
                raise RequestError(
                    f"`refiner`: got {pipeline.bundle.folder}, which has no `{keyword}`, expected bundles of two "
                    f"{OPTIONS[keyword].only}; leave it out"
                )
        if base.family.latent_space != refiner.family.latent_space:
            raise RequestError(
                f"`refiner`: got {refiner.bundle.folder}, whose latents are scaled otherwise than those of "
                f"{base.bundle.folder}; expected a refiner of the same autoencoder"
            )

    def close(self) -> None:
        super().close()
        self.refiner.close()

    def resolve(self, request: Request) -> RefinedRequest:
        if isinstance(request, RefinedRequest):
            return request
        values = flat_values(request)
        for keyword in _EMBEDDINGS:
            if values[keyword] is not None:
                raise RequestError(f"`{keyword}`: got embeddings with a refiner, which has another encoder; give texts")
        if values["padding_mask_crop"] is not None:
            raise RequestError("`padding_mask_crop`: a refiner cannot go on from a crop; leave one of them out")
        share = DEFAULT_SHARE if request.sampling.denoising_end is None else request.sampling.denoising_end
        own = {keyword: value for keyword, value in values.items() if keyword not in _OF_REFINER}
        own = self._keep_taken(own, self, self.refiner) | {"denoising_end": share, "safety": "off"}
        first = super().resolve(Request.of(**own))
        second = self._keep_taken(values, self.refiner, self) | dict.fromkeys(_OF_BASE - {"deep_cache"})
        second |= {
            "deep_cache": 1,
            "denoising_start": share,
            "num_inference_steps": first.steps,
            "num_images_per_prompt": first.images_per_prompt,
            "seed": first.seeds,
        }
        refinement = Request.of(**second)
        space = self.family.latent_space
        start = np.zeros((len(first.seeds), *space.shape(first.height, first.width)), np.float32)
        rows = len(self._resolve_refinement(refinement, start).schedule)
        decided = {each.name: getattr(first, each.name) for each in fields(first)}
        return RefinedRequest(**decided, refinement=refinement, refinement_rows=rows)

    def count_steps(self, request: ResolvedRequest) -> int:
        return super().count_steps(request) + self.resolve(request).refinement_rows

    def finish(self, request: ResolvedRequest, latents: Step | Latents, output_type: OutputType = "pil") -> Result:
        refinement = self._refinements.get(request) if isinstance(request, RefinedRequest) else None
        if refinement is None:
            raise RequestError("got a request whose steps were not run, expected one that `steps` has generated")
        result = self.refiner.finish(refinement, latents, output_type)
        records = []
        for index, record in enumerate(result.records):
            parameters = expected_texts(self.bundle, self.family, request, index)[PARAMETERS]
            image = InputRecord(digest=record.inputs["image"].digest, parameters=parameters)
            records.append(msgspec.structs.replace(record, inputs={**record.inputs, "image": image}))
        return replace(result, records=tuple(records))

    def _steps(self, request: Request, stopwatch: Stopwatch) -> Generator[Step, None, None]:
        resolved = self.resolve(request)
        space = self.family.latent_space
        start = np.zeros((len(resolved.seeds), *space.shape(resolved.height, resolved.width)), np.float32)
        checked = self._resolve_refinement(resolved.refinement, start)
        self.refiner.bundle.check(self.refiner.family.files(checked))  # before any work
        for made in super()._steps(resolved, stopwatch):
            yield made
        refinement = self._resolve_refinement(resolved.refinement, made.latents)
        self._refinements[resolved] = refinement
        yield from self.refiner._steps(refinement, stopwatch)

    def _resolve_refinement(self, refinement: Request, latents: Latents) -> ResolvedRequest:
        return self.refiner.resolve(replace(refinement, start=replace(refinement.start, image=latents)))

    @staticmethod
    def _keep_taken(values: dict[str, Any], pipeline: Pipeline, other: Pipeline) -> dict[str, Any]:
        """Return the options without those that the other pipeline's model takes and this one's does not."""
        left = other.family.options - pipeline.family.options
        return {keyword: value for keyword, value in values.items() if keyword not in left}
