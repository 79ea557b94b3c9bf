from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.documents import validated
from tests.engines.cli.calling import Caller
from tests.engines.made_up import broken, publish_targets
from tests.runtime.small_bundle import change_byte

FLEET = ("--gpus", "rtx4090,rtx4060,h100")


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a data-centre GPU depends on whether TensorRT is installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def rows(out: str) -> list[list[str]]:
    """Return the table's cells, without its headings."""
    below = out.splitlines()[2:]
    return [re.split(r"\s{2,}", line.strip()) for line in below if re.match(r"\S+ \(\d", line)]


def without_numbers(line: str) -> str:
    """Remove the measurements from a line of a build's output."""
    line = re.sub(r"(?<=\S)\s{2,}exists, .*", " exists", line)
    return re.sub(r"(?<=\S)\s{2,}.*MB, built in .*", " built", line)


def test_the_table(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    publish_targets(cache, sample, "unet")
    ended = latentrt("plan", bundle_path(), *FLEET, "--component", "unet", "--component", "text_encoder")
    assert ended.code == 0, ended.err
    profile = "64x64, batch 1, guidance on"
    assert [[*row[:4], row[5]] for row in rows(ended.out)] == [
        ["rtx4090 (8.9)", "tensorrt_rtx", "unet", profile, "in the cache"],
        ["rtx4090 (8.9)", "tensorrt_rtx", "text_encoder", profile, "can be built here"],
        ["rtx4060 (8.9)", "tensorrt_rtx", "unet", profile, "in the cache"],
        ["rtx4060 (8.9)", "tensorrt_rtx", "text_encoder", profile, "can be built here"],
        ["h100 (9.0)", "tensorrt", "unet", profile, "on its own machine"],
        ["h100 (9.0)", "tensorrt", "text_encoder", profile, "on its own machine"],
    ]
    assert [row[4].startswith("~") for row in rows(ended.out)] == [False, True, False, True, True, True]
    obstacle, summary = ended.out.splitlines()[-2:]
    assert obstacle.startswith("h100: ")
    assert summary == "4 different engines: 1 existing, 1 can be built here (--run), 2 on their own machines"


def test_engines_that_no_machine_can_build(latentrt: Caller, cache: EngineCache) -> None:
    """The machine with the GPU would reject the build too."""
    options = ("--component", "unet", "--library", "tensorrt_rtx")
    ended = latentrt("plan", bundle_path(), "--gpus", "rtx4090,h100,8.9", *options)
    assert [row[5] for row in rows(ended.out)] == ["can be built here", "cannot be built here", "can be built here"]
    assert rows(ended.out)[2][0] == "8.9 (8.9)"
    obstacle, summary = ended.out.splitlines()[-2:]
    assert re.match(r"h100: TensorRT-RTX .* compute capability 9\.0", obstacle)
    counts = "0 existing, 1 can be built here (--run), 0 on their own machines, 1 cannot be built here"
    ended = latentrt("plan", bundle_path(), "--gpus", "h100", *options, "--run")
    assert ended.code == 9
    assert "error: engines of this fleet cannot be built here: " in ended.err
    assert latentrt("plan", bundle_path(), "--gpus", "h100", *options, "--check").err.endswith(
        "missing; the table says what to do\n"
    )
    assert summary == f"2 different engines: {counts}", "a card without a name shares the engine of its kind"


def test_one_plan_for_more_gpus_is_one_engine(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    (engine,) = publish_targets(cache, sample, "unet", gpus="rtx4090,rtx3060")
    call = ("plan", bundle_path(), "--gpu", "rtx4090,rtx3060,8.6", "--component", "unet")
    counts = "1 existing, 0 can be built here (--run), 0 on their own machines"
    assert latentrt(*call).out.splitlines()[-1] == f"1 different engine: {counts}"
    planned = json.loads(latentrt(*call, "--json").out)["engines"]
    assert [(each["gpu"], each["location"]) for each in planned] == [
        ("rtx4090", "cache"),
        ("rtx3060", "cache"),
        ("8.6", "cache"),
    ]
    assert {(each["key"], each["size_bytes"]) for each in planned} == {(engine.key, engine.record.plan.size)}


# --check


def test_check_of_a_complete_fleet(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    publish_targets(cache, sample, "unet")
    call = ("plan", bundle_path(), "--gpus", "rtx4090,rtx4060", "--component", "unet")
    ended = latentrt(*call, "--check")
    assert (ended.code, ended.out, ended.err) == (0, latentrt(*call).out, "")


@pytest.mark.parametrize(
    ("gpus", "count"),
    [("rtx3060,8.6", "1 engine"), ("rtx4090,rtx3060,h100", "2 engines")],
)
def test_check_of_an_incomplete_fleet(
    latentrt: Caller, sample: Bundle, cache: EngineCache, gpus: str, count: str
) -> None:
    publish_targets(cache, sample, "unet")
    call = ("plan", bundle_path(), "--gpus", gpus, "--component", "unet")
    for form in ((), ("--json",)):
        plain, ended = latentrt(*call, *form), latentrt(*call, *form, "--check")
        assert plain.code == 0
        assert (ended.code, ended.out) == (9, plain.out), "the plan is still printed"
        assert ended.err.startswith(f"error: {count} ")


def test_check_after_a_run(latentrt: Caller, cache: EngineCache) -> None:
    call = ("plan", bundle_path(), "--gpus", "rtx4090", "--component", "vae_decoder", "--check")
    assert latentrt(*call).code == 9
    assert latentrt(*call, "--run").code == 0
    assert latentrt(*call).code == 0


# --json


def test_json(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    (engine,) = publish_targets(cache, sample, "unet")
    ended = latentrt("plan", bundle_path(), *FLEET, "--component", "unet", "--json")
    assert ended.code == 0
    first, second, third = validated("plan", ended.out)["engines"]
    assert first == {
        "gpu": "rtx4090",
        "compute_capability": "8.9",
        "library": "tensorrt_rtx",
        "component": "unet",
        "images": "64x64, batch 1, guidance on",
        "key": engine.key,
        "location": "cache",
        "size_bytes": engine.record.plan.size,
        "size_is_estimated": False,
        "obstacle": None,
        "buildable_elsewhere": False,
    }
    assert second == {**first, "gpu": "rtx4060"}
    assert (third["location"], third["size_is_estimated"], third["buildable_elsewhere"]) == (None, True, True)
    assert "on the GPU itself" in third["obstacle"]


# --run


def test_run_builds_missing_engines_once_and_can_be_resumed(
    latentrt: Caller, sample: Bundle, cache: EngineCache
) -> None:
    publish_targets(cache, sample, "vae_encoder")
    call = ("plan", bundle_path(), *FLEET, "--component", "vae_encoder", "--component", "vae_decoder", "--run")
    first = latentrt(*call)
    assert first.code == 0, first.err
    heading = "for rtx4090, rtx4060, 64x64, batch 1, guidance on:"
    assert [without_numbers(line) for line in first.err.splitlines()] == [
        heading,
        "vae_encoder exists",
        heading,
        "vae_decoder built",
    ], "one engine for two GPUs"
    counts = "2 existing, 0 can be built here (--run), 2 on their own machines"
    assert first.out.splitlines()[-1] == f"4 different engines: {counts}"
    second = latentrt(*call)
    assert (second.code, second.err.count("exists"), second.err.count("built in")) == (0, 2, 0)
    assert second.out == first.out


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda plan: os.truncate(plan, 3),
    "missing": Path.unlink,
    "flipped": change_byte,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_run_rebuilds_damaged_engines_with_a_warning(
    latentrt: Caller, sample: Bundle, cache: EngineCache, damage: str
) -> None:
    """A plan of the recorded size counts as existing until a run hashes it."""
    (engine,) = publish_targets(cache, sample, "vae_decoder")
    DAMAGE[damage](engine.plan_path)
    call = ("plan", bundle_path(), "--gpus", "rtx4090", "--component", "vae_decoder")
    assert rows(latentrt(*call).out)[0][5] == ("in the cache" if damage == "flipped" else "can be built here")
    ended = latentrt(*call, "--run")
    assert ended.code == 0, ended.err
    heading, warning, built = ended.err.splitlines()
    assert heading == "for rtx4090, 64x64, batch 1, guidance on:"
    assert warning.startswith("warning: vae_decoder: ")
    assert "quarantined" in warning
    assert without_numbers(built) == "vae_decoder built"
    assert cache.plan(*cache.engines())
    assert [path.name.split(".")[0] for path in (cache.folder / "quarantine").iterdir()] == [engine.key]
    assert rows(ended.out)[0][5] == "in the cache"
    assert "exists" in latentrt(*call, "--run").err


def test_run_does_not_build_sealed_engines(
    latentrt: Caller, sample: Bundle, cache: EngineCache, tmp_path: Path
) -> None:
    publish_targets(cache, sample, "unet", gpus="rtx4090,rtx3060")
    assert latentrt("engines", "seal", bundle_path(), tmp_path / "out").code == 0
    call = ("plan", tmp_path / "out", "--gpus", "rtx4090,rtx3060", "--component", "unet", "--run")
    ended = latentrt(*call)
    assert (ended.code, ended.err, [row[5] for row in rows(ended.out)]) == (0, "", ["in the bundle"] * 2)


def test_run_with_json_prints_json_alone(latentrt: Caller, cache: EngineCache) -> None:
    call = ("--gpus", "rtx4090", "--component", "vae_decoder", "--run", "--json")
    ended = latentrt("plan", bundle_path(), *call)
    assert [each["location"] for each in json.loads(ended.out)["engines"]] == ["cache"]


def test_a_failed_build_does_not_stop_the_others(latentrt: Caller, cache: EngineCache, tmp_path: Path) -> None:
    bundle = broken(tmp_path / "bundle", "safety_checker")
    names = ("safety_checker", "vae_decoder", "vae_encoder")
    components = [word for name in names for word in ("--component", name)]
    ended = latentrt("plan", bundle.folder, "--gpus", "rtx4090", *components, "--run")
    assert ended.code == 9
    assert "1 of 3 engines could not be built:\n  safety_checker: " in ended.err
    assert {engine.record.identity.component for engine in cache.engines()} == {"vae_decoder", "vae_encoder"}
    again = latentrt("plan", bundle.folder, "--gpus", "rtx4090", *components, "--run")
    assert "1 of 3 engines could not be built:\n  safety_checker: " in again.err
    assert again.err.count("exists") == 2


@pytest.mark.parametrize(
    ("options", "code", "fragment"),
    [
        ((), 2, "--gpus is missing, as in: latentrt plan"),
        (("--gpus", "rtx1"), 2, "GPU 'rtx1'"),
        (("--gpus", ","), 2, "at least one"),
        ((*FLEET, "--size", "63"), 2, "--size: got a width of 63"),
        ((*FLEET, "--batch", "many"), 2, "--batch: got 'many'"),
        ((*FLEET, "--digest", f"sha256:{'0' * 64}"), 4, "sha256:000"),
    ],
)
def test_a_wrong_call(latentrt: Caller, cache: EngineCache, options: tuple[str, ...], code: int, fragment: str) -> None:
    ended = latentrt("plan", bundle_path(), *options)
    assert (ended.code, ended.out) == (code, "")
    assert fragment in ended.err
