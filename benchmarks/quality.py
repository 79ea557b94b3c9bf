"""Does a bundle of the sample model draw what it is told?

    .venv/bin/python -m benchmarks.quality                                     # the bundle that the runtime carries
    .venv/bin/python -m benchmarks.quality --graph float32 --graph float16     # two graphs of it, side by side
    .venv/bin/python -m benchmarks.quality my-bundle other-bundle --sampler euler --steps 10

One column for each bundle and graph. A classical judge (`sample/judge.py`) reads pictures of prompts whose combinations
training never saw; the safety graph is asked about pictures that it should flag and pictures that it should not. Bars
are for 25 steps of DDIM with guidance 5; `--bars` fails where one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.full_size import machine
from latentrt import Bundle, Pipeline
from latentrt.backends.onnxruntime import open_session
from latentrt.sample import bundle_path
from sample import quality
from sample.prompts import held_out_prompts
from sample.quality import BARS, Figure, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="*", help="by default the one that the runtime carries")
    parser.add_argument("--graph", action="append", choices=["float32", "float16"], help="may be given twice")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--safety-pictures", type=int, default=512, help="of each kind; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--bars", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--output", type=Path, help="a JSON report")
    arguments = parser.parse_args()
    settings = Settings(arguments.steps, arguments.guidance_scale, arguments.sampler)
    console = Console()
    columns: dict[str, dict[str, Figure]] = {}
    seconds: dict[str, float] = {}
    for bundle in arguments.bundle or [bundle_path()]:
        for graph in arguments.graph or ["float32"]:
            name = f"{bundle.name} {graph}"
            began = time.perf_counter()
            columns[name] = measure(bundle, graph, settings, arguments.prompts, arguments.safety_pictures, console)
            seconds[name] = round(time.perf_counter() - began, 1)
    console.print(as_table(columns))
    failures = [f"{name}: {words}" for name, figures in columns.items() for words in quality.missed(figures)]
    if arguments.output:
        report = {"command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]), "machine": machine()}
        shares = {
            name: {key: [value.right, value.of] for key, value in figures.items()} for name, figures in columns.items()
        }
        arguments.output.write_text(json.dumps({**report, "right_of": shares, "seconds": seconds}, indent=2) + "\n")
    for failure in failures:
        console.print(f"missed: {failure}", highlight=False)
    if failures and arguments.bars:
        sys.exit(1)


def measure(
    path: Path, graph: Any, settings: Settings, prompts: int, safety_pictures: int, console: Console
) -> dict[str, Figure]:
    """Every figure of a bundle run by one of its graphs."""
    bundle = Bundle.open(path)
    pipeline = Pipeline(bundle, lambda component: open_session(bundle, component, precision=graph))
    unguided = replace(settings, guidance_scale=1.0)
    asked = held_out_prompts(prompts, quality.PROMPT_SEED)
    figures: dict[str, Figure] = {}
    with Progress(console=console, transient=True) as progress:
        total = 2 * prompts + 3 * (prompts // 2) + 2 * safety_pictures
        task = progress.add_task(f"{path.name} {graph}", total=total)

        def bar(drawn: int) -> None:
            progress.advance(task, drawn)

        guided, free = (quality.readings(pipeline, one, asked, bar) for one in (settings, unguided))
        figures |= quality.following(asked, guided)
        figures |= {f"{key} (guidance 1)": value for key, value in quality.following(asked, free).items()}
        names = "wholly right with guidance alone", "wholly right without it alone"
        figures |= dict(zip(names, quality.compared(asked, guided, free), strict=True))
        figures |= quality.negatives(pipeline, settings, prompts // 2, bar)
        if safety_pictures:
            figures |= quality.safety(pipeline, settings, safety_pictures, bar)
    return figures


def as_table(columns: dict[str, dict[str, Figure]]) -> Table:
    """One row a figure, one column a bundle and graph."""
    table = Table(box=None, header_style="")
    table.add_column("share of pictures")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("bar", justify="right")
    for key in next(iter(columns.values())):
        cells = [f"{figures[key].share:.1%} of {figures[key].of}" for figures in columns.values()]
        low, high = BARS.get(key, (0.0, 1.0))
        bar = "" if key not in BARS else f"≥ {low:.0%}" if high == 1 else f"≤ {high:.0%}"
        table.add_row(key, *cells, bar)
    return table


if __name__ == "__main__":
    main()
