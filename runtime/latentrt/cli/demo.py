"""The command `latentrt demo`: images of the sample bundle, which ships with the package."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from latentrt.bundle.printable import counted
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.prompts import prompts_argument
from latentrt.cli.request_options import SPELLING, given_options, request_options
from latentrt.errors import OutputError

__all__ = ["PROMPTS", "DemoDocument", "demo"]

PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star on a black background",
    "a big green heart on a white background",
    "a purple triangle on a yellow background",
    "a white cross on a red background",
    "an orange square on the left on a green background",
    "a small black circle at the top on an orange background",
    "a green star left of a blue square",
    "a large red heart above a small white circle on a black background",
    "a yellow triangle below a purple square on a white background",
    "a white star to the right of an orange cross on a purple background",
    "a small blue circle on the left of a big black heart, yellow background",
)


class DemoDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt demo --json`.

    Attributes:
        sheet: the file.
        flagged: number of images that the safety classifier blocked.
        seconds: loading included.
        again: the command line that generates the first image alone.
    """

    sheet: str
    images: int
    flagged: int
    seconds: float
    again: list[str]


@command(
    examples=(
        "latentrt demo",
        'latentrt demo "a white heart above a small red square on a black background" -o heart.png',
        'latentrt demo "a red circle" "a green star" --sampler euler --steps 10',
    )
)
@prompts_argument
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    group="Output",
    help="A .png, .jpg or .webp.  [default: demo.png, or the next free name]",
)
@option("--overwrite", is_flag=True, group="Output", help="Replace an existing file.")
@request_options("negative_prompt", "num_inference_steps", "sampler", "guidance_scale")
@option("--seed", type=int, default=7, group="Images", help="Of the first image; image i takes seed + i.")
def demo(prompt: tuple[str, ...], output: Path | None, overwrite: bool, seed: int, **options: Any) -> None:
    """Generate an image for each PROMPT, or for twelve built-in ones, with the sample bundle, on one sheet.

    The sample model generates circles, squares, triangles, stars, hearts and crosses, one or two per image, in red,
    orange, yellow, green, blue, purple, white and black. Its images are 64 × 64 pixels and enlarged on the sheet;
    `latentrt run` writes them in their own size, with their metadata.
    """
    from latentrt.bundle.sample import SAMPLE
    from latentrt.cli.destinations import choose_file
    from latentrt.cli.progress import latents_with_progress
    from latentrt.images.contact_sheet import contact_sheet
    from latentrt.images.files import save
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request

    began = time.monotonic()
    place = choose_file(output, "demo.png", overwrite=overwrite)
    pipeline = Pipeline.load()
    prompts, given = prompt or PROMPTS, given_options(options)
    request = pipeline.resolve(Request.of(prompt=prompts, seed=seed, **given))
    result = pipeline.finish(request, latents_with_progress(pipeline, request))
    save(contact_sheet(result.images, prompts), place)
    alone = {"seed": request.seeds[0], **given}
    flags = [str(part) for keyword, value in alone.items() for part in (SPELLING[keyword], value)]
    document = DemoDocument(
        sheet=str(place),
        images=len(prompts),
        flagged=sum(result.nsfw_content_detected or ()),
        seconds=round(time.monotonic() - began, 3),
        again=["latentrt", "run", SAMPLE, prompts[0], *flags, "-o", "image.png"],
    )
    with contextlib.suppress(OutputError):  # the sheet is there, wherever the report goes
        if settings().json:
            echo_document(document)
        elif not settings().quiet:
            _print(document)


def _print(document: DemoDocument) -> None:
    blocked = f", {document.flagged} of them blocked by the safety classifier" if document.flagged else ""
    images = counted(document.images, "image")
    echo(f"{document.sheet}: {images} in {document.seconds:.1f} s, loading included{blocked}")
    echo(f"the first alone: {shlex.join(document.again)}")
