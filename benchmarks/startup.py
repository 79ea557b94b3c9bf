"""Measures the runtime's installed size, and the time of its import, its help and its first image.

    .venv/bin/python -m benchmarks.startup --output benchmarks/results/startup.json

Installs the runtime into a fresh environment, as `pip install "latentrt[cpu]"` does, and measures there: bytes without
byte code, the median wall time of a bare interpreter, of importing the runtime with its backend, of `latentrt --help`,
and of `latentrt run` with the sample bundle (25 steps, guided), from the start of the process to the file on disk. Then
the same with `latentrt[openvino]`: the first run, which compiles, and the later ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import click
import pyperf

from benchmarks.command import PATH, REPORT, benchmark, write_report
from benchmarks.full_size import machine

ROOT = Path(__file__).parent.parent
RUNS = 15
PROMPT = "a large red circle on a blue background"


@benchmark("benchmarks.startup", __doc__)
@click.option("--output", type=PATH, required=True, help=REPORT)
def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = {"command": "python -m benchmarks.startup", "machine": machine(), **measure(Path(folder))}
    write_report(output, report)
    print(json.dumps(report, indent=2))


def measure(folder: Path) -> dict[str, Any]:
    """Install, then time; each command runs once untimed, so that byte code is written and files are cached."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install(python, "cpu")
    found = {
        "installed_mb_without_byte_code": round(installed_bytes(folder) / 1e6, 1),
        "bare_interpreter_s": median([python, "-c", "pass"]),
        "import_latentrt_s": median([python, "-c", "import latentrt"]),
        "import_pipeline_and_onnxruntime_s": median(
            [python, "-c", "import latentrt.pipeline, latentrt.backends.onnxruntime, onnxruntime"]
        ),
        "help_s": median([folder / "bin" / "latentrt", "--help"]),
        "run_help_s": median([folder / "bin" / "latentrt", "run", "--help"]),
        "image_onnxruntime_s": median(generate_command(folder, "cpu")),
    }
    install(python, "openvino")
    began = time.perf_counter()
    subprocess.run(generate_command(folder, "openvino"), check=True)
    return {
        **found,
        "installed_mb_with_openvino": round(installed_bytes(folder) / 1e6, 1),
        "first_image_openvino_s": round(time.perf_counter() - began, 3),
        "image_openvino_s": median(generate_command(folder, "openvino")),
    }


def install(python: Path, extra: str) -> None:
    """Install the runtime with an extra, in addition to earlier ones."""
    pip: list[Any] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{ROOT}[{extra}]"], check=True)


def generate_command(folder: Path, device: str) -> list[Any]:
    """Return the command that generates an image with an environment's sample bundle and its own cache."""
    bundle = next(folder.glob("lib/python*/site-packages/latentrt/sample_bundle"))
    command = [folder / "bin" / "latentrt", "run", bundle, PROMPT, "--seed", "7", "--device", device, "--quiet"]
    return ["env", f"LATENTRT_CACHE={folder / 'cache'}", *command, "-o", folder / "image.png", "--overwrite"]


def installed_bytes(folder: Path) -> int:
    """Return the size of all files except byte code and pip itself."""
    packages = next(folder.glob("lib/python*/site-packages"))
    files = (path for path in packages.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sum(
        path.stat().st_size
        for path in files
        if path.relative_to(packages).parts[0].split("-")[0] not in ("pip", "setuptools")
    )


def median(command: list[Any]) -> float:
    """Return the median wall time of a command in seconds, of runs after an untimed one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        runs = ["--processes", "1", "--warmups", "1", "--values", str(RUNS), "--loops", "1"]
        pyperf_command = [sys.executable, "-m", "pyperf", "command", "--quiet", *runs, "--output", file, "--", *command]
        subprocess.run(pyperf_command, check=True, stdout=subprocess.DEVNULL)
        return round(float(pyperf.Benchmark.load(str(file)).median()), 3)


if __name__ == "__main__":
    main()
