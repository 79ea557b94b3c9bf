"""Measures latentrt and comparable programs on a CPU in one run.

    .venv/bin/python -m benchmarks.full_size_checkpoint scratch/full/checkpoint
    .venv/bin/python -m benchmarks.peers scratch/full/checkpoint --work scratch/peers \\
        --output benchmarks/results/peers.json --markdown scratch/peers.md --plot docs/peers.svg

Makes an environment for each program and converts the checkpoint for it, once, under `--work` (about 35 GB); then
measures all configurations (`peer_catalogue.py`) in rounds, each time in a process of its own, so that other load
affects all of them. Every program generates from the same prompt and noise with the same sampler (Euler, timesteps from
999 to 0), on all cores, without a safety checker, with its files in the page cache. The report is written after every
process; values are medians of the rounds' medians, ratios medians of the rounds' ratios. `--components` runs the
components alone and generates no images.

`--render REPORT` writes the tables and the plot of a report and measures nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from benchmarks.command import PATH, REPORT, benchmark, write_report
from benchmarks.full_size import PROMPT, machine
from benchmarks.peer_adapters.protocol import Job
from benchmarks.peer_catalogue import REFERENCE, Configuration, select
from benchmarks.peer_environments import UnavailableError, describe_environment, make_environment
from benchmarks.peer_models import convert, file_bytes, warm
from benchmarks.peer_process import measure
from benchmarks.peer_report import markdown
from benchmarks.psnr import psnr_db
from latentrt.backends.openvino import computes_in_bfloat16
from latentrt.sampling import noise

__all__ = ["Bench"]

GUIDANCE_SCALE = 7.5


@benchmark("benchmarks.peers", __doc__)
@click.argument("checkpoint", type=PATH, required=False)
@click.option("--work", type=PATH, help="folder of environments, models and images; kept")
@click.option("--output", type=PATH, help=REPORT)
@click.option("--markdown", type=PATH, help="the tables")
@click.option("--plot", type=PATH, help="the plot, an SVG file; needs matplotlib")
@click.option("--render", type=PATH, metavar="REPORT", help="render this report, measure nothing")
@click.option("--only", multiple=True, metavar="WORDS", help="configurations whose name has the words; may be repeated")
@click.option("--steps", type=click.IntRange(2), default=10)
@click.option("--size", type=click.IntRange(64), default=512, help="side of an image in pixels")
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--images", type=click.IntRange(1), default=2, help="images after the first, in each round")
@click.option("--calls", type=click.IntRange(1), default=5, help="calls of each component alone, in each round")
@click.option("--components", is_flag=True, help="only run components alone; no images")
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)))
@click.option("--seed", type=int, default=0)
@click.option("--timeout", type=float, default=3600.0, help="time limit of one process, in seconds")
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    check(arguments)
    if arguments.render is not None:
        report = json.loads(arguments.render.read_text())
    else:
        bench = Bench(arguments)
        report = bench.report
        for configuration in select(arguments.only):
            bench.prepare(configuration)
        for number in range(arguments.rounds):
            bench.round(number)
    table = markdown(report)
    print(table)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(table + "\n")
    if arguments.plot is not None:
        from benchmarks.peer_plot import write_plot

        write_plot(report, arguments.plot)


def check(arguments: SimpleNamespace) -> None:
    """Refuse arguments that do not belong together."""
    if arguments.render is None and None in (arguments.checkpoint, arguments.work, arguments.output):
        raise click.UsageError("expected a checkpoint, --work and --output, or --render")
    if arguments.size % 64:
        raise click.UsageError(f"got --size {arguments.size}, expected a multiple of 64")


class Bench:
    """One run of the comparison, and its report, which is written after every process."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        self.arguments, self.work = arguments, arguments.work.resolve()
        self.python_of: Callable[[str], Path] = cache(lambda name: make_environment(name, self.work / "environments"))
        self.ready: dict[str, tuple[Configuration, Path, Path]] = {}
        options = ("steps", "size", "rounds", "images", "calls", "components", "threads", "seed")
        self.report: dict[str, Any] = {
            "command": _command(arguments),
            "machine": machine(),
            "settings": {
                **{name: getattr(arguments, name) for name in options},
                "prompt": PROMPT,
                "guidance_scale": GUIDANCE_SCALE,
            },
            "environments": {},
            "configurations": {},
            "skipped": {},
        }
        (self.work / "images").mkdir(parents=True, exist_ok=True)
        self._write_noise("noise", arguments.seed)
        self._write_noise("other", arguments.seed + 1)

    def _write_noise(self, name: str, seed: int) -> None:
        side = self.arguments.size // 8
        (self.work / name).write_bytes(noise.Generator(seed).normal((1, 4, side, side)).tobytes())

    def prepare(self, configuration: Configuration) -> None:
        """Prepare a configuration's environment and model, or record the reason for skipping it."""
        name, environment = configuration.name, configuration.environment
        try:
            if configuration.bfloat16 and not computes_in_bfloat16():
                raise UnavailableError("this CPU does not multiply in bfloat16")
            python = self.python_of(environment)
            checkpoint, models = self.arguments.checkpoint.resolve(), self.work / "models"
            model = convert(configuration.model, models, checkpoint, self.python_of)
        except UnavailableError as error:
            self._skip(name, str(error))
            return
        if environment not in self.report["environments"]:
            self.report["environments"][environment] = describe_environment(environment, python)
        self.ready[name] = (configuration, python, model)
        self.report["configurations"][name] = {
            "bits": configuration.bits,
            "ours": configuration.ours,
            "accelerated": configuration.accelerated,
            "environment": environment,
            "model_mb": round(file_bytes(model) / 1e6, 1),
            "note": configuration.note,
            "rounds": [],
        }
        self._write()

    def round(self, number: int) -> None:
        """Measure every configuration once; one that fails is skipped from then on."""
        for name in list(self.ready):
            configuration, _, model = self.ready[name]
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            try:
                warm(model)
                found = self._measure(configuration, images=self._images(configuration), calls=self.arguments.calls)
                if number == 0 and name == REFERENCE and "image_s" in found:
                    self._another_seed(configuration)
            except UnavailableError as error:
                self._skip(name, str(error))
                continue
            self.report["configurations"][name]["rounds"].append(found)
            self._write()

    def _images(self, configuration: Configuration) -> int | None:
        generates = not self.arguments.components or not configuration.components_alone
        return self.arguments.images if generates else None

    def _measure(
        self, configuration: Configuration, *, images: int | None, calls: int, latents: str = "noise"
    ) -> dict[str, Any]:
        _, python, model = self.ready[configuration.name]
        arguments, image = self.arguments, self._image_file(configuration.name, latents)
        job = Job(
            model=str(model),
            options=configuration.options,
            prompt=PROMPT,
            side=arguments.size,
            steps=arguments.steps,
            guidance_scale=GUIDANCE_SCALE,
            threads=arguments.threads,
            seed=arguments.seed,
            latents=str(self.work / latents),
            image_file=str(image),
            images=images,
            calls=calls,
            began=0.0,
        )
        found = measure(
            python,
            f"benchmarks.peer_adapters.{configuration.adapter}",
            job,
            variables=configuration.variables,
            folder=self.work,
            timeout_s=arguments.timeout,
        )
        return found if images is None else found | self._score(image)

    def _image_file(self, name: str, latents: str) -> Path:
        return Path(self.work, "images", f"{name}, {latents}.u8")

    def _score(self, image: Path) -> dict[str, Any]:
        """Check that an image is not blank; return its PSNR against the reference's."""
        pixels, reference = np.fromfile(image, np.uint8), self._image_file(REFERENCE, "noise")
        if pixels.size != self.arguments.size**2 * 3 or pixels.std() < 1:
            raise UnavailableError(
                f"its image has {pixels.size} values with a standard deviation of {pixels.std():.2g}"
            )
        if REFERENCE not in self.ready:
            return {}
        return {"psnr_db": psnr_db(pixels, np.fromfile(reference, np.uint8))}

    def _another_seed(self, configuration: Configuration) -> None:
        """Measure the PSNR of an image of another seed, to which the others compare."""
        found = self._measure(configuration, images=0, calls=0, latents="other")
        self.report["psnr_of_another_seed_db"] = found["psnr_db"]

    def _skip(self, name: str, reason: str) -> None:
        print(f"{name} is skipped: {reason}", file=sys.stderr, flush=True)
        self.report["skipped"][name] = reason
        self.ready.pop(name, None)
        if not self.report["configurations"].get(name, {}).get("rounds"):
            self.report["configurations"].pop(name, None)
        self._write()

    def _write(self) -> None:
        write_report(self.arguments.output, self.report)


def _command(arguments: SimpleNamespace) -> str:
    """Return the command line without this machine's paths."""
    numbers = ("steps", "size", "rounds", "images", "calls", "threads", "seed")
    options = [f"--{name} {getattr(arguments, name)}" for name in numbers]
    options += ["--components"] if arguments.components else []
    options += [f"--only {shlex.quote(words)}" for words in arguments.only]
    return f"python -m benchmarks.peers scratch/full/checkpoint --work scratch/peers {' '.join(options)}"


if __name__ == "__main__":
    main()
