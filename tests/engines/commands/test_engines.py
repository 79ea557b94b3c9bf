from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from latentrt.bundle import Bundle
from latentrt.engine_store import RECORD_NAME, StoredEngine
from latentrt.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.engines.commands.calling import Caller
from tests.engines.made_up import H100, identity, publish, publish_wanted, retrained
from tests.runtime.small_bundle import change_byte

FOR_4090 = ("--gpu", "rtx4090")


@pytest.fixture
def built(sample: Bundle, cache: EngineCache) -> list[StoredEngine]:
    """What `latentrt build --gpu rtx4090` leaves of two submodules."""
    return publish_wanted(cache, sample, "unet", "vae_decoder")


# list


def test_an_empty_list(latentrt: Caller, cache: EngineCache) -> None:
    ended = latentrt("engines", "list")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == f"0 engines, 0 bytes, in {cache.folder}"
    assert json.loads(latentrt("engines", "list", "--json").out) == []


def test_the_list(latentrt: Caller, sample: Bundle, cache: EngineCache, built: list[StoredEngine]) -> None:
    target = {"library": "tensorrt", "library_version": "11.0", "gpu": H100.name, "compute_capabilities": ("9.0",)}
    publish(cache, sample, identity(sample, "safety_checker", **target))
    ended = latentrt("engines", "list")
    lines = ended.out.splitlines()
    assert [re.split(r"\s{2,}", line.strip())[1:4] for line in lines[2:-1]] == [
        ["safety_checker", "float16", "NVIDIA H100 80GB HBM3"],
        ["unet", "float16", "8.9"],
        ["vae_decoder", "float16", "8.9"],
    ]
    assert lines[3].startswith(built[0].key[:12])
    assert all(line.rstrip().endswith("2026-01-02 03:04   not run") for line in lines[2:-1])
    assert lines[-1].startswith("3 engines, ")


def test_the_list_as_json(latentrt: Caller, built: list[StoredEngine]) -> None:
    listed = {one["key"]: one for one in json.loads(latentrt("engines", "list", "--json").out)}
    assert set(listed) == {engine.key for engine in built}
    for engine in built:
        assert listed[engine.key]["identity"]["component"] == engine.record.identity.component
        assert listed[engine.key]["plan"]["sha256"] == engine.record.plan.sha256


# why


def test_why(latentrt: Caller, built: list[StoredEngine], tmp_path: Path) -> None:
    bundle = retrained(tmp_path / "b", "conv_in.weight")
    ended = latentrt("engines", "why", bundle.folder, *FOR_4090)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert re.fullmatch(r"wanted: TensorRT-RTX \S+, for 8\.9; pictures 64x64, batch 1, guidance on", lines[0])
    assert lines[1:] == [
        "safety_checker  nothing is built of safety_checker",
        "text_encoder    nothing is built of text_encoder",
        f"unet            missing; nearest is {built[0].key[:12]} in the cache:",
        "                  weights changed: unet, 1 of 208 arrays",
        f"vae_decoder     there: {built[1].key[:12]} in the cache",
        "vae_encoder     nothing is built of vae_encoder",
    ]


def test_why_of_sealed_engines(latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path) -> None:
    assert latentrt("engines", "seal", bundle_path(), tmp_path / "out").code == 0
    ended = latentrt("engines", "why", tmp_path / "out", *FOR_4090, "--component", "unet")
    assert ended.out.splitlines()[-1] == f"unet            there: {built[0].key[:12]} in the bundle"


def test_why_of_what_cannot_be(latentrt: Caller, cache: EngineCache, tmp_path: Path) -> None:
    assert latentrt("engines", "why", bundle_path(), "--gpu", "rtx1").code == 2
    assert latentrt("engines", "why", tmp_path / "nothing", *FOR_4090).code == 4


# verify


def test_intact(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    ended = latentrt("engines", "verify")
    assert (ended.code, ended.out) == (0, f"intact: 2 engines in {cache.folder}\n")


@pytest.mark.parametrize("damaged", ["plan", "record"])
def test_damage_is_found_and_moved_aside(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine], damaged: str
) -> None:
    change_byte(built[0].plan_path) if damaged == "plan" else (built[0].folder / RECORD_NAME).write_bytes(b"{")
    ended = latentrt("engines", "verify")
    assert (ended.code, ended.out) == (9, "")
    assert f"not what was built: 1 of 2; they were moved aside, to {cache.folder / 'aside'}:" in ended.err
    assert built[0].key in ended.err
    assert built[1].key not in ended.err
    assert latentrt("engines", "verify").out == f"intact: 1 engines in {cache.folder}\n"
    (moved,) = (cache.folder / "aside").iterdir()
    assert (moved / "reason.txt").read_text()


def test_what_a_build_is_at_is_not_called_damaged(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine]
) -> None:
    """A plan whose record is not written yet: nothing is moved, so nothing may be said to have been."""
    (cache.folder / ("0" * 64)).mkdir()
    ended = latentrt("engines", "verify")
    assert "moved aside" not in ended.err
    assert (ended.code, ended.out) == (0, f"intact: 2 engines in {cache.folder}\n")


def test_verifying_is_not_using(latentrt: Caller, built: list[StoredEngine]) -> None:
    """Else whoever verifies every night would never prune."""
    os.utime(built[0].folder / RECORD_NAME, (0, 0))
    assert latentrt("engines", "verify").code == 0
    assert "1 things" in latentrt("engines", "prune", "--older-than", "1", "--dry-run").out


# prune


def test_nothing_to_prune(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    assert latentrt("engines", "prune").out == f"0 things, 0 bytes, in {cache.folder}\n"
    assert len(cache.all_keys()) == 2


def test_prune(latentrt: Caller, sample: Bundle, cache: EngineCache, built: list[StoredEngine]) -> None:
    old = publish(cache, sample, identity(sample, "unet", library_version="1.0+cu13"))
    dry = latentrt("engines", "prune", "--dry-run")
    assert dry.out.startswith(f"would delete {old.key[:12]}: unet, built by tensorrt_rtx 1.0+cu13, this is ")
    assert dry.out.splitlines()[-1].endswith(f"(nothing was deleted), in {cache.folder}")
    assert old.folder.exists()
    wet = latentrt("engines", "prune")
    assert wet.out.startswith(f"deleting {old.key[:12]}: ")
    assert not old.folder.exists()
    assert sorted(cache.all_keys()) == sorted(engine.key for engine in built)


def test_prune_what_was_not_used(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    os.utime(built[0].folder / RECORD_NAME, (0, 0))
    assert "unet, not used for so long" in latentrt("engines", "prune", "--older-than", "30").out
    assert cache.all_keys() == [built[1].key]
    assert latentrt("engines", "prune", "--older-than", "-1").code == 2


def test_prune_all(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    assert latentrt("engines", "prune", "--all").out.count("as every engine") == 2
    assert cache.all_keys() == []


# seal


def test_seal(latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = latentrt("engines", "seal", bundle_path(), out, built[0].key[:12])
    assert ended.code == 0, ended.err
    sealed = Bundle.open(out)
    assert ended.out.splitlines() == [
        f"sealed {built[0].key[:12]}  unet",
        f"{out}: 1 engines",
        f"digest: {sealed.digest}",
    ]
    assert latentrt("verify", out, "--digest", sealed.digest).code == 0
    shown = latentrt("inspect", out)
    assert re.search(rf"^engine +{built[0].key[:12]}  .*{built[0].plan_path.name}$", shown.out, re.MULTILINE)
    assert latentrt("engines", "seal", bundle_path(), out).code == 8
    assert latentrt("engines", "seal", bundle_path(), out, "--overwrite").out.count("sealed ") == 2


def test_what_cannot_be_sealed(latentrt: Caller, sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nothing = latentrt("engines", "seal", bundle_path(), out)
    assert (nothing.code, "build some: latentrt build" in nothing.err) == (9, True)
    (engine,) = publish_wanted(cache, sample, "unet")
    assert latentrt("engines", "seal", bundle_path(), out, "0" * 64).code == 2
    assert latentrt("engines", "seal", bundle_path(), out, "--digest", f"sha256:{'0' * 64}").code == 4
    change_byte(engine.plan_path)
    damaged = latentrt("engines", "seal", bundle_path(), out)
    assert (damaged.code, "build it again: latentrt build" in damaged.err) == (9, True)
    assert not out.exists()
