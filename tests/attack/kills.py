"""Kills exports, seals, builds and runs with SIGKILL, and looks for damage and for files that are left behind.

Each kind of work replaces an earlier result. After a kill the result must be the earlier one or the new one, complete;
after the next run there must be no other file, nor a further one in the user's cache or in the folder for temporary
files. Half of the kills come before a chosen change of the file system (every
rename, removal, new folder and opened file is one), the other half at a random time. Work runs in a child of this
process, so that a thousand kills take minutes: components are exported, and engines built, by stand-ins, which write
files of the same names. Everything around them is the product's own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.sample import bundle_path
from latentrt.cli.main import main as latentrt
from latentrt.errors import LatentRTError
from tests.killed import count_steps, in_child, start_child

__all__ = ["KINDS", "Kill", "Work", "cases", "run"]


class Work(ABC):
    """One kind of work, which writes to a folder of its own.

    Args:
        place: a new folder.

    Attributes:
        folder: the work puts nothing else into it than its result.
        sources: a folder for what the work reads.
    """

    def __init__(self, place: Path) -> None:
        self.folder, self.sources, self._cache = place / "work", place / "sources", place / "cache"
        self._temporary, self._baseline = place / "temporary", set[str]()
        self.folder.mkdir(parents=True, mode=0o700)
        self.sources.mkdir()
        self._temporary.mkdir()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the work have a cache and a folder for temporary files of its own meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LATENTRT_CACHE", str(self._cache))
            patch.setenv("TMPDIR", str(self._temporary))
            patch.setattr(tempfile, "tempdir", str(self._temporary))
            yield

    def set_baseline(self) -> None:
        """Record the files in the cache and among temporary files that every run leaves, such as torch's own folder."""
        self._baseline = self._list_outside()

    def list_leftovers(self) -> list[str]:
        """Return the names of files that belong to no result, and of those outside of it beyond the baseline."""
        return sorted(self.list_unknown() | (self._list_outside() - self._baseline))

    def _list_outside(self) -> set[str]:
        places = {"cache": self._cache, "temporary": self._temporary}
        return {f"{name}/{file}" for name, place in places.items() for file in _list_files(place)}

    def prepare(self) -> None:
        """Import and make what every run needs; once, in the parent, in which nothing is replaced."""

    @abstractmethod
    def run(self) -> None:
        """Do the work once, in the child that may be killed."""

    @abstractmethod
    def find_damage(self) -> str | None:
        """Describe the damage to the result; None if it is complete."""

    @abstractmethod
    def list_unknown(self) -> set[str]:
        """Return the names of files in `folder` that belong to no result."""


class _Bundle(Work):
    """Work that replaces the bundle at `folder / "bundle"`."""

    def find_damage(self) -> str | None:
        try:
            Bundle.open(self.folder / "bundle", trust_cache=False).verify()
        except LatentRTError as error:
            return str(error)
        return None

    def list_unknown(self) -> set[str]:
        opened = Bundle.open(self.folder / "bundle")
        known = {f"bundle/{name}" for name in (*opened.manifest.files, "bundle.json", "export-report.json")}
        return _list_files(self.folder) - known


class Export(_Bundle):
    """`latentrt export --overwrite` of a small checkpoint."""

    def prepare(self) -> None:
        from tests.export.fake_worker import write_described

        self.checkpoint = write_described(self.sources / "model")

    def run(self) -> None:
        from tests.export.fake_worker import FakeWorker, install

        install(pytest.MonkeyPatch(), FakeWorker(content=b"x" * 4096))
        latentrt(["export", str(self.checkpoint), str(self.folder / "bundle"), "--overwrite"])

    def find_damage(self) -> str | None:
        """Compare the hashes alone: what the stand-in writes is no graph, which `verify` would say."""
        try:
            files = Bundle.open(self.folder / "bundle").manifest.files
            wrong = [name for name, pin in files.items() if file_record(self.folder / "bundle" / name) != pin]
        except (LatentRTError, OSError) as error:
            return str(error)
        return f"damaged: {wrong}" if wrong else None


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
        import latentrt_engines.build  # noqa: F401
        import tests.engines.real_builds  # noqa: F401
        from latentrt_engines.cache import EngineCache
        from tests.engines.made_up import make_target

        self.sample, self.cache = Bundle.open(bundle_path()), EngineCache(self.folder)
        self.targets = [make_target(self.sample, name) for name in ("unet", "vae_decoder")]

    def run(self) -> None:
        from latentrt.engines.record import SelfCheck
        from latentrt_engines import build
        from latentrt_engines.worker import Built
        from tests.engines.real_builds import RecordedProgress

        def write_plan(self: object, draft: Path, workspace_bytes: int | None) -> Built:
            draft.write_bytes(os.urandom(1 << 16))  # a build gives another plan each time
            check = SelfCheck(ran_on=None, skip_reason="a stand-in")
            plan = file_record(draft)
            return Built(plan=plan, check=check, array_digests={}, seconds=0, peak_bytes=0, workspace_bytes=0)

        pytest.MonkeyPatch().setattr(build._Build, "_run_worker", write_plan)
        list(build.build_engines(self.sample, self.targets, self.cache, RecordedProgress(), force=True))

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

    def list_unknown(self) -> set[str]:
        known = {f"locks/{target.key}.lock" for target in self.targets}
        for engine in self.cache.engines():
            known |= {f"{engine.key}/{name}" for name in ("record.json", "weights.json", engine.plan_path.name)}
        return _list_files(self.folder) - known


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
        latentrt(["run", str(bundle_path()), "a red circle", "-o", image, "--overwrite", *options])

    def find_damage(self) -> str | None:
        try:
            with Image.open(self.folder / "image.png") as image:
                image.load()
        except OSError as error:
            return str(error)
        return None

    def list_unknown(self) -> set[str]:
        return _list_files(self.folder) - {"image.png"}


KINDS: dict[str, type[Work]] = {"export": Export, "seal": Seal, "build": Build, "run": Run}


def _list_files(folder: Path) -> set[str]:
    """Return the paths of everything in a folder but folders; of empty folders too, which are leftovers."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or (not any(path.iterdir()) and path.name != "drafts")
    }


@dataclass(frozen=True)
class Kill:
    """A kill of prepared work.

    Attributes:
        work: the work.
        seconds: how long the work takes without a kill.
        steps: how many steps it has.
        number: decides where the kill comes.
    """

    work: Work
    seconds: float
    steps: int
    number: int


def cases(kinds: Sequence[str] = tuple(KINDS)) -> Iterator[tuple[str, Kill]]:
    """Yield kills of each kind of work in turn, without an end.

    Raises:
        AssertionError: a kind of work fails without a kill.
    """
    with tempfile.TemporaryDirectory(prefix="latentrt-kills-") as place:
        prepared = {kind: _prepare(KINDS[kind](Path(place) / kind)) for kind in kinds}
        for number in itertools.count():
            for kind, first in prepared.items():
                yield f"{kind} {number}", replace(first, number=number)


def _prepare(work: Work) -> Kill:
    """Do a work three times without a kill, to know its length."""
    with work.in_place():
        work.prepare()
        in_child(work.run)  # compiles what it imports, in steps that no other run has
        steps, began = count_steps(work.run), time.monotonic()
        status = in_child(work.run)
        seconds = time.monotonic() - began
        damage = work.find_damage()  # which uses the cache as well
        work.set_baseline()
        leftovers = work.list_leftovers()
        if status or damage or leftovers:
            fault = f"status {status}, {damage}, left {leftovers}"
            raise AssertionError(f"{type(work).__name__} fails without a kill: {fault}")
        return Kill(work, seconds, steps, number=0)


def run(kill: Kill, folder: Path) -> None:
    """Kill the work, check the result, and do the work again, in the work's own folder.

    Raises:
        AssertionError: the result is damaged, or the next run fails or leaves other files.
    """
    work, chance = kill.work, random.Random(kill.number)
    with work.in_place():
        where = next((how for attempt in range(20) if (how := _kill(kill, chance, attempt))), None)
        assert where is not None, "20 processes ended before they were killed"
        damage = work.find_damage()
        assert not damage, f"killed {where}: {damage}"
        status = in_child(work.run)
        assert status == 0, f"killed {where}: the next run ended with {status}"
        damage = work.find_damage()
        assert not damage, f"killed {where}: the next run made {damage}"
        leftovers = work.list_leftovers()
        work.set_baseline()  # so that each leftover fails one case
        assert not leftovers, f"killed {where}: the next run left {leftovers}"


def _kill(kill: Kill, chance: random.Random, attempt: int) -> str | None:
    """Start the work and kill it, sooner with each attempt; return where, or None if it ended before."""
    if kill.number % 2:
        # Every second one among the last, where results take their places.
        step = chance.randrange(max(0, kill.steps - 30) if kill.number % 4 == 1 else 0, kill.steps)
        return f"at step {step}" if in_child(kill.work.run, kill_at=step) == -signal.SIGKILL else None
    moment = chance.uniform(0, 1.2 * kill.seconds / (1 + attempt))
    child = start_child(kill.work.run)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return f"after {moment:.3f} s" if killed else None
