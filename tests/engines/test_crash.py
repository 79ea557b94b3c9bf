"""What happens to the cache when a build is killed, interrupted, short of room, or not alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.store import StoredEngine
from latentrt.errors import EngineDamagedError
from latentrt.bundle.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.engines.real_builds import Told, build_command, built, wanted

BUILD = ("--component", "unet", "--size", "64x64")  # two seconds, of which about one is the library's
SECONDS = 60


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "latentrt"


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said on standard error."""
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that builds."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "latentrt_engines.worker" in child.cmdline():
                    return child
        time.sleep(0.01)
    raise AssertionError("no worker was started")


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def intact_engines(root: Path) -> list[StoredEngine]:
    """The engines that are there, each compared with its hash, without moving anything."""
    cache = EngineCache(root / "engines")
    engines = list(cache.engines())
    assert all(cache.plan(engine) for engine in engines)
    assert not (cache.folder / "aside").exists()
    return engines


@pytest.mark.parametrize("seconds", [0.0, 0.5, 0.9, 1.2, 1.5])
@pytest.mark.parametrize("earlier", [False, True], ids=["first build", "rebuild"])
def test_killed_at_any_moment(root: Path, seconds: float, earlier: bool) -> None:
    """Of the command: the old engine, the new one or none is there, and the next build does not wait."""
    before: list[StoredEngine] = []
    if earlier:
        assert finish(build_command(bundle_path(), root, *BUILD))[0] == 0
        before = intact_engines(root)
    process = build_command(bundle_path(), root, *BUILD, "--force")
    worker = worker_of(process)
    time.sleep(seconds)
    process.kill()
    finish(process)
    wait_until(lambda: is_gone(worker))  # its work is nobody's any more
    after = intact_engines(root)
    if earlier:
        assert len(after) == 1
        assert after[0].key == before[0].key
    code, said = finish(build_command(bundle_path(), root, *BUILD))
    assert (code, "waiting" in said) == (0, False)
    assert len(intact_engines(root)) == 1
    assert EngineCache(root / "engines").leftovers() == []


def test_a_worker_that_is_killed_is_tried_again_with_less_memory(root: Path) -> None:
    """As the kernel does when memory runs out."""
    process = build_command(bundle_path(), root, *BUILD)
    worker_of(process).kill()
    code, said = finish(process)
    assert code == 0
    assert (
        "warning: unet: out of memory with a workspace of the library's own limit, trying again with 2,048 MiB" in said
    )
    (engine,) = intact_engines(root)
    assert engine.record.build.workspace_bytes == 2 << 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(root: Path, number: signal.Signals) -> None:
    process = build_command(bundle_path(), root, *BUILD)
    worker = worker_of(process)
    time.sleep(0.8)
    process.send_signal(number)
    code, said = finish(process)
    assert code == (130 if number == signal.SIGINT else 128 + number)
    assert is_gone(worker)
    assert "Traceback" not in said
    assert intact_engines(root) == []
    assert EngineCache(root / "engines").leftovers() == []
    assert list((root / "engines" / "drafts").iterdir()) == []


def test_many_who_want_it_build_it_once(root: Path) -> None:
    processes = [build_command(bundle_path(), root, *BUILD) for _ in range(5)]
    said = [finish(process) for process in processes]
    assert [code for code, _ in said] == [0] * 5
    assert sum("built in" in words for _, words in said) == 1
    assert sum("there already" in words for _, words in said) == 4
    assert len(intact_engines(root)) == 1


def small_files() -> None:
    """In a child: no file may grow above 1 MB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk(root: Path) -> None:
    assert finish(build_command(bundle_path(), root, *BUILD))[0] == 0
    before = intact_engines(root)
    code, said = finish(build_command(bundle_path(), root, *BUILD, "--force", preexec_fn=small_files))
    assert code == 9
    assert f"error: {root / 'engines'} cannot be written: File too large; make room (latentrt engines prune)" in said
    assert [engine.record for engine in intact_engines(root)] == [engine.record for engine in before]
    assert EngineCache(root / "engines").leftovers() == []


def bound_by_permissions() -> None:
    """In a child: root, too, may write only where permissions say so."""
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        for capability in range(41):
            ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_a_read_only_folder(root: Path) -> None:
    assert finish(build_command(bundle_path(), root, *BUILD))[0] == 0
    before = intact_engines(root)
    folders = [root / "engines", *(path for path in (root / "engines").iterdir() if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        code, said = finish(build_command(bundle_path(), root, *BUILD, "--force", preexec_fn=bound_by_permissions))
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert code == 9
    assert f"error: {root / 'engines'} cannot be written: Permission denied; make it writable" in said
    assert [engine.record for engine in intact_engines(root)] == [engine.record for engine in before]


def test_a_folder_that_others_can_reach_is_not_used(root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    code, said = finish(build_command(bundle_path(), root, *BUILD))
    assert code == 9
    mend = "chmod 700 it, or name another folder with LATENTRT_CACHE"
    assert f"error: {root} is open to others (mode 755, expected 700); {mend}" in said


def truncated(engine: StoredEngine, other: StoredEngine) -> None:
    os.truncate(engine.plan_path, 1000)


def flipped(engine: StoredEngine, other: StoredEngine) -> None:
    with open(engine.plan_path, "r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)[0]
        stream.seek(1000)
        stream.write(bytes([byte ^ 1]))


def missing(engine: StoredEngine, other: StoredEngine) -> None:
    engine.plan_path.unlink()


def foreign_plan(engine: StoredEngine, other: StoredEngine) -> None:
    engine.plan_path.write_bytes(other.plan_path.read_bytes())


def foreign_engine(engine: StoredEngine, other: StoredEngine) -> None:
    """Another engine, whole, under this one's key."""
    for path in engine.folder.iterdir():
        path.unlink()
    for path in other.folder.iterdir():
        (engine.folder / path.name).write_bytes(path.read_bytes())


def no_record(engine: StoredEngine, other: StoredEngine) -> None:
    (engine.folder / "record.json").write_text("{}")


@pytest.mark.parametrize("damage", [truncated, flipped, missing, foreign_plan, foreign_engine, no_record])
def test_damage_is_found_moved_aside_and_mended_by_a_build(
    sample: Bundle, tmp_path: Path, damage: Callable[[StoredEngine, StoredEngine], None]
) -> None:
    cache, told = EngineCache(tmp_path), Told()
    (engine,) = built(sample, wanted(sample, "text_encoder"), cache)
    (other,) = built(sample, wanted(sample, "text_encoder", batch="2"), cache)
    damage(engine, other)
    if damage not in (foreign_engine, no_record):
        with pytest.raises(EngineDamagedError, match=r"it was moved to .*, build it again: latentrt build"):
            cache.plan(engine)
        assert cache.get(engine.key) is None
    (mended,) = built(sample, wanted(sample, "text_encoder"), cache, told)
    assert told.finished == [("text_encoder", True)]
    # Said where the build found it; `plan` has said so itself.
    said = ["text_encoder: what was there is not what was built; moved aside, and built again"]
    assert told.warnings == (said if damage in (foreign_engine, no_record) else [])
    assert mended.record.identity == engine.record.identity
    assert cache.plan(mended)
    (aside,) = (cache.folder / "aside").iterdir()
    assert aside.name.startswith(engine.key)
    assert (aside / "reason.txt").read_text().strip()
    assert cache.plan(other), "the other engine is as it was"
