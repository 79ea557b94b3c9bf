from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.engines.choice import Machine, choose_engines, find_incompatibilities
from latentrt.engines.record import EngineIdentity, EngineOptions, ShapeRange
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import seal
from tests.engines.made_up import H100, RTX, RTX4090, TENSORRT, identity, publish

MACHINE = Machine(
    gpu=RTX4090.name,
    compute_capability=RTX4090.compute_capability,
    versions={"tensorrt_rtx": RTX.version, "tensorrt": TENSORRT.version},
)
RANGE = ShapeRange(min=(1, 4, 8, 8), opt=(1, 4, 16, 16), max=(4, 4, 32, 32))


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


def widened(sample: Bundle) -> EngineIdentity:
    """Return the identity of an engine of the denoiser with a wide profile."""
    engine = identity(sample, "unet")
    return msgspec.structs.replace(engine, profile={**engine.profile, "sample": RANGE})


@pytest.mark.extras  # the lock of the engine cache
def test_narrow_profiles_come_before_wide_ones(sample: Bundle, cache: EngineCache) -> None:
    wide = publish(cache, sample, widened(sample))
    narrow = publish(cache, sample, identity(sample, "unet"))
    publish(cache, sample, identity(sample, "vae_decoder"))
    compatible, incompatible = choose_engines(sample, "unet", MACHINE)
    assert [source.record for source in compatible] == [narrow.record, wide.record]
    assert incompatible == []


@pytest.mark.extras  # the lock of the engine cache
def test_sealed_engines_come_before_stored_ones(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    """Also before a narrower one: the author of the bundle has chosen them."""
    wide = publish(cache, sample, widened(sample))
    sealed = seal(sample, [wide], cache, tmp_path / "out", overwrite=False)
    cache.remove(wide.key)
    narrow = publish(cache, sample, identity(sample, "unet"))
    compatible, _ = choose_engines(sealed, "unet", MACHINE)
    assert [source.record for source in compatible] == [wide.record, narrow.record]


@pytest.mark.extras  # the lock of the engine cache
def test_sealed_engines_do_not_need_a_cache(
    sample: Bundle, cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    sealed = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file"))
    compatible, _ = choose_engines(sealed, "unet", MACHINE)
    assert [source.record for source in compatible] == [engine.record]


@pytest.mark.extras  # the lock of the engine cache
def test_incompatible_engines_have_reasons(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",), platform="elsewhere-riscv"))
    compatible, (incompatible,) = choose_engines(sample, "unet", MACHINE)
    assert compatible == []
    assert incompatible.record == engine.record
    platform, gpu = incompatible.reasons
    assert "elsewhere-riscv" in platform
    assert "8.6" in gpu


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({}, []),
        ({"weights": None}, []),
        ({"compute_capabilities": ("8.6", "8.9")}, []),
        ({"graph": "0" * 64}, ["graph changed"]),
        ({"component": "controlnet"}, ["graph changed"]),
        ({"weights": "0" * 64}, ["weights changed"]),
        ({"platform": "elsewhere-riscv"}, ["elsewhere-riscv"]),
        ({"library_version": "1.0+cu13"}, ["1.0+cu13"]),
        ({"compute_capabilities": ("8.6",)}, ["this GPU is 8.9"]),
        ({"gpu": H100.name}, [H100.name]),
        ({"gpu": RTX4090.name}, []),
    ],
)
def test_reasons(sample: Bundle, changes: dict[str, Any], fragments: list[str]) -> None:
    engine = msgspec.structs.replace(identity(sample, "unet"), **changes)
    reasons = list(find_incompatibilities(engine, sample, MACHINE))
    assert len(reasons) == len(fragments)
    assert all(fragment in reason for fragment, reason in zip(fragments, reasons, strict=True))


def test_a_library_that_is_not_installed(sample: Bundle) -> None:
    machine = Machine(gpu=RTX4090.name, compute_capability="8.9", versions={})
    (reason,) = find_incompatibilities(identity(sample, "unet"), sample, machine)
    assert "tensorrt_rtx" in reason


@pytest.mark.parametrize(
    ("built_by", "compatible"), [("11.0.0.0+cu13", True), ("11.2.0.0+cu13", False), ("10.9.0.0+cu13", False)]
)
def test_a_version_compatible_engine_runs_with_later_releases_of_its_major_version(
    sample: Bundle, built_by: str, compatible: bool
) -> None:
    options = EngineOptions(version_compatible=True)
    engine = identity(sample, "unet", library="tensorrt", library_version=built_by, options=options)
    assert (list(find_incompatibilities(engine, sample, MACHINE)) == []) == compatible


@pytest.mark.parametrize("version", ["11.²", "11." + "9" * 5000, "", "+cu13", "11.x", "²"])
def test_a_forged_version_is_no_crash(sample: Bundle, version: str) -> None:
    options = EngineOptions(version_compatible=True)
    engine = identity(sample, "unet", library="tensorrt", library_version=version, options=options)
    reasons = list(find_incompatibilities(engine, sample, MACHINE))
    assert all(version in reason for reason in reasons)
    assert len(reasons) == (not version.startswith("11"))


@pytest.mark.parametrize(("capability", "compatible"), [("8.0", True), ("12.0", True), ("7.5", False)])
def test_ampere_plus_runs_from_compute_capability_8(sample: Bundle, capability: str, compatible: bool) -> None:
    options = EngineOptions(hardware_compatibility="ampere_plus")
    engine = identity(sample, "unet", library="tensorrt", library_version=TENSORRT.version, options=options)
    machine = Machine(gpu="any", compute_capability=capability, versions=MACHINE.versions)
    assert (list(find_incompatibilities(engine, sample, machine)) == []) == compatible
