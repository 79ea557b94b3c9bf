from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.weights import map_weights
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import EngineOptions, LibraryName
from latentrt.errors import BackendError, LatentRTError, MissingExtraError, RequestError
from latentrt_engines.library import Library, installed_libraries, load_library
from latentrt_engines.network import Log, make_log, parse_network
from tests.engines.made_up import H100, NO_GPU, RTX4090, TENSORRT


@pytest.fixture(scope="module")
def rtx() -> Library:
    return load_library("tensorrt_rtx")


def refusal(library: Library, gpu: Gpu | NoGpu, *capabilities: str, **options: Any) -> LatentRTError:
    with pytest.raises(LatentRTError) as refused:
        library.check(EngineOptions(**options), capabilities, gpu)
    return refused.value


# What contradicts itself


@pytest.mark.parametrize("gpu", [NO_GPU, RTX4090], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimization_level": 6}, "found optimization level 6, expected 0 to 5"),
        ({"optimization_level": -1}, "found optimization level -1, expected 0 to 5"),
        (
            {"version_compatible": True, "refittable": True},
            "--version-compatible and --refittable exclude each other: a plan that runs without its lean runtime",
        ),
        (
            {"version_compatible": True, "strip_weights": True},
            "--version-compatible and --strip-weights exclude each other: a plan that runs without its lean runtime",
        ),
    ],
)
def test_contradictions(rtx: Library, gpu: Gpu | NoGpu, options: dict[str, Any], sentence: str) -> None:
    """Of the options alone: whichever library, and before it is said that there is no GPU."""
    for library in (rtx, TENSORRT):
        error = refusal(library, gpu, "8.9", **options)
        assert isinstance(error, RequestError)
        assert str(error).startswith(sentence)


@pytest.mark.parametrize("level", range(6))
def test_every_optimization_level_there_is(rtx: Library, level: int) -> None:
    rtx.check(EngineOptions(optimization_level=level), ("8.9",), NO_GPU)


# TensorRT


def test_tensorrt_without_a_gpu() -> None:
    error = refusal(TENSORRT, NO_GPU, "9.0")
    assert isinstance(error, BackendError)
    assert str(error) == (
        "TensorRT 11.0.0.1+cu13 builds on the GPU that the plan is for, and here there is no NVIDIA driver; buy one, "
        "or build for an RTX GPU with --library tensorrt_rtx"
    )


@pytest.mark.parametrize("capabilities", [("8.9",), ("8.9", "9.0"), ("9.0", "9.0"), ()])
def test_tensorrt_for_another_gpu(capabilities: tuple[str, ...]) -> None:
    error = refusal(TENSORRT, H100, *capabilities)
    assert isinstance(error, RequestError)
    here = "NVIDIA H100 80GB HBM3 (compute capability 9.0, 80 GiB)"
    assert f"builds for the GPU of this machine, {here}, found a build for {', '.join(capabilities)};" in str(error)


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
def test_what_tensorrt_can_do_on_its_gpu(options: dict[str, Any]) -> None:
    TENSORRT.check(EngineOptions(**options), ("9.0",), H100)


# TensorRT-RTX


def test_the_capabilities_of_tensorrt_rtx(rtx: Library) -> None:
    """Known of 1.7.1, and more may come; 9.0 is a data-centre GPU's, CURRENT and NONE are no capability's name."""
    assert {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"} <= set(rtx.capabilities())
    assert "9.0" not in rtx.capabilities()
    assert all(part.isdecimal() for name in rtx.capabilities() for part in name.split("."))
    assert rtx.capabilities()["12.0"] == rtx.module.ComputeCapability.SM120


def test_a_library_that_names_no_capabilities() -> None:
    assert TENSORRT.capabilities() == {}


@pytest.mark.parametrize("gpu", [NO_GPU, RTX4090], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("capabilities", "options", "sentence"),
    [
        (("9.0",), {}, " cannot build for compute capability 9.0, it knows 7.5, 8.0, 8.6, 8.9, "),
        (("8.9", "10.0"), {}, " cannot build for compute capability 10.0, it knows "),
        (("8.9",), {"hardware_compatibility": "ampere_plus"}, " has no levels of hardware compatibility: name every"),
        (("8.9",), {"version_compatible": True}, " makes no version-compatible plans: each belongs to one release;"),
    ],
)
def test_what_tensorrt_rtx_cannot_do(
    rtx: Library, gpu: Gpu | NoGpu, capabilities: tuple[str, ...], options: dict[str, Any], sentence: str
) -> None:
    error = refusal(rtx, gpu, *capabilities, **options)
    assert isinstance(error, RequestError)
    assert str(error).startswith(f"{rtx}{sentence}")


@pytest.mark.parametrize(
    ("options", "words", "option"),
    [
        ({"refittable": True}, "refittable plans", "--refittable"),
        ({"strip_weights": True}, "plans without their weights", "--strip-weights"),
    ],
)
def test_what_tensorrt_rtx_can_do_with_a_gpu_only(
    rtx: Library, options: dict[str, Any], words: str, option: str
) -> None:
    error = refusal(rtx, NO_GPU, "8.9", **options)
    assert isinstance(error, RequestError)
    assert str(error) == (
        f"{rtx} makes {words} only on a machine with a GPU, and here there is no NVIDIA driver; leave out {option}, or "
        "build there"
    )
    rtx.check(EngineOptions(**options), ("8.9",), RTX4090)


def test_a_timing_cache_is_for_tensorrt_alone(rtx: Library) -> None:
    with pytest.raises(RequestError, match=r"uses no timing cache.*; leave out --timing-cache"):
        rtx.check_timing_cache(Path("times"))
    rtx.check_timing_cache(None)
    TENSORRT.check_timing_cache(Path("times"))


# Which library is here


def test_a_library_of_this_machine(rtx: Library) -> None:
    assert isinstance(rtx, Library)
    assert str(rtx) == f"TensorRT-RTX {rtx.version}"
    assert installed_libraries()["tensorrt_rtx"] == rtx


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_library_that_is_not_installed(name: LibraryName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="is needed to build engines with TensorRT") as absence:
        load_library(name)
    assert installed_libraries()[name] == str(absence.value)


# That what is refused would fail, and that what is not does not


def build(rtx: Library, bundle: Bundle, capability: str, setup: Callable[[Any, Any, Any], None]) -> tuple[Any, Log]:
    """A plan of the smallest submodule, or None; and what the library said."""
    trt = rtx.module
    graph, weights = bundle.component_files("vae_decoder", "float16")
    arrays = map_weights(bundle.path(weights))
    log, logger = make_log(rtx)
    builder = trt.Builder(logger)
    network, parser = parse_network(rtx, logger, builder, "vae_decoder", bundle.read(graph), arrays)
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
def test_what_is_refused_really_fails(rtx: Library, sample: Bundle, case: str) -> None:
    """Should a later release do it, the refusal has to go. On a machine with a GPU nothing of this is refused."""
    options, capability, setup = REFUSED_WITHOUT_GPU[case]
    gpu = find_gpu()
    if isinstance(gpu, Gpu):
        rtx.check(EngineOptions(**options), ("8.9",), gpu)
        return
    plan, log = build(rtx, sample, capability, setup)
    assert plan is None
    assert log.errors


def test_a_version_compatible_plan_really_fails(rtx: Library, sample: Bundle) -> None:
    """For want of the lean runtime, which the packages do not have."""
    plan, log = build(rtx, sample, "SM89", lambda config, _, its: config.set_flag(its.flag.VERSION_COMPATIBLE))
    assert plan is None
    assert "lean" in log.text()


@pytest.mark.parametrize("flag", ["WEIGHT_STREAMING", "STRICT_NANS"])
def test_what_is_not_refused_really_builds(rtx: Library, sample: Bundle, flag: str) -> None:
    plan, log = build(rtx, sample, "SM89", lambda config, _, its: config.set_flag(getattr(its.flag, flag)))
    assert plan is not None, log.text()
    assert plan.nbytes > 1_000_000
    assert log.errors == []


def test_plans_build_without_tf32(rtx: Library, sample: Bundle) -> None:
    """It is the library's default, and off by ours."""
    before = []

    def clear(config: Any, network: Any, its: Any) -> None:
        before.append(config.get_flag(its.flag.TF32))
        config.clear_flag(its.flag.TF32)

    plan, log = build(rtx, sample, "SM89", clear)
    assert before == [True]
    assert plan is not None, log.text()
