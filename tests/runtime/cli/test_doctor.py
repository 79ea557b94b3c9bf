"""`latentrt doctor` on machines without a GPU. Engines are in tests/engines/test_doctor.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.backends import openvino, placement
from latentrt.bundle.sample import bundle_path
from latentrt.engines import gpu
from latentrt.engines.gpu import NoGpu
from tests.runtime.cli.conftest import Caller

NO_GPU = NoGpu(reason="there is no NVIDIA driver", mend="buy one")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (gpu, placement):
        monkeypatch.setattr(module, "find_gpu", lambda: NO_GPU)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


def lines(latentrt: Caller, *arguments: object) -> dict[str, str]:
    """Return the lines by their first word."""
    done = latentrt("doctor", *arguments)
    assert done.code == 0, done.err
    return {line[:16].strip(): line[17:] for line in done.out.splitlines()}


def test_each_line_gives_the_version_or_the_package_to_install(latentrt: Caller, tmp_path: Path) -> None:
    found = lines(latentrt)
    assert found["GPU"] == "no: there is no NVIDIA driver; buy one"
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")):
        assert found[name][0].isdigit() or found[name].endswith(f"pip install 'latentrt[{extra}]'")
    assert "CPUExecutionProvider" in found["onnxruntime"]
    assert found["engines"] == f"0 in {tmp_path / 'cache' / 'engines'}"


def test_without_openvino(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    assert "latentrt[openvino]" in lines(latentrt)["openvino"]


def test_a_cache_that_cannot_be_used_is_a_line_and_not_an_error(
    latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "open"))
    assert lines(latentrt)["engines"].startswith(f"no: {tmp_path / 'open'}")


def test_a_bundle_adds_a_line_for_each_component(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    found = lines(latentrt, bundle_path())
    for name in ("text_encoder", "unet", "vae_decoder", "safety_checker"):
        assert found[name] == "ONNX Runtime on the CPU: there is no NVIDIA driver"


def test_no_bundle(latentrt: Caller, tmp_path: Path) -> None:
    done = latentrt("doctor", tmp_path / "none")
    assert (done.code, done.out) == (4, "")
