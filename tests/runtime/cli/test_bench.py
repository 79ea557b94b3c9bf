"""`latentrt bench`: the sample bundle on this machine's CPU, in a process of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components
from latentrt.backends.placement import place_components
from latentrt.bundle.sample import bundle_path
from latentrt.cli.bench_messages import quantiles
from latentrt.cli.bench_worker import TimedSession, time_placement
from latentrt.engines import gpu
from latentrt.engines.gpu import NoGpu
from tests.runtime.cli.conftest import Caller

SAMPLE = bundle_path()
QUICK = ("--steps", "1", "--runs", "1", "--threads", "1")


def test_the_numbers_as_json(latentrt: Caller) -> None:
    options = ("--device", "cpu", "--steps", "3", "--width", "32", "--runs", "2", "--threads", "1")
    done = latentrt("bench", "sample", *options, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["digest"] == Bundle.open(SAMPLE).digest
    assert report["settings"]["options"] == {"num_inference_steps": 3, "width": 32}
    measured = report["measured"]["cpu"]
    components = measured["components"]
    counts = {name: each["count"] for name, each in components.items()}
    # Per image: two texts; three rows, and the time embedding and the cross-attention once; the rest once. Two images
    # are counted, the first is not.
    assert counts == {"safety_checker": 2, "text_encoder": 4, "unet": 10, "vae_decoder": 2}
    for each in (*components.values(), measured["image"]):
        assert 0 < each["p50_ms"] <= each["max_ms"]
    assert components["unet"]["p50_ms"] <= components["unet"]["p90_ms"] <= components["unet"]["max_ms"]
    assert measured["image"]["p90_ms"] is measured["image"]["p99_ms"] is None
    assert measured["image"]["count"] == 2
    assert measured["first_ms"] > components["unet"]["p50_ms"]
    assert measured["peak_bytes"] > 50 << 20
    assert measured["runs_on"]["unet"] == "ONNX Runtime on the CPU: as requested"


def test_a_table_says_which_percentiles_mean_nothing(latentrt: Caller) -> None:
    done = latentrt("bench", SAMPLE, "--device", "cpu", *QUICK, "--size", "32", "--batch", "2")
    assert done.code == 0, done.err
    assert "text_encoder, unet, vae_decoder, vae_encoder: ONNX Runtime on the CPU: as requested" in done.out
    assert re.search(r"^  first 2 images [\d,]+ ms, loading included$", done.out, re.M)
    assert re.search(r"^  2 images +1 +[\d,.]+ +- +- +[\d,.]+$", done.out, re.M)
    assert done.out.endswith(
        "too few runs for the percentile; p90 needs 10, p99 needs 100: latentrt bench --runs 100\n"
    )


def test_a_named_backend_that_is_not_available_is_an_error(latentrt: Caller) -> None:
    done = latentrt("bench", SAMPLE, "--device", "cuda", *QUICK)
    assert (done.code, done.out) == (7, "")
    assert "CUDAExecutionProvider" in done.err
    assert latentrt("bench", SAMPLE, "--provider", "npu", *QUICK).code == 7


def test_no_measurement_at_all_is_an_error(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.backends.openvino.is_installed", lambda: False)
    monkeypatch.setattr(gpu, "find_gpu", lambda: NoGpu(reason="none", mend="none"))
    done = latentrt("bench", SAMPLE, "--precision", "bfloat16", *QUICK)
    assert done.code == 7
    assert "--precision: got bfloat16" in done.err


def test_an_impossible_request(latentrt: Caller) -> None:
    done = latentrt("bench", SAMPLE, "--device", "cpu", "--width", "33", *QUICK)
    assert done.code == 2
    assert "--width: got 33" in done.err
    done = latentrt("bench", SAMPLE, "--device", "npu", *QUICK)
    assert done.code == 2
    assert "--device: got 'npu'" in done.err


def test_timed_sessions_change_nothing_and_are_not_shared() -> None:
    bundle = Bundle.open(SAMPLE)
    placements = place_components(bundle, "cpu")
    durations_ms: dict[str, list[float]] = {name: [] for name in placements}
    timed = {name: time_placement(each, durations_ms[name]) for name, each in placements.items()}
    assert all(timed[name].key != placements[name].key for name in placements)
    call: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "deep_cache": 2, "output_type": "latent"}
    plain, measured = (
        Pipeline(bundle, Components(each))("a red circle", **call).images for each in (placements, timed)
    )
    np.testing.assert_array_equal(plain, measured)
    # Four rows, of which two reuse deep features, and the two parts that run once.
    assert len(durations_ms["unet"]) == 6
    assert durations_ms["vae_decoder"] == []


def test_preparing_is_not_timed() -> None:
    placement = place_components(Bundle.open(SAMPLE), "cpu")["vae_decoder"]
    prepared, durations_ms = list[Any](), list[float]()
    session = placement.open(None)
    session.prepare = prepared.append  # type: ignore[method-assign, assignment]
    timed = time_placement(replace(placement, open=lambda part: session), durations_ms).open(None)
    assert isinstance(timed, TimedSession)
    assert (timed.inputs, timed.outputs) == (session.inputs, session.outputs)
    timed.prepare({"latents": (1, 4, 16, 16)})
    assert prepared == [{"latents": (1, 4, 16, 16)}]
    assert durations_ms == []
    timed.run({"latents": np.zeros((1, 4, 16, 16), np.float32)})
    assert len(durations_ms) == 1


def test_quantiles_are_by_nearest_rank_and_absent_where_they_would_be_the_longest() -> None:
    hundred = quantiles([float(number) for number in range(100, 0, -1)])
    assert (hundred.count, hundred.p50_ms, hundred.p90_ms, hundred.p99_ms, hundred.max_ms) == (100, 50, 90, 99, 100)
    ten = quantiles([float(number) for number in range(10)])
    assert (ten.p50_ms, ten.p90_ms, ten.p99_ms, ten.max_ms) == (4, 8, None, 9)
    one = quantiles([7.0])
    assert (one.p50_ms, one.p90_ms, one.p99_ms, one.max_ms) == (7, None, None, 7)
