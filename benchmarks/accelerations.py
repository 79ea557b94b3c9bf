"""What does it cost, and what does it save, to leave work out?

    .venv/bin/python -m benchmarks.approximations scratch/full/int8 --merged scratch/full/int8_merged \\
        --output benchmarks/results/approximations.json

The price is measured on the sample model: how many of its images are fully right (`benchmarks.quality` has the same
judge, prompts and seeds), and how far they are from the exact ones. What is saved, and how far images are from exact
ones where weights are random, is measured on a bundle of full size: rounds over all ways, so that a noisy machine hits
all alike, and medians of the rounds' ratios. Bundles need the parts that are asked for: `latentrt export … --deep-cache
0 --preview-decoder FOLDER`, and `--token-merging 0.5` for those that merge tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.full_size import machine
from latentrt import Pipeline
from latentrt.bundle.sample import bundle_path
from sample.judge import read
from sample.prompts import held_out_prompts
from sample.quality import PROMPT_SEED, Settings, fully_right, generate

Images = NDArray[np.uint8]

# Before anything is timed: the fewest steps in which each way compiles every graph that it will run, for guided and for
# unguided steps.
_WARM_STEPS = 7

PROMPT = "a photograph of an astronaut riding a horse"


@dataclass(frozen=True)
class Way:
    """A way to draw. `merged` is by the bundle that merges tokens."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    merged: bool = False


WAYS = (
    Way("exact"),
    Way("guidance until 0.8", {"guidance_end": 0.8}),
    Way("guidance until 0.6", {"guidance_end": 0.6}),
    Way("guidance until 0.4", {"guidance_end": 0.4}),
    Way("guidance from 0.1 to 0.7", {"guidance_start": 0.1, "guidance_end": 0.7}),
    Way("deep cache 2", {"deep_cache": 2}),
    Way("deep cache 3", {"deep_cache": 3}),
    Way("deep cache 5", {"deep_cache": 5}),
    Way("preview decoder", {"decoder": "preview"}),
    Way("token merging", merged=True),
    Way("guidance until 0.6, deep cache 3", {"guidance_end": 0.6, "deep_cache": 3}),
    Way(
        "guidance until 0.6, deep cache 3, preview decoder",
        {"guidance_end": 0.6, "deep_cache": 3, "decoder": "preview"},
    ),
    Way(
        "guidance until 0.6, deep cache 3, preview decoder, token merging",
        {"guidance_end": 0.6, "deep_cache": 3, "decoder": "preview"},
        merged=True,
    ),
)


@dataclass
class Found:
    """What was measured of one way: seconds and times faster of each round, on the bundle of full size."""

    right: int = 0
    sample_psnr: float | None = None
    psnr: float | None = None
    seconds: list[float] = field(default_factory=list)
    faster: list[float] = field(default_factory=list)


def main() -> None:
    arguments = parse()
    console = Console()
    found = {way.name: Found() for way in WAYS if arguments.merged or not way.merged}
    ways = [way for way in WAYS if way.name in found]
    price(ways, found, arguments)
    save(ways, found, arguments)
    console.print(as_table(found, arguments.prompts))
    report = {
        "command": "python -m benchmarks.approximations " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "runs_on": {name: str(each) for name, each in load(arguments.bundle, arguments).runs_on.items()},
        "sample": {"prompts": arguments.prompts, **asdict(Settings())},
        "ways": {way.name: {"options": way.options, "merged": way.merged, **asdict(found[way.name])} for way in ways},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of full size")
    parser.add_argument("--merged", type=Path, help="the same, exported with --token-merging")
    parser.add_argument("--sample", type=Path, default=bundle_path(), help="by default the one that comes along")
    parser.add_argument("--sample-merged", type=Path, help="the same, exported with --token-merging")
    parser.add_argument("--precision", help="what is computed in; by default the bundle's")
    parser.add_argument("--steps", type=int, default=20, help="of images of full size, by default 20")
    parser.add_argument("--rounds", type=int, default=3, help="by default 3")
    parser.add_argument("--prompts", type=int, default=256, help="of the sample model, by default 256")
    parser.add_argument("--output", type=Path, help="a JSON report")
    arguments = parser.parse_args()
    if (arguments.merged is None) != (arguments.sample_merged is None):
        parser.error("found one of --merged and --sample-merged, expected both or none")
    return arguments


def load(bundle: Path, arguments: argparse.Namespace) -> Pipeline:
    return Pipeline.load(bundle, precision=arguments.precision)


def price(ways: Sequence[Way], found: dict[str, Found], arguments: argparse.Namespace) -> None:
    """How many of the sample model's images stay right, and how far they are from the exact ones."""
    asked = held_out_prompts(arguments.prompts, PROMPT_SEED)
    pipelines = {False: load(arguments.sample, arguments)}
    if arguments.sample_merged:
        pipelines[True] = load(arguments.sample_merged, arguments)
    exact: Images | None = None
    for way in ways:
        settings = replace(Settings(), options=way.options)
        batches = generate(
            pipelines[way.merged], settings, [prompt.text for prompt in asked], progress=lambda count: None
        )
        images = np.concatenate([images for images, _ in batches])
        exact = images if exact is None else exact
        found[way.name].right = fully_right(asked, [read(image) for image in images]).right
        found[way.name].sample_psnr = psnr(images, exact)
        print(f"{way.name}: {found[way.name].right} of {len(asked)} right", flush=True)


def save(ways: Sequence[Way], found: dict[str, Found], arguments: argparse.Namespace) -> None:
    """How much faster images of full size are, and how far from the exact ones."""
    pipelines = {False: load(arguments.bundle, arguments)}
    if arguments.merged:
        pipelines[True] = load(arguments.merged, arguments)
    for way in ways:
        draw(pipelines[way.merged], way, _WARM_STEPS)
    exact: Images | None = None
    for number in range(arguments.rounds):
        for way in ways:
            seconds, images = draw(pipelines[way.merged], way, arguments.steps)
            exact = images if exact is None else exact
            found[way.name].psnr = psnr(images, exact)
            found[way.name].seconds.append(round(seconds, 3))
            found[way.name].faster.append(round(found[ways[0].name].seconds[-1] / seconds, 3))
            print(f"round {number}: {way.name}: {seconds:.1f} s", flush=True)


def draw(pipeline: Pipeline, way: Way, steps: int) -> tuple[float, Images]:
    """One image, and the seconds it took."""
    began = time.perf_counter()
    result: Any = pipeline(
        PROMPT,
        seed=7,
        num_inference_steps=steps,
        guidance_scale=7.5,
        sampler="ddim",
        safety="off",
        output_type="np",
        **way.options,
    )
    return time.perf_counter() - began, np.rint(result.images * 255).astype(np.uint8)


def psnr(images: Images, exact: Images) -> float | None:
    """Peak signal to noise in decibels, over all pixels; None where they are the same."""
    error = float(np.mean((images.astype(np.float64) - exact.astype(np.float64)) ** 2))
    return round(10 * float(np.log10(255**2 / error)), 2) if error else None


def as_table(found: dict[str, Found], prompts: int) -> Table:
    table = Table(box=None, header_style="")
    for heading in ("way", "times faster", "s/image", "PSNR dB", "sample: right", "sample: PSNR dB"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, one in found.items():
        table.add_row(
            name,
            f"{statistics.median(one.faster):.2f}",
            f"{statistics.median(one.seconds):.1f}",
            "" if one.psnr is None else f"{one.psnr:.1f}",
            f"{one.right / prompts:.1%}",
            "" if one.sample_psnr is None else f"{one.sample_psnr:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
