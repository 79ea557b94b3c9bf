from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.bundle.weights import map_weights
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import EngineOptions, LibraryName
from latentrt.errors import BackendError, LatentRTError, MissingExtraError, RequestError
from latentrt_engines.library import Library, load_libraries, load_library
from latentrt_engines.network import Log, make_log, parse_network
from tests.engines.made_up import H100, NO_GPU, RTX4090, TENSORRT


@pytest.fixture(scope="module")
def rtx() -> Library:
    return load_library("tensorrt_rtx")


def refusal(library: Library, gpu: Gpu | NoGpu, *capabilities: str, **options: Any) -> LatentRTError:
    with pytest.raises(LatentRTError) as refused:
        library.check(EngineOptions(**options), capabilities, gpu)
    return refused.value


# Options that exclude each other


@pytest.mark.parametrize("gpu", [NO_GPU, RTX4090], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"optimization_level": 6}, "--builder-optimization-level 6"),
        ({"optimization_level": -1}, "--builder-optimization-level -1"),
        ({"version_compatible": True, "refittable": True}, "--version-compatible with --refittable"),
        ({"version_compatible": True, "strip_weights": True}, "--version-compatible with --strip-weights"),
    ],
)
def test_contradictions(rtx: Library, gpu: Gpu | NoGpu, options: dict[str, Any], fragment: str) -> None:
    """They depend on the options alone: either library rejects them, and before a missing GPU is reported."""
    for library in (rtx, TENSORRT):
        error = refusal(library, gpu, "8.9", **options)
        assert isinstance(error, RequestError)
        assert fragment in str(error)


@pytest.mark.parametrize("level", range(6))
def test_every_optimization_level(rtx: Library, level: int) -> None:
    rtx.check(EngineOptions(optimization_level=level), ("8.9",), NO_GPU)


# TensorRT


def test_tensorrt_without_a_gpu() -> None:
    error = refusal(TENSORRT, NO_GPU, "9.0")
    assert isinstance(error, BackendError)
    assert NO_GPU.reason in str(error)
    assert NO_GPU.mend in str(error)
    assert "--library tensorrt_rtx" in str(error)


@pytest.mark.parametrize("capabilities", [("8.9",), ("8.9", "9.0"), ("9.0", "9.0"), ()])
def test_tensorrt_for_another_gpu(capabilities: tuple[str, ...]) -> None:
    error = refusal(TENSORRT, H100, *capabilities)
    assert isinstance(error, RequestError)
    assert "NVIDIA H100 80GB HBM3 (compute capability 9.0, 80 GiB)" in str(error)
    assert f"got a build for {', '.join(capabilities)};" in str(error)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version_compatible": True},
        {"hardware_compatibility": "ampere_plus"},
        {"refittable": True},
        {"strip_weights": True, "refittable": True},
        {"weight_streaming": True, "tf32": True},
    ],
)
def test_options_that_tensorrt_supports_on_its_gpu(options: dict[str, Any]) -> None:
    TENSORRT.check(EngineOptions(**options), ("9.0",), H100)


# TensorRT-RTX


def test_the_capabilities_of_tensorrt_rtx(rtx: Library) -> None:
    """Version 1.7.1 has at least these. 9.0 is a data-centre GPU's. CURRENT and NONE are no capabilities."""
    assert {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"} <= set(rtx.capabilities())
    assert "9.0" not in rtx.capabilities()
    assert all(part.isdecimal() for name in rtx.capabilities() for part in name.split("."))
    assert rtx.capabilities()["12.0"] == rtx.module.ComputeCapability.SM120


def test_tensorrt_has_no_list_of_capabilities() -> None:
    assert TENSORRT.capabilities() == {}


@pytest.mark.parametrize("gpu", [NO_GPU, RTX4090], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("capabilities", "options", "fragment"),
    [
        (("9.0",), {}, "compute capability 9.0, expected one of 7.5, 8.0, 8.6, 8.9, "),
        (("8.9", "10.0"), {}, "compute capability 10.0, expected one of "),
        (("8.9",), {"hardware_compatibility": "ampere_plus"}, "--hardware-compatibility ampere_plus"),
        (("8.9",), {"version_compatible": True}, "--version-compatible"),
    ],
)
def test_options_that_tensorrt_rtx_does_not_support(
    rtx: Library, gpu: Gpu | NoGpu, capabilities: tuple[str, ...], options: dict[str, Any], fragment: str
) -> None:
    error = refusal(rtx, gpu, *capabilities, **options)
    assert isinstance(error, RequestError)
    assert str(error).startswith(str(rtx))
    assert fragment in str(error)


@pytest.mark.parametrize(
    ("options", "option"),
    [({"refittable": True}, "--refittable"), ({"strip_weights": True}, "--strip-weights")],
)
def test_options_that_tensorrt_rtx_supports_with_a_gpu_only(rtx: Library, options: dict[str, Any], option: str) -> None:
    error = refusal(rtx, NO_GPU, "8.9", **options)
    assert isinstance(error, RequestError)
    assert NO_GPU.reason in str(error)
    assert f"omit {option}" in str(error)
    rtx.check(EngineOptions(**options), ("8.9",), RTX4090)


def test_a_timing_cache_is_for_tensorrt_alone(rtx: Library) -> None:
    with pytest.raises(RequestError, match="omit --timing-cache"):
        rtx.check_timing_cache(Path("times"))
    rtx.check_timing_cache(None)
    TENSORRT.check_timing_cache(Path("times"))


# Loading


def test_an_installed_library(rtx: Library) -> None:
    assert isinstance(rtx, Library)
    assert str(rtx) == f"TensorRT-RTX {rtx.version}"
    assert load_libraries()["tensorrt_rtx"] == rtx


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_library_that_is_not_installed(name: LibraryName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="TensorRT") as absence:
        load_library(name)
    assert load_libraries()[name] == str(absence.value)


# Rejected builds would fail, and others succeed


def build(rtx: Library, bundle: Bundle, capability: str, setup: Callable[[Any, Any, Any], None]) -> tuple[Any, Log]:
    """Build the smallest component; return the plan, or None if the build failed, and the log."""
    trt = rtx.module
    graph, weights = bundle.component_files("vae_decoder", "float16")
    arrays = map_weights(bundle.path(weights))
    log, logger = make_log(rtx)
    builder = trt.Builder(logger)
    network, parser = parse_network(rtx, logger, builder, "vae_decoder", bundle.read(graph, MAX_GRAPH_BYTES), arrays)
    config, profile, shape = builder.create_builder_config(), builder.create_optimization_profile(), (1, 4, 16, 16)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile.set_shape("latents", shape, shape, shape)
    config.add_optimization_profile(profile)
    setup(config, network, SimpleNamespace(weights=arrays, flag=trt.BuilderFlag))
    plan = builder.build_serialized_network(network, config)
    del parser
    return plan, log


def refit_individual(config: Any, network: Any, its: Any) -> None:
    config.set_flag(its.flag.REFIT_INDIVIDUAL)
    assert all(network.mark_weights_refittable(name) for name in its.weights)


Case = tuple[dict[str, Any], str, Callable[[Any, Any, Any], None]]
REFUSED_WITHOUT_GPU: dict[str, Case] = {
    "--refittable": ({"refittable": True}, "SM89", refit_individual),
    "--strip-weights": (
        {"strip_weights": True},
        "SM89",
        lambda config, network, its: config.set_flag(its.flag.STRIP_PLAN),
    ),
    "this GPU": ({}, "CURRENT", lambda config, network, its: None),
}


@pytest.mark.parametrize("case", REFUSED_WITHOUT_GPU)
def test_rejected_builds_really_fail(rtx: Library, sample: Bundle, case: str) -> None:
    """If a later release succeeds, the check has to go. On a machine with a GPU these builds are not rejected."""
    options, capability, setup = REFUSED_WITHOUT_GPU[case]
    gpu = find_gpu()
    if isinstance(gpu, Gpu):
        rtx.check(EngineOptions(**options), ("8.9",), gpu)
        return
    plan, log = build(rtx, sample, capability, setup)
    assert plan is None
    assert log.errors


def test_a_version_compatible_plan_really_fails(rtx: Library, sample: Bundle) -> None:
    """The packages do not contain the lean runtime."""
    plan, log = build(rtx, sample, "SM89", lambda config, _, its: config.set_flag(its.flag.VERSION_COMPATIBLE))
    assert plan is None
    assert "lean" in log.text()


@pytest.mark.parametrize("flag", ["WEIGHT_STREAMING", "STRICT_NANS"])
def test_other_builds_really_succeed(rtx: Library, sample: Bundle, flag: str) -> None:
    plan, log = build(rtx, sample, "SM89", lambda config, _, its: config.set_flag(getattr(its.flag, flag)))
    assert plan is not None, log.text()
    assert plan.nbytes > 1_000_000
    assert log.errors == []


def test_plans_build_without_tf32(rtx: Library, sample: Bundle) -> None:
    """TF32 is on by default in the library, and off in latentrt."""
    before = []

    def clear(config: Any, network: Any, its: Any) -> None:
        before.append(config.get_flag(its.flag.TF32))
        config.clear_flag(its.flag.TF32)

    plan, log = build(rtx, sample, "SM89", clear)
    assert before == [True]
    assert plan is not None, log.text()
