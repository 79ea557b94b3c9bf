from __future__ import annotations

import os
import time
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineOptions
from latentrt.engines.store import RECORD_NAME, StoredEngine
from latentrt.errors import EngineDamagedError
from latentrt_engines.cache import EngineCache
from latentrt_engines.library import load_library
from latentrt_engines.prune import Prunable, prunable
from tests.engines.made_up import PLAN, identity, publish
from tests.runtime.small_bundle import change_byte

VERSION = load_library("tensorrt_rtx").version


def engine(cache: EngineCache, bundle: Bundle, component: str = "unet", **changes: Any) -> StoredEngine:
    """Of the release that is installed, if nothing else is said."""
    return publish(cache, bundle, identity(bundle, component, **{"library_version": VERSION, **changes}))


def found(cache: EngineCache, *, everything: bool = False, not_used_since: float | None = None) -> list[Prunable]:
    return prunable(cache, everything=everything, not_used_since=not_used_since)


def test_what_can_be_used_stays(sample: Bundle, cache: EngineCache) -> None:
    engine(cache, sample)
    engine(cache, sample, library="tensorrt", library_version="1.0")  # nothing here says that it is no use elsewhere
    assert found(cache) == []
    assert found(EngineCache(cache.folder / "nothing")) == []


def test_engines_of_another_release(sample: Bundle, cache: EngineCache) -> None:
    old = engine(cache, sample, library_version="1.0.0+cu13")
    engine(cache, sample)
    (only,) = found(cache)
    assert only.path == old.folder
    assert only.reason == f"unet, built by tensorrt_rtx 1.0.0+cu13, this is {VERSION}"
    assert only.size_bytes == sum(path.stat().st_size for path in old.folder.iterdir()) > len(PLAN)


def test_a_version_compatible_engine_outlives_a_release(sample: Bundle, cache: EngineCache) -> None:
    engine(cache, sample, library_version="1.0.0+cu13", options=EngineOptions(version_compatible=True))
    assert found(cache) == []


def test_what_was_not_used_for_so_long(sample: Bundle, cache: EngineCache) -> None:
    old, new = engine(cache, sample), engine(cache, sample, "vae_decoder")
    then = time.time() - 1000
    os.utime(old.folder / RECORD_NAME, (then, then))
    assert [each.path for each in found(cache, not_used_since=time.time() - 500)] == [old.folder]
    assert found(cache, not_used_since=then - 1) == []
    cache.mark_used(old)
    assert found(cache, not_used_since=time.time() - 500) == [], "it was loaded"
    assert new.folder.exists()


def test_everything(sample: Bundle, cache: EngineCache) -> None:
    folders = {engine(cache, sample, name).folder for name in sample.manifest.components}
    assert {each.path for each in found(cache, everything=True)} == folders


def test_what_was_moved_aside(sample: Bundle, cache: EngineCache) -> None:
    damaged = engine(cache, sample)
    change_byte(damaged.plan_path)
    with pytest.raises(EngineDamagedError):
        cache.plan(damaged)
    (only,) = found(cache)
    assert (only.path.parent.name, only.reason) == ("aside", "it failed its hash and was moved aside")


def test_what_a_killed_build_left(sample: Bundle, cache: EngineCache) -> None:
    key = engine(cache, sample).key
    draft = cache.folder / "drafts" / f"{key}.plan"
    draft.write_bytes(b"half a plan")
    bare = cache.folder / ("0" * 64)
    bare.mkdir()
    (bare / "x.plan").write_bytes(b"no record yet")
    assert {(each.path, each.reason, each.size_bytes) for each in found(cache)} == {
        (draft, "a build that was killed left it", 11),
        (bare, "a build that was killed left it", 13),
    }


def test_what_somebody_builds_now_stays(cache: EngineCache) -> None:
    """Its draft, and its folder without a record."""
    key = "0" * 64
    with cache.locked(key) as draft:
        draft.write_bytes(b"half a plan")
        (cache.folder / key).mkdir()
        assert found(cache) == []
    assert [each.path for each in found(cache)] == [cache.folder / key]


def test_a_record_that_cannot_be_read_is_verifys_business(
    sample: Bundle, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    (engine(cache, sample).folder / RECORD_NAME).write_bytes(b"?")
    assert found(cache, everything=True) == []
    assert "latentrt engines verify moves it aside" in caplog.text


def test_deleting_what_was_found(sample: Bundle, cache: EngineCache) -> None:
    stays = engine(cache, sample, "vae_decoder")
    engine(cache, sample, library_version="1.0")
    damaged = engine(cache, sample)
    change_byte(damaged.plan_path)
    assert cache.intact(damaged.key) is None
    assert len(found(cache)) == 2
    for each in found(cache):
        cache.delete(each.path)
        assert not each.path.exists()
    assert found(cache) == []
    assert stays.folder.exists()
