from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.interrupts import TerminatedError, ending_on_signals
from latentrt.bundle.weights import map_weights
from latentrt.engines.record import EngineIdentity, EngineOptions, EngineRecord, engine_key
from latentrt.engines.store import RECORD_NAME, WEIGHTS_NAME, StoredEngine
from latentrt.errors import EngineDamagedError, RequestError
from latentrt_engines.cache import EngineCache, Prunable, digest_arrays, find_prunable, read_array_digests
from latentrt_engines.library import load_library
from tests.engines.made_up import PLAN, identity, publish, record
from tests.killed import count_steps, in_child
from tests.runtime.small_bundle import change_byte

VERSION = load_library("tensorrt_rtx").version


def engine(cache: EngineCache, bundle: Bundle, component: str = "unet", **changes: Any) -> StoredEngine:
    """Publish an engine of the installed library version, unless changed."""
    return publish(cache, bundle, identity(bundle, component, **{"library_version": VERSION, **changes}))


# Finding by prefix


def test_an_unknown_key(sample: Bundle, cache: EngineCache) -> None:
    engine(cache, sample)
    for key in ("xxxx", "0" * 64):
        with pytest.raises(RequestError, match=f"'{key}'.* 0 engines"):
            cache.find_by_prefix(key)


@pytest.mark.parametrize("digits", [0, 1, 3])
def test_a_prefix_that_is_too_short(sample: Bundle, cache: EngineCache, digits: int) -> None:
    """Even if one engine only has it today: tomorrow another one may have it."""
    only = engine(cache, sample)
    with pytest.raises(RequestError, match=f"'{only.key[:digits]}'.* 4 digits"):
        cache.find_by_prefix(only.key[:digits])
    assert cache.find_by_prefix(only.key[:4]) == only


def make_keys_with_one_prefix(bundle: Bundle) -> tuple[EngineIdentity, EngineIdentity]:
    """Make two identities whose keys begin with the same four digits, by trying some hundreds."""
    seen: dict[str, EngineIdentity] = {}
    default = identity(bundle, "unet")
    for number in itertools.count():
        made = msgspec.structs.replace(default, library_version=f"{number}")
        earlier = seen.setdefault(engine_key(made)[:4], made)
        if earlier != made:
            return earlier, made
    raise AssertionError


def test_a_prefix_of_several_keys(sample: Bundle, cache: EngineCache) -> None:
    first, second = (publish(cache, sample, each) for each in make_keys_with_one_prefix(sample))
    with pytest.raises(RequestError, match=f"'{first.key[:4]}'.* 2 engines"):
        cache.find_by_prefix(first.key[:4])
    assert cache.find_by_prefix(second.key[:12]) == second


def test_digests_in_a_pipe_are_not_waited_for(sample: Bundle, cache: EngineCache) -> None:
    made = engine(cache, sample)
    assert read_array_digests(made)
    (made.folder / WEIGHTS_NAME).unlink()
    os.mkfifo(made.folder / WEIGHTS_NAME)
    assert read_array_digests(made) is None


# Pruning


def found(cache: EngineCache, *, everything: bool = False, not_used_since: float | None = None) -> list[Prunable]:
    return find_prunable(cache, everything=everything, not_used_since=not_used_since)


def test_usable_engines_are_kept(sample: Bundle, cache: EngineCache) -> None:
    engine(cache, sample)
    engine(cache, sample, library="tensorrt", library_version="1.0")  # may run on another machine
    assert found(cache) == []
    assert found(EngineCache(cache.folder / "nothing")) == []


def test_engines_of_another_library_version(sample: Bundle, cache: EngineCache) -> None:
    old = engine(cache, sample, library_version="1.0.0+cu13")
    engine(cache, sample)
    (only,) = found(cache)
    assert only.path == old.folder
    assert "1.0.0+cu13" in only.reason
    assert VERSION in only.reason
    assert only.size_bytes == sum(path.stat().st_size for path in old.folder.iterdir()) > len(PLAN)


def test_a_version_compatible_engine_outlives_an_upgrade(sample: Bundle, cache: EngineCache) -> None:
    engine(cache, sample, library_version="1.0.0+cu13", options=EngineOptions(version_compatible=True))
    assert found(cache) == []


def test_engines_that_were_not_used_recently(sample: Bundle, cache: EngineCache) -> None:
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


def test_quarantined_engines(sample: Bundle, cache: EngineCache) -> None:
    damaged = engine(cache, sample)
    change_byte(damaged.plan_path)
    with pytest.raises(EngineDamagedError):
        cache.plan(damaged)
    (only,) = found(cache)
    assert only.path.parent.name == "quarantine"
    assert "quarantined" in only.reason


def test_files_of_a_killed_build(sample: Bundle, cache: EngineCache) -> None:
    key = engine(cache, sample).key
    draft = cache.folder / "drafts" / f"{key}.plan"
    draft.write_bytes(b"half a plan")
    bare = cache.folder / ("0" * 64)
    bare.mkdir()
    (bare / "x.plan").write_bytes(b"no record yet")
    assert {(each.path, each.size_bytes) for each in found(cache)} == {(draft, 11), (bare, 13)}
    assert all("killed" in each.reason for each in found(cache))


def test_files_of_a_running_build_are_kept(cache: EngineCache) -> None:
    """Its draft, and its folder without a record."""
    key = "0" * 64
    with cache.lock(key) as draft:
        draft.write_bytes(b"half a plan")
        (cache.folder / key).mkdir()
        assert found(cache) == []
    assert [each.path for each in found(cache)] == [cache.folder / key]


def test_an_invalid_record_is_left_to_verify(
    sample: Bundle, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    (engine(cache, sample).folder / RECORD_NAME).write_bytes(b"?")
    assert found(cache, everything=True) == []
    assert "latentrt engines verify" in caplog.text


def test_deleting_prunable_engines(sample: Bundle, cache: EngineCache) -> None:
    stays = engine(cache, sample, "vae_decoder")
    engine(cache, sample, library_version="1.0")
    damaged = engine(cache, sample)
    change_byte(damaged.plan_path)
    assert cache.find_intact(damaged.key) is None
    assert len(found(cache)) == 2
    for each in found(cache):
        assert cache.delete(each)
        assert not each.path.exists()
    assert found(cache) == []
    assert stays.folder.exists()


def build_again(cache: EngineCache, bundle: Bundle, old: StoredEngine) -> None:
    publish(cache, bundle, old.record.identity, b"built a second ago")


def build_the_same_plan_again(cache: EngineCache, bundle: Bundle, old: StoredEngine) -> None:
    """Only the time of its last use differs."""
    publish(cache, bundle, old.record.identity)


def use(cache: EngineCache, bundle: Bundle, old: StoredEngine) -> None:
    cache.mark_used(old)


@pytest.mark.parametrize("meanwhile", [build_again, build_the_same_plan_again, use])
def test_an_engine_that_was_built_or_used_since_it_was_listed_is_kept(
    sample: Bundle, cache: EngineCache, meanwhile: Callable[[EngineCache, Bundle, StoredEngine], None]
) -> None:
    old = engine(cache, sample)
    os.utime(old.folder / RECORD_NAME, (0, 0))
    (listed,) = found(cache, not_used_since=time.time() - 500)
    meanwhile(cache, sample, old)
    assert not cache.delete(listed)
    (kept,) = cache.engines()
    assert cache.plan(kept)


def test_pruning_waits_for_a_build_and_keeps_its_engine(sample: Bundle, cache: EngineCache) -> None:
    old = engine(cache, sample)
    (listed,) = found(cache, everything=True)
    deleted: list[bool] = []
    pruning = threading.Thread(target=lambda: deleted.append(EngineCache(cache.folder).delete(listed)))
    made = record(sample, old.record.identity, b"new")
    with cache.lock(old.key) as draft:
        pruning.start()
        draft.write_bytes(b"new")
        cache.publish(made, draft, {})
    pruning.join()
    assert deleted == [False]
    assert cache.plan(StoredEngine(old.folder, made)) == b"new"


def test_a_folder_without_a_record_that_has_become_an_engine_is_kept(sample: Bundle, cache: EngineCache) -> None:
    of = identity(sample, "unet", library_version=VERSION)
    (cache.folder / engine_key(of)).mkdir()
    (listed,) = found(cache)
    publish(cache, sample, of)
    assert not cache.delete(listed)
    assert len(list(cache.engines())) == 1


@pytest.mark.parametrize("earlier", [False, True])
def test_a_build_that_is_killed_at_any_step(sample: Bundle, cache: EngineCache, earlier: bool) -> None:
    """The cache has the old engine, the new one or none, and the next build leaves nothing but its engine."""
    old, new = (record(sample, identity(sample, "unet", library_version=VERSION), plan) for plan in (b"old", b"new"))

    def build(made: EngineRecord, plan: bytes) -> None:
        with cache.lock(made.key) as draft:
            draft.write_bytes(plan)
            cache.publish(made, draft, {})

    status, step, outcomes = -signal.SIGKILL, 0, set()
    while status:
        if earlier:
            build(old, b"old")
        status = in_child(lambda: build(new, b"new"), kill_at=step)
        outcomes |= {cache.plan(each) for each in cache.engines()} or {b"none"}
        build(old, b"old")
        folder = cache.folder / old.key
        assert found(cache) == []
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".plan") == [RECORD_NAME, WEIGHTS_NAME]
        assert len(list(folder.glob("*.plan"))) == 1
        cache.remove(old.key)
        step += 1
    assert step > 10
    assert outcomes == {b"old" if earlier else b"none", b"new"}


def test_a_signal_at_any_step_leaves_one_whole_engine(sample: Bundle, cache: EngineCache) -> None:
    """No file of the other one stays, also before the next build."""
    old, new = (record(sample, identity(sample, "unet", library_version=VERSION), plan) for plan in (b"old", b"new"))

    def build(made: EngineRecord, plan: bytes) -> None:
        with contextlib.suppress(TerminatedError), ending_on_signals(), cache.lock(made.key) as draft:
            draft.write_bytes(plan)
            cache.publish(made, draft, {})

    outcomes = set()
    for step in range(count_steps(lambda: build(new, b"new"))):
        build(old, b"old")
        assert in_child(lambda: build(new, b"new"), kill_at=step, by=[signal.SIGTERM]) == 0
        (found_engine,) = cache.engines()
        outcomes.add(cache.plan(found_engine))
        names = {path.name for path in found_engine.folder.iterdir()}
        assert names == {RECORD_NAME, WEIGHTS_NAME, found_engine.plan_path.name}, step
        assert cache.find_leftovers() == []
    assert outcomes == {b"old", b"new"}


# Digests of weights


def test_a_digest_is_of_the_bytes() -> None:
    ones = np.ones((3, 5), np.float16)
    expected = hashlib.blake2b(ones.tobytes(), digest_size=8).hexdigest()
    assert digest_arrays({"ones": ones}) == {"ones": expected}
    assert len(expected) == 16


def test_equal_arrays_have_equal_digests_and_others_do_not() -> None:
    array = np.arange(12, dtype=np.float32)
    one_bit = array.copy()
    one_bit.view(np.uint8)[47] ^= 1
    found = digest_arrays({"a": array, "b": array.copy(), "one bit": one_bit, "minus": -array})
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_arrays_of_any_rank() -> None:
    """Scalars and empty arrays are weights too."""
    found = digest_arrays({"scalar": np.array(2, np.float32), "empty": np.empty((0, 4), np.float32)})
    assert found["scalar"] == hashlib.blake2b(np.array(2, np.float32).tobytes(), digest_size=8).hexdigest()
    assert found["empty"] == hashlib.blake2b(digest_size=8).hexdigest()


def test_different_arrays_of_real_weights_have_different_digests(sample: Bundle) -> None:
    _, weights = sample.component_files("unet", "float16")
    arrays = map_weights(sample.path(weights))
    found = digest_arrays(arrays)
    assert list(found) == list(arrays)
    different = {array.tobytes() for array in arrays.values()}
    assert len(set(found.values())) == len(different)
