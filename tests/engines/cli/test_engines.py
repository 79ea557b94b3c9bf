from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.engines.record import EngineOptions
from latentrt.engines.store import RECORD_NAME, StoredEngine
from latentrt_engines.cache import EngineCache, Prunable
from tests.documents import validated
from tests.engines.cli.calling import Caller
from tests.engines.made_up import H100, PLAN, identity, publish, publish_targets, retrained
from tests.runtime.small_bundle import change_byte

FOR_4090 = ("--gpu", "rtx4090")


@pytest.fixture
def built(sample: Bundle, cache: EngineCache) -> list[StoredEngine]:
    """Publish the engines that `latentrt build --gpu rtx4090` builds of two components."""
    return publish_targets(cache, sample, "unet", "vae_decoder")


def cells(line: str) -> list[str]:
    """Return the cells of a row that are not empty."""
    return re.split(r"\s{2,}", line.strip())


# list


def test_an_empty_list(latentrt: Caller, cache: EngineCache) -> None:
    ended = latentrt("engines", "list")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == f"0 engines, 0 bytes, in {cache.folder}"
    assert json.loads(latentrt("engines", "list", "--json").out) == {"folder": str(cache.folder), "engines": []}


def test_the_list(latentrt: Caller, sample: Bundle, cache: EngineCache, built: list[StoredEngine]) -> None:
    target = {"library": "tensorrt", "library_version": "11.0", "gpu": H100.name, "compute_capabilities": ("9.0",)}
    options = EngineOptions(optimization_level=5, refittable=True)
    publish(cache, sample, identity(sample, "safety_checker", **target, options=options))
    portable = identity(sample, "vae_encoder", compute_capabilities=("8.6", "8.9"), library_version="1.2")
    publish(cache, sample, portable)
    ended = latentrt("engines", "list")
    lines = ended.out.splitlines()
    assert lines[0].split() == ["key", "component", "for", "shapes", "options", "size", "built", "checked", "on"]
    rtx, built_at = built[0].record.identity.library_version, ["2026-01-02 03:04", "not run"]
    sizes = [f"{engine.record.plan.size} bytes" for engine in built]
    assert [cells(line)[1:] for line in lines[2:-1]] == [
        [
            "safety_checker float16",
            f"{H100.name}, tensorrt 11.0",
            "1×64×64×3",
            "optimization level 5, refittable",
            f"{len(PLAN)} bytes",
            *built_at,
        ],
        ["unet float16", f"8.9, tensorrt_rtx {rtx}", "2×4×16×16", sizes[0], *built_at],
        ["vae_decoder float16", f"8.9, tensorrt_rtx {rtx}", "1×4×16×16", sizes[1], *built_at],
        ["vae_encoder float16", "8.6, 8.9, tensorrt_rtx 1.2", "1×3×64×64", f"{len(PLAN)} bytes", *built_at],
    ]
    assert lines[3].startswith(built[0].key[:12])
    size = 2 * len(PLAN) + sum(engine.record.plan.size for engine in built)
    assert lines[-1] == f"4 engines, {size} bytes, in {cache.folder}"


def test_a_list_of_one_engine(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet"))
    assert latentrt("engines", "list").out.splitlines()[-1] == f"1 engine, {len(PLAN)} bytes, in {cache.folder}"


def test_an_incomplete_engine_is_listed_as_damaged(latentrt: Caller, built: list[StoredEngine]) -> None:
    os.truncate(built[0].plan_path, 3)
    built[1].plan_path.unlink()
    assert [cells(line)[4] for line in latentrt("engines", "list").out.splitlines()[2:-1]] == ["damaged", "damaged"]


def test_the_list_of_a_bundle(latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path) -> None:
    other = retrained(tmp_path / "b", "conv_in.weight")  # with another denoiser and the same decoder
    (engine,) = publish_targets(cache, other, "unet")
    listed = {
        folder: {one["key"] for one in json.loads(latentrt("engines", "list", folder, "--json").out)["engines"]}
        for folder in (bundle_path(), other.folder)
    }
    assert listed == {bundle_path(): {one.key for one in built}, other.folder: {engine.key, built[1].key}}
    lines = latentrt("engines", "list", other.folder).out.splitlines()
    assert [cells(line)[0] for line in lines[2:-1]] == [engine.key[:12], built[1].key[:12]]
    assert lines[-1].startswith("2 engines, ")
    assert latentrt("engines", "list", tmp_path / "nothing").code == 4


def test_the_list_as_json(latentrt: Caller, built: list[StoredEngine]) -> None:
    listed = {one["key"]: one for one in json.loads(latentrt("engines", "list", "--json").out)["engines"]}
    assert set(listed) == {engine.key for engine in built}
    for engine in built:
        assert listed[engine.key]["record"]["identity"]["component"] == engine.record.identity.component
        assert listed[engine.key]["record"]["plan"]["sha256"] == engine.record.plan.sha256


# show


def test_show(latentrt: Caller, built: list[StoredEngine]) -> None:
    ended = latentrt("engines", "show", built[0].key[:12])
    assert (ended.code, ended.out.encode()) == (0, (built[0].folder / RECORD_NAME).read_bytes())
    assert json.loads(ended.out)["identity"]["component"] == "unet"


def test_show_of_an_invalid_key(latentrt: Caller, built: list[StoredEngine]) -> None:
    for key, fragment in ((built[0].key[:3], "4 digits"), ("0" * 64, "latentrt engines list")):
        ended = latentrt("engines", "show", key)
        assert (ended.code, ended.out) == (2, "")
        assert f"'{key}'" in ended.err
        assert fragment in ended.err
    assert latentrt("engines", "show").code == 2


# why


def test_why(latentrt: Caller, built: list[StoredEngine], tmp_path: Path) -> None:
    bundle = retrained(tmp_path / "b", "conv_in.weight")
    ended = latentrt("engines", "why", bundle.folder, *FOR_4090)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert re.fullmatch(r"wanted: TensorRT-RTX \S+, for 8\.9; images 64x64, batch 1, guidance on", lines[0])
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "preview_decoder missing; no engine of preview_decoder exists",
        "safety_checker missing; no engine of safety_checker exists",
        "text_encoder missing; no engine of text_encoder exists",
        f"unet missing; the nearest is {built[0].key[:12]} in the cache:",
        "weights changed: unet, 1 of 208 arrays",
        f"vae_decoder exists: {built[1].key[:12]} in the cache",
        "vae_encoder missing; no engine of vae_encoder exists",
    ]


def test_why_of_one_plan_for_more_gpus(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    (engine,) = publish_targets(cache, sample, "unet", gpus="rtx4090,rtx3060")
    for gpus in ("rtx4090", "rtx3060", "8.9,8.6"):
        ended = latentrt("engines", "why", bundle_path(), "--gpu", gpus, "--component", "unet")
        assert ended.out.splitlines()[1:] == [f"unet            exists: {engine.key[:12]} in the cache"]
    ended = latentrt("engines", "why", bundle_path(), "--gpu", "rtx4090,rtx5090", "--component", "unet")
    assert ended.out.splitlines()[1:] == [
        f"unet            missing; the nearest is {engine.key[:12]} in the cache:",
        "                  built for 8.6, 8.9, wanted 8.9, 12.0",
    ]


def test_why_of_an_incomplete_engine(latentrt: Caller, built: list[StoredEngine]) -> None:
    os.truncate(built[0].plan_path, 3)
    ended = latentrt("engines", "why", bundle_path(), *FOR_4090, "--component", "unet")
    assert ended.out.splitlines()[1:] == ["unet            missing; no engine of unet exists"]


def test_why_of_sealed_engines(latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path) -> None:
    assert latentrt("engines", "seal", bundle_path(), tmp_path / "out").code == 0
    ended = latentrt("engines", "why", tmp_path / "out", *FOR_4090, "--component", "unet")
    assert ended.out.splitlines()[-1] == f"unet            exists: {built[0].key[:12]} in the bundle"


def test_why_of_invalid_arguments(latentrt: Caller, cache: EngineCache, tmp_path: Path) -> None:
    assert latentrt("engines", "why", bundle_path(), "--gpu", "rtx1").code == 2
    assert latentrt("engines", "why", tmp_path / "nothing", *FOR_4090).code == 4


# verify


def test_intact(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    ended = latentrt("engines", "verify")
    assert (ended.code, ended.out) == (0, f"intact: 2 engines in {cache.folder}\n")


@pytest.mark.parametrize("damaged", ["plan", "record"])
def test_damaged_engines_are_quarantined(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine], damaged: str
) -> None:
    change_byte(built[0].plan_path) if damaged == "plan" else (built[0].folder / RECORD_NAME).write_bytes(b"{")
    ended = latentrt("engines", "verify")
    assert (ended.code, ended.out) == (9, "")
    assert "1 of 2 engines" in ended.err
    assert str(cache.folder / "quarantine") in ended.err
    assert built[0].key in ended.err
    assert built[1].key not in ended.err
    assert latentrt("engines", "verify").out == f"intact: 1 engine in {cache.folder}\n"
    (moved,) = (cache.folder / "quarantine").iterdir()
    assert (moved / "reason.txt").read_text()


def test_a_running_build_is_not_reported_as_damaged(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine]
) -> None:
    """Its record is not written yet. Nothing is quarantined, so nothing may be reported."""
    (cache.folder / ("0" * 64)).mkdir()
    ended = latentrt("engines", "verify")
    assert ended.err == ""
    assert (ended.code, ended.out) == (0, f"intact: 2 engines in {cache.folder}\n")


def test_verify_does_not_count_as_use(latentrt: Caller, built: list[StoredEngine]) -> None:
    """Otherwise nothing would be pruned where engines are verified every night."""
    os.utime(built[0].folder / RECORD_NAME, (0, 0))
    assert latentrt("engines", "verify").code == 0
    dry = latentrt("engines", "prune", "--older-than", "1", "--dry-run")
    assert dry.out.splitlines()[-1].startswith("would delete 1 item, ")


# prune


def test_nothing_to_prune(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    assert latentrt("engines", "prune").out == f"deleted 0 items, 0 bytes, in {cache.folder}\n"
    assert len(cache.list_keys()) == 2


def test_prune(latentrt: Caller, sample: Bundle, cache: EngineCache, built: list[StoredEngine]) -> None:
    old = publish(cache, sample, identity(sample, "unet", library_version="1.0+cu13"))
    dry = latentrt("engines", "prune", "--dry-run")
    assert dry.out.startswith(f"would delete {old.key[:12]}: unet, ")
    assert re.fullmatch(rf"would delete 1 item, .*, in {cache.folder}", dry.out.splitlines()[-1])
    assert old.folder.exists()
    wet = latentrt("engines", "prune")
    assert wet.out.startswith(f"deleted {old.key[:12]}: ")
    assert not old.folder.exists()
    assert sorted(cache.list_keys()) == sorted(engine.key for engine in built)


def test_prune_of_unused_engines(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    os.utime(built[0].folder / RECORD_NAME, (0, 0))
    assert f"deleted {built[0].key[:12]}: unet, " in latentrt("engines", "prune", "--older-than", "30").out
    assert cache.list_keys() == [built[1].key]
    assert latentrt("engines", "prune", "--older-than", "-1").code == 2


def test_prune_all(latentrt: Caller, cache: EngineCache, built: list[StoredEngine]) -> None:
    assert latentrt("engines", "prune", "--all").out.count("deleted ") == 3, "and their sum"
    assert cache.list_keys() == []


def test_prune_says_what_it_keeps(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = EngineCache.delete

    def use_first(self: EngineCache, prunable: Prunable) -> bool:
        if prunable.path == built[0].folder:
            os.utime(prunable.path / RECORD_NAME)
        return delete(self, prunable)

    monkeypatch.setattr(EngineCache, "delete", use_first)
    ended = latentrt("engines", "prune", "--all")
    assert f"keeping {built[0].key[:12]}: built or used meanwhile" in ended.out.splitlines()
    assert ended.out.splitlines()[-1].startswith("deleted 1 item, ")
    assert cache.list_keys() == [built[0].key]


# seal


def test_seal(latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = latentrt("engines", "seal", bundle_path(), out, built[0].key[:12])
    assert ended.code == 0, ended.err
    sealed = Bundle.open(out)
    assert ended.out.splitlines() == [
        f"sealed {built[0].key[:12]}  unet",
        f"{out}: 1 engine, 1 of them sealed now",
        f"digest: {sealed.digest}",
    ]
    assert latentrt("verify", out, "--digest", sealed.digest).code == 0
    shown = latentrt("inspect", out)
    line = rf"unet, 2×4×16×16, for 8\.9, tensorrt_rtx, {built[0].record.plan.size} bytes"
    assert re.search(rf"^engine +{built[0].key[:12]}  {line}$", shown.out, re.MULTILINE)
    assert latentrt("engines", "seal", bundle_path(), out).code == 8
    assert latentrt("engines", "seal", bundle_path(), out, "--overwrite").out.count("\nsealed ") == 1


def test_sealing_more_engines_into_a_sealed_bundle(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert latentrt("engines", "seal", bundle_path(), first, built[0].key[:12]).code == 0
    ended = latentrt("engines", "seal", first, second, built[1].key[:4])
    assert ended.out.splitlines()[1] == f"{second}: 2 engines, 1 of them sealed now"
    itself = latentrt("engines", "seal", first, first, "--overwrite")
    assert (itself.code, itself.out) == (2, "")
    assert str(first) in itself.err
    assert len(Bundle.open(first).manifest.engines) == 1


def test_seal_of_missing_and_damaged_engines(
    latentrt: Caller, sample: Bundle, cache: EngineCache, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nothing = latentrt("engines", "seal", bundle_path(), out)
    assert (nothing.code, "latentrt build" in nothing.err) == (9, True)
    (engine,) = publish_targets(cache, sample, "unet")
    assert latentrt("engines", "seal", bundle_path(), out, "0" * 64).code == 2
    assert latentrt("engines", "seal", bundle_path(), out, "--digest", f"sha256:{'0' * 64}").code == 4
    change_byte(engine.plan_path)
    damaged = latentrt("engines", "seal", bundle_path(), out)
    assert (damaged.code, "latentrt build" in damaged.err) == (9, True)
    assert not out.exists()


# --json


def test_every_command_prints_its_document(
    latentrt: Caller, cache: EngineCache, built: list[StoredEngine], tmp_path: Path
) -> None:
    keys = {engine.key for engine in built}
    shown = validated("engines show", latentrt("engines", "show", built[0].key[:12], "--json").out)
    assert shown["identity"]["component"] == "unet"
    listed = validated("engines list", latentrt("engines", "list", "sample", "--json").out)
    assert {each["key"] for each in listed["engines"]} == keys
    explained = validated("engines why", latentrt("engines", "why", "sample", *FOR_4090, "--json").out)
    found = {each["component"]: each for each in explained["engines"]}
    assert found["unet"]["exists"]
    assert found["unet"]["location"] == "cache"
    assert not found["text_encoder"]["exists"]
    assert found["text_encoder"]["nearest"] is None
    assert found["text_encoder"]["differences"]
    assert validated("engines verify", latentrt("engines", "verify", "--json").out)["intact"] == 2
    sealed = validated("engines seal", latentrt("engines", "seal", "sample", tmp_path / "out", "--json").out)
    assert (set(sealed["sealed"]), sealed["engines"]) == (keys, 2)
    assert sealed["digest"] == Bundle.open(tmp_path / "out").digest
    for options, dry_run in ((("--dry-run",), True), ((), False)):
        pruned = validated("engines prune", latentrt("engines", "prune", "--all", *options, "--json").out)
        assert pruned["dry_run"] == dry_run
        assert {each["name"] for each in pruned["deleted"]} == {key[:12] for key in keys}
    assert list(cache.engines()) == []
