"""The command `latentrt run`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import counted
from latentrt.cli.command import command, option, settings
from latentrt.cli.output import echo
from latentrt.cli.prompts import prompt_argument
from latentrt.cli.request_options import (
    device_options,
    digest_option,
    given_options,
    precision_options,
    request_options,
)
from latentrt.cli.values import BundlePath
from latentrt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from latentrt.backends.placement import ComputePrecision, Device, Placement
    from latentrt.decode.safety import Verdict
    from latentrt.images.metadata import ImageRecord
    from latentrt.result import Result

__all__ = ["run"]


_MAX_SEEDS = 10_000


class _Seeds(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`7`, a list `7,9,11`, or a range with both ends `7..10`."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Sequence[int]:
        first, dots, last = value.partition("..")
        try:
            if dots:
                seeds = range(int(first), int(last) + 1)
                if seeds.stop - seeds.start > _MAX_SEEDS:  # `len` fails for a range beyond the memory
                    self.fail(f"got {value!r}, expected at most {_MAX_SEEDS:,} seeds", param, ctx)
                return seeds
            return [int(part) for part in value.split(",")] if "," in value else int(value)
        except ValueError:
            self.fail(f"got {value!r}, expected a number, a list such as 7,9,11 or a range such as 7..10", param, ctx)


@command(
    examples=(
        'latentrt run sample "a red circle on a blue background" -o circle.png',
        'latentrt run my-bundle "a lighthouse at dusk" --steps 25 --seed 7 --size 768x512',
        'latentrt run my-bundle "the same at night" --image lighthouse.png --strength 0.6',
        'latentrt run my-bundle "a lighthouse" --sampler "DPM++ 2M Karras" --seed 1..4',
    )
)
@click.argument("bundle", type=BundlePath())
@prompt_argument
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    group="Output",
    help="A .png, .jpg or .webp; several images get a number.",
)
@option(
    "--seed",
    type=_Seeds(),
    group="Images",
    help="A number, a list (7,9,11) or a range (7..10); -1 is random.  [default: random]",
)
@option("--images", type=int, group="Images", help="Images per prompt.  [default: 1, or one for each seed]")
@request_options()
@device_options
@precision_options
@digest_option
def run(
    bundle: Path,
    prompt: tuple[str, ...],
    output: Path,
    seed: int | Sequence[int] | None,
    images: int | None,
    digest: str | None,
    device: Device,
    provider: str | None,
    threads: int | None,
    precision: ComputePrecision | None,
    low_memory: bool,
    **options: Any,
) -> None:
    """Generate one image from BUNDLE for each PROMPT."""
    from latentrt.cli.progress import latents_with_progress
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request
    from latentrt.result import check_places

    started, quiet = time.monotonic(), settings().quiet
    pipeline = Pipeline.load(
        bundle,
        device=device,
        digest=digest,
        threads=threads,
        provider=provider,
        precision=precision,
        low_memory=low_memory,
    )
    request = pipeline.resolve(
        Request.of(
            prompt=prompt or None,
            num_images_per_prompt=_images_per_prompt(images, seed, max(len(prompt), 1)),
            seed=seed,
            **given_options(options),
        )
    )
    check_places(pipeline.bundle, pipeline.family, request, output)
    result = pipeline.finish(request, latents_with_progress(pipeline, request))
    paths = result.save(output)
    if not quiet:
        with contextlib.suppress(OutputError):  # the images are there, wherever the report goes
            _report(paths, result, time.monotonic() - started)
            _report_backends(pipeline.runs_on)


def _images_per_prompt(images: int | None, seed: int | Sequence[int] | None, prompts: int) -> int:
    """Return the number of images per prompt: as given, or that of the seeds divided by that of the prompts.

    Raises:
        RequestError: the number of seeds is 0 or not a multiple of the number of prompts.
    """
    if images is not None or not isinstance(seed, Sequence):
        return 1 if images is None else images
    # A range of 10³⁰ has no length.
    count = max(seed.stop - seed.start, 0) if isinstance(seed, range) else len(seed)
    if count == 0:
        raise RequestError("`seed`: got an empty range, expected first ≤ last, as in 7..10")
    if count % prompts:
        raise RequestError(
            f"`seed`: got {count} seeds for {prompts} prompts, expected a multiple of {prompts}, as all prompts "
            "have the same number of images"
        )
    return count // prompts


def _report(paths: list[Path], result: Result, seconds: float) -> None:
    verdicts = result.verdicts or [None] * len(paths)
    for path, record, verdict in zip(paths, result.records, verdicts, strict=True):
        steps = counted(record.options["num_inference_steps"], "step")
        safety = _describe_safety(record.safety.policy, verdict)
        echo(f"{path}: seed {record.seed}, {_describe_sampler(record)}, {steps}, safety {safety}")
    images = "1 image" if len(paths) == 1 else f"{len(paths)} images"
    echo(f"{images} in {seconds:.1f} s, loading included", err=True)


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
