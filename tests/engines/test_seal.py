from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineIdentity, engine_key
from latentrt.engines.sealed import sealed_engines
from latentrt.engines.store import RECORD_NAME, StoredEngine
from latentrt.errors import EngineDamagedError, EngineError, IntegrityError, LatentRTError, OutputError, RequestError
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import choose_engines, find_engine, is_of_bundle, seal
from tests.engines.made_up import identity, publish, retrained
from tests.exported import Exported
from tests.runtime.small_bundle import change_byte


@pytest.fixture
def engines(sample: Bundle, cache: EngineCache) -> list[StoredEngine]:
    return [publish(cache, sample, identity(sample, name), name.encode()) for name in ("unet", "vae_decoder")]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Which engines


def test_all_that_are_of_the_bundle(sample: Bundle, cache: EngineCache, engines: list[StoredEngine]) -> None:
    publish(cache, sample, identity(sample, "unet", graph="0" * 64))
    assert {engine.key for engine in choose_engines(cache, sample, [])} == {engine.key for engine in engines}


def test_those_whose_keys_begin_so(sample: Bundle, cache: EngineCache, engines: list[StoredEngine]) -> None:
    keys = [engine.key for engine in reversed(engines)]
    assert [engine.key for engine in choose_engines(cache, sample, [keys[0][:12], keys[1]])] == keys


def test_a_key_that_no_engine_has(sample: Bundle, cache: EngineCache, engines: list[StoredEngine]) -> None:
    for key in ("xxxx", "0" * 64):
        with pytest.raises(RequestError, match=f"^no engine has a key that begins with '{key}'; latentrt engines list"):
            choose_engines(cache, sample, [key])


@pytest.mark.parametrize("digits", [0, 1, 3])
def test_a_beginning_that_is_too_short(cache: EngineCache, engines: list[StoredEngine], digits: int) -> None:
    """Even if one engine alone has it today: tomorrow another one may."""
    key = engines[0].key[:digits]
    with pytest.raises(RequestError, match=f"^found the key '{key}', expected its first 4 digits or more$"):
        find_engine(key, engines[:1])
    assert find_engine(engines[0].key[:4], engines[:1]) == engines[0]


def two_with_one_beginning(bundle: Bundle) -> tuple[EngineIdentity, EngineIdentity]:
    """Two whose keys begin with the same four digits; some hundreds are enough for that."""
    seen: dict[str, EngineIdentity] = {}
    usual = identity(bundle, "unet")
    for number in itertools.count():
        made = msgspec.structs.replace(usual, library_version=f"{number}")
        earlier = seen.setdefault(engine_key(made)[:4], made)
        if earlier != made:
            return earlier, made
    raise AssertionError


def test_a_beginning_that_several_keys_have(sample: Bundle, cache: EngineCache) -> None:
    first, second = (publish(cache, sample, each) for each in two_with_one_beginning(sample))
    digits = first.key[:4]
    with pytest.raises(RequestError, match=f"^2 engines have a key that begins with '{digits}'; latentrt engines list"):
        choose_engines(cache, sample, [digits])
    assert choose_engines(cache, sample, [second.key[:12]]) == [second]


def test_an_engine_of_other_weights(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    other = retrained(tmp_path / "other", "conv_in.bias")
    with pytest.raises(RequestError, match=r"was built of other weights or another graph than .*other has; latentrt"):
        choose_engines(cache, other, [engines[0].key])
    assert [engine.key for engine in choose_engines(cache, other, [])] == [engines[1].key]


def test_nothing_is_built(sample: Bundle, cache: EngineCache) -> None:
    with pytest.raises(EngineError, match=f"^the cache has no engine of {sample.folder}; build some: latentrt build"):
        choose_engines(cache, sample, [])


def test_what_an_engine_is_of(sample: Bundle, sd1: Exported) -> None:
    of = identity(sample, "unet")
    assert is_of_bundle(of, sample)
    assert is_of_bundle(identity(sample, "unet", weights=None), sample), "it takes any"
    assert is_of_bundle(identity(sample, "unet", precision="float32"), sample)
    assert not is_of_bundle(identity(sample, "unet", graph="0" * 64), sample)
    assert not is_of_bundle(msgspec.structs.replace(of, component="controlnet"), sample)
    assert not is_of_bundle(of, Bundle.open(sd1.bundle)), "it has no half graph"


# Sealing


def test_a_new_bundle_pins_the_engines(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    before = sample.digest
    sealed = seal(sample, engines, cache, tmp_path / "out", overwrite=False)
    assert sealed.digest != before
    Bundle.open(tmp_path / "out", sealed.digest, trust_cache=False).verify()
    assert {one.record.key: one.plan() for one in sealed_engines(sealed)} == {
        engine.key: engine.record.identity.component.encode() for engine in engines
    }
    assert Bundle.open(sample.folder).digest == before


def test_the_rest_of_the_bundle_is_as_it_was(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    sealed = seal(sample, engines, cache, tmp_path / "out", overwrite=False)
    after = content(sealed.folder)
    for name in sample.manifest.files:
        assert after[name] == (sample.folder / name).read_bytes()
        assert sealed.manifest.files[name] == sample.manifest.files[name]
    added = {name for name in after if name not in sample.manifest.files and name != "bundle.json"}
    expected = {f"engines/{engine.key}/{name}" for engine in engines for name in (RECORD_NAME, engine.plan_path.name)}
    assert added == expected


def test_a_bundle_that_has_engines_keeps_them(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    first = seal(sample, engines[:1], cache, tmp_path / "first", overwrite=False)
    cache.remove(engines[0].key)
    second = seal(first, engines[1:], cache, tmp_path / "second", overwrite=False)
    assert {one.record.key for one in sealed_engines(second)} == {engine.key for engine in engines}
    assert len({sample.digest, first.digest, second.digest}) == 3


def test_sealing_twice_changes_nothing(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    first = seal(sample, engines, cache, tmp_path / "first", overwrite=False)
    second = seal(first, engines, cache, tmp_path / "second", overwrite=False)
    assert second.digest == first.digest
    assert content(second.folder) == content(first.folder)


def test_an_engine_that_was_built_again_replaces_the_sealed_one(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    """No file stays behind that no engine needs: the bundle is what the manifest says, and no larger."""
    first = seal(sample, engines[:1], cache, tmp_path / "first", overwrite=False)
    again = publish(cache, sample, engines[0].record.identity, b"built again")
    second = seal(first, [again], cache, tmp_path / "second", overwrite=False)
    (found,) = sealed_engines(second)
    assert found.plan() == b"built again"
    place = f"engines/{again.key}"
    assert {name for name in second.manifest.files if name.startswith(place)} == {
        f"{place}/{RECORD_NAME}",
        f"{place}/{again.plan_path.name}",
    }


@pytest.fixture
def earlier(sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path) -> dict[str, bytes]:
    """An OUT that is there already."""
    return content(seal(sample, engines[:1], cache, tmp_path / "out", overwrite=False).folder)


def test_what_exists_is_replaced_on_demand_only(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path, earlier: dict[str, bytes]
) -> None:
    with pytest.raises(OutputError, match=r"out exists; .*--overwrite"):
        seal(sample, engines, cache, tmp_path / "out", overwrite=False)
    assert content(tmp_path / "out") == earlier
    assert len(seal(sample, engines, cache, tmp_path / "out", overwrite=True).manifest.engines) == 2


@pytest.mark.parametrize("place", ["out", "link", "elsewhere/../out"])
def test_a_bundle_is_not_sealed_into_its_own_place(
    cache: EngineCache, engines: list[StoredEngine], tmp_path: Path, earlier: dict[str, bytes], place: str
) -> None:
    """Its digest would be another, and whoever pins it would find it damaged."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(RequestError, match=f"^{tmp_path / place} is the bundle itself; seal into another folder, as "):
        seal(Bundle.open(tmp_path / "out"), engines, cache, tmp_path / place, overwrite=True)
    assert content(tmp_path / "out") == earlier


@pytest.mark.parametrize("damaged", ["plan", "weights"])
def test_damage_leaves_what_was_there(
    cache: EngineCache, engines: list[StoredEngine], tmp_path: Path, earlier: dict[str, bytes], damaged: str
) -> None:
    bundle = retrained(tmp_path / "source", "conv_in.bias")
    expected: type[LatentRTError] = EngineDamagedError
    if damaged == "plan":
        change_byte(engines[1].plan_path)
    else:
        expected = IntegrityError
        change_byte(bundle.folder / "unet" / "model.safetensors")
    with pytest.raises(expected):
        seal(bundle, engines[1:], cache, tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "source"], "no half made bundle"
