"""Measures the speed-up of each acceleration, and its cost in quality.

    .venv/bin/python -m benchmarks.accelerations scratch/full/int8 --merged scratch/full/int8_merged \\
        --output benchmarks/results/accelerations.json

The cost is measured on the sample model: how many of its images are fully right (with the judge, prompts and seeds of
`benchmarks.quality`), and their PSNR against images without acceleration. The speed-up, and the PSNR with random
weights, are measured on a bundle of full size: in rounds over all variants, so that noise affects all alike, with
medians of the rounds' ratios. Bundles need the parts in use: `latentrt export … --deep-cache 0 --preview-decoder
FOLDER`, and `--token-merging 0.5` for those that merge tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command import FOLDER, PATH, REPORT, benchmark, command_line, write_report
from benchmarks.full_size import machine
from benchmarks.psnr import psnr_db
from latentrt import Pipeline
from latentrt.bundle.sample import bundle_path
from sample.judge import read
from sample.prompts import held_out_prompts
from sample.quality import PROMPT_SEED, Settings, fully_right, generate

Images = NDArray[np.uint8]

# Steps of a warm-up: the fewest in which each variant compiles all its graphs, for guided and for unguided steps.
_WARM_STEPS = 7

PROMPT = "a photograph of an astronaut riding a horse"


@dataclass(frozen=True)
class Variant:
    """A set of accelerations; with `merged`, the bundle with token merging is used."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    merged: bool = False


VARIANTS = (
    Variant("exact"),
    Variant("guidance until 0.8", {"guidance_end": 0.8}),
    Variant("guidance until 0.6", {"guidance_end": 0.6}),
    Variant("guidance until 0.4", {"guidance_end": 0.4}),
    Variant("guidance from 0.1 to 0.7", {"guidance_start": 0.1, "guidance_end": 0.7}),
    Variant("deep cache 2", {"deep_cache": 2}),
    Variant("deep cache 3", {"deep_cache": 3}),
    Variant("deep cache 5", {"deep_cache": 5}),
    Variant("preview decoder", {"decoder": "preview"}),
    Variant("token merging", merged=True),
    Variant("guidance until 0.6, deep cache 3", {"guidance_end": 0.6, "deep_cache": 3}),
    Variant(
        "guidance until 0.6, deep cache 3, preview decoder",
        {"guidance_end": 0.6, "deep_cache": 3, "decoder": "preview"},
    ),
    Variant(
        "guidance until 0.6, deep cache 3, preview decoder, token merging",
        {"guidance_end": 0.6, "deep_cache": 3, "decoder": "preview"},
        merged=True,
    ),
)


@dataclass
class Found:
    """The measurements of one variant: the seconds and the speed-up of each round, on the bundle of full size."""

    right: int = 0
    sample_psnr: float | None = None
    psnr: float | None = None
    seconds: list[float] = field(default_factory=list)
    speed_up: list[float] = field(default_factory=list)


@benchmark("benchmarks.accelerations", __doc__)
@click.argument("bundle", type=FOLDER)
@click.option("--merged", type=FOLDER, help="the bundle of full size, exported with --token-merging")
@click.option("--sample", type=FOLDER, default=bundle_path(), help="the sample bundle", show_default="the runtime's")
@click.option("--sample-merged", type=FOLDER, help="the sample bundle, exported with --token-merging")
@click.option("--precision", help="precision on a CPU; by default the bundle's")
@click.option("--steps", type=int, default=20, help="steps of images of full size")
@click.option("--rounds", type=int, default=3)
@click.option("--prompts", type=int, default=256, help="prompts for the sample model")
@click.option("--output", type=PATH, help=REPORT)
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    if (arguments.merged is None) != (arguments.sample_merged is None):
        raise click.UsageError("got one of --merged and --sample-merged, expected both or none")
    console = Console()
    found = {variant.name: Found() for variant in VARIANTS if arguments.merged or not variant.merged}
    variants = [variant for variant in VARIANTS if variant.name in found]
    measure_quality(variants, found, arguments)
    measure_speed(variants, found, arguments)
    console.print(as_table(found, arguments.prompts))
    report = {
        "command": command_line("benchmarks.accelerations"),
        "machine": machine(),
        "runs_on": {name: str(each) for name, each in load(arguments.bundle, arguments).runs_on.items()},
        "sample": {"prompts": arguments.prompts, **asdict(Settings())},
        "variants": {
            variant.name: {"options": variant.options, "merged": variant.merged, **asdict(found[variant.name])}
            for variant in variants
        },
    }
    if arguments.output:
        write_report(arguments.output, report)


def load(bundle: Path, arguments: SimpleNamespace) -> Pipeline:
    return Pipeline.load(bundle, precision=arguments.precision, progress=False)


def measure_quality(variants: Sequence[Variant], found: dict[str, Found], arguments: SimpleNamespace) -> None:
    """Count the right images of the sample model, and compute their PSNR in decibels against the exact ones."""
    prompts = held_out_prompts(arguments.prompts, PROMPT_SEED)
    pipelines = {False: load(arguments.sample, arguments)}
    if arguments.sample_merged:
        pipelines[True] = load(arguments.sample_merged, arguments)
    exact: Images | None = None
    for variant in variants:
        settings = replace(Settings(), options=variant.options)
        batches = generate(
            pipelines[variant.merged], settings, [prompt.text for prompt in prompts], progress=lambda count: None
        )
        images = np.concatenate([images for images, _ in batches])
        exact = images if exact is None else exact
        found[variant.name].right = fully_right(prompts, [read(image) for image in images]).right
        found[variant.name].sample_psnr = psnr_db(images, exact)
        print(f"{variant.name}: {found[variant.name].right} of {len(prompts)} right", flush=True)


def measure_speed(variants: Sequence[Variant], found: dict[str, Found], arguments: SimpleNamespace) -> None:
    """Time images of full size, and compute their PSNR in decibels against the exact ones."""
    pipelines = {False: load(arguments.bundle, arguments)}
    if arguments.merged:
        pipelines[True] = load(arguments.merged, arguments)
    for variant in variants:
        time_image(pipelines[variant.merged], variant, _WARM_STEPS)
    exact: Images | None = None
    for number in range(arguments.rounds):
        for variant in variants:
            seconds, images = time_image(pipelines[variant.merged], variant, arguments.steps)
            exact = images if exact is None else exact
            found[variant.name].psnr = psnr_db(images, exact)
            found[variant.name].seconds.append(round(seconds, 3))
            found[variant.name].speed_up.append(round(found[variants[0].name].seconds[-1] / seconds, 3))
            print(f"round {number}: {variant.name}: {seconds:.1f} s", flush=True)


def time_image(pipeline: Pipeline, variant: Variant, steps: int) -> tuple[float, Images]:
    """Generate an image; return the wall time in seconds, and the image."""
    began = time.perf_counter()
    result: Any = pipeline(
        PROMPT,
        seed=7,
        num_inference_steps=steps,
        guidance_scale=7.5,
        sampler="ddim",
        safety="off",
        output_type="np",
        **variant.options,
    )
    return time.perf_counter() - began, np.rint(result.images * 255).astype(np.uint8)


def as_table(found: dict[str, Found], prompts: int) -> Table:
    table = Table(box=None, header_style="")
    for heading in ("variant", "speed-up", "s/image", "PSNR dB", "sample: right", "sample: PSNR dB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, one in found.items():
        table.add_row(
            name,
            f"{statistics.median(one.speed_up):.2f}",
            f"{statistics.median(one.seconds):.1f}",
            "" if one.psnr is None else f"{one.psnr:.1f}",
            f"{one.right / prompts:.1%}",
            "" if one.sample_psnr is None else f"{one.sample_psnr:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
