"""The cache when a build is killed or interrupted, the disk is full, or several processes build."""

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
from latentrt.bundle.sample import bundle_path
from latentrt.engines.store import StoredEngine
from latentrt.errors import EngineDamagedError
from latentrt_engines.cache import EngineCache
from tests.engines.real_builds import RecordedProgress, build, make_targets, start_build

OPTIONS = ("--component", "unet", "--size", "64x64")  # about two seconds, one of them in the library
SECONDS = 60


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "latentrt"


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a process; return its exit code and standard error."""
    _, stderr = process.communicate(timeout=SECONDS)
    return process.returncode, stderr


def find_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """Wait for the process that builds, and return it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "latentrt_engines.worker" in child.cmdline():
                    return child
        time.sleep(0.01)
    raise AssertionError("no worker was started")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def intact_engines(root: Path) -> list[StoredEngine]:
    """Read the engines and compare each with its hash; none is quarantined."""
    cache = EngineCache(root / "engines")
    engines = list(cache.engines())
    assert all(cache.plan(engine) for engine in engines)
    assert not (cache.folder / "quarantine").exists()
    return engines


@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(late, marks=pytest.mark.slow) for late in (0.5, 0.9, 1.5)), 1.2]
)
@pytest.mark.parametrize("earlier", [False, True], ids=["first build", "rebuild"])
def test_killed_at_any_moment(root: Path, seconds: float, earlier: bool) -> None:
    """The cache has the old engine, the new one or none, and the next build does not wait."""
    before: list[StoredEngine] = []
    if earlier:
        assert finish(start_build(bundle_path(), root, *OPTIONS))[0] == 0
        before = intact_engines(root)
    process = start_build(bundle_path(), root, *OPTIONS, "--force")
    worker = find_worker(process)
    time.sleep(seconds)
    process.kill()
    finish(process)
    wait_until(lambda: is_gone(worker))  # it ends with its parent
    after = intact_engines(root)
    if earlier:
        assert len(after) == 1
        assert after[0].key == before[0].key
    code, output = finish(start_build(bundle_path(), root, *OPTIONS))
    assert (code, "waiting" in output) == (0, False)
    assert len(intact_engines(root)) == 1
    assert EngineCache(root / "engines").find_leftovers() == []


def test_a_killed_worker_is_retried_with_a_smaller_workspace(root: Path) -> None:
    """The kernel kills it when memory runs out."""
    process = start_build(bundle_path(), root, *OPTIONS)
    find_worker(process).kill()
    code, output = finish(process)
    assert code == 0
    assert "warning: unet: out of memory" in output
    assert "2,048 MiB" in output
    (engine,) = intact_engines(root)
    assert engine.record.build.workspace_bytes == 2 << 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(root: Path, number: signal.Signals) -> None:
    process = start_build(bundle_path(), root, *OPTIONS)
    worker = find_worker(process)
    time.sleep(0.8)
    process.send_signal(number)
    code, output = finish(process)
    assert code == (130 if number == signal.SIGINT else 128 + number)
    assert is_gone(worker)
    assert "Traceback" not in output
    assert intact_engines(root) == []
    assert EngineCache(root / "engines").find_leftovers() == []
    assert list((root / "engines" / "drafts").iterdir()) == []


def test_several_processes_build_an_engine_once(root: Path) -> None:
    processes = [start_build(bundle_path(), root, *OPTIONS) for _ in range(5)]
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0] * 5
    assert sum("built in" in text for _, text in ended) == 1
    assert sum("exists" in text for _, text in ended) == 4
    assert len(intact_engines(root)) == 1


def limit_file_size() -> None:
    """Limit files to 1 MB in a child process, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk(root: Path) -> None:
    assert finish(start_build(bundle_path(), root, *OPTIONS))[0] == 0
    before = intact_engines(root)
    code, output = finish(start_build(bundle_path(), root, *OPTIONS, "--force", preexec_fn=limit_file_size))
    assert code == 9
    assert f"{root / 'engines'} cannot be written: File too large" in output
    assert "latentrt engines prune" in output
    assert [engine.record for engine in intact_engines(root)] == [engine.record for engine in before]
    assert EngineCache(root / "engines").find_leftovers() == []


def obey_permissions() -> None:
    """Drop root's right to ignore permissions in a child process."""
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        for capability in range(41):
            ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_a_read_only_folder(root: Path) -> None:
    assert finish(start_build(bundle_path(), root, *OPTIONS))[0] == 0
    before = intact_engines(root)
    folders = [root / "engines", *(path for path in (root / "engines").iterdir() if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        code, output = finish(start_build(bundle_path(), root, *OPTIONS, "--force", preexec_fn=obey_permissions))
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert code == 9
    assert f"{root / 'engines'} cannot be written: Permission denied; make it writable" in output
    assert [engine.record for engine in intact_engines(root)] == [engine.record for engine in before]


def test_a_folder_that_other_users_can_access_is_not_used(root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    code, output = finish(start_build(bundle_path(), root, *OPTIONS))
    assert code == 9
    assert str(root) in output
    assert "mode 755" in output


def truncate(engine: StoredEngine, other: StoredEngine) -> None:
    os.truncate(engine.plan_path, 1000)


def flip_bit(engine: StoredEngine, other: StoredEngine) -> None:
    with open(engine.plan_path, "r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)[0]
        stream.seek(1000)
        stream.write(bytes([byte ^ 1]))


def delete_plan(engine: StoredEngine, other: StoredEngine) -> None:
    engine.plan_path.unlink()


def replace_plan(engine: StoredEngine, other: StoredEngine) -> None:
    engine.plan_path.write_bytes(other.plan_path.read_bytes())


def replace_engine(engine: StoredEngine, other: StoredEngine) -> None:
    """Put a complete engine under another engine's key."""
    for path in engine.folder.iterdir():
        path.unlink()
    for path in other.folder.iterdir():
        (engine.folder / path.name).write_bytes(path.read_bytes())


def empty_record(engine: StoredEngine, other: StoredEngine) -> None:
    (engine.folder / "record.json").write_text("{}")


@pytest.mark.parametrize("damage", [truncate, flip_bit, delete_plan, replace_plan, replace_engine, empty_record])
def test_damage_is_quarantined_and_repaired_by_a_build(
    sample: Bundle, tmp_path: Path, damage: Callable[[StoredEngine, StoredEngine], None]
) -> None:
    cache, progress = EngineCache(tmp_path), RecordedProgress()
    (engine,) = build(sample, make_targets(sample, "text_encoder"), cache)
    (other,) = build(sample, make_targets(sample, "text_encoder", batch="2"), cache)
    damage(engine, other)
    if damage not in (replace_engine, empty_record):
        with pytest.raises(EngineDamagedError, match="latentrt build"):
            cache.plan(engine)
        assert cache.get(engine.key) is None
    (repaired,) = build(sample, make_targets(sample, "text_encoder"), cache, progress)
    assert progress.finished == [("text_encoder", True)]
    # Only a build that finds the damage itself warns of it; `plan` raises an error.
    assert len(progress.warnings) == (damage in (replace_engine, empty_record))
    assert repaired.record.identity == engine.record.identity
    assert cache.plan(repaired)
    (moved,) = (cache.folder / "quarantine").iterdir()
    assert moved.name.startswith(engine.key)
    assert (moved / "reason.txt").read_text().strip()
    assert cache.plan(other), "the other engine is unchanged"
