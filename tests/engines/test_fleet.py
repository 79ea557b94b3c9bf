from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineIdentity, EngineOptions
from latentrt.errors import RequestError
from latentrt_engines.cache import EngineCache
from latentrt_engines.fleet import PlannedEngine, plan_fleet
from latentrt_engines.gpus import parse_gpus
from latentrt_engines.library import load_library
from latentrt_engines.options import BuildOptions
from latentrt_engines.seal import seal
from tests.engines.made_up import H100, NO_GPU, PLAN, FakeTensorRT, identity, publish

RTX = load_library("tensorrt_rtx")
L40S = Gpu(name="NVIDIA L40S", compute_capability="8.9", memory_bytes=48 << 30, cuda="13.0")


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> str:
    """Fake an installed TensorRT; return its version."""
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    return load_library("tensorrt").version


def plan(
    bundle: Bundle, cache: EngineCache, gpus: str, here: Gpu | NoGpu = NO_GPU, **given: Any
) -> list[PlannedEngine]:
    """Plan the denoiser's engines, unless other components are given."""
    options = BuildOptions(**{"component": ("unet",), **given})
    return plan_fleet(bundle, options, parse_gpus(gpus), cache, here)


def locations(planned: list[PlannedEngine]) -> dict[str, str | None]:
    return {each.gpu.label: each.location for each in planned}


def rtx_engine(bundle: Bundle, *capabilities: str, **changes: Any) -> EngineIdentity:
    changes = {"library_version": RTX.version, **changes}
    return identity(bundle, "unet", compute_capabilities=capabilities, **changes)


# Targets


def test_every_component_and_size_for_every_gpu(sample: Bundle, cache: EngineCache) -> None:
    planned = plan(sample, cache, "rtx4090,rtx3060", component=(), size=("64", "128"))
    components = list(sample.manifest.components)
    expected = 2 * (2 * len(components) - 1)  # the text encoder's engine serves all sizes
    assert len(planned) == expected
    for label, capability in (("rtx4090", "8.9"), ("rtx3060", "8.6")):
        of_gpu = [each for each in planned if each.gpu.label == label]
        assert {each.target.component for each in of_gpu} == set(components)
        assert {each.target.identity.compute_capabilities for each in of_gpu} == {(capability,)}


def test_gpus_of_one_capability_share_an_engine(sample: Bundle, cache: EngineCache) -> None:
    first, second = plan(sample, cache, "rtx4090,rtx4060")
    assert first.target.key == second.target.key


def test_images_and_components_that_the_bundle_does_not_support(sample: Bundle, cache: EngineCache) -> None:
    with pytest.raises(RequestError, match="`size`: got a width of 63"):
        plan(sample, cache, "rtx4090", size=("63",))
    with pytest.raises(RequestError, match="component 'vae'"):
        plan(sample, cache, "rtx4090", component=("vae",))


# Existing engines


def test_no_engine_exists(sample: Bundle, cache: EngineCache) -> None:
    (planned,) = plan(sample, cache, "rtx4090")
    assert (planned.location, planned.obstacle) == (None, None)


def test_in_the_cache(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, rtx_engine(sample, "8.9"))
    assert locations(plan(sample, cache, "rtx4090,rtx4060,rtx3060")) == {
        "rtx4090": "cache",
        "rtx4060": "cache",
        "rtx3060": None,
    }


def test_sealed_into_the_bundle(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    engine = publish(cache, sample, rtx_engine(sample, "8.9"))
    bundle = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    assert locations(plan(bundle, cache, "rtx4090")) == {"rtx4090": "bundle"}
    cache.remove(engine.key)
    assert locations(plan(bundle, cache, "rtx4090")) == {"rtx4090": "bundle"}


def test_an_engine_for_several_capabilities_serves_each(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, rtx_engine(sample, "8.6", "8.9"))
    assert locations(plan(sample, cache, "rtx3060,rtx4090,rtx5090")) == {
        "rtx3060": "cache",
        "rtx4090": "cache",
        "rtx5090": None,
    }


def test_the_key_is_the_existing_engines(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, rtx_engine(sample, "8.6", "8.9"))
    planned = {each.gpu.label: each for each in plan(sample, cache, "rtx3060,rtx4090,rtx5090")}
    assert {planned["rtx3060"].key, planned["rtx4090"].key} == {engine.key}
    assert planned["rtx4090"].target.key != engine.key
    assert planned["rtx5090"].key == planned["rtx5090"].target.key


def test_a_card_without_a_name_by_its_capability(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, rtx_engine(sample, "8.9"))
    planned = {each.gpu.label: each for each in plan(sample, cache, "8.9,rtx4090,7.5,10.0")}
    assert {label: each.location for label, each in planned.items()} == {
        "8.9": "cache",
        "rtx4090": "cache",
        "7.5": None,
        "10.0": None,
    }
    assert planned["8.9"].key == planned["rtx4090"].key == engine.key
    assert planned["7.5"].obstacle is None
    assert "compute capability 10.0" in (planned["10.0"].obstacle or "")


@pytest.mark.parametrize("damage", [lambda plan: os.truncate(plan, 3), Path.unlink], ids=["truncated", "missing"])
def test_an_incomplete_engine_does_not_exist(
    sample: Bundle, cache: EngineCache, damage: Callable[[Path], None]
) -> None:
    engine = publish(cache, sample, rtx_engine(sample, "8.9"))
    damage(engine.plan_path)
    (planned,) = plan(sample, cache, "rtx4090")
    assert (planned.location, planned.obstacle) == (None, None)
    assert planned.size_bytes > len(PLAN), "an estimate"
    assert engine.folder.exists(), "planning quarantines nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"library_version": "1.0+cu12"},
        {"platform": "elsewhere-riscv"},
        {"weights": "0" * 64},
        {"graph": "0" * 64},
        {"precision": "float32"},
        {"profile": {}},
        {"options": EngineOptions(tf32=True)},
    ],
)
def test_a_different_engine_does_not_serve(sample: Bundle, cache: EngineCache, changes: dict[str, Any]) -> None:
    publish(cache, sample, rtx_engine(sample, "8.9", **changes))
    assert locations(plan(sample, cache, "rtx4090")) == {"rtx4090": None}


def tensorrt_engine(bundle: Bundle, version: str, gpu: str, capability: str) -> EngineIdentity:
    target: dict[str, Any] = {"library": "tensorrt", "library_version": version, "gpu": gpu}
    return identity(bundle, "unet", compute_capabilities=(capability,), **target)


def test_an_engine_for_a_gpu_with_its_memory_in_its_name(sample: Bundle, cache: EngineCache, tensorrt: str) -> None:
    publish(cache, sample, tensorrt_engine(sample, tensorrt, H100.name, "9.0"))
    assert locations(plan(sample, cache, "h100,h200")) == {"h100": "cache", "h200": None}


@pytest.mark.parametrize(("gpu", "label"), [("NVIDIA L40S", "l4"), ("NVIDIA L40S", "l40"), ("NVIDIA A10G", "a10")])
def test_an_engine_for_a_gpu_whose_name_begins_with_anothers(
    sample: Bundle, cache: EngineCache, tensorrt: str, gpu: str, label: str
) -> None:
    """A TensorRT plan is for the GPU model it was built on, and an L40S is not an L4."""
    capability = parse_gpus(label)[0].compute_capability
    publish(cache, sample, tensorrt_engine(sample, tensorrt, gpu, capability))
    found = locations(plan(sample, cache, f"{label},{gpu}"))
    assert found == {label: None, parse_gpus(gpu)[0].label: "cache"}


def test_an_engine_of_any_version_serves_without_the_library(sample: Bundle, cache: EngineCache) -> None:
    """As when planning on a laptop with a bundle that was sealed on another machine."""
    publish(cache, sample, tensorrt_engine(sample, "10.0", "NVIDIA L4", "8.9"))
    assert locations(plan(sample, cache, "l4")) == {"l4": "cache"}


# Obstacles


def test_a_library_that_is_not_installed(sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (planned,) = plan(sample, cache, "h100", H100)
    assert planned.obstacle is not None
    assert "latentrt[tensorrt]" in planned.obstacle
    (planned,) = plan(sample, cache, "l4", H100)
    assert "on the GPU itself" in (planned.obstacle or ""), "the library is missing on this machine only"


def test_a_library_that_needs_no_gpu_is_not_installed(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    (planned,) = plan(sample, cache, "rtx4090")
    assert planned.obstacle is not None
    assert "latentrt[rtx]" in planned.obstacle
    assert not planned.buildable_elsewhere, "any machine with the library can build them"


@pytest.mark.parametrize("here", [NO_GPU, H100, L40S], ids=["no GPU", "H100", "L40S"])
def test_a_gpu_that_is_not_in_this_machine(
    sample: Bundle, cache: EngineCache, tensorrt: str, here: Gpu | NoGpu
) -> None:
    (planned,) = plan(sample, cache, "l4", here)
    assert "on the GPU itself" in (planned.obstacle or "")
    assert planned.buildable_elsewhere


def test_the_gpu_in_this_machine(sample: Bundle, cache: EngineCache, tensorrt: str) -> None:
    planned = plan(sample, cache, "h100,l4", H100)
    assert {each.gpu.label: (each.obstacle is None, each.buildable_elsewhere) for each in planned} == {
        "h100": (True, False),
        "l4": (False, True),
    }


def test_the_plan_for_this_machines_gpu_has_the_key_that_build_uses(
    sample: Bundle, cache: EngineCache, tensorrt: str
) -> None:
    """Otherwise `plan --run` would build an engine under a key that no run looks for."""
    (planned,) = plan(sample, cache, "h100", H100)
    (built,) = BuildOptions(component=("unet",), library="tensorrt").resolve(sample, None, None, H100).targets
    assert planned.target.key == built.key


def test_options_that_the_library_does_not_support(sample: Bundle, cache: EngineCache) -> None:
    (planned,) = plan(sample, cache, "rtx4090", refittable=True)
    assert planned.obstacle is not None
    assert "--refittable" in planned.obstacle
    assert not planned.buildable_elsewhere
    (planned,) = plan(sample, cache, "h100", library="tensorrt_rtx")
    assert planned.obstacle is not None
    assert "compute capability 9.0" in planned.obstacle
    assert not planned.buildable_elsewhere, "the machine with the GPU cannot either"


# Sizes


def test_the_size_of_an_existing_engine_and_an_estimate(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, rtx_engine(sample, "8.9"))
    there, missing = plan(sample, cache, "rtx4090,rtx5090")
    weights = sample.manifest.files[sample.manifest.components["unet"].weights.file].size
    assert there.size_bytes == len(PLAN)
    assert weights < missing.size_bytes < weights + 50_000_000


def test_an_estimate_of_a_plan_without_weights(sample: Bundle, cache: EngineCache) -> None:
    (whole,) = plan(sample, cache, "rtx4090")
    (stripped,) = plan(sample, cache, "rtx4090", strip_weights=True)
    weights = sample.manifest.files[sample.manifest.components["unet"].weights.file].size
    assert whole.size_bytes - stripped.size_bytes == weights
