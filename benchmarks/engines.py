"""Measures building the engines of a full-size Stable Diffusion 1.5, on a machine without a GPU.

    .venv/bin/python -m benchmarks.full_size_checkpoint scratch/full/checkpoint
    .venv/bin/latentrt export scratch/full/checkpoint scratch/full/float16 --precision float16
    .venv/bin/python -m benchmarks.engines scratch/full/float16 --output benchmarks/results/engines.json

Builds a plan of every component for one image of 512 × 512 with guidance, and for 256 to 768 pixels and one to four
images, with TensorRT-RTX, for compute capability 8.9. Engines go into a temporary cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.command import FOLDER, PATH, REPORT, benchmark, write_report
from benchmarks.full_size import machine
from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import find_gpu
from latentrt.engines.record import EngineOptions
from latentrt_engines.build import build_engines
from latentrt_engines.cache import EngineCache
from latentrt_engines.cli.report import Reporter
from latentrt_engines.library import Library, load_library
from latentrt_engines.profiles import image_profile
from latentrt_engines.targets import list_targets

CAPABILITY = "8.9"
PROFILES = {"512x512, batch 1": ("512x512", "1"), "256 to 768, batch 1 to 4": ("256x256:512x512:768x768", "1:1:4")}


@benchmark("benchmarks.engines", __doc__)
@click.argument("folder", metavar="BUNDLE", type=FOLDER)
@click.option("--output", type=PATH, required=True, help=REPORT)
def main(folder: Path, output: Path) -> None:
    bundle, library = Bundle.open(folder), load_library("tensorrt_rtx")
    report: dict[str, Any] = {
        "command": "python -m benchmarks.engines",
        "machine": machine(),
        "library": str(library),
        "compute_capability": CAPABILITY,
        "precision": bundle.manifest.precision,
        "weights_bytes": {
            name: bundle.manifest.files[component.weights.file].size
            for name, component in bundle.manifest.components.items()
        },
    }
    report["engines"] = {name: measure(bundle, library, *profile) for name, profile in PROFILES.items()}
    write_report(output, report)
    print(json.dumps(report["engines"], indent=2))


def measure(bundle: Bundle, library: Library, size: str, batch: str) -> dict[str, Any]:
    """Build every component once, into an empty cache."""
    targets = list_targets(
        bundle,
        tuple(bundle.manifest.components),
        image_profile(bundle.manifest, size=size, batch=batch),
        library=library,
        options=EngineOptions(),
        capabilities=(CAPABILITY,),
        gpu=find_gpu(),
    )
    # Beside the bundle, where there is room for weights; a temporary file system is often memory.
    with tempfile.TemporaryDirectory(dir=bundle.folder.parent) as folder, Reporter() as reporter:
        os.chmod(folder, 0o700)
        engines = list(build_engines(bundle, targets, EngineCache(Path(folder)), reporter))
    return {
        engine.record.identity.component: {
            "seconds": round(engine.record.build.seconds, 1),
            "peak_gib": round(engine.record.build.peak_bytes / 2**30, 2),
            "plan_bytes": engine.record.plan.size,
        }
        for engine in engines
    }


if __name__ == "__main__":
    main()
