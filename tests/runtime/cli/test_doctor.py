"""`latentrt doctor`: a machine without a GPU, and one whose GPU is stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from latentrt.backends import device, gpu
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.cli.doctor import doctor
from latentrt_engines.cache import EngineCache
from tests.engines import made_up
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import fake_library


def lines(*arguments: str) -> dict[str, str]:
    """What it prints, by the word in front."""
    result = CliRunner().invoke(doctor, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return {line[:16].strip(): line[17:] for line in result.output.splitlines()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


def test_every_rung_says_what_is_there_or_what_would_mend_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: made_up.NO_GPU)
    found = lines()
    assert found["GPU"] == "no: there is no NVIDIA driver; buy one"
    assert found["tensorrt_rtx"].startswith("1.")
    assert found["tensorrt"].endswith("pip install 'latentrt[tensorrt]'") or found["tensorrt"][0].isdigit()
    assert "CPUExecutionProvider" in found["onnxruntime"]
    assert found["engines"] == f"0 in {tmp_path / 'cache' / 'engines'}"


def test_a_cache_that_cannot_be_used_is_a_rung_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "open"))
    assert lines()["engines"].startswith(f"no: {tmp_path / 'open'} is open to others")


def test_a_bundle_is_told_what_runs_it_and_why(monkeypatch: pytest.MonkeyPatch, cache: EngineCache) -> None:
    bundle = Bundle.open(bundle_path())
    fitting = made_up.publish(cache, bundle, made_up.identity(bundle, "unet"))
    other = made_up.publish(cache, bundle, made_up.identity(bundle, "unet", compute_capabilities=("12.0",)))
    library = fake_library(FakeCudaApi(), "tensorrt_rtx", made_up.RTX.version)
    for module in (gpu, device):
        monkeypatch.setattr(module, "find_gpu", lambda: made_up.RTX4090)
    monkeypatch.setattr(device, "find_libraries", lambda: {"tensorrt": "not here", "tensorrt_rtx": library})
    result = CliRunner().invoke(doctor, [str(bundle_path())], catch_exceptions=False)
    said = result.output
    assert "GPU              NVIDIA GeForce RTX 4090 (compute capability 8.9, 24 GiB), driver for CUDA 13.0" in said
    assert f"unet             TensorRT-RTX engine {fitting.key[:12]}" in said
    assert f"  fits: {fitting.key[:12]}, sample 2×4×16×16; timestep 2" in said
    assert f"  does not fit: {other.key[:12]}, built for 12.0, this GPU is 8.9" in said
    assert "vae_decoder      OpenVINO on the CPU in float32: no engine is built of vae_decoder (latentrt build)" in said
    assert f"  mend: latentrt build {bundle_path()} --component vae_decoder" in said
