"""Kills exports, seals, builds and runs with SIGKILL, and looks for damage and for files that are left behind.

    python -m tests.attack.kills --kills 1000

Each kind of work replaces an earlier result. After a kill the result must be the earlier one or the new one, complete;
after the next run there must be no other file. Half of the kills come before a chosen change of the file system (every
rename, removal, new folder and opened file is one), the other half at a random time. Work runs in a child of this
process, so that a thousand kills take minutes: components are exported, and engines built, by stand-ins, which write
files of the same names. Everything around them is the product's own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.cli.main import main as latentrt
from latentrt.errors import LatentRTError
from tests.killed import count_steps, in_child, start_child

__all__ = ["KINDS", "Report", "kill_often", "main"]


class Work(ABC):
    """One kind of work, which writes to a folder of its own.

    Args:
        folder: empty. The work puts nothing else into it than its result.
        sources: a folder for what the work reads.
    """

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder, self.sources = folder, sources

    def prepare(self) -> None:
        """Import and make what every run needs; once, in the parent."""

    @abstractmethod
    def run(self) -> None:
        """Do the work once, in the child that may be killed."""

    @abstractmethod
    def find_damage(self) -> str | None:
        """Describe what is wrong with the result; None if it is complete."""

    @abstractmethod
    def list_leftovers(self) -> list[str]:
        """Return the names of files that belong to no result."""


class _Bundle(Work):
    """Work that replaces the bundle at `folder / "bundle"`."""

    def find_damage(self) -> str | None:
        try:
            Bundle.open(self.folder / "bundle", trust_cache=False).verify()
        except LatentRTError as error:
            return str(error)
        return None

    def list_leftovers(self) -> list[str]:
        opened = Bundle.open(self.folder / "bundle")
        known = {f"bundle/{name}" for name in (*opened.manifest.files, "bundle.json", "export-report.json")}
        return sorted(_list_files(self.folder) - known)


class Export(_Bundle):
    """`latentrt export --overwrite` of a small checkpoint."""

    def prepare(self) -> None:
        from tests.export.fake_worker import FakeWorker, install, write_described

        self.checkpoint = write_described(self.sources / "model")
        self._patch = pytest.MonkeyPatch()  # of this process and its children, which do nothing else
        install(self._patch, FakeWorker(content=b"x" * 4096))

    def run(self) -> None:
        latentrt(["export", str(self.checkpoint), str(self.folder / "bundle"), "--overwrite"])


class Seal(_Bundle):
    """`latentrt engines seal --overwrite` of the sample bundle with two engines."""

    def prepare(self) -> None:
        from latentrt_engines.cache import EngineCache
        from tests.engines.made_up import identity, publish

        sample = Bundle.open(bundle_path())
        cache = EngineCache()
        for name in ("unet", "vae_decoder"):
            publish(cache, sample, identity(sample, name), name.encode())

    def run(self) -> None:
        latentrt(["engines", "seal", str(bundle_path()), str(self.folder / "bundle"), "--overwrite"])


class Build(Work):
    """`build_engines` of two engines into the cache, with stand-ins for plans."""

    def prepare(self) -> None:
        from latentrt.engines.record import SelfCheck
        from latentrt_engines import build
        from latentrt_engines.cache import EngineCache
        from latentrt_engines.worker import Built
        from tests.engines.made_up import make_target

        self.sample, self.cache, self._build = Bundle.open(bundle_path()), EngineCache(self.folder), build
        self.targets = [make_target(self.sample, name) for name in ("unet", "vae_decoder")]

        def write_plan(self: object, draft: Path, workspace_bytes: int | None) -> Built:
            from latentrt.bundle.digests import file_record

            draft.write_bytes(os.urandom(1 << 16))  # a build gives another plan each time
            check = SelfCheck(ran_on=None, skip_reason="a stand-in")
            plan = file_record(draft)
            return Built(plan=plan, check=check, array_digests={}, seconds=0, peak_bytes=0, workspace_bytes=0)

        pytest.MonkeyPatch().setattr(build._Build, "_run_worker", write_plan)

    def run(self) -> None:
        from tests.engines.real_builds import RecordedProgress

        list(self._build.build_engines(self.sample, self.targets, self.cache, RecordedProgress(), force=True))

    def find_damage(self) -> str | None:
        engines = list(self.cache.engines())
        if len(engines) != len(self.targets):
            return f"{len(engines)} engines"
        try:
            for engine in engines:
                self.cache.plan(engine)
        except LatentRTError as error:
            return str(error)
        return None

    def list_leftovers(self) -> list[str]:
        known = {f"locks/{target.key}.lock" for target in self.targets}
        for engine in self.cache.engines():
            known |= {f"{engine.key}/{name}" for name in ("record.json", "weights.json", engine.plan_path.name)}
        return sorted(_list_files(self.folder) - known)


class Run(Work):
    """`latentrt run` of the sample bundle, one image."""

    def prepare(self) -> None:
        import onnxruntime  # noqa: F401

        import latentrt.backends.onnxruntime
        import latentrt.cli.run
        import latentrt.families.stable_diffusion
        import latentrt.pipeline  # noqa: F401

    def run(self) -> None:
        image = str(self.folder / "image.png")
        options = ["--steps", "1", "--device", "cpu", "--threads", "1", "--quiet"]
        latentrt(["run", str(bundle_path()), "a red circle", "-o", image, *options])

    def find_damage(self) -> str | None:
        try:
            with Image.open(self.folder / "image.png") as image:
                image.load()
        except OSError as error:
            return str(error)
        return None

    def list_leftovers(self) -> list[str]:
        return sorted(_list_files(self.folder) - {"image.png"})


KINDS: dict[str, type[Work]] = {"export": Export, "seal": Seal, "build": Build, "run": Run}


def _list_files(folder: Path) -> set[str]:
    """Return the paths of everything in a folder but folders; of empty folders too, which are leftovers."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or (not any(path.iterdir()) and path.name != "drafts")
    }


@dataclass
class Report:
    """The result of many kills.

    Attributes:
        kills: the number of processes that were killed, others having ended before.
        left: the kills that left files which the next run had to remove.
        faults: descriptions of damaged results, of failed next runs, and of files left after one.
    """

    kills: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)


def kill_often(kind: str, kills: int, *, seed: int = 0) -> Report:
    """Kill one kind of work, check the result, and run it again; until it was killed `kills` times."""
    chance, report = random.Random(seed), Report()
    with _workplace() as place:
        (place / "work").mkdir(mode=0o700)
        (place / "sources").mkdir()
        work = KINDS[kind](place / "work", place / "sources")
        work.prepare()
        began = time.monotonic()
        _expect_success(work)
        seconds, steps = time.monotonic() - began, count_steps(work.run)
        for number in range(20 * kills):
            if report.kills == kills:
                return report
            if number % 2:
                # Every second one among the last, where results take their places.
                step = chance.randrange(max(0, steps - 30) if number % 4 == 1 else 0, steps)
                killed = in_child(work.run, kill_at=step) == -signal.SIGKILL
                how = f"at step {step}"
            else:
                moment = chance.uniform(0, 1.2 * seconds)
                killed, how = _kill_after(work, moment), f"after {moment:.3f} s"
            report.kills += killed
            where = f"{kind}, kill {report.kills}, {how}"
            if damage := work.find_damage():
                report.faults.append(f"{where}: {damage}")
            report.left += bool(work.list_leftovers()) if not work.find_damage() else 0
            if status := in_child(work.run):
                report.faults.append(f"{where}: the next run ended with {status}")
            elif leftovers := work.list_leftovers():
                report.faults.append(f"{where}: left {', '.join(leftovers)}")
    raise AssertionError(f"{kind}: only {report.kills} of {20 * kills} processes were killed")


def _expect_success(work: Work) -> None:
    status = in_child(work.run)
    if status or work.find_damage() or work.list_leftovers():
        raise AssertionError(f"{type(work).__name__} fails without a kill: status {status}, {work.find_damage()}")


def _kill_after(work: Work, seconds: float) -> bool:
    """Kill a run after some time; return whether it had not ended before."""
    child = start_child(work.run)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """Yield a folder; the cache is in it meanwhile."""
    place = Path(tempfile.mkdtemp(prefix="latentrt-kills-"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LATENTRT_CACHE", str(place / "cache"))
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Kill every kind of work equally often, print a line for each, and exit with 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="only this kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds, faults = options.kind or list(KINDS), Counter[str]()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for kind in kinds:
        began = time.monotonic()
        with _silent():
            report = kill_often(kind, -(-options.kills // len(kinds)), seed=options.seed)
        faults[kind] = len(report.faults)
        seconds = time.monotonic() - began
        print(
            f"{kind:<8}{report.kills} kills in {seconds:.0f} s, {report.left} left files that the next run removed, "
            f"{len(report.faults)} faults"
        )
        for fault in report.faults[:10]:
            print(f"  {fault}")
    sys.exit(1 if faults.total() else 0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard the output of children: a thousand tables."""
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
    try:
        yield
    finally:
        for number, each in enumerate(kept, start=1):
            os.dup2(each, number)
            os.close(each)


if __name__ == "__main__":
    main()
