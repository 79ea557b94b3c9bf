from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentrt.bundle.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.documents import validated
from tests.engines.cli.calling import Caller
from tests.engines.made_up import broken

FOR_4090 = ("--gpu", "rtx4090")
SMALL = (*FOR_4090, "--component", "vae_encoder", "--component", "vae_decoder")


def test_engines_are_built_once(latentrt: Caller, cache: EngineCache) -> None:
    first = latentrt("build", bundle_path(), *SMALL)
    assert first.code == 0, first.err
    lines = first.err.splitlines()
    assert re.fullmatch(r"TensorRT-RTX \S+, for 8\.9; images 64x64, batch 1, guidance on", lines[0])
    assert [line.split()[0] for line in lines[1:3]] == ["vae_encoder", "vae_decoder"]
    assert all(re.search(r"MB, built in \d+\.\d s, peak memory \d\.\d GiB$", line) for line in lines[1:3])
    assert "not run yet" in lines[3]
    assert re.fullmatch(rf"ready: 2 engines in {cache.folder}, \d+ s\n", first.out)

    second = latentrt("build", "sample", "--gpus", "8.9", *SMALL[2:], "--json")
    assert second.code == 0
    assert second.err.count("exists") == 2
    document = validated("build", second.out)
    assert {each["key"] for each in document["engines"]} == set(cache.list_keys())
    assert document["folder"] == str(cache.folder)
    assert len(list(cache.engines())) == 2


def test_force_builds_again(latentrt: Caller, cache: EngineCache) -> None:
    call = ("build", bundle_path(), *FOR_4090, "--component", "vae_decoder")
    assert latentrt(*call).code == 0
    (before,) = (engine.record for engine in cache.engines())
    forced = latentrt(*call, "--force")
    assert "built in" in forced.err
    (after,) = (engine.record for engine in cache.engines())
    assert after.identity == before.identity
    assert after.build != before.build


def test_one_plan_for_more_gpus_is_not_built_again(latentrt: Caller, cache: EngineCache) -> None:
    decoder = ("--component", "vae_decoder")
    assert latentrt("build", bundle_path(), "--gpu", "rtx4090,rtx3060", *decoder).code == 0
    (engine,) = cache.engines()
    ended = latentrt("build", bundle_path(), *FOR_4090, *decoder)
    assert "exists" in ended.err
    assert re.fullmatch(rf"ready: 1 engine in {cache.folder}, \d+ s\n", ended.out)
    assert cache.list_keys() == [engine.key]


def test_a_graph_that_cannot_be_built(latentrt: Caller, cache: EngineCache, tmp_path: Path) -> None:
    bundle = broken(tmp_path / "bundle", "vae_decoder")
    ended = latentrt("build", bundle.folder, *SMALL)
    assert ended.code == 9
    (error,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: vae_decoder: ")
    assert "op Cast" in error
    assert [engine.record.identity.component for engine in cache.engines()] == ["vae_encoder"], "built before it"
    assert ended.out == "", "no success is reported"


@pytest.mark.parametrize(
    ("options", "code", "fragment"),
    [
        (("--gpu", "rtx1"), 2, "GPU 'rtx1'"),
        (("--compute-capabilities", "9.0"), 2, "compute capability 9.0"),
        (("--gpu", "l4"), 2, "--gpu l4,"),
        (("--gpus", "rtx4090,l4,h100"), 2, "--gpu l4,h100,"),
        ((*FOR_4090, "--size", "63"), 2, "--size: got a width of 63"),
        ((*FOR_4090, "-H", "63"), 2, "-H: got a height of 63"),
        ((*FOR_4090, "-W", "64", "--size", "64"), 2, "got --size and -W, expected one of the two"),
        ((*FOR_4090, "--component", "vae"), 2, "component 'vae'"),
        ((*FOR_4090, "--workspace", "much"), 2, "workspace 'much'"),
        ((*FOR_4090, "--version-compatible", "--refittable"), 2, "--version-compatible with --refittable"),
        ((*FOR_4090, "--timing-cache", "times"), 2, "omit --timing-cache"),
        ((*FOR_4090, "--digest", "sha256:0"), 2, "digest"),
        ((*FOR_4090, "--digest", f"sha256:{'0' * 64}"), 4, "sha256:000"),
        ((*FOR_4090, "--guidance", "maybe"), 2, "--guidance: got 'maybe', expected one of on, off, both"),
        ((*FOR_4090, "--unheard-of"), 2, "got --unheard-of, expected an option of latentrt build"),
    ],
)
def test_invalid_options_are_rejected_before_any_work(
    latentrt: Caller, cache: EngineCache, options: tuple[str, ...], code: int, fragment: str
) -> None:
    ended = latentrt("build", bundle_path(), *options)
    assert (ended.code, ended.out) == (code, "")
    assert fragment in ended.err
    assert list(cache.folder.iterdir()) == []


def test_no_bundle(latentrt: Caller, tmp_path: Path) -> None:
    ended = latentrt("build", tmp_path / "nothing", *FOR_4090)
    assert ended.code == 4
    assert "latentrt export CHECKPOINT BUNDLE" in ended.err


def test_a_library_that_is_not_installed(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ended = latentrt("build", bundle_path(), *FOR_4090, "--library", "tensorrt")
    assert ended.code == 7
    assert "pip install 'latentrt[tensorrt]'" in ended.err


def test_a_cache_that_other_users_can_access(latentrt: Caller, cache: EngineCache) -> None:
    cache.folder.chmod(0o777)
    ended = latentrt("build", bundle_path(), *SMALL)
    assert ended.code == 9
    assert "chmod 700" in ended.err


def test_a_full_disk(latentrt: Caller, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported before the build, which takes minutes for a large model."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1))
    ended = latentrt("build", bundle_path(), *SMALL)
    assert ended.code == 9
    assert "1 MB" in ended.err
    assert "latentrt engines prune" in ended.err
    assert list(cache.engines()) == []
