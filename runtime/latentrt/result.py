"""The result of a request: images and everything that is known of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentrt import __version__
from latentrt.errors import RequestError
from latentrt.images import files
from latentrt.images.metadata import ImageRecord, record_texts
from latentrt.request import OPTIONS, flat_values
from latentrt.sampling import samplers

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle
    from latentrt.bundle.manifest import Source
    from latentrt.decode.safety import Verdict
    from latentrt.families import Family
    from latentrt.resolve import ResolvedRequest

__all__ = ["OutputType", "Result", "check_output_type", "check_places", "make_result", "numbered"]

OutputType = Literal["pil", "np", "latent"]
# Options that the record holds in a field of their own, or not at all.
_ELSEWHERE = {"prompt", "negative_prompt", "seed", "num_images_per_prompt", "safety"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Images and everything that is known of them.

    Attributes:
        images: a list of Pillow images, or an array, by `output_type`.
        seeds: of each image.
        verdicts: the classifier's, of each image; None where nothing was checked.
        records: the metadata of each image.
    """

    images: Any  # `output_type` decides at run time, and a union would have every caller narrow it
    seeds: tuple[int, ...]
    verdicts: tuple[Verdict, ...] | None
    records: tuple[ImageRecord, ...]

    @property
    def nsfw_content_detected(self) -> list[bool] | None:
        """Whether each image was flagged; None where nothing was checked. diffusers' name."""
        return None if self.verdicts is None else [verdict.flagged for verdict in self.verdicts]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the images with their records: one to `path`, several to `path` with their number before the extension.

        Raises:
            OutputError: they cannot be written. RequestError: these are arrays, not images.
        """
        if not isinstance(self.images, list):
            raise RequestError("`output_type`: got arrays, expected images; request output_type='pil' to save files")
        paths = numbered(Path(path), len(self.images))
        for image, record, place in zip(self.images, self.records, paths, strict=True):
            files.save(image, place, record_texts(record))
        return paths


def check_output_type(output_type: str) -> None:
    """Reject an unknown output type.

    Raises:
        RequestError: listing the known ones.
    """
    if output_type not in get_args(OutputType):
        raise RequestError(f"`output_type`: got {output_type!r}, expected one of {', '.join(get_args(OutputType))}")


def numbered(path: Path, count: int) -> list[Path]:
    """Return the paths of `count` images that share one name."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def make_result(
    bundle: Bundle,
    family: Family,
    request: ResolvedRequest,
    values: NDArray[Any],
    verdicts: tuple[Verdict, ...] | None,
    output_type: OutputType,
    backend: str | None,
) -> Result:
    """Wrap latents, or pixels uint8 [images, height, width, 3] that the safety policy has been applied to.

    Args:
        backend: title of the denoiser's backend.
    """
    images: Any = values
    if output_type == "pil":
        images = files.to_images(values)
    elif output_type == "np":
        images = values.astype(np.float32) / np.float32(255)
    policy = "off" if output_type == "latent" else request.policy  # latents are not checked
    records = [
        _record(bundle, family, request, index, policy, verdicts, backend) for index in range(len(request.seeds))
    ]
    return Result(images=images, seeds=request.seeds, verdicts=verdicts, records=tuple(records))


def check_places(bundle: Bundle, family: Family, request: ResolvedRequest, path: Path) -> None:
    """Check, before any work, that the images and their metadata can be written.

    Raises:
        OutputError: they cannot.
    """
    for index, place in enumerate(numbered(path, len(request.seeds))):
        record = _record(bundle, family, request, index, request.policy, None, None)
        files.check_output(place, record_texts(record))


def _record(
    bundle: Bundle,
    family: Family,
    request: ResolvedRequest,
    index: int,
    policy: str,
    verdicts: Sequence[Verdict] | None,
    backend: str | None,
) -> ImageRecord:
    from latentrt.decode.safety import check_policy, safety_record

    prompt = request.prompt_of(index)
    negatives = request.negative_prompts if request.guided else None
    merging = bundle.manifest.components[family.denoiser].token_merging
    values = flat_values(request)
    return ImageRecord(
        prompt=request.prompts[prompt] if request.prompts else None,
        negative_prompt=negatives[prompt] if negatives else None,
        seed=request.seeds[index],
        task=request.task,
        options=_options(request, values),
        given=tuple(
            keyword for keyword, each in OPTIONS.items() if each.check.kind == "python" and values[keyword] is not None
        ),
        inputs=family.input_records(request),
        token_merging=merging.ratio if merging else 0.0,
        backend=backend,
        bundle_digest=bundle.digest,
        bundle_name=bundle.manifest.source.name,
        model_sha256=_find_model_sha256(bundle.manifest.source),
        latentrt_version=__version__,
        safety=safety_record(check_policy(policy), verdicts[index] if verdicts else None),
    )


def _find_model_sha256(source: Source) -> str | None:
    """Return the SHA-256 of the single file that a bundle was exported from; a folder has no such file."""
    if source.layout != "single-file":
        return None
    # Beside it there may be the files of a classifier and of a preview decoder.
    return next((sha256 for file, sha256 in source.weights.items() if Path(file).stem == source.name), None)


def _options(request: ResolvedRequest, values: dict[str, Any]) -> dict[str, Any]:
    """Return every option that was decided and differs from its declaration's default, as JSON carries it."""
    chosen = samplers.choose(request.sampler)
    values = {
        **values,
        "sampler": chosen.name,
        "sampler_options": {**chosen.options, **(request.sampling.options or {})} or None,
    }
    return {
        keyword: _to_json(values[keyword])
        for keyword, each in OPTIONS.items()
        if keyword not in _ELSEWHERE
        and each.check.kind not in ("python", "path")
        and values[keyword] is not None
        and values[keyword] != each.default
    }


def _to_json(value: Any) -> Any:
    """Return a value as JSON carries it: it has no infinity, which diffusers' configurations write as a string."""
    if isinstance(value, dict):
        return {name: _to_json(each) for name, each in value.items()}
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
