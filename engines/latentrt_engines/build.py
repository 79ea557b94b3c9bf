"""A bundle's graphs → engines in the cache: each built once, checked, and recorded."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from latentrt import __version__
from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import ENGINE_FORMAT, BuildFigures, EngineRecord
from latentrt.engines.store import StoredEngine
from latentrt.errors import BuildError, EngineError
from latentrt.worker_process import Failed, WorkerProcess
from latentrt_engines.cache import EngineCache
from latentrt_engines.wanted import Wanted
from latentrt_engines.worker import BuildJob, Built, Message, OutOfMemory, Phase

__all__ = ["Progress", "build_engines"]

_SMALLEST_WORKSPACE_BYTES = 256 << 20
# The library's own limit may be all of the GPU's memory, or none at all.
_LARGEST_RETRY_BYTES = 2 << 30
_PLAN_OVERHEAD = 1.1


class Progress(Protocol):
    """Told how a build goes on."""

    def phase(self, component: str, text: str, fraction: float) -> None:
        """What a component is at, 0 … 1."""

    def done(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        """A component's engine is there: built now, or found."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""


def build_engines(
    bundle: Bundle,
    wanted: Iterable[Wanted],
    cache: EngineCache,
    progress: Progress,
    *,
    force: bool = False,
    timing_cache: Path | None = None,
) -> Iterator[StoredEngine]:
    """Build what is wanted and not there yet, one after the other.

    Args:
        force: build also what is there; it stays until the new one takes its place.
        timing_cache: a file of kernels' times, read and added to (`tensorrt`).

    Yields:
        Each engine, once it is in the cache.

    Raises:
        BundleError: the bundle is damaged. BuildError: a graph cannot be built. EngineError: the cache cannot be
            written, or there is no room. Whatever was there before is as it was.
    """
    for each in wanted:
        yield _Build(bundle, each, cache, progress, timing_cache).engine(force=force)


class _Build:
    """One engine."""

    def __init__(
        self, bundle: Bundle, wanted: Wanted, cache: EngineCache, progress: Progress, timing_cache: Path | None
    ) -> None:
        self.bundle, self.wanted, self.cache, self.progress = bundle, wanted, cache, progress
        self.timing_cache, self.name = timing_cache, wanted.component

    def engine(self, *, force: bool) -> StoredEngine:
        """The engine, found or built."""
        waited = False

        def on_wait() -> None:
            nonlocal waited
            waited = True
            self.progress.phase(self.name, "waiting for another process that builds it", 0.0)

        with self.cache.locked(self.wanted.key, on_wait) as draft:
            # Who waited wanted it built, and now it is.
            there = self._there() if waited or not force else None
            engine = there or self._build(draft)
        self.progress.done(self.name, engine, built=there is None)
        return engine

    def _there(self) -> StoredEngine | None:
        """The engine, or one plan for more GPUs; what fails its hash is moved aside, and said to be."""
        tried, damaged = set[str](), False
        key: str | None = self.wanted.key
        while key is not None and key not in tried:
            tried.add(key)
            was_there = (self.cache.folder / key).exists()
            if (engine := self.cache.intact(key)) is not None:
                return engine
            damaged |= was_there and not (self.cache.folder / key).exists()
            other = self.cache.find(self.wanted.identity)
            key = other.key if other is not None else None
        if damaged:
            self.progress.warn(f"{self.name}: what was there is not what was built; moved aside, and built again")
        return None

    def _build(self, draft: Path) -> StoredEngine:
        self._check_room()
        built = self._attempts(draft)
        component = self.bundle.manifest.components[self.name]
        figures = BuildFigures(
            seconds=built.seconds,
            peak_bytes=built.peak_bytes,
            workspace_bytes=built.workspace_bytes,
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
            created_by=f"latentrt {__version__}",
        )
        record = EngineRecord(
            format_version=ENGINE_FORMAT,
            identity=self.wanted.identity,
            plan=built.plan,
            inputs=tuple(spec.tensor for spec in component.inputs),
            outputs=component.outputs,
            build=figures,
            check=built.check,
        )
        return self.cache.publish(record, draft, built.arrays)

    def _attempts(self, draft: Path) -> Built:
        """Build, and on running out of memory again with less workspace."""
        workspace = self.wanted.identity.options.workspace_bytes
        while True:
            outcome = self._attempt(draft, workspace)
            if isinstance(outcome, Built):
                return outcome
            smaller = _smaller(outcome.workspace_bytes)
            if smaller is None:
                raise BuildError(
                    f"{self.name}: there is not enough memory to build the engine, with a workspace of "
                    f"{_mebibytes(outcome.workspace_bytes)} too ({outcome.said.splitlines()[-1] or 'it was killed'}); "
                    "close other programs, ask for smaller pictures or batches, or build on a machine with more"
                )
            self.progress.warn(
                f"{self.name}: out of memory with a workspace of {_mebibytes(outcome.workspace_bytes)}, trying again "
                f"with {_mebibytes(smaller)}"
            )
            workspace = smaller

    def _attempt(self, draft: Path, workspace_bytes: int | None) -> Built | OutOfMemory:
        job = BuildJob(
            bundle=str(self.bundle.folder),
            digest=self.bundle.digest,
            identity=self.wanted.identity,
            workspace_bytes=workspace_bytes,
            timing_cache=None if self.timing_cache is None else str(self.timing_cache),
            draft=str(draft),
        )
        with WorkerProcess("latentrt_engines.worker", job) as worker:
            for line in worker.messages():
                message = msgspec.json.decode(line, type=Message)
                match message:
                    case Phase(text, fraction):
                        self.progress.phase(self.name, text, fraction)
                    case Failed():
                        raise message.as_raised(BuildError)
                    case Built() | OutOfMemory():
                        return message
            ending = worker.ending()
        if ending.no_memory:
            return OutOfMemory(workspace_bytes or 0, ending.said)
        raise ending.error(self.name, BuildError)

    def _check_room(self) -> None:
        """A plan holds its weights; what cannot fit is said before the build, not after."""
        _, weights = self.bundle.component_files(self.name, self.wanted.identity.precision)
        needed = 0 if self.wanted.identity.weights is None else self.bundle.manifest.files[weights].size
        needed = int(needed * _PLAN_OVERHEAD)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.cache.folder).free
            if free < needed:
                raise EngineError(
                    f"{self.name}: its engine needs about {needed / 1e6:,.0f} MB, and {self.cache.folder} has "
                    f"{free / 1e6:,.0f} MB left; make room (latentrt engines prune), or name another folder with "
                    "LATENTRT_CACHE"
                )


def _smaller(workspace_bytes: int) -> int | None:
    """The next workspace to try after one (0: the library's own limit); None where it makes no sense to go on."""
    smaller = min(workspace_bytes // 4, _LARGEST_RETRY_BYTES) if workspace_bytes else _LARGEST_RETRY_BYTES
    return smaller if smaller >= _SMALLEST_WORKSPACE_BYTES else None


def _mebibytes(count: int) -> str:
    return f"{count >> 20:,} MiB" if count else "the library's own limit"
