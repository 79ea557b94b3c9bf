"""`latentrt doctor BUNDLE` on a machine with a GPU and engines, both made up."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from latentrt.backends import onnxruntime, placement
from latentrt.backends.tensorrt.library import LoadedLibrary
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.cli.doctor import doctor
from latentrt.engines import gpu
from latentrt_engines.cache import EngineCache
from tests.engines import made_up


def test_the_engines_of_each_component_and_why_one_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, cache: EngineCache
) -> None:
    bundle = Bundle.open(bundle_path())
    fitting = made_up.publish(cache, bundle, made_up.identity(bundle, "unet"))
    other = made_up.publish(cache, bundle, made_up.identity(bundle, "unet", compute_capabilities=("12.0",)))
    library = LoadedLibrary(name="tensorrt_rtx", module=None, version=made_up.RTX.version)
    for module in (gpu, placement):
        monkeypatch.setattr(module, "find_gpu", lambda: made_up.RTX4090)
    monkeypatch.setattr(placement, "find_libraries", lambda: {"tensorrt": "not here", "tensorrt_rtx": library})
    monkeypatch.setattr(onnxruntime, "available_providers", lambda: ["CPUExecutionProvider"])
    result = CliRunner().invoke(doctor, [str(bundle_path())], catch_exceptions=False)
    lines = {line[:16].strip() or line.strip(): line for line in result.output.splitlines()}
    assert "NVIDIA GeForce RTX 4090 (compute capability 8.9, 24 GiB), driver " in lines["GPU"]
    assert lines["GPU"].endswith("for CUDA 13.0")
    assert lines["unet"].endswith(f"TensorRT-RTX engine {fitting.key[:12]}")
    assert f"  fits: {fitting.key[:12]}, sample 2×4×16×16; timestep 2" in result.output
    assert f"  does not fit: {other.key[:12]}, built for 12.0, this GPU is 8.9" in result.output
    assert "no engine is built of vae_decoder" in lines["vae_decoder"]
    assert "latentrt build sample --component vae_decoder" in result.output
