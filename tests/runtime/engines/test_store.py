from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import FileRecord
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.record import ENGINE_FORMAT, EngineRecord
from latentrt.engines.store import (
    LOCKS,
    MAX_RECORD_BYTES,
    QUARANTINE,
    RECORD_NAME,
    EngineStore,
    StoredEngine,
    decode_record,
    encode_record,
    plan_name,
)
from latentrt.errors import EngineDamagedError, EngineError
from tests.engines.made_up import PLAN, identity, record
from tests.runtime.small_bundle import change_byte

SAMPLE = Bundle.open(bundle_path(), trust_cache=False)
RECORD = record(SAMPLE, identity(SAMPLE, "unet"))


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def put(store: EngineStore, made: EngineRecord = RECORD, plan: bytes = PLAN) -> StoredEngine:
    engine = StoredEngine(store.folder / made.key, made)
    engine.folder.mkdir(parents=True, exist_ok=True)
    engine.plan_path.write_bytes(plan)
    (engine.folder / RECORD_NAME).write_bytes(encode_record(made))
    return engine


def quarantined(store: EngineStore) -> list[Path]:
    return list((store.folder / QUARANTINE).glob("*"))


def test_an_engine_is_found_by_its_key(store: EngineStore) -> None:
    put(store)
    engine = store.get(RECORD.key)
    assert engine is not None
    assert (engine.record, engine.key) == (RECORD, RECORD.key)
    assert engine.plan_path.name == plan_name(RECORD) == f"{hash_bytes(PLAN)}.plan"
    assert store.plan(engine) == PLAN
    assert [one.record for one in store.engines()] == [RECORD]


def test_an_empty_store(store: EngineStore) -> None:
    assert store.get(RECORD.key) is None
    assert (store.list_keys(), list(store.engines())) == ([], [])


def test_the_store_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    assert EngineStore().folder == tmp_path / "cache" / "engines"
    assert (tmp_path / "cache" / "engines").stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache" / "engines").chmod(0o777)
    with pytest.raises(EngineError, match="mode 777"):
        EngineStore()


def test_only_keys_are_engines(store: EngineStore) -> None:
    put(store)
    for name in (LOCKS, QUARANTINE, "drafts", RECORD.key[:-1], RECORD.key.upper(), f".{RECORD.key}"):
        (store.folder / name).mkdir(exist_ok=True)
    assert store.list_keys() == [RECORD.key]


def test_reading_a_plan_does_not_mark_it_as_used(store: EngineStore) -> None:
    engine = put(store)
    os.utime(engine.folder / RECORD_NAME, (0, 0))
    store.plan(engine)
    assert (engine.folder / RECORD_NAME).stat().st_mtime == 0
    store.mark_used(engine)
    assert (engine.folder / RECORD_NAME).stat().st_mtime > 1e9


# Plans


def truncate(place: Path) -> None:
    os.truncate(place, len(PLAN) - 1)


def lengthen(place: Path) -> None:
    place.write_bytes(PLAN + b"\0")


def another(place: Path) -> None:
    place.write_bytes(PLAN[::-1])


def into_a_folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def into_a_pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (change_byte, "has SHA-256 .*, expected"),
    "foreign bytes": (another, "has SHA-256 .*, expected"),
    "truncated": (truncate, f"has {len(PLAN) - 1} bytes, expected {len(PLAN)}"),
    "too long": (lengthen, f"has {len(PLAN) + 1} bytes, expected {len(PLAN)}"),
    "empty": (lambda place: os.truncate(place, 0), f"has 0 bytes, expected {len(PLAN)}"),
    "missing": (lambda place: place.unlink(), "cannot be read: No such file"),
    "a folder": (into_a_folder, "cannot be read"),
    "a pipe": (into_a_pipe, "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_quarantined_and_never_returned(store: EngineStore, kind: str) -> None:
    damage, message = DAMAGE[kind]
    engine = put(store)
    damage(engine.plan_path)
    with pytest.raises(EngineDamagedError, match=f"{plan_name(RECORD)} {message}.*{QUARANTINE}.*latentrt build"):
        store.plan(engine)
    assert store.get(RECORD.key) is None
    (moved,) = quarantined(store)
    assert moved.name.startswith(f"{RECORD.key}.")
    assert (moved / RECORD_NAME).read_bytes() == encode_record(RECORD)
    reason = (moved / "reason.txt").read_text()
    assert reason.startswith(str(engine.plan_path))
    assert reason.endswith("\n")


def test_two_damaged_plans_of_one_key_are_both_quarantined(store: EngineStore) -> None:
    for _ in range(2):
        engine = put(store, plan=b"damaged")
        with pytest.raises(EngineDamagedError):
            store.plan(engine)
    assert len(quarantined(store)) == 2


def test_an_engine_that_is_replaced_meanwhile(store: EngineStore) -> None:
    """The plan of the found record is gone, and its replacement is intact: nothing is damaged."""
    before = put(store)
    newer = record(SAMPLE, RECORD.identity, b"built again")
    put(store, newer, b"built again")
    before.plan_path.unlink()
    assert store.plan(before) == b"built again"
    assert quarantined(store) == []


def test_an_engine_that_is_deleted_meanwhile(store: EngineStore) -> None:
    engine = put(store)
    store.remove(engine.key)
    assert not engine.folder.exists()
    with pytest.raises(EngineDamagedError, match="cannot be read: No such file"):
        store.plan(engine)
    assert quarantined(store) == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_incomplete_engine_is_not_found(store: EngineStore, kind: str) -> None:
    engine = put(store)
    assert store.find(RECORD.identity) == engine
    DAMAGE[kind][0](engine.plan_path)
    assert (
        engine.is_complete == (store.find(RECORD.identity) is not None) == (kind in ("a flipped bit", "foreign bytes"))
    )
    assert quarantined(store) == [], "searching quarantines nothing"


def test_one_plan_for_more_gpus_is_found(store: EngineStore) -> None:
    more = put(store, record(SAMPLE, identity(SAMPLE, "unet", compute_capabilities=("8.6", "8.9"))))
    assert store.find(RECORD.identity) == more
    assert store.find(identity(SAMPLE, "unet", compute_capabilities=("8.9", "12.0"))) is None


# Records


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not the record of an engine"),
        (b"{", "is not the record of an engine"),
        (b"null", "is not the record of an engine"),
        (b"\xff\xfe", "is not the record of an engine"),
        (encode_record(RECORD)[:-40], "is not the record of an engine"),
        (encode_record(RECORD).replace(b'"plan"', b'"plane"'), "is not the record of an engine"),
        (encode_record(RECORD).replace(hash_bytes(PLAN).encode(), b"../../../etc/passwd"), "is not the record"),
        (encode_record(record(SAMPLE, identity(SAMPLE, "unet", platform="elsewhere"))), "is the record of another"),
        (b"[" * 100_000, "is not the record of an engine: is nested deeper"),
        (
            encode_record(RECORD).replace(b"{", b'{"plan": 1,', 1),
            "is not the record of an engine: has the key 'plan' tw",
        ),
        (b" " * (MAX_RECORD_BYTES + 1), "is not the record of an engine: is larger"),
    ],
    ids=lambda each: each[:20].decode("latin-1") if isinstance(each, bytes) else "",
)
def test_a_damaged_record_is_an_error(store: EngineStore, data: bytes, message: str) -> None:
    engine = put(store)
    (engine.folder / RECORD_NAME).write_bytes(data)
    with pytest.raises(EngineDamagedError, match=f"{RECORD_NAME} {message}"):
        store.get(RECORD.key)


def test_a_record_that_is_a_folder(store: EngineStore) -> None:
    (store.folder / RECORD.key / RECORD_NAME).mkdir(parents=True)
    with pytest.raises(EngineDamagedError, match="cannot be read"):
        store.get(RECORD.key)


def test_a_file_in_an_engines_place_is_quarantined(store: EngineStore) -> None:
    store.folder.mkdir()
    (store.folder / RECORD.key).write_bytes(b"no folder")
    with pytest.raises(EngineDamagedError, match="cannot be read: Not a directory") as damage:
        store.get(RECORD.key)
    store.quarantine(RECORD.key, str(damage.value))
    assert store.list_keys() == []


def test_unreadable_engines_do_not_hide_the_others(store: EngineStore, caplog: pytest.LogCaptureFixture) -> None:
    put(store)
    other = record(SAMPLE, identity(SAMPLE, "vae_decoder"))
    (put(store, other).folder / RECORD_NAME).write_bytes(b"?")
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert [engine.record for engine in store.engines()] == [RECORD]
    assert "is not the record of an engine" in caplog.text
    assert "latentrt engines verify" in caplog.text


def test_a_newer_format() -> None:
    newer = msgspec.structs.replace(RECORD, format_version=ENGINE_FORMAT + 1)
    message = f"x has format {ENGINE_FORMAT + 1}, expected {ENGINE_FORMAT}"
    with pytest.raises(EngineDamagedError, match=message):
        decode_record(encode_record(newer), "x")
    # With a key that this format does not have.
    with pytest.raises(EngineDamagedError, match=message):
        decode_record(encode_record(newer).replace(b'"check"', b'"checks"'), "x")


def test_a_record_round_trips(store: EngineStore) -> None:
    data = encode_record(RECORD)
    assert decode_record(data, "x") == RECORD
    assert data.endswith(b"}\n")
    assert b'"min": [ 2, 4, 16, 16 ]' in data, "shapes on one line"


def test_a_large_record_is_read_completely(store: EngineStore) -> None:
    """A profile of many inputs, as ControlNet has them."""
    shapes = next(iter(RECORD.identity.profile.values()))
    profile = {f"down_block_residual_{index}": shapes for index in range(1000)}
    of = msgspec.structs.replace(RECORD.identity, profile=profile)
    inputs = tuple(TensorSpec(name, "float32", shapes.max) for name in profile)
    large = msgspec.structs.replace(RECORD, identity=of, inputs=inputs)
    put(store, large)
    found = store.get(large.key)
    assert found is not None
    assert found.record == large


# Quarantining and removing


def test_quarantining_twice(store: EngineStore) -> None:
    put(store)
    store.quarantine(RECORD.key, "first")
    store.quarantine(RECORD.key, "second")
    (moved,) = quarantined(store)
    assert (moved / "reason.txt").read_text() == "first\n"


def test_an_engine_that_cannot_be_quarantined(store: EngineStore) -> None:
    put(store)
    (store.folder / QUARANTINE).write_bytes(b"in the way")
    with pytest.raises(EngineError, match=f"^it is broken; .*{RECORD.key} cannot be quarantined: "):
        store.quarantine(RECORD.key, "it is broken")


def test_removing_nothing_is_not_an_error(store: EngineStore) -> None:
    store.remove(RECORD.key)
    assert store.get(RECORD.key) is None


def test_a_plan_is_pinned_by_size_before_it_is_read(store: EngineStore) -> None:
    """A file that grew huge is not read into memory."""
    engine = put(store)
    os.truncate(engine.plan_path, 1 << 40)
    with pytest.raises(EngineDamagedError, match="has 1,099,511,627,776 bytes, expected 21"):
        store.plan(engine)


def test_a_record_of_a_plan_of_no_bytes(store: EngineStore) -> None:
    empty = msgspec.structs.replace(RECORD, plan=FileRecord(sha256=hash_bytes(b""), size=0))
    assert store.plan(put(store, empty, b"")) == b""
