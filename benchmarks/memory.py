"""Measures the peak memory of `latentrt run`.

    python -m benchmarks.memory --float16 BUNDLE --int8 BUNDLE --output benchmarks/results/memory.json

Each configuration is a process of its own, as a user starts it: loading, two steps of a guided image at the bundle's
default size, decoding and the classifier. The peak is the largest resident set by the system's count, including mapped
weights, which the system can reclaim. The report also has the sizes of the weights, of which the denoiser's are the
largest.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.command import FOLDER, PATH, REPORT, benchmark, write_report
from benchmarks.full_size import machine
from latentrt.backends.openvino import computes_in_bfloat16
from latentrt.bundle.bundle import Bundle

PROMPT = "a photograph of an astronaut riding a horse"


class Configuration(NamedTuple):
    """A bundle and the options of its run."""

    bundle: str
    options: tuple[str, ...]


CONFIGURATIONS = (
    Configuration("int8", ("--device", "openvino")),
    Configuration("int8", ("--device", "cpu")),
    Configuration("float16", ("--device", "openvino", "--precision", "bfloat16")),
    Configuration("float16", ("--device", "openvino")),
    Configuration("float16", ("--device", "cpu")),
)


@benchmark("benchmarks.memory", __doc__)
@click.option("--float16", type=FOLDER, required=True, help="a bundle of that precision")
@click.option("--int8", type=FOLDER, required=True, help="the same in int8")
@click.option("--output", type=PATH, required=True, help=REPORT)
def main(float16: Path, int8: Path, output: Path) -> None:
    bundles = {"float16": float16, "int8": int8}
    report: dict[str, Any] = {
        "command": "python -m benchmarks.memory --float16 BUNDLE --int8 BUNDLE",
        "machine": machine(),
        "weights_gib": {name: weights(folder) for name, folder in bundles.items()},
        "runs": [],
    }
    for bundle, own in CONFIGURATIONS:
        if "bfloat16" in own and not computes_in_bfloat16():
            print("skipped, no bfloat16 on this CPU:", bundle, *own)
            continue
        for low in (False, True):
            options = (*own, *(("--low-memory",) if low else ()))
            found = {"bundle": bundle, "options": options, **measure(bundles[bundle], options)}
            print(found, flush=True)
            report["runs"].append(found)
    write_report(output, report)


def weights(folder: Path) -> dict[str, float]:
    """Return component → the size of its weights in GiB."""
    manifest = Bundle.open(folder).manifest
    return {
        name: round(manifest.files[component.weights.file].size / 2**30, 2)
        for name, component in manifest.components.items()
    }


def measure(bundle: Path, options: tuple[str, ...]) -> dict[str, float]:
    """Run once; return the peak and the time."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        arguments = ["run", bundle, PROMPT, "--steps", "2", "--seed", "7", "--quiet", "-o", image, *options]
        command = [Path(sys.executable).with_name("latentrt"), *arguments]
        began = time.monotonic()
        process = subprocess.Popen([*map(str, command)], env={**os.environ, "LATENTRT_CACHE": f"{folder}/cache"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status != 0:
            raise SystemExit(f"{command} ended with the status {status}")
    kilobytes = usage.ru_maxrss / (1024 if platform.system() == "Darwin" else 1)
    return {"peak_gib": round(kilobytes / 2**20, 2), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
