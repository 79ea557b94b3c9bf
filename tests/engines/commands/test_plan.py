from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from latentrt.bundle import Bundle
from latentrt.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.engines.commands.calling import Caller
from tests.engines.made_up import broken, publish_wanted

FLEET = ("--gpus", "rtx4090,rtx4060,h100")


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan says of a data-centre GPU depends on it."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def rows(out: str) -> list[list[str]]:
    """The table's cells, below its headings."""
    below = out.splitlines()[2:]
    return [re.split(r"\s{2,}", line.strip()) for line in below if re.match(r"\w+ \(\d", line)]


def test_the_table(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    publish_wanted(cache, sample, "unet")
    ended = latentrt("plan", bundle_path(), *FLEET, "--component", "unet", "--component", "text_encoder")
    assert ended.code == 0, ended.err
    picture = "64x64, batch 1, guidance on"
    assert [[*row[:4], row[5]] for row in rows(ended.out)] == [
        ["rtx4090 (8.9)", "tensorrt_rtx", "unet", picture, "in the cache"],
        ["rtx4090 (8.9)", "tensorrt_rtx", "text_encoder", picture, "can be built here"],
        ["rtx4060 (8.9)", "tensorrt_rtx", "unet", picture, "in the cache"],
        ["rtx4060 (8.9)", "tensorrt_rtx", "text_encoder", picture, "can be built here"],
        ["h100 (9.0)", "tensorrt", "unet", picture, "on its own machine"],
        ["h100 (9.0)", "tensorrt", "text_encoder", picture, "on its own machine"],
    ]
    assert [row[4].startswith("~") for row in rows(ended.out)] == [False, True, False, True, True, True]
    obstacle, summary = ended.out.splitlines()[-2:]
    assert obstacle.startswith("h100: tensorrt is needed to build engines with TensorRT and is not installed; pip")
    assert summary == "4 different engines: 1 there, 1 can be built here (--run), 2 elsewhere"


def test_json(latentrt: Caller, sample: Bundle, cache: EngineCache) -> None:
    (engine,) = publish_wanted(cache, sample, "unet")
    ended = latentrt("plan", bundle_path(), *FLEET, "--component", "unet", "--json")
    assert ended.code == 0
    first, second, third = json.loads(ended.out)
    assert first == {
        "gpu": "rtx4090",
        "compute_capability": "8.9",
        "library": "tensorrt_rtx",
        "component": "unet",
        "pictures": "64x64, batch 1, guidance on",
        "key": engine.key,
        "there": "cache",
        "size_bytes": engine.record.plan.size,
        "size_is_estimated": False,
        "obstacle": None,
    }
    assert second == {**first, "gpu": "rtx4060"}
    assert (third["there"], third["size_is_estimated"], "tensorrt" in third["obstacle"]) == (None, True, True)


def test_run_builds_what_is_missing_once_and_goes_on_where_it_was(
    latentrt: Caller, sample: Bundle, cache: EngineCache
) -> None:
    publish_wanted(cache, sample, "vae_encoder")
    call = ("plan", bundle_path(), *FLEET, "--component", "vae_encoder", "--component", "vae_decoder", "--run")
    first = latentrt(*call)
    assert first.code == 0, first.err
    assert [line.split()[0] for line in first.err.splitlines()] == ["vae_decoder"], "one engine for two GPUs"
    assert first.out.splitlines()[-1] == "4 different engines: 2 there, 0 can be built here (--run), 2 elsewhere"
    second = latentrt(*call)
    assert (second.code, second.err, second.out) == (0, "", first.out)


def test_run_with_json_prints_json_alone(latentrt: Caller, cache: EngineCache) -> None:
    call = ("--gpus", "rtx4090", "--component", "vae_decoder", "--run", "--json")
    ended = latentrt("plan", bundle_path(), *call)
    assert [each["there"] for each in json.loads(ended.out)] == ["cache"]


def test_one_that_fails_does_not_keep_the_others_from_being_built(
    latentrt: Caller, cache: EngineCache, tmp_path: Path
) -> None:
    bundle = broken(tmp_path / "bundle", "safety_checker")
    names = ("safety_checker", "vae_decoder", "vae_encoder")
    components = [word for name in names for word in ("--component", name)]
    ended = latentrt("plan", bundle.folder, "--gpus", "rtx4090", *components, "--run")
    assert ended.code == 9
    assert "error: 1 of 3 engines could not be built:\n  safety_checker: TensorRT-RTX" in ended.err
    assert {engine.record.identity.component for engine in cache.engines()} == {"vae_decoder", "vae_encoder"}
    again = latentrt("plan", bundle.folder, "--gpus", "rtx4090", *components, "--run")
    assert "1 of 1 engines could not be built" in again.err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ((), 2, "Missing option '--gpus'"),
        (("--gpus", "rtx1"), 2, "error: found the GPU 'rtx1'"),
        (("--gpus", ","), 2, "expected at least one"),
        ((*FLEET, "--size", "63"), 2, "error: found a width of 63 pixels"),
        ((*FLEET, "--batch", "many"), 2, "error: found the batch 'many'"),
        ((*FLEET, "--digest", f"sha256:{'0' * 64}"), 4, "expected the pinned"),
    ],
)
def test_a_wrong_call(latentrt: Caller, cache: EngineCache, options: tuple[str, ...], code: int, sentence: str) -> None:
    ended = latentrt("plan", bundle_path(), *options)
    assert (ended.code, ended.out) == (code, "")
    assert sentence in ended.err
