"""Generates any number of images, in batches of requests that differ in prompt, negative prompt and seed only.

    for image in generate_many(pipeline, requests):
        image.result.save(f"{image.index}.png")

Requests are read as they are needed, and a result is handed out as soon as its batch is done, so that memory does not
grow with their number. An image is the one that its request gives alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.bundle.printable import quote
from latentrt.errors import BackendError, LatentRTError, RequestError, SafetyError
from latentrt.request import OPTIONS, RANDOM_SEED, Request, Whole, flat_values
from latentrt.resolve import MAX_REQUEST_BYTES

if TYPE_CHECKING:
    from latentrt.pipeline import Pipeline
    from latentrt.resolve import ResolvedRequest
    from latentrt.result import Result

__all__ = ["ImageResult", "choose_batch_size", "generate_many", "resolve_batches"]

log = logging.getLogger("latentrt")

# In larger batches an image takes little less time, and the first one comes later: 206, 86, 65 and 54 ms an image in
# batches of 1, 4, 8 and 16 on two cores (`latentrt bench sample --device cpu --steps 4 --batch N`).
_USUAL_BATCH = 8
# Latents of a batch on a CPU, 8 images of the sample model. One of 64 × 64 keeps the cores busy alone: Stable Diffusion
# 1.5 takes 44.3 s for an image of 512 × 512 in 2 steps and 91.1 s for two at once, so a batch would only let the first
# one, and an interrupted run, wait (`latentrt bench BUNDLE --device openvino --steps 2 --batch N --runs 1`, two cores).
_CPU_LATENTS = 8 * 16 * 16
# Images that wait for others to share a batch with.
_MAX_WAITING = 64
# Kinds of requests whose batch size is remembered.
_MAX_SIZES = 256
# Memory of one evaluation at 64 × 64 latents: the scores of self-attention in Stable Diffusion 1, held twice
# (`latentrt.bundle.graph_check`). They grow with the square of the area.
_EVALUATION_BYTES, _AREA = 1 << 30, 64 * 64
# Memory that is taken for available where the system does not say: of a GPU, and outside Linux.
_ASSUMED_BYTES = 8 << 30
# Options that the requests of a batch need not share.
_OWN = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "seed", "num_images_per_prompt")
# Texts of the second encoder, and those of the first that they are where they are left out.
_FIRST_TEXTS = {"prompt_2": "prompt", "negative_prompt_2": "negative_prompt"}
# Embeddings, with their number of axes; the first is of prompts.
_EMBEDS = {
    "prompt_embeds": 3,
    "negative_prompt_embeds": 3,
    "pooled_prompt_embeds": 2,
    "negative_pooled_prompt_embeds": 2,
}

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """The result of one image of `generate_many`.

    Attributes:
        request: the number of its request, from 0.
        index: the number of the image, from 0, over all requests in their order.
        result: with this image alone.
    """

    request: int
    index: int
    result: Result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One image to generate: its request's values by keyword, of one prompt and one seed.

    Attributes:
        place: of the request, for errors, such as `request 3`; empty where there is one only.
    """

    place: str
    request: int
    index: int
    values: Values


def generate_many(
    pipeline: Pipeline,
    requests: Iterable[Request],
    batch_size: int | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Iterator[ImageResult]:
    """Yield the result of each image as soon as it is done.

    Images of equal options come in order; others may overtake those that wait for a batch to fill.

    Args:
        pipeline: generates the images.
        requests: any number, read lazily; each may have any number of images. Those in a list or tuple are checked
            before the first image is generated.
        batch_size: images in one batch; None chooses it for each kind of request (`choose_batch_size`). A batch that
            fails is tried again in halves, as memory may have run out.
        progress: called after each step with the number of images that were generated since the last call, a fraction
            of the batch's; with a negative number where a failed batch is tried again.

    Raises:
        RequestError: a request is impossible; the message has its number.
        Others: as `Pipeline.steps` and `Pipeline.finish`, for an image alone.
    """
    if batch_size is not None:
        batch_size = Whole(1, pipeline.bundle.manifest.limits.max_batch)("batch_size", batch_size)
    named = ((f"request {number}", request) for number, request in enumerate(requests, 1))
    if isinstance(requests, Sequence):
        for _ in resolve_batches(pipeline, named):
            pass
        named = ((f"request {number}", request) for number, request in enumerate(requests, 1))
    return _Generation(pipeline, batch_size, progress or (lambda images: None)).run(_list_jobs(named))


class _Generation:
    """A run of `generate_many`: the images that wait for a batch, and the batch size of each kind of request."""

    def __init__(self, pipeline: Pipeline, batch_size: int | None, progress: Callable[[float], None]) -> None:
        self._pipeline, self._batch_size, self._progress = pipeline, batch_size, progress
        self._waiting: dict[Any, list[_Job]] = {}  # the kind whose first image has waited longest comes first
        self._sizes: dict[Any, int] = {}

    def run(self, jobs: Iterator[_Job]) -> Iterator[ImageResult]:
        failure = None
        while True:
            try:
                job = next(jobs)
            except StopIteration:
                break
            except LatentRTError as error:  # raised when the requests before it are done
                failure = error
                break
            kind = _kind(job.values)
            self._waiting.setdefault(kind, []).append(job)
            if kind is None or len(self._waiting[kind]) >= self._size(kind, job):
                yield from self._generate(kind)
            elif sum(map(len, self._waiting.values())) >= _MAX_WAITING:
                yield from self._generate(next(iter(self._waiting)))
        while self._waiting:
            yield from self._generate(next(iter(self._waiting)))
        if failure is not None:
            raise failure

    def _size(self, kind: Any, job: _Job) -> int:
        if kind is None:
            return 1
        if self._batch_size is not None:
            return self._sizes.get(kind, self._batch_size)
        if kind not in self._sizes:
            self._remember(kind, choose_batch_size(self._pipeline, _resolve(self._pipeline, [job])))
        return self._sizes[kind]

    def _remember(self, kind: Any, size: int) -> None:
        self._sizes.pop(kind, None)
        while len(self._sizes) >= _MAX_SIZES:
            del self._sizes[next(iter(self._sizes))]
        self._sizes[kind] = size

    def _generate(self, kind: Any) -> Iterator[ImageResult]:
        """Yield the results of all waiting images of a kind."""
        jobs = self._waiting.pop(kind)
        while jobs:
            batch = jobs[: self._size(kind, jobs[0])]
            result = self._try(batch)
            if result is None:
                self._remember(kind, (len(batch) + 1) // 2)
                continue
            jobs = jobs[len(batch) :]
            for place, job in enumerate(batch):
                yield ImageResult(request=job.request, index=job.index, result=_select(result, place))

    def _try(self, batch: list[_Job]) -> Result | None:
        """Return the result of a batch; None if it failed and a smaller one may not."""
        done = 0.0
        try:
            request = _resolve(self._pipeline, batch)
            share = len(batch) / self._pipeline.count_steps(request)
            with self._pipeline.components.call():
                for step in self._pipeline.steps(request):  # noqa: B007  # the last one is finished
                    done += share
                    self._progress(share)
                return self._pipeline.finish(request, step)
        # A library's failure to allocate has no class of its own, and one image's failure ends the run in any case.
        except (BackendError, SafetyError, RequestError, MemoryError) as error:
            if len(batch) == 1:
                raise
            log.info("a batch of %d images failed, so smaller ones follow: %s", len(batch), error)
        self._progress(-done)
        return None


def choose_batch_size(pipeline: Pipeline, request: ResolvedRequest) -> int:
    """Return the number of images like this one that are generated at once.

    It is the usual one, or the most that an engine is built for, unless the bundle's limit or the memory is smaller. It
    is 1 with `low_memory`, and for large images on a CPU.
    """
    if pipeline.components.low_memory:
        return 1
    sizes = pipeline.family.batch_sizes(request)
    height, width = pipeline.family.latent_space.shape(request.height, request.width)[-2:]
    evaluations = 2 if request.guided else 1
    if sizes is None:
        needed = evaluations * _EVALUATION_BYTES * (height * width / _AREA) ** 2
        on_cpu = pipeline.components.on_cpu
        available = _available_bytes() if on_cpu else _ASSUMED_BYTES
        most = min(_CPU_LATENTS // (height * width) if on_cpu else _USUAL_BATCH, _USUAL_BATCH)
        most = min(most, int(available / 2 / needed))
    else:
        most = max(sizes, default=1)  # an engine holds the memory of its largest size in any case
    own = request.height * request.width * 3 * 2 + height * width * pipeline.family.latent_space.channels * 4 * 10
    return max(1, min(most, pipeline.bundle.manifest.limits.max_batch, MAX_REQUEST_BYTES // 2 // own))


def _available_bytes() -> int:
    """Return the memory that this process may still take: of the machine, and of its control group."""
    available = _ASSUMED_BYTES
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    limit, used = (next(iter(_read_lines(f"/sys/fs/cgroup/memory.{name}")), "") for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        available = min(available, max(int(limit) - int(used), 0))
    return available


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as stream:
            return stream.read(1 << 16).splitlines()
    except (OSError, ValueError):
        return []


def _split_values(request: Request) -> Iterator[Values]:
    """Yield the values of each image of a request: those of the first prompt, then of the second, and so on.

    Random seeds are decided. Values of the wrong type are left to `resolve`.

    Raises:
        RequestError: it is no request, or the number of prompts, negative prompts or seeds does not fit.
    """
    if not isinstance(request, Request):
        raise RequestError(f"got {quote(request)}, expected a request, such as Request.of(prompt='a red circle')")
    values = flat_values(request)
    count = Whole(1)("num_images_per_prompt", request.images_per_prompt)
    prompts = _prompt_values(values)
    images = count * len(prompts)
    for index, seed in enumerate(_list_seeds(request.seed, images)):
        own = values | prompts[index // count] | {"seed": seed, "num_images_per_prompt": 1}
        for key in ("latents", "image"):
            array = values[key]
            if isinstance(array, np.ndarray) and array.ndim == 4 and len(array) == images:  # noise, or latents
                own[key] = array[index : index + 1]
        yield own


def _prompt_values(values: Values) -> list[Values]:
    """Return the values of each prompt: texts, or embeddings [1, tokens, width] and pooled ones [1, width]."""
    lists: dict[str, Sequence[Any]] = {
        key: values[key] for key in _FIRST_TEXTS.values() if isinstance(values[key], (list, tuple))
    }
    for key in _FIRST_TEXTS:
        if isinstance(values[key], (list, tuple)):  # in which an empty text is not left out
            lists[key] = [[text] for text in values[key]]
    for key, axes in _EMBEDS.items():
        if isinstance(values[key], np.ndarray) and values[key].ndim == axes:
            lists[key] = [values[key][index : index + 1] for index in range(len(values[key]))]
    own = "prompt_embeds" if "prompt_embeds" in lists else "prompt"
    count = len(lists.get(own, [None]))
    if not count:
        raise RequestError(f"`{own}`: got an empty list, expected a text or a list of texts")
    for key, listed in lists.items():
        if len(listed) not in ({count} if key == "prompt" or key in _EMBEDS else {count, 1}):
            raise RequestError(f"`{key}`: got {len(listed)} for {count} prompts, expected one for all or one for each")
    return [
        {key: listed[index] if len(listed) == count else listed[0] for key, listed in lists.items()}
        for index in range(count)
    ]


def _list_seeds(seed: Any, images: int) -> Iterator[Any]:
    """Yield the seed of each image; random ones are decided here, others are checked by `resolve`."""
    if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, (str, bytes)):
        count = seed.stop - seed.start if isinstance(seed, range) else len(seed)  # a range of 10³⁰ has no length
        if count != images:
            raise RequestError(
                f"`seed`: got {count} seeds for {images} images, expected one number, or a seed for each image"
            )
        yield from (secrets.randbelow(2**32) if each == RANDOM_SEED else each for each in seed)
        return
    if seed is None or seed == RANDOM_SEED:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        yield from (int(seed) + index for index in range(images))
    else:
        yield from (seed for _ in range(images))


def _second_text(text: Any, first: Any) -> Any:
    """Return the text of the second encoder of one image: its own, or that of the first encoder."""
    if isinstance(text, list):
        return text[0]
    if text is None or (isinstance(text, str) and not text):
        return "" if first is None else first
    return text


def _merge(values: Sequence[Values]) -> Request:
    first, count = values[0], len(values)
    if count == 1:
        return Request.of(**first)
    seeds = [each["seed"] for each in values]
    if first["prompt"] is None:
        return Request.of(**first | {"seed": seeds, "num_images_per_prompt": count})
    own: dict[str, Any] = {"prompt": [each["prompt"] for each in values]}
    if first["negative_prompt"] is not None:  # all or none of a kind have one
        own["negative_prompt"] = [each["negative_prompt"] for each in values]
    for key, other in _FIRST_TEXTS.items():
        if any(each[key] is not None for each in values):
            own[key] = [_second_text(each[key], each[other]) for each in values]
    return Request.of(**first | own | {"seed": seeds})


def resolve_batches(
    pipeline: Pipeline, requests: Iterable[tuple[str, Request]], size: int | None = None
) -> Iterator[tuple[ResolvedRequest, list[Request]]]:
    """Check requests without generating anything: resolve all images, neighbours of equal options at once.

    Args:
        requests: each with its place for errors, such as `request 3`; it may be empty.
        size: the most images of one resolved request; None: the bundle's limit.

    Yields:
        Resolved requests whose images are those of `requests`, in order; and for each image a request of its own.

    Raises:
        RequestError: a request is impossible; the message begins with its place.
    """
    size = pipeline.bundle.manifest.limits.max_batch if size is None else size
    batch: list[_Job] = []
    for job in _list_jobs(requests):
        kind = _kind(job.values)
        if batch and (kind is None or kind != _kind(batch[0].values)):
            yield from _resolve_all(pipeline, batch)
            batch = []
        batch.append(job)
        if len(batch) >= size:
            yield from _resolve_all(pipeline, batch)
            batch = []
    if batch:
        yield from _resolve_all(pipeline, batch)


def _resolve_all(pipeline: Pipeline, jobs: Sequence[_Job]) -> Iterator[tuple[ResolvedRequest, list[Request]]]:
    """Yield the resolved request of all images, or one for each where they are too large together."""
    together = None
    if len(jobs) > 1:
        with contextlib.suppress(RequestError):
            together = _resolve(pipeline, jobs)
    if together is not None:
        yield together, [Request.of(**job.values) for job in jobs]
        return
    for job in jobs:
        yield _resolve(pipeline, [job]), [Request.of(**job.values)]


def _resolve(pipeline: Pipeline, jobs: Sequence[_Job]) -> ResolvedRequest:
    with _naming(jobs[0].place if len(jobs) == 1 else ""):
        resolved = pipeline.resolve(_merge([job.values for job in jobs]))
        pipeline.family.check_prompts(resolved)
        return resolved


def _list_jobs(requests: Iterable[tuple[str, Request]]) -> Iterator[_Job]:
    index = 0
    for number, (place, request) in enumerate(requests):
        with _naming(place):
            for values in _split_values(request):
                yield _Job(place=place, request=number, index=index, values=values)
                index += 1


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Begin the message of a RequestError with the place of its request."""
    try:
        yield
    except RequestError as error:
        if not place:
            raise
        located = RequestError(f"{place}: {error}")
        located.place = place
        raise located from error


def _kind(values: Values) -> tuple[Any, ...] | None:
    """Return a key that is equal for images that may share a batch; None for one that is generated alone."""
    shared = {key: value for key, value in values.items() if key not in _OWN and value is not None}
    if any(OPTIONS[key].check.kind == "python" for key in shared):
        return None  # arrays of one image each
    # Without prompts the images of a request have one negative prompt. One that is left out may stand for zeros.
    alone = values["prompt"] is None and tuple(repr(values[key]) for key in ("negative_prompt", *_FIRST_TEXTS))
    return (*((key, _comparable(value)) for key, value in shared.items()), alone, values["negative_prompt"] is None)


def _comparable(value: Any) -> Any:
    """Return a value that is equal for equal values of an option; an image, which its request holds, is itself."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value), sort_keys=True, default=repr)
    return repr(value) if isinstance(value, (str, int, float, os.PathLike, list, tuple)) else id(value)


def _select(result: Result, place: int) -> Result:
    """Return the result with one of its images."""
    return replace(
        result,
        images=result.images[place : place + 1],
        seeds=result.seeds[place : place + 1],
        verdicts=None if result.verdicts is None else result.verdicts[place : place + 1],
        records=result.records[place : place + 1],
    )
