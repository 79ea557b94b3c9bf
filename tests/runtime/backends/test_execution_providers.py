"""ONNX Runtime's execution providers by short names, on a stand-in for packages that have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from latentrt import Bundle
from latentrt.backends import onnxruntime as ort
from latentrt.backends.execution_providers import PROVIDERS, find_provider
from latentrt.backends.onnxruntime import check_provider, open_on_provider
from latentrt.backends.placement import place_components
from latentrt.errors import BackendError

DECODER = "vae_decoder"


class Options:
    """Records what a session is made with."""

    def __init__(self) -> None:
        self.devices: list[tuple[list[Any], dict[str, str]]] = []
        self.enable_mem_pattern, self.execution_mode = True, "parallel"

    def add_session_config_entry(self, key: str, text: str) -> None:
        pass

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.devices.append((devices, options))


@dataclass(frozen=True)
class Device:
    ep_name: str


@dataclass(eq=False)
class Runtime:
    """A package of ONNX Runtime.

    Attributes:
        available: its own providers.
        plugins: names of the devices that the library of a plug-in brings, by its path.
        made: the options and the providers of its sessions.
    """

    available: list[str]
    plugins: dict[str, list[str]] = field(default_factory=dict)
    made: list[tuple[Options, Any]] = field(default_factory=list)
    devices: list[Device] = field(default_factory=lambda: [Device("CPUExecutionProvider")])

    __version__ = "1.31.1"
    SessionOptions = Options
    ExecutionMode = onnxruntime.ExecutionMode

    def get_available_providers(self) -> list[str]:
        return self.available

    def get_ep_devices(self) -> list[Device]:
        return self.devices

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if path not in self.plugins:
            raise RuntimeError("it is registered already, or is no library")
        self.devices += map(Device, self.plugins.pop(path))

    def InferenceSession(  # noqa: N802, the library's name
        self, graph: bytes, options: Options, *, providers: Any, enable_fallback: int
    ) -> Runtime:
        assert enable_fallback == 0
        self.made.append((options, providers))
        return self

    def get_providers(self) -> list[str]:
        options, providers = self.made[-1]
        own = [name for name, _ in providers or ()]
        return [*own, *(device.ep_name for devices, _ in options.devices for device in devices)]


def install(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Runtime:
    monkeypatch.setattr(ort, "require", lambda: runtime)
    return runtime


@pytest.mark.parametrize(
    ("name", "full", "options"),
    [
        ("coreml", "CoreMLExecutionProvider", {"ModelFormat": "MLProgram"}),
        ("CoreML", "CoreMLExecutionProvider", {"ModelFormat": "MLProgram"}),
        ("CoreMLExecutionProvider", "CoreMLExecutionProvider", {"ModelFormat": "MLProgram"}),
        ("rocm", "MIGraphXExecutionProvider", {}),
        ("migraphx", "MIGraphXExecutionProvider", {}),
        ("directml", "DmlExecutionProvider", {}),
        ("dml", "DmlExecutionProvider", {}),
        ("qnn", "QNNExecutionProvider", {}),
        ("openvino", "OpenVINOExecutionProvider", {}),
        ("xnnpack", "XnnpackExecutionProvider", {}),
    ],
)
def test_a_provider_is_found_by_any_of_its_names(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, full: str, options: dict[str, str]
) -> None:
    runtime = install(monkeypatch, Runtime(["CPUExecutionProvider", full]))
    open_on_provider(bundle, DECODER, name)
    ((made, providers),) = runtime.made
    assert providers == [(full, options)]
    assert made.devices == []
    directml = full == "DmlExecutionProvider"
    assert made.enable_mem_pattern is not directml
    assert (made.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL) is directml


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("coreml", "macOS"),
        ("rocm", "onnxruntime-migraphx"),
        ("ROCMExecutionProvider", "onnxruntime-migraphx"),
        ("migraphx", "onnxruntime-migraphx"),
        ("directml", "onnxruntime-directml"),
        ("qnn", "onnxruntime-qnn"),
        ("openvino", "onnxruntime-ep-openvino"),
        ("webgpu", "onnxruntime-ep-webgpu"),
        ("cuda", r"latentrt\[gpu\]"),
    ],
)
def test_a_missing_provider_names_its_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    install(monkeypatch, Runtime(["CPUExecutionProvider"]))
    with pytest.raises(BackendError, match=rf"`provider`: got '{name}'.*CPUExecutionProvider; .*{package}"):
        check_provider(name)


def add_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    (folder / f"{module}.py").write_text(f"def get_library_path():\n    return {module + '.so'!r}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_a_plugin_is_loaded_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugin(tmp_path, monkeypatch, "onnxruntime_ep_webgpu")
    names = ["WebGpuExecutionProvider", "WebGpuExecutionProvider"]
    runtime = install(monkeypatch, Runtime(["CPUExecutionProvider"], {"onnxruntime_ep_webgpu.so": names}))
    for _ in range(2):
        open_on_provider(bundle, DECODER, "webgpu")
    for made, providers in runtime.made:
        assert providers is None
        assert made.devices == [([Device("WebGpuExecutionProvider")], {})], "it takes one device"


@pytest.mark.parametrize("devices", [[], None])
def test_a_plugin_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str] | None
) -> None:
    """Without a device, or with a library that ONNX Runtime does not load."""
    add_plugin(tmp_path, monkeypatch, "onnxruntime_qnn")
    plugins = {} if devices is None else {"onnxruntime_qnn.so": devices}
    install(monkeypatch, Runtime(["CPUExecutionProvider"], plugins))
    for _ in range(2):
        reason = "cannot be loaded: it is" if devices is None else "is installed and finds no device"
        with pytest.raises(BackendError, match=f"QNNExecutionProvider.* {reason}"):
            check_provider("qnn")


def test_a_provider_in_onnxruntime_comes_before_a_plugin(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_plugin(tmp_path, monkeypatch, "onnxruntime_qnn")
    runtime = install(monkeypatch, Runtime(["QNNExecutionProvider", "CPUExecutionProvider"]))
    open_on_provider(bundle, DECODER, "qnn")
    assert runtime.made[0][1] == [("QNNExecutionProvider", {})]


def test_names_of_one_provider_share_sessions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Runtime(["MIGraphXExecutionProvider"]))
    placements = [place_components(bundle, provider=name)[DECODER] for name in ("rocm", "MIGraphX")]
    assert placements[0].key == placements[1].key
    assert placements[0].title == "ONNX Runtime with MIGraphX"
    install(monkeypatch, Runtime([ort.CUDA]))
    assert place_components(bundle, provider="cuda")[DECODER].device == "gpu"


def test_the_names() -> None:
    assert {"coreml", "cpu", "cuda", "directml", "migraphx", "openvino", "qnn", "rocm", "webgpu"} == {*PROVIDERS}
    for name, provider in PROVIDERS.items():
        assert find_provider(name) is find_provider(provider.name) is provider
