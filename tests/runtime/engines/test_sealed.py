from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record, hash_bytes
from latentrt.bundle.manifest import SealedEngine, encode_manifest
from latentrt.bundle.sample import bundle_path
from latentrt.engines.record import EngineRecord
from latentrt.engines.sealed import BundledEngine, read_sealed_engines
from latentrt.engines.store import MAX_PLAN_BYTES, MAX_RECORD_BYTES, encode_record, plan_name
from latentrt.errors import BundleError, EngineDamagedError, IntegrityError, ManifestError
from tests.engines.made_up import PLAN, identity, record
from tests.runtime.small_bundle import change_byte, edit_manifest, enlarge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the sample bundle, with a fake engine of its denoiser."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_path(), copy)
    write_engine(copy, engine(copy))
    return copy


def engine(folder: Path) -> EngineRecord:
    bundle = Bundle.open(folder)
    return record(bundle, identity(bundle, "unet"))


def write_engine(folder: Path, made: EngineRecord, *, key: str | None = None) -> None:
    """Seal an engine as `latentrt engines seal` does, or under another key."""
    place = f"engines/{key or made.key}"
    files = SealedEngine(record=f"{place}/record.json", plan=f"{place}/{plan_name(made)}")
    (folder / place).mkdir(parents=True)
    (folder / files.record).write_bytes(encode_record(made))
    (folder / files.plan).write_bytes(PLAN)
    pinned = {name: file_record(folder / name) for name in (files.record, files.plan)}
    manifest = Bundle.open(folder).manifest
    changed = msgspec.structs.replace(
        manifest, engines={**manifest.engines, key or made.key: files}, files={**manifest.files, **pinned}
    )
    (folder / "bundle.json").write_bytes(encode_manifest(changed))


def test_a_bundle_without_engines() -> None:
    assert read_sealed_engines(Bundle.open(bundle_path())) == []


def test_a_sealed_engine(folder: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.verify()
    (found,) = read_sealed_engines(bundle)
    assert found.record == engine(folder)
    assert found.plan() == PLAN


def test_a_damaged_plan_is_not_returned(folder: Path) -> None:
    (found,) = read_sealed_engines(Bundle.open(folder))
    change_byte(folder / found.plan_file)
    (found,) = read_sealed_engines(Bundle.open(folder))
    with pytest.raises(IntegrityError, match=found.plan_file):
        found.plan()


def test_a_damaged_record_is_not_read(folder: Path) -> None:
    change_byte(next((folder / "engines").glob("*/record.json")))
    with pytest.raises(IntegrityError, match=r"record\.json"):
        read_sealed_engines(Bundle.open(folder))


def test_files_too_large_to_be_an_engines_are_not_read(folder: Path) -> None:
    (found,) = read_sealed_engines(Bundle.open(folder))
    enlarge(folder, found.plan_file, MAX_PLAN_BYTES + 1)
    with pytest.raises(BundleError, match=f"expected at most {MAX_PLAN_BYTES:,}"):
        BundledEngine(Bundle.open(folder), found.record, found.plan_file).plan()
    enlarge(folder, found.plan_file.replace(found.plan_file.rpartition("/")[2], "record.json"), 1 << 40)
    with pytest.raises(BundleError, match=rf"record\.json.* expected at most {MAX_RECORD_BYTES:,}"):
        read_sealed_engines(Bundle.open(folder))


def test_a_pinned_file_that_is_not_a_record(folder: Path) -> None:
    place = next((folder / "engines").glob("*/record.json"))
    place.write_bytes(b"{}")
    name = str(place.relative_to(folder))
    edit_manifest(folder, lambda tree: tree["files"].update({name: msgspec.to_builtins(file_record(place))}))
    with pytest.raises(EngineDamagedError, match="is not the record of an engine"):
        read_sealed_engines(Bundle.open(folder))


def seal_forged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Seal an engine of another record, with the key and the hashes that it gives."""
    tree = msgspec.to_builtins(engine(folder))
    change(tree)
    tree["identity"]["profile"] = dict(sorted(tree["identity"]["profile"].items()))  # in the key's order
    key = hash_bytes(msgspec.json.encode(tree["identity"]))
    place = f"engines/{key}"
    files = {"record": f"{place}/record.json", "plan": f"{place}/{hash_bytes(PLAN)}.plan"}
    (folder / place).mkdir(exist_ok=True)  # another record may have the same key
    (folder / files["record"]).write_bytes(msgspec.json.encode(tree))
    (folder / files["plan"]).write_bytes(PLAN)
    pinned = {name: msgspec.to_builtins(file_record(folder / name)) for name in files.values()}
    edit_manifest(folder, lambda tree: tree["files"].update(pinned))
    edit_manifest(folder, lambda tree: tree["engines"].update({key: files}))


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "size 0": (lambda profile: profile["sample"].update(min=[0, 4, 8, 8]), "`int` >= 1"),
    "other ranks": (lambda profile: profile["sample"].update(max=[1, 4, 8]), "shapes of 4, 4, 3 axes"),
    "beyond the bound": (lambda profile: profile["sample"].update(max=[1 << 40, 4, 8, 8]), "`int` <= 1048576"),
    "descending": (lambda profile: profile["sample"].update(min=[9, 4, 8, 8]), "minimum ≤ optimum ≤ maximum"),
    "no input": (lambda profile: profile.clear(), "got a profile of nothing, expected one of the inputs"),
    "other input": (lambda profile: profile.update(x=profile.pop("sample")), "expected one of the inputs sample"),
    "input of another rank": (
        lambda profile: profile.update(sample={"min": [], "opt": [], "max": []}),
        r"sample \(0 axes\).*expected one of the inputs sample \(4 axes\)",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_profile(folder: Path, forgery: str) -> None:
    """Whoever makes a bundle pins what he likes, so all hashes are right."""
    change, fault = FORGERIES[forgery]
    seal_forged(folder, lambda tree: change(tree["identity"]["profile"]))
    bundle = Bundle.open(folder)
    bundle.verify()
    with pytest.raises(EngineDamagedError, match=f"record.json is not the record of an engine: .*{fault}"):
        read_sealed_engines(bundle)


@pytest.mark.parametrize("axis", ["x*height", "0*height", "8*8*height", "8 * height", ""])
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_forged_axis(folder: Path, kind: str, axis: str) -> None:
    seal_forged(folder, lambda tree: tree[kind][0].update(shape=["batch", 4, axis, "width"]))
    with pytest.raises(EngineDamagedError, match="expected axes such as 4, height or"):
        read_sealed_engines(Bundle.open(folder))


def test_another_profile_is_read(folder: Path) -> None:
    seal_forged(folder, lambda tree: tree["identity"]["profile"]["sample"].update(max=[9, 4, 99, 99]))
    assert len(read_sealed_engines(Bundle.open(folder))) == 2


def test_a_record_under_another_key(folder: Path) -> None:
    write_engine(folder, engine(folder), key="0" * 64)
    with pytest.raises(EngineDamagedError, match="expected the engine 000000000000"):
        read_sealed_engines(Bundle.open(folder))


def test_the_plan_of_another_engine(folder: Path) -> None:
    """Both files have the pinned hashes, but do not belong together."""

    def swap(tree: dict[str, Any]) -> None:
        (files,) = tree["engines"].values()
        files["plan"] = "unet/model.onnx"

    edit_manifest(folder, swap)
    with pytest.raises(EngineDamagedError, match="expected the engine"):
        read_sealed_engines(Bundle.open(folder))


@pytest.mark.parametrize("field", ["record", "plan"])
def test_an_engine_whose_files_are_not_pinned(folder: Path, field: str) -> None:
    def forget(tree: dict[str, Any]) -> None:
        (files,) = tree["engines"].values()
        del tree["files"][files[field]]

    edit_manifest(folder, forget)
    with pytest.raises(ManifestError, match=f"is the {field} of the engine .* but is not pinned in files"):
        Bundle.open(folder)


@pytest.mark.parametrize("path", ["../elsewhere.plan", "/etc/passwd", "engines/../../x"])
def test_an_engine_outside_the_bundle(folder: Path, path: str) -> None:
    def point_out(tree: dict[str, Any]) -> None:
        (files,) = tree["engines"].values()
        tree["files"][path] = tree["files"][files["plan"]]
        files["plan"] = path

    edit_manifest(folder, point_out)
    with pytest.raises(ManifestError, match="expected a relative path inside the bundle"):
        Bundle.open(folder)


def test_an_invalid_key(folder: Path) -> None:
    edit_manifest(folder, lambda tree: tree["engines"].update({"../../x": next(iter(tree["engines"].values()))}))
    with pytest.raises(ManifestError, match="is not a manifest of format 2"):
        Bundle.open(folder)
