from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.engines.sealed import read_sealed_engines
from latentrt.engines.store import RECORD_NAME, StoredEngine
from latentrt.errors import EngineDamagedError, EngineError, IntegrityError, LatentRTError, OutputError, RequestError
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import is_of_bundle, seal, select_engines
from tests.engines.made_up import identity, publish, retrained
from tests.exported import Exported
from tests.runtime.small_bundle import change_byte, edit_manifest


@pytest.fixture
def engines(sample: Bundle, cache: EngineCache) -> list[StoredEngine]:
    return [publish(cache, sample, identity(sample, name), name.encode()) for name in ("unet", "vae_decoder")]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Selecting


def test_all_engines_of_the_bundle(sample: Bundle, cache: EngineCache, engines: list[StoredEngine]) -> None:
    publish(cache, sample, identity(sample, "unet", graph="0" * 64))
    assert {engine.key for engine in select_engines(cache, sample, [])} == {engine.key for engine in engines}


def test_engines_by_prefix(sample: Bundle, cache: EngineCache, engines: list[StoredEngine]) -> None:
    keys = [engine.key for engine in reversed(engines)]
    assert [engine.key for engine in select_engines(cache, sample, [keys[0][:12], keys[1]])] == keys


def test_an_engine_of_other_weights(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    other = retrained(tmp_path / "other", "conv_in.bias")
    with pytest.raises(RequestError, match="latentrt engines why"):
        select_engines(cache, other, [engines[0].key])
    assert [engine.key for engine in select_engines(cache, other, [])] == [engines[1].key]


def test_nothing_is_built(sample: Bundle, cache: EngineCache) -> None:
    with pytest.raises(EngineError, match=f"{sample.folder}.*latentrt build"):
        select_engines(cache, sample, [])


def test_engines_of_a_bundle(sample: Bundle, sd1: Exported) -> None:
    of = identity(sample, "unet")
    assert is_of_bundle(of, sample)
    assert is_of_bundle(identity(sample, "unet", weights=None), sample), "any weights fit"
    assert is_of_bundle(identity(sample, "unet", precision="float32"), sample)
    assert not is_of_bundle(identity(sample, "unet", graph="0" * 64), sample)
    assert not is_of_bundle(msgspec.structs.replace(of, component="controlnet"), sample)
    assert not is_of_bundle(of, Bundle.open(sd1.bundle)), "it has no float16 graph"


# Sealing


def test_a_new_bundle_pins_the_engines(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    before = sample.digest
    sealed = seal(sample, engines, cache, tmp_path / "out", overwrite=False)
    assert sealed.digest != before
    Bundle.open(tmp_path / "out", sealed.digest, trust_cache=False).verify()
    assert {one.record.key: one.plan() for one in read_sealed_engines(sealed)} == {
        engine.key: engine.record.identity.component.encode() for engine in engines
    }
    assert Bundle.open(sample.folder).digest == before


def test_the_other_files_are_unchanged(
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


def test_a_bundle_keeps_its_engines(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path
) -> None:
    first = seal(sample, engines[:1], cache, tmp_path / "first", overwrite=False)
    cache.remove(engines[0].key)
    second = seal(first, engines[1:], cache, tmp_path / "second", overwrite=False)
    assert {one.record.key for one in read_sealed_engines(second)} == {engine.key for engine in engines}
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
    """The files of the earlier plan are removed."""
    first = seal(sample, engines[:1], cache, tmp_path / "first", overwrite=False)
    again = publish(cache, sample, engines[0].record.identity, b"built again")
    second = seal(first, [again], cache, tmp_path / "second", overwrite=False)
    (found,) = read_sealed_engines(second)
    assert found.plan() == b"built again"
    place = f"engines/{again.key}"
    assert {name for name in second.manifest.files if name.startswith(place)} == {
        f"{place}/{RECORD_NAME}",
        f"{place}/{again.plan_path.name}",
    }


def test_a_damaged_record_of_the_bundle_is_not_sealed_again(
    cache: EngineCache, sample: Bundle, engines: list[StoredEngine], tmp_path: Path
) -> None:
    """Its hash is right, as whoever made the bundle pinned what he liked."""
    first = seal(sample, engines[:1], cache, tmp_path / "first", overwrite=False)
    name = f"engines/{engines[0].key}/{RECORD_NAME}"
    record = first.folder / name
    record.write_bytes(record.read_bytes().replace(b'"min": [ 2,', b'"min": [ 0,'))
    pin = msgspec.to_builtins(file_record(record))
    edit_manifest(first.folder, lambda tree: tree["files"].update({name: pin}))
    with pytest.raises(EngineDamagedError, match=f"{name} is not the record of an engine"):
        seal(Bundle.open(first.folder), engines[1:], cache, tmp_path / "second", overwrite=False)
    assert not (tmp_path / "second").exists()


@pytest.fixture
def earlier(sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path) -> dict[str, bytes]:
    """Write a bundle to OUT."""
    return content(seal(sample, engines[:1], cache, tmp_path / "out", overwrite=False).folder)


def test_an_existing_bundle_is_replaced_with_overwrite_only(
    sample: Bundle, cache: EngineCache, engines: list[StoredEngine], tmp_path: Path, earlier: dict[str, bytes]
) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        seal(sample, engines, cache, tmp_path / "out", overwrite=False)
    assert content(tmp_path / "out") == earlier
    assert len(seal(sample, engines, cache, tmp_path / "out", overwrite=True).manifest.engines) == 2


@pytest.mark.parametrize("place", ["out", "link", "elsewhere/../out"])
def test_a_bundle_is_not_sealed_into_itself(
    cache: EngineCache, engines: list[StoredEngine], tmp_path: Path, earlier: dict[str, bytes], place: str
) -> None:
    """Its digest would change, and everyone who pins the digest would reject it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(RequestError, match=f"{tmp_path / place}, which is the bundle itself"):
        seal(Bundle.open(tmp_path / "out"), engines, cache, tmp_path / place, overwrite=True)
    assert content(tmp_path / "out") == earlier


@pytest.mark.parametrize("damaged", ["plan", "weights"])
def test_damage_leaves_the_existing_bundle_unchanged(
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "source"], "no incomplete bundle"
