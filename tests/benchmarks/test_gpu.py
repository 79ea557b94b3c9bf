"""What `benchmarks.gpu` reports without a GPU: the routes are measured on one."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import gpu
from latentrt.bundle.sample import bundle_path
from latentrt.engines.gpu import Gpu, NoGpu
from tests.engines import made_up


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (NoGpu(reason="there is no NVIDIA driver", mend="buy one"), "none: there is no NVIDIA driver"),
        (made_up.H100, "NVIDIA H100 80GB HBM3 (compute capability 9.0, 80 GiB), driver 580.65.06 for CUDA 13.0"),
    ],
)
def test_a_report_names_the_gpu_and_its_driver(
    found: Gpu | NoGpu, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[str, Any] = {"device": "cpu"}
    monkeypatch.setattr(gpu, "find_gpu", lambda: found)
    monkeypatch.setattr(gpu, "describe_driver", lambda gpu: f"driver 580.65.06 for CUDA {gpu.cuda}")
    monkeypatch.setattr(gpu, "_process", lambda arguments, route: measured)
    report = gpu.compare(argparse.Namespace(routes=[], rounds=1))
    assert (report["gpu"], report["roofline"]) == (expected, measured)


def test_a_route_of_latentrt_is_what_bench_measures() -> None:
    """On the CPU, as the benchmark's own `--device cpu` does."""
    given = {"bundle": bundle_path(), "device": "cpu", "size": 64, "steps": 1, "runs": 1, "timeout": 600}
    measured = gpu._latentrt(argparse.Namespace(**given), "latentrt engines")
    assert measured.keys() == {"picture_ms", "unet_ms", "decoder_ms", "first_picture_ms", "peak_gib"}
    assert all(value > 0 for value in measured.values())
