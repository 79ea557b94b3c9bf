"""The command `latentrt run`: any number of images, each written as soon as it is done."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from latentrt.bundle.interrupts import TerminatedError, uninterrupted
from latentrt.bundle.printable import counted, quote
from latentrt.cli.command import command, option, settings
from latentrt.cli.output import echo, echo_bytes, echo_json_text, is_terminal
from latentrt.cli.prompts import prompts_argument
from latentrt.cli.request_options import LoadOptions, given_options, load_options, request_options
from latentrt.cli.values import BundlePath, Suggested
from latentrt.errors import LatentRTError, OutputError, RequestError
from latentrt.request import RANDOM_SEED

if TYPE_CHECKING:
    from latentrt.backends.placement import Placement
    from latentrt.batch.request_lines import RequestFile, RequestLine
    from latentrt.cli.destinations import Destination, Existing, OutputNames
    from latentrt.decode.safety import Verdict
    from latentrt.images.metadata import ImageRecord
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request
    from latentrt.resolve import ResolvedRequest
    from latentrt.result import Result

__all__ = ["MAX_IMAGES", "RunDocument", "RunImage", "RunTotals", "run"]

MAX_IMAGES = 1_000_000
"""Most images of a run whose number is known before; a pipe may ask for more."""
# Images whose plan is kept from the check to the work.
_MAX_KEPT = 32
_MAX_FOLDERS = 1024  # folders that are known to be writable


class RunImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a run.

    Attributes:
        path: the file; null for standard output.
        index: number of the image in the run, from 0.
        flagged: by the safety classifier; null where nothing was checked.
        timings: seconds of each kind of work, of the whole batch that the image was generated in.
    """

    path: str | None
    index: int
    seed: int
    prompt: str | None
    negative_prompt: str | None
    width: int
    height: int
    sampler: str
    steps: int
    guidance_scale: float
    safety_policy: str
    flagged: bool | None
    timings: dict[str, float]


class RunTotals(msgspec.Struct, frozen=True, kw_only=True):
    """The totals of a run.

    Attributes:
        done: number of images that were generated. skipped: number of existing files that were kept.
        total: number of images that were requested; null where a pipe ended early.
        seconds: wall time, loading included.
        stopped: `interrupted`, or the error that ended the run; null where nothing did.
    """

    done: int
    skipped: int
    total: int | None
    seconds: float
    stopped: str | None = None


class RunDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt run --json`.

    Attributes:
        bundle: the folder. digest: of bundle.json.
        runs_on: a description of the backend by component.
    """

    bundle: str
    digest: str
    runs_on: dict[str, str]
    images: list[RunImage]
    totals: RunTotals


class _Seeds(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`7`, a list `7,9,11`, or a range with both ends `7..10`."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Sequence[int]:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may convert twice
        first, dots, last = value.partition("..")
        try:
            if dots:
                seeds = range(int(first), int(last) + 1)
                if seeds.stop - seeds.start > MAX_IMAGES:  # `len` fails for a range beyond the memory
                    self.fail(f"got {quote(value)}, expected at most {MAX_IMAGES:,} seeds", param, ctx)
                return seeds
            return [int(part) for part in value.split(",")] if "," in value else int(value)
        except ValueError:
            self.fail(
                f"got {quote(value)}, expected a number, a list such as 7,9,11 or a range such as 7..10", param, ctx
            )


@command(
    examples=(
        'latentrt run sample "a red circle on a blue background" -o circle.png',
        'latentrt run my-bundle "a lighthouse at dusk" --steps 25 --seed 7 --size 768x512',
        'latentrt run my-bundle "the same at night" --image lighthouse.png --strength 0.6',
        'latentrt run my-bundle "a lighthouse" --seed 1..100 -o "lighthouse-{seed}.png"',
        "latentrt run my-bundle --prompts prompts.txt --count 4 -o images/",
        'latentrt run my-bundle --prompts requests.jsonl -o "{sampler}/{index:04}-{prompt}.webp" --skip-existing',
    )
)
@click.argument("bundle", type=BundlePath())
@prompts_argument
@option(
    "--prompts",
    "prompts",
    type=click.Path(allow_dash=True),
    metavar="FILE",
    group="Prompt",
    help="A file with a prompt on each line (lines that are empty or begin with # are skipped), or of JSON lines: "
    "objects with the keywords of latentrt.Pipeline, and `output`. - is standard input.",
)
@option(
    "-o",
    "--output",
    type=click.Path(allow_dash=True),
    metavar="NAME",
    group="Output",
    help="A .png, .jpg or .webp; a folder, with / at the end; - for standard output. May have the fields {index} "
    "{seed} {prompt} {sampler} {steps} {guidance_scale} {width} {height} {date}, as in {index:04}; several images get "
    "a number.  [default: out.png, or the next free name]",
)
@option(
    "--format",
    type=Suggested(lambda: ("png", "jpeg", "webp")),
    metavar="png|jpeg|webp",
    group="Output",
    help="Where the name has no extension.",
)
@option("--overwrite", is_flag=True, group="Output", help="Replace existing files.")
@option("--skip-existing", is_flag=True, group="Output", help="Keep existing files, and generate the other images.")
@option(
    "--seed",
    type=_Seeds(),
    group="Images",
    help="A number, of which image i takes the sum with i; a list (7,9,11) or a range (7..10), one for each image; -1 "
    "is random.  [default: random]",
)
@option(
    "--count",
    "num_images_per_prompt",
    type=int,
    group="Images",
    help="Images per prompt.  [default: 1, or one for each seed]",
)
@option(
    "--batch-size",
    type=int,
    group="Machine",
    help="Images that are generated at once.  [default: as many as fit memory]",
)
@option(
    "--refiner",
    type=BundlePath(),
    group="Stable Diffusion XL",
    help="A bundle of a refiner, which goes on where BUNDLE stops: at --denoising-end, 0.8 by default.",
)
@request_options()
@load_options
def run(
    bundle: Path,
    prompt: tuple[str, ...],
    prompts: str | None,
    output: str | None,
    format: str | None,  # noqa: A002  # the option's name
    overwrite: bool,
    skip_existing: bool,
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int | None,
    batch_size: int | None,
    refiner: Path | None,
    machine: LoadOptions,
    **options: Any,
) -> None:
    """Generate images from BUNDLE: one for each PROMPT, or for each line of a file, or several.

    Each image is written as soon as it is done. A run that was interrupted is continued by the same command with
    --skip-existing.
    """
    from latentrt.batch.request_lines import RequestFile
    from latentrt.cli.destinations import OutputNames

    started = time.monotonic()
    if overwrite and skip_existing:
        raise RequestError("got `overwrite` and `skip_existing`, expected one of the two")
    if prompt and prompts is not None:
        raise RequestError("got `prompt` and `prompts`, expected one of the two")
    existing: Existing = "overwrite" if overwrite else "skip" if skip_existing else "refuse"
    with contextlib.ExitStack() as stack:
        file = None if prompts is None else stack.enter_context(contextlib.closing(RequestFile(prompts)))
        requests = _Requests(prompt, file, given_options(options), num_images_per_prompt, seed)
        total = requests.measure() if requests.can_be_read_again else None
        names = OutputNames(output, format, existing, several=total != 1)
        _check_standard_output(names, total)
        pipeline = machine.load(bundle)
        if refiner is not None:
            from latentrt.refinement import RefinedPipeline

            pipeline = RefinedPipeline(pipeline, replace(machine, digest=None).load(refiner))
        _Run(pipeline, requests, names, existing, total, started).work(
            1 if total == 1 and batch_size is None else batch_size
        )


def _check_standard_output(names: OutputNames, total: int | None) -> None:
    if names.main is None:
        if settings().json:
            raise RequestError(
                "got `output` - and --json, which both write to standard output; expected one of the two"
            )
        if total not in (1, None):
            raise RequestError(f"`output`: got - for {total:,} images, expected one image; give a folder or a name")
        if is_terminal():
            raise OutputError("`output`: got -, and standard output is a terminal; redirect it to a file or a program")


@dataclass(kw_only=True)
class _Entry:
    """A request of one or several images, from an argument or a line of a file; `left` images are not planned yet; the
    seed of one is random if `is_random`."""

    line: RequestLine
    request: Request
    images: int
    left: int
    is_random: bool


class _Requests:
    """The requests of a run: those of the arguments, or of a file.

    Args:
        prompts: of the arguments; none: one request without a prompt, unless there is a file.
        options: of all requests, by keyword; a line's own come first.
        count: images per prompt; None: 1, or one for each seed.
        seed: as given; image i takes `seed` + i, or the i-th of several.

    Attributes:
        can_be_read_again: whether the requests can be iterated more than once.
        random_seed: the seed of the first image where none is given.
        used_random_seed: whether a request had no seed of its own so far.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        file: RequestFile | None,
        options: Mapping[str, Any],
        count: int | None,
        seed: int | Sequence[int] | None,
    ) -> None:
        from latentrt.request import Whole

        self._prompts, self._file, self._options = prompts, file, options
        self._count = None if count is None else Whole(1)("num_images_per_prompt", count)
        self._seed = None if seed == RANDOM_SEED else seed
        self.can_be_read_again = file is None or file.seekable
        self.random_seed, self.used_random_seed = secrets.randbelow(2**32), False
        if isinstance(seed, range) and seed.start < 0:
            raise RequestError(f"`seed`: got {seed.start}..{seed.stop - 1}, expected whole numbers of at least 0")
        if isinstance(seed, Sequence) and not self.can_be_read_again:
            raise RequestError(
                "`seed`: got several for a pipe, whose number of requests is unknown; expected one number, or a seed "
                "in each line of JSON"
            )

    def measure(self) -> int:
        """Return the number of images, and decide how many each prompt has.

        Raises:
            RequestError: the seeds do not fit, there are too many images, or a line is no request.
        """
        # Every prompt has an image at least: a file of billions of lines is read as far as it can be generated.
        prompts = 0
        for line in self._lines():
            if (prompts := prompts + _count_prompts(line)) > MAX_IMAGES:
                raise _too_many(f"more than {MAX_IMAGES:,}")
        seeds = len(self._seed) if isinstance(self._seed, Sequence) else None
        if seeds == 0:
            raise RequestError("`seed`: got an empty range, expected first ≤ last, as in 7..10")
        if prompts == 0:
            raise RequestError("`prompts`: got a file without requests, expected one on each line")
        if self._count is None and seeds is not None:
            if seeds % prompts:
                raise RequestError(
                    f"`seed`: got {seeds} seeds for {prompts} prompts, expected a multiple of {prompts}, as all "
                    "prompts have the same number of images"
                )
            self._count = seeds // prompts
        total = sum(_count_prompts(line) * self._count_images(line) for line in self._lines())
        if total > MAX_IMAGES:
            raise _too_many(f"{total:,}")
        if seeds not in (None, total):
            raise RequestError(
                f"`seed`: got {seeds} seeds for {total} images, expected one number, or a seed for each image"
            )
        return total

    def __iter__(self) -> Iterator[_Entry]:
        from latentrt.request import Request

        first = 0
        for line in self._lines():
            images = _count_prompts(line) * self._count_images(line)
            values = {
                **self._options,
                **line.values,
                "seed": self._find_seed(line, first, images),
                "num_images_per_prompt": self._count_images(line),
            }
            random = self._is_random(line)
            self.used_random_seed |= random
            yield _Entry(line=line, request=Request.of(**values), images=images, left=images, is_random=random)
            first += images

    def _lines(self) -> Iterator[RequestLine]:
        from latentrt.batch.request_lines import RequestLine

        if self._file is not None:
            yield from self._file.lines()
        else:
            texts: Sequence[str | None] = self._prompts or [None]
            yield from (RequestLine("", {"prompt": text}) for text in texts)

    def _count_images(self, line: RequestLine) -> int:
        from latentrt.request import Whole

        count = line.values.get("num_images_per_prompt")
        if count is None:
            return 1 if self._count is None else self._count
        try:
            return Whole(1)("num_images_per_prompt", count)
        except RequestError as error:
            raise _of_line(line, error) from None

    def _is_random(self, line: RequestLine) -> bool:
        """Return whether the seed of one of a line's images is random: neither the line nor the command has it."""
        own = line.values.get("seed")
        return self._seed is None and (RANDOM_SEED in own if isinstance(own, list) else own in (None, RANDOM_SEED))

    def _find_seed(self, line: RequestLine, first: int, images: int) -> Any:
        """Return the seeds of a line's images, of which the first is number `first` of the run."""
        own = line.values.get("seed")
        if isinstance(own, list) and len(own) == images:  # another number is refused when it is resolved
            return [self._seed_of(first + place) if seed == RANDOM_SEED else seed for place, seed in enumerate(own)]
        if own not in (None, RANDOM_SEED):
            return own
        return self._seed[first : first + images] if isinstance(self._seed, Sequence) else self._seed_of(first)

    def _seed_of(self, image: int) -> int:
        """Return the seed of an image that has none of its own, by its number in the run: the same in each reading."""
        if isinstance(self._seed, Sequence):
            return self._seed[image]
        return image + (self.random_seed if self._seed is None else self._seed)


def _count_prompts(line: RequestLine) -> int:
    prompt = line.values.get("prompt")
    return max(len(prompt), 1) if isinstance(prompt, list) else 1  # an empty list is refused when it is resolved


def _too_many(images: str) -> RequestError:
    return RequestError(f"got {images} images, expected at most {MAX_IMAGES:,} in one run; split it")


def _of_line(line: RequestLine, error: LatentRTError) -> LatentRTError:
    """Return the error with the place of its line, and the line's own fields as they are written there."""
    text = str(error)
    for keyword in (*line.values, "output"):
        text = text.replace(f"`{keyword}`", keyword) if line.place else text
    if line.place and getattr(error, "place", "") != line.place:
        text = f"{line.place}: {text}"
    return type(error)(text)


@dataclass(frozen=True, kw_only=True)
class _Image:
    """An image of the plan.

    Attributes:
        request: of this image alone.
        path, destination: None for standard output.
    """

    index: int
    request: Request
    path: Path | None
    destination: Destination | None
    file_format: str


@dataclass
class _Run:
    """A run: which images it has, and how many of them are done.

    Args:
        total: the number of images; None: unknown.
        started: of the command, as `time.monotonic` counts.
    """

    pipeline: Pipeline
    requests: _Requests
    names: OutputNames
    existing: Existing
    total: int | None
    started: float
    done: int = 0
    skipped: int = 0
    _printed: bool = False  # the beginning of the JSON document
    _lost: OutputError | None = None  # why the JSON document is incomplete
    _waiting: dict[int, _Image] = field(default_factory=dict)  # by the number of its request
    _folders: set[Path] = field(default_factory=set)  # known to be writable

    def work(self, batch_size: int | None) -> None:
        """Check everything that can be checked before, then generate and write each image.

        Raises:
            RequestError, OutputError: before the work where the requests can be read again.
        """
        kept = None
        if self.requests.can_be_read_again:
            kept = self._check()
        elif self.names.main is None:
            kept = [*islice(self._plan(), 2)]  # the whole plan, or one too many
            if len(kept) > 1:
                raise RequestError("`output`: got - for several images, expected one; give a folder or a name")
        try:
            if self.total is None or self.skipped < self.total:
                self.skipped = 0
                self._generate(batch_size, self._plan() if kept is None else iter(kept))
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | TerminatedError)
            self._finish("interrupted" if interrupted else str(error) or type(error).__name__)
            raise
        self._finish(None)
        if self._lost is not None:  # the images are there, the result that was asked for is not
            raise self._lost

    def _plan(self) -> Iterator[_Image]:
        """Yield the images of the run in order.

        Raises:
            RequestError, OutputError: a request is impossible; the message has its line.
        """
        from latentrt.batch.generation import resolve_batches

        entries, index = deque[_Entry](), 0

        def pull() -> Iterator[tuple[str, Request]]:
            for entry in self.requests:
                entries.append(entry)
                yield entry.line.place, entry.request

        # A pipe's requests are worked on as they come.
        batches = resolve_batches(self.pipeline, pull(), None if self.requests.can_be_read_again else 1)
        while True:
            try:
                resolved, requests = next(batches, (None, []))
            except RequestError as error:
                line = next((each.line for each in entries if error.place and each.line.place == error.place), None)
                raise error if line is None else _of_line(line, error) from None
            if resolved is None:
                return
            for number, request in enumerate(requests):
                entry = entries[0]
                try:
                    yield self._place(entry, resolved, number, request, index)
                except (RequestError, OutputError) as error:
                    raise _of_line(entry.line, error) from None
                index, entry.left = index + 1, entry.left - 1
                if not entry.left:
                    entries.popleft()

    def _place(self, entry: _Entry, resolved: ResolvedRequest, number: int, request: Request, index: int) -> _Image:
        from latentrt.images.files import encode_texts
        from latentrt.result import expected_texts

        destination, path = self.names.main, None
        if entry.line.output is not None or destination is not None:
            destination = self.names.of_request(entry.line.output, several=entry.images > 1)
            if self.existing == "skip" and entry.is_random and "seed" in destination.template.fields:
                raise RequestError(
                    "`skip_existing`: the name has a random seed, so no existing file would have it; give `seed`"
                )
            path = self.names.place(destination, resolved, number, index)
        file_format = self.names.file_format if destination is None else destination.file_format
        if file_format == "JPEG":  # which has room for a part of the longest prompts
            encode_texts(file_format, expected_texts(self.pipeline.bundle, self.pipeline.family, resolved, number))
        return _Image(index=index, request=request, path=path, destination=destination, file_format=file_format)

    def _check(self) -> list[_Image] | None:
        """Check every request and every name; return the plan if it is short."""
        hashes, depths, kept = array("q"), set[int](), list[_Image]()
        for image in self._plan():
            self.skipped += self._is_kept(image)
            if image.path is not None and image.destination is not None and not image.destination.is_numbered:
                hashes.append(hash(_fold(image.path)))
                depths.add(len(image.path.parts))
            if image.index < _MAX_KEPT:
                kept.append(image)
        self._check_distinct(hashes)
        if len(depths) > 1:  # files of one depth are in no other
            self._check_folders({*hashes})
        return kept if len(kept) == self.total else None

    def _is_kept(self, image: _Image) -> bool:
        """Return whether an image's file exists and is to be kept, after checking that it can be written.

        Raises:
            OutputError: it exists and must not, or cannot be written.
        """
        from latentrt.cli.destinations import refuse_file
        from latentrt.images.files import check_folder, find_file

        if image.path is None or image.destination is None:
            return False
        exists = find_file(image.path)
        if exists and self.existing == "refuse":
            raise refuse_file(image.path, skips=True)
        if not exists and image.path.parent not in self._folders:
            check_folder(image.path, make=image.destination.makes_folders)
            if len(self._folders) < _MAX_FOLDERS:
                self._folders.add(image.path.parent)
        return exists and self.existing == "skip"

    def _check_distinct(self, hashes: array[int]) -> None:
        """Check that no two images have one name, also where upper and lower case are the same.

        Args:
            hashes: of the names that are not numbered: 8 bytes for each image.

        Raises:
            OutputError: two have.
        """
        import numpy as np

        found, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
        twice, seen = {*found[counts > 1].tolist()}, dict[str, int]()
        for image in self._plan() if twice else ():
            if (name := _fold(image.path)) in seen:
                raise OutputError(
                    f"`output`: got {image.path} for the images {seen[name]} and {image.index}, expected a name for "
                    "each; add {index}"
                )
            if hash(name) in twice:
                seen[name] = image.index

    def _check_folders(self, hashes: set[int]) -> None:
        """Check that no image's name is the folder of another.

        Args:
            hashes: of the names.

        Raises:
            OutputError: one is.
        """
        for image in self._plan():
            for folder in () if image.path is None else image.path.parents:
                if hash(_fold(folder)) in hashes:
                    raise OutputError(
                        f"`output`: got {folder} for an image and {image.path} for another, expected a folder of "
                        "another name"
                    )

    def _generate(self, batch_size: int | None, plan: Iterator[_Image]) -> None:
        from latentrt.batch.generation import generate_many
        from latentrt.cli.progress import Progress

        with Progress() as progress:
            task, amount = progress.task("images", self.total), 0.0

            def advance(images: float) -> None:
                nonlocal amount
                amount += images
                task.update(round(amount, 1))

            for made in generate_many(self.pipeline, self._todo(plan, advance), batch_size, progress=advance):
                image = self._waiting.pop(made.request)
                with uninterrupted():
                    written = self._write(image, made.result)
                    self.done, self.skipped = self.done + written, self.skipped + (not written)
                if written:
                    self._report(image, made.result)

    def _todo(self, plan: Iterator[_Image], progress: Callable[[float], None]) -> Iterator[Request]:
        """Yield the requests of the images that have to be generated."""
        number = 0
        for image in plan:
            if self._is_kept(image):
                self.skipped += 1
                progress(1)
                continue
            self._waiting[number] = image
            number += 1
            yield image.request

    def _write(self, image: _Image, result: Result) -> bool:
        """Write an image; return False if another program has written it meanwhile, and its file is to be kept."""
        from latentrt.images.files import encode, make_folder, save
        from latentrt.images.metadata import record_texts

        texts = record_texts(result.records[0])
        if image.path is None or image.destination is None:
            echo_bytes(encode(result.images[0], image.file_format, texts))
            return True
        if self._is_kept(image):
            return False
        if image.destination.makes_folders:
            make_folder(image.path)
        save(result.images[0], image.path, texts, image.file_format)
        return True

    def _report(self, image: _Image, result: Result) -> None:
        with self._reporting():
            if settings().json:
                self._print_json(image, result)
            elif not settings().quiet:
                echo(_describe_image(image, result), err=image.path is None)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Go on if a report cannot be written within the block: the image is there, wherever the report goes."""
        try:
            yield
        except OutputError as error:
            if settings().json and self._lost is None:
                self._lost = error

    def _finish(self, stopped: str | None) -> None:
        seconds = time.monotonic() - self.started
        with self._reporting():
            if settings().json:
                self._print_totals(seconds, stopped)
            if settings().quiet:
                return
            if stopped is not None:
                if (done := self.done + self.skipped) > 0:
                    made = (
                        counted(done, "image") if self.total is None else f"{done:,} of {counted(self.total, 'image')}"
                    )
                    echo(f"{made} done; {self._describe_rest()}", err=True)
                return
            kept = f", {counted(self.skipped, 'file')} kept" if self.skipped else ""
            echo(f"{counted(self.done, 'image')} in {seconds:.1f} s, loading included{kept}", err=True)
            if self.done:
                _report_backends(self.pipeline.runs_on)

    def _describe_rest(self) -> str:
        """Return how a run is continued."""
        more = [f"--seed {self.requests.random_seed}"] if self.requests.used_random_seed else []
        if self.names.main is not None and click.get_current_context().params.get("output") is None:
            more.append(f'-o "{self.names.main.template.text}"')
        return f"for the others, give the same command with {' '.join([*more, '--skip-existing'])}"

    def _print_json(self, image: _Image | None, result: Result | None) -> None:
        """Print the next piece of the document, so that its size is not bound by memory."""
        if not self._printed:
            bundle = self.pipeline.bundle
            start = {
                "bundle": str(bundle.folder),
                "digest": bundle.digest,
                "runs_on": {name: str(placement) for name, placement in self.pipeline.runs_on.items()},
            }
            echo_json_text(json.dumps(start, indent=2).removesuffix("\n}") + ',\n  "images": [')
        if image is not None and result is not None:
            separator = "," if self._printed else ""
            echo_json_text(f"{separator}    {_encode(_describe_as_json(image, result))}")
        self._printed = True

    def _print_totals(self, seconds: float, stopped: str | None) -> None:
        if not self._printed:
            self._print_json(None, None)
        totals = RunTotals(
            done=self.done, skipped=self.skipped, total=self.total, seconds=round(seconds, 3), stopped=stopped
        )
        echo_json_text(f'  ],\n  "totals": {_encode(totals)}\n}}')


def _fold(path: Path | None) -> str:
    return str(path).casefold()


def _encode(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _describe_as_json(image: _Image, result: Result) -> RunImage:
    record, options = result.records[0], result.records[0].options
    width, height = result.images[0].size
    return RunImage(
        path=None if image.path is None else str(image.path),
        index=image.index,
        seed=record.seed,
        prompt=record.prompt,
        negative_prompt=record.negative_prompt,
        width=width,
        height=height,
        sampler=options["sampler"],
        steps=options["num_inference_steps"],
        guidance_scale=options["guidance_scale"],
        safety_policy=record.safety.policy,
        flagged=record.safety.flagged,
        timings={name: round(value, 4) for name, value in vars(result.timings).items()},
    )


def _describe_image(image: _Image, result: Result) -> str:
    record, verdict = result.records[0], result.verdicts[0] if result.verdicts else None
    steps = counted(record.options["num_inference_steps"], "step")
    safety = _describe_safety(record.safety.policy, verdict)
    where = "standard output" if image.path is None else image.path
    return f"{where}: seed {record.seed}, {_describe_sampler(record)}, {steps}, safety {safety}"


def _describe_sampler(record: ImageRecord) -> str:
    """Return the sampler's name and the options of its configuration that are set."""
    options = record.options
    changed = {"use_karras_sigmas": options.get("karras"), **options.get("sampler_options", {})}
    shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in changed.items() if value}
    described = [name if text == "true" else f"{name}={text}" for name, text in shown.items()]
    return " ".join([options["sampler"], *described])


def _report_backends(runs_on: Mapping[str, Placement]) -> None:
    described = {name: placement.summary for name, placement in runs_on.items()}
    for text in dict.fromkeys(described.values()):
        components = [name for name, each in described.items() if each == text]
        echo(f"{'all' if len(components) == len(runs_on) else ', '.join(components)} on {text}", err=True)


def _describe_safety(policy: str, verdict: Verdict | None) -> str:
    if verdict is None:
        return "off"
    if not verdict.flagged:
        return f"{policy}: clear"
    concepts = ", ".join(map(str, verdict.concepts)) or "none"
    return f"{policy}: flagged, concepts {concepts}, highest score {max(verdict.concept_scores):+.3f}"
