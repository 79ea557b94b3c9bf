"""The result of a request: images and everything that is known of them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentrt import __version__
from latentrt.bundle.printable import counted, printable, quote
from latentrt.errors import MissingAttributeError, OutputError, RequestError
from latentrt.images import files
from latentrt.images.contact_sheet import contact_sheet
from latentrt.images.metadata import ImageRecord, record_texts
from latentrt.request import OPTIONS, flat_values
from latentrt.sampling import samplers
from latentrt.timings import Stopwatch, Timings

if TYPE_CHECKING:
    from PIL import Image

    from latentrt.bundle.bundle import Bundle
    from latentrt.bundle.manifest import Source
    from latentrt.decode.safety import Verdict
    from latentrt.families import Family
    from latentrt.resolve import ResolvedRequest

__all__ = ["OutputType", "Result", "check_output_type", "expected_texts", "make_result", "numbered"]

OutputType = Literal["pil", "np", "latent"]
# Options that the record holds in a field of their own, or not at all.
_ELSEWHERE = {"prompt", "negative_prompt", "seed", "num_images_per_prompt", "safety"}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result:
    """Images and everything that is known of them. It has the length of its images, and can be iterated and indexed.

    Notebooks show the images with their settings.

    Attributes:
        images: a list of Pillow images, or an array, by `output_type`.
        seeds: of each image.
        verdicts: the classifier's, of each image; None where nothing was checked.
        records: the metadata of each image.
        timings: seconds of each kind of work.
    """

    images: Any  # `output_type` decides at run time, and a union would have every caller narrow it
    seeds: tuple[int, ...]
    verdicts: tuple[Verdict, ...] | None
    records: tuple[ImageRecord, ...]
    timings: Timings

    @property
    def image(self) -> Any:
        """The image, or its array, of a result of one.

        Raises:
            MissingAttributeError: there are several.
        """
        self._require_one("image")
        return self.images[0]

    @property
    def record(self) -> ImageRecord:
        """The metadata of the image, of a result of one.

        Raises:
            MissingAttributeError: there are several.
        """
        self._require_one("record")
        return self.records[0]

    @property
    def nsfw_content_detected(self) -> list[bool] | None:
        """Whether each image was flagged, under diffusers' name; None if no image was checked."""
        return None if self.verdicts is None else [verdict.flagged for verdict in self.verdicts]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def save(self, target: str | os.PathLike[str] | IO[bytes], format: str | None = None) -> list[Path]:  # noqa: A002  # Pillow's word
        """Write the images with their records: one to a path or file object, several to a path with their number before
        the extension. Existing files are replaced.

        Args:
            target: a path, or a binary file object, such as `io.BytesIO()`, for one image.
            format: `png`, `jpeg` or `webp`; None takes what the extension of the path, or of the file object's name,
                says, and PNG for a file object without one.

        Returns:
            The paths; none for a file object.

        Raises:
            OutputError: they cannot be written.
            RequestError: these are arrays, not images; or several images for one file object.
        """
        if not isinstance(self.images, list):
            raise RequestError("`output_type`: got arrays, expected images; request output_type='pil' to save files")
        file_format = None if format is None else files.find_format(format)
        if not isinstance(target, (str, os.PathLike)):
            self._write(target, file_format)
            return []
        paths = numbered(Path(target), len(self.images))
        for image, record, place in zip(self.images, self.records, paths, strict=True):
            files.save(image, place, record_texts(record), file_format)
        return paths

    def _write(self, stream: IO[bytes], file_format: str | None) -> None:
        """Write the only image to a file object."""
        if len(self.images) != 1:
            raise RequestError(
                f"got {len(self.images)} images for one file object, expected one; save to a path, or write each of "
                "`images` on its own"
            )
        if file_format is None:
            name = getattr(stream, "name", None)
            suffix = Path(name).suffix if isinstance(name, str) else ""
            file_format = files.find_format(suffix.removeprefix(".") or "png")
        data = files.encode(self.images[0], file_format, record_texts(self.records[0]))
        try:
            while data:
                # A file object without a buffer writes a part, or nothing where it would have to wait.
                if not (count := stream.write(data)):
                    raise BlockingIOError("it takes no more bytes now")
                data = data[count:]
        except (OSError, ValueError) as error:  # the latter of a closed file
            raise OutputError(f"the image cannot be written to {quote(stream)}: {error}") from None
        except (AttributeError, TypeError):
            raise RequestError(
                f"got {quote(stream)}, expected a path or a binary file object, such as open(path, 'wb')"
            ) from None

    def __repr__(self) -> str:
        count = len(self.seeds)
        if isinstance(self.images, list):
            width, height = self.images[0].size
            what = f"{counted(count, 'image')} of {width} × {height}"
        else:
            what = f"{self.images.dtype} array {self.images.shape}"
        seeds = ", ".join(map(str, self.seeds[:_SHOWN_SEEDS])) + (", …" if count > _SHOWN_SEEDS else "")
        flagged = sum(self.nsfw_content_detected or [])
        return (
            f"<Result: {what}, {'seed' if count == 1 else 'seeds'} {seeds}{f', {flagged} flagged' if flagged else ''}>"
        )

    def _repr_png_(self) -> bytes | None:
        """Return the image as PNG, a contact sheet of several; None for arrays. For notebooks."""
        if not isinstance(self.images, list):
            return None
        if len(self.images) == 1:
            return files.encode(self.images[0], "PNG")
        shown = self.images[:_SHOWN_IMAGES]
        captions = [f"seed {seed}" for seed in self.seeds[: len(shown)]]
        return files.encode(contact_sheet([_reduce(image, _SHEET_SIDE) for image in shown], captions), "PNG")

    def _repr_html_(self) -> str | None:
        """Return the images with their settings, at most `_SHOWN_IMAGES`, reduced; None for arrays. For notebooks."""
        if not isinstance(self.images, list):
            return None
        side = _SINGLE_SIDE if len(self.images) == 1 else _SHEET_SIDE
        shown = zip(self.images[:_SHOWN_IMAGES], self.records, strict=False)
        figures = "".join(_figure(image, record, side) for image, record in shown)
        more = len(self.images) - _SHOWN_IMAGES
        rest = f"<p>and {counted(more, 'further image')}</p>" if more > 0 else ""
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{figures}</div>{rest}'

    def _require_one(self, name: str) -> None:
        if len(self.seeds) != 1:
            raise MissingAttributeError(
                f"got `{name}` of a result of {len(self.seeds)} images, expected a result of one; use `{name}s`"
            )


# Of what a notebook shows: images, seeds in a `repr`, pixels a side of an image, characters of a prompt.
_SHOWN_IMAGES, _SHOWN_SEEDS = 16, 8
_SINGLE_SIDE, _SHEET_SIDE = 768, 320
_PROMPT_CHARACTERS = 300
_LOSSLESS_SIDE = 256  # of pixels: small images are shown enlarged, where losses would be visible
_ENLARGED_SIDE = 192  # pixels a side, at least, as the browser shows it


def _reduce(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose sides are at most `side` pixels."""
    if max(image.size) <= side:
        return image
    reduced = image.copy()
    reduced.thumbnail((side, side))
    return reduced


def _figure(image: Image.Image, record: ImageRecord, side: int) -> str:
    """Return an image and its settings as HTML."""
    shown, encoded = _reduce(image, side), io.BytesIO()
    shown.save(encoded, "WEBP", lossless=max(shown.size) <= _LOSSLESS_SIDE, quality=90)
    width = max(shown.width, _ENLARGED_SIDE * shown.width // max(shown.size))
    scaling = "pixelated" if width > shown.width else "auto"
    data, alt = base64.b64encode(encoded.getvalue()).decode(), html.escape(_shorten(record.prompt or record.task))
    lines = [f"<b>{alt}</b>", *(html.escape(line) for line in _settings(image, record))]
    return (
        f'<figure style="margin:0;width:{width}px;overflow-wrap:anywhere">'
        f'<img alt="{alt}" src="data:image/webp;base64,{data}" style="width:100%;image-rendering:{scaling}">'
        f'<figcaption style="font-size:small">{"<br>".join(lines)}</figcaption></figure>'
    )


def _settings(image: Image.Image, record: ImageRecord) -> Iterator[str]:
    """Yield the lines below an image in a notebook."""
    if record.negative_prompt:
        yield f"Negative prompt: {_shorten(record.negative_prompt)}"
    options = record.options
    steps, guidance = options.get("num_inference_steps", 0), options.get("guidance_scale", 0)
    yield f"seed {record.seed}, {options.get('sampler')}, {counted(steps, 'step')}, guidance {guidance:g}"
    strength = f", strength {options['strength']:g}" if "strength" in options else ""
    yield f"{image.width} × {image.height}{strength}"
    if record.safety.policy == "off":
        yield "not checked"
    elif record.safety.flagged:
        yield f"flagged ({record.safety.policy})"


def _shorten(text: str) -> str:
    text = printable(text, keep="\n")
    return text if len(text) <= _PROMPT_CHARACTERS else f"{text[:_PROMPT_CHARACTERS]}…"


def check_output_type(output_type: str) -> None:
    """Reject an unknown output type.

    Raises:
        RequestError: listing the known ones.
    """
    if output_type not in get_args(OutputType):
        raise RequestError(
            f"`output_type`: got {quote(output_type)}, expected one of {', '.join(get_args(OutputType))}"
        )


def numbered(path: Path, count: int) -> list[Path]:
    """Return the paths of `count` images that share one name."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def make_result(
    bundle: Bundle,
    family: Family,
    request: ResolvedRequest,
    values: NDArray[Any],
    verdicts: tuple[Verdict, ...] | None,
    *,
    output_type: OutputType,
    backend: str | None,
    stopwatch: Stopwatch,
) -> Result:
    """Wrap latents, or pixels uint8 [images, height, width, 3] that the safety policy has been applied to.

    Args:
        backend: title of the denoiser's backend.
        stopwatch: of the request.
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
    return Result(
        images=images,
        seeds=request.seeds,
        verdicts=verdicts,
        records=tuple(records),
        timings=stopwatch.timings(),
    )


def expected_texts(bundle: Bundle, family: Family, request: ResolvedRequest, index: int = 0) -> dict[str, str]:
    """Return the texts that the file of an image will carry, as far as they are known before the work."""
    return record_texts(_record(bundle, family, request, index, request.policy, None, None))


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
    for keyword, first, second in (
        ("prompt_2", request.prompts, request.prompts_2),
        ("negative_prompt_2", negatives, request.negative_prompts_2),
    ):
        values[keyword] = second[prompt] if first and second and second[prompt] != first[prompt] else None
    return ImageRecord(
        prompt=request.prompts[prompt] if request.prompts else None,
        negative_prompt=negatives[prompt] if negatives else None,
        seed=request.seeds[index],
        task=request.task,
        options=_options(request, values),
        given=tuple(
            keyword for keyword, each in OPTIONS.items() if each.check.kind == "python" and values[keyword] is not None
        ),
        inputs=family.input_records(request, index),
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
    if request.sampling.schedule is None:
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
    """Return a value as JSON carries it: it has no tuple, and no infinity, which diffusers' configurations write as a
    string."""
    if isinstance(value, dict):
        return {name: _to_json(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [*map(_to_json, value)]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
