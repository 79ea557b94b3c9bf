"""`latentrt bench`: the sample bundle on this machine's CPU, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Arrays
from latentrt.backends.split_denoiser import InParts, ReusesFeatures
from latentrt.bench import quantiles, timed
from latentrt.bundle.bundle import Bundle
from latentrt.cli.main import main
from latentrt.sample import bundle_path
from latentrt.sampling.samplers import Steps
from latentrt.sampling.samplers.ddim import DDIM
from latentrt.sampling.schedule import Latents
from latentrt.sampling.trajectory import Denoising, KeepsLatents
from tests.runtime.backends.split_fakes import FakeParts


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["bench", str(bundle_path()), *arguments])
    return end.value.code


def test_a_table_and_the_same_figures_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "bench.json"
    assert run("--device", "cpu", "--steps", "3", "--runs", "2", "--threads", "1", "--json", str(report)) == 0
    said = capsys.readouterr().out
    measured = json.loads(report.read_text())["measured"]["cpu"]
    submodules = measured["submodules"]
    # Two texts, three steps, and one run of each other submodule, for both pictures; the first does not count.
    counts = {name: figures["count"] for name, figures in submodules.items()}
    assert counts == {"safety_checker": 2, "text_encoder": 4, "unet": 6, "vae_decoder": 2}
    for figures in (*submodules.values(), measured["picture"]):
        assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
    # A picture is its submodules and little else, and the first one also loads them.
    assert measured["picture"]["p50_ms"] > 3 * submodules["unet"]["p50_ms"] * 0.5
    assert measured["peak_bytes"] > 50 << 20
    assert measured["runs_on"]["unet"] == "ONNX Runtime on the CPU: as asked"
    assert f"{measured['picture']['p50_ms']:,.1f}" in said
    assert "safety_checker, text_encoder, unet, vae_decoder, vae_encoder: ONNX Runtime on the CPU: as asked" in said


def test_a_backend_that_is_named_and_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cuda", "--steps", "1", "--runs", "1") == 7
    assert "error: found the provider 'CUDAExecutionProvider'" in capsys.readouterr().err
    assert run("--provider", "npu", "--steps", "1", "--runs", "1") == 7


def test_nothing_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("latentrt.backends.openvino.is_installed", lambda: False)
    assert run("--precision", "bfloat16", "--steps", "1", "--runs", "1") == 7
    assert "ONNX Runtime does not compute in bfloat16 on a CPU" in capsys.readouterr().err


def test_an_impossible_request_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cpu", "--width", "33", "--runs", "1") == 2
    assert "33" in capsys.readouterr().err


class Loop:
    """A denoising loop on some device."""

    def step(self, changed: Latents | None) -> Callable[[], Latents]:
        return lambda: np.zeros((1, 4, 8, 8), np.float32)

    def close(self) -> None: ...


class Denoiser:
    """A session that keeps latents on its device."""

    inputs = ()

    def run(self, feeds: object) -> Arrays:
        raise AssertionError

    def trajectory(self, *arguments: object) -> Loop:
        return Loop()


def test_a_loop_on_the_device_is_measured_and_not_another_one() -> None:
    durations = list[float]()
    denoiser = timed(Denoiser(), durations)
    assert isinstance(denoiser, KeepsLatents)
    latents = np.zeros((1, 4, 8, 8), np.float32)
    loop = denoiser.trajectory(Denoising(DDIM().schedule(Steps(count=3)), latents, latents[0], 5.0, lambda: latents))
    assert loop is not None
    for _ in range(3):
        assert loop.step(None)().shape == latents.shape
    assert len(durations) == 3
    assert not isinstance(timed(open_session(Bundle.open(bundle_path()), "unet", threads=1), []), KeepsLatents)


def test_a_denoiser_in_parts_is_measured_row_by_row() -> None:
    durations, parts = list[float](), FakeParts()
    denoiser = timed(parts.denoiser, durations)
    assert isinstance(denoiser, InParts)
    row = denoiser.begin(np.array([900, 300], np.float32))
    assert isinstance(row, ReusesFeatures)
    sample, embeddings = np.ones((1, 4, 2, 2), np.float32), np.ones((1, 3, 8), np.float32)
    feeds = {"sample": sample, "timestep": np.full(1, 900, np.float32), "encoder_hidden_states": embeddings}
    found = row.run(feeds)
    assert len(durations) == 1
    again = row.run_reusing({**feeds, "timestep": np.full(1, 300, np.float32)}, found["deep_features"])
    assert len(durations) == 2
    assert (parts.runs("body"), parts.runs("shallow_body"), parts.runs("time_embedding")) == (1, 1, 1)
    np.testing.assert_array_equal(again["noise_pred"], sample * np.float32(0.3) + found["deep_features"])


def test_quantiles_are_by_nearest_rank() -> None:
    hundred = quantiles([float(number) for number in range(100, 0, -1)])
    assert (hundred.count, hundred.p50_ms, hundred.p90_ms, hundred.p99_ms) == (100, 50, 90, 99)
    one = quantiles([7.0])
    assert (one.p50_ms, one.p90_ms, one.p99_ms) == (7, 7, 7)
    few = quantiles([1.0, 2.0, 3.0])
    assert (few.p50_ms, few.p90_ms, few.p99_ms) == (2, 3, 3)
