"""Measures the export and the run of a full-size Stable Diffusion 1.5.

    .venv/bin/python -m benchmarks.full_size --work scratch/full --output benchmarks/results/full_size.json

Makes a checkpoint of 860 M random UNet parameters with the shipped configurations (speed does not depend on the
values), exports it in float32 and in float16, gate included, and generates one image of 512 × 512 in 2 steps from each,
every command in a process of its own. Needs about 24 GB of disk.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.command import PATH, REPORT, benchmark, write_report

CONFIGS = Path(__file__).parent.parent / "export/latentrt_export/checkpoints/configs"
PROMPT = "a photograph of an astronaut riding a horse"


@benchmark("benchmarks.full_size", __doc__)
@click.option("--work", type=PATH, required=True, help="folder of checkpoint and bundles; kept")
@click.option("--output", type=PATH, required=True, help=REPORT)
@click.option("--precision", "precisions", multiple=True, default=["float32", "float16"], help="may be repeated")
@click.option("--runs-only", is_flag=True, help="run the bundles of an earlier report again")
def main(work: Path, output: Path, precisions: Sequence[str], runs_only: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.full_size_checkpoint", str(checkpoint)], check=True)
    report: dict[str, Any] = {"command": "python -m benchmarks.full_size", "machine": machine()}
    if runs_only:
        report = json.loads(output.read_text())
    for precision in precisions:
        bundle = work / precision
        if not runs_only:
            report[precision] = measure_export(checkpoint, bundle, precision)
        report[precision]["run_512x512_2_steps"] = measure_runs(bundle)
        write_report(output, report)
        print(json.dumps(report[precision], indent=2), flush=True)


def machine() -> dict[str, Any]:
    """Return a description of the machine and the versions of the packages."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
    return {
        "cpu": cpu,
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def measure_export(checkpoint: Path, bundle: Path, precision: str) -> dict[str, Any]:
    """Export in a new process; return the time, the peak memory and the components."""
    shutil.rmtree(bundle, ignore_errors=True)
    export = timed("export", str(checkpoint), str(bundle), "--precision", precision)
    manifest = json.loads((bundle / "bundle.json").read_text())
    costs = json.loads((bundle / "export-report.json").read_text())["components"]
    return {
        "export": export,
        "bundle_bytes": sum(file["size"] for file in manifest["files"].values()),
        "components": {name: describe(each, costs[name], manifest) for name, each in manifest["components"].items()},
    }


def measure_runs(bundle: Path) -> dict[str, Any]:
    """Generate twice, each in a new process; the second uses remembered hashes of files older than a minute.

    2 steps of the checkpoint's PNDM are 3 evaluations of the UNet.
    """
    image = str(bundle.with_suffix(".png"))
    run = ["run", str(bundle), PROMPT, "--steps", "2", "--seed", "7", "-o", image, "--overwrite"]
    return {"first": timed(*run), "second_with_remembered_hashes": timed(*run)}


def describe(component: dict[str, Any], cost: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a component's cost, sizes and gate results, from the manifest and the export report."""
    return {
        "export_seconds": round(cost["seconds"], 1),
        "export_peak_gib": round(cost["peak_bytes"] / 2**30, 2),
        "parameters": component["weights"]["parameters"],
        "weights_bytes": manifest["files"][component["weights"]["file"]]["size"],
        "graphs": {
            precision: {
                "nodes": graph["nodes"],
                "graph_bytes": manifest["files"][graph["file"]]["size"],
                "float32_nodes": len(graph["float32_nodes"]),
                "gate": {
                    f"{gate['output']} {gate['shapes']}": f"{gate['value']:.3g} of {gate['bound']:g} {gate['metric']}"
                    for gate in graph["gate"]
                },
            }
            for precision, graph in component["graphs"].items()
        },
    }


def timed(*arguments: str) -> dict[str, float]:
    """Run a latentrt command; return its wall time and the largest resident set of its processes."""
    started = time.monotonic()
    process = subprocess.Popen([str(Path(sys.executable).with_name("latentrt")), *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"latentrt {' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


if __name__ == "__main__":
    main()
