"""Measures the time to verify a bundle's files when it is loaded first and when it is loaded again.

    .venv/bin/python -m benchmarks.hashing --output benchmarks/results/hashing.json

Makes a bundle whose UNet weights are 1 GiB of random bytes and times `Bundle.check` of every file: with hashing, with
remembered hashes, and with hashing in spite of remembered ones. Files are in the page cache, so this is CPU time.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.command import PATH, REPORT, benchmark, write_report
from benchmarks.full_size import machine
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.manifest import encode_manifest
from tests.runtime import small_bundle

WEIGHTS_BYTES = 1 << 30
RUNS = 5
# Remembered hashes count only for files that have not changed for a minute.
SETTLING_SECONDS = 65


@benchmark("benchmarks.hashing", __doc__)
@click.option("--output", type=PATH, required=True, help=REPORT)
def main(output: Path) -> None:
    Path("scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="scratch") as folder:
        os.environ["LATENTRT_CACHE"] = str(Path(folder).absolute() / "cache")
        report = {"command": "python -m benchmarks.hashing", "machine": machine(), **measure(Path(folder) / "bundle")}
    write_report(output, report)
    print(json.dumps(report, indent=2))


def measure(folder: Path) -> dict[str, Any]:
    """Time opening a bundle and checking all its files, in seconds."""
    small_bundle.write_bundle(folder)
    weights = folder / small_bundle.WEIGHTS
    weights.write_bytes(os.urandom(WEIGHTS_BYTES))
    manifest = small_bundle.manifest(folder)
    (folder / "bundle.json").write_bytes(encode_manifest(manifest))
    assert manifest.files[small_bundle.WEIGHTS] == file_record(weights)
    time.sleep(SETTLING_SECONDS)
    return {
        "bundle_bytes": sum(record.size for record in manifest.files.values()),
        "first_load_s": round(timed(lambda: check_bundle(folder)), 3),
        "second_load_s": median(lambda: check_bundle(folder)),
        "load_that_trusts_no_record_s": median(lambda: check_bundle(folder, trust_cache=False)),
    }


def check_bundle(folder: Path, *, trust_cache: bool = True) -> None:
    small_bundle.everything(Bundle.open(folder, trust_cache=trust_cache))


def median(action: Callable[[], None]) -> float:
    return round(statistics.median(timed(action) for _ in range(RUNS)), 4)


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
