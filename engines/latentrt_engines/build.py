"""Builds of engines: each engine is built once in its own process, checked, and published in the cache."""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from latentrt import __version__
from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import ENGINE_FORMAT, BuildStats, EngineRecord
from latentrt.engines.store import StoredEngine
from latentrt.errors import BuildError, EngineError
from latentrt.worker_process import Failed, WorkerProcess
from latentrt_engines.cache import EngineCache
from latentrt_engines.targets import EngineTarget
from latentrt_engines.worker import MESSAGES, BuildJob, Built, OutOfMemory, Phase

__all__ = ["Progress", "build_engines"]

_SMALLEST_WORKSPACE_BYTES = 256 << 20
# The library's own limit may be all of the GPU's memory, or 0 where there is no GPU.
_MAX_RETRY_BYTES = 2 << 30
_PLAN_OVERHEAD = 1.1


class Progress(ABC):
    """A receiver of the progress of builds."""

    @abstractmethod
    def update(self, component: str, text: str, fraction: float) -> None:
        """Show the phase of a component's build, and the fraction that is done, 0 … 1."""

    @abstractmethod
    def finish(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        """Show that a component's engine is available, because it was built or because it existed."""

    @abstractmethod
    def warn(self, text: str) -> None:
        """Show a warning."""


def build_engines(
    bundle: Bundle,
    targets: Iterable[EngineTarget],
    cache: EngineCache,
    progress: Progress,
    *,
    force: bool = False,
    timing_cache: Path | None = None,
) -> Iterator[StoredEngine]:
    """Build the engines that do not exist yet, one after the other.

    Args:
        bundle: the bundle with the graphs.
        targets: the engines to build.
        cache: the cache for the engines.
        progress: notified of phases, results and warnings.
        force: whether to build engines that exist; an existing engine is kept until the new one replaces it.
        timing_cache: the file of kernel timings to read and extend (`tensorrt`); None for no file.

    Yields:
        Each engine, once it is in the cache.

    Raises:
        BundleError: the bundle is damaged.
        BuildError: a graph cannot be built.
        EngineError: the cache cannot be written, or the disk is full. Existing engines are unchanged.
    """
    for target in targets:
        yield _Build(bundle, target, cache, progress, timing_cache).run(force=force)


class _Build:
    """The build of one engine."""

    def __init__(
        self, bundle: Bundle, target: EngineTarget, cache: EngineCache, progress: Progress, timing_cache: Path | None
    ) -> None:
        self.bundle, self.target, self.cache, self.progress = bundle, target, cache, progress
        self.timing_cache, self.name = timing_cache, target.component

    def run(self, *, force: bool) -> StoredEngine:
        """Find the engine, or build it."""
        waited = False

        def on_wait() -> None:
            nonlocal waited
            waited = True
            self.progress.update(self.name, "waiting for another process that builds it", 0.0)

        with self.cache.lock(self.target.key, on_wait) as draft:
            # After waiting, the other process has just built the engine, which satisfies a forced build too.
            existing = self._find_existing() if waited or not force else None
            engine = existing or self._build(draft)
        self.progress.finish(self.name, engine, built=existing is None)
        return engine

    def _find_existing(self) -> StoredEngine | None:
        """Find the engine, or one whose plan supports more GPUs; quarantine damaged engines with a warning."""
        tried, damaged = set[str](), False
        key: str | None = self.target.key
        while key is not None and key not in tried:
            tried.add(key)
            existed = (self.cache.folder / key).exists()
            if (engine := self.cache.find_intact(key)) is not None:
                return engine
            damaged |= existed and not (self.cache.folder / key).exists()
            other = self.cache.find(self.target.identity)
            key = other.key if other is not None else None
        if damaged:
            self.progress.warn(f"{self.name}: the existing engine is damaged; it is quarantined and built again")
        return None

    def _build(self, draft: Path) -> StoredEngine:
        self._check_room()
        built = self._build_with_retries(draft)
        component = self.bundle.manifest.components[self.name]
        stats = BuildStats(
            seconds=built.seconds,
            peak_bytes=built.peak_bytes,
            workspace_bytes=built.workspace_bytes,
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
            created_by=f"latentrt {__version__}",
        )
        record = EngineRecord(
            format_version=ENGINE_FORMAT,
            identity=self.target.identity,
            plan=built.plan,
            inputs=tuple(spec.tensor for spec in component.inputs),
            outputs=component.outputs,
            build=stats,
            check=built.check,
        )
        return self.cache.publish(record, draft, built.array_digests)

    def _build_with_retries(self, draft: Path) -> Built:
        """Build the plan; after running out of memory, retry with a smaller workspace.

        Raises:
            BuildError: no smaller workspace would help, or the graph cannot be built.
        """
        workspace = self.target.identity.options.workspace_bytes
        while True:
            outcome = self._run_worker(draft, workspace)
            if isinstance(outcome, Built):
                return outcome
            smaller = _next_workspace(outcome.workspace_bytes)
            if smaller is None:
                reason = outcome.reason.splitlines()[-1] if outcome.reason else "its process was killed"
                raise BuildError(
                    f"{self.name}: not enough memory to build the engine, even with a workspace of "
                    f"{_format_mebibytes(outcome.workspace_bytes)} ({reason}); close other programs, build for smaller "
                    "images or batches, or build on a machine with more memory"
                )
            self.progress.warn(
                f"{self.name}: out of memory with a workspace of {_format_mebibytes(outcome.workspace_bytes)}, trying "
                f"again with {_format_mebibytes(smaller)}"
            )
            workspace = smaller

    def _run_worker(self, draft: Path, workspace_bytes: int | None) -> Built | OutOfMemory:
        job = BuildJob(
            bundle=str(self.bundle.folder),
            digest=self.bundle.digest,
            identity=self.target.identity,
            workspace_bytes=workspace_bytes,
            timing_cache=None if self.timing_cache is None else str(self.timing_cache),
            draft=str(draft),
        )
        with WorkerProcess("latentrt_engines.worker", job) as worker:
            for line in worker.messages():
                message = MESSAGES.decode(line)
                match message:
                    case Phase(text, fraction):
                        self.progress.update(self.name, text, fraction)
                    case Failed():
                        raise message.as_raised(BuildError)
                    case Built() | OutOfMemory():
                        return message
            ending = worker.ending()
        if ending.no_memory:
            return OutOfMemory(workspace_bytes or 0, ending.said)
        raise ending.error(self.name, BuildError)

    def _check_room(self) -> None:
        """Reject a build whose plan, which contains its weights, cannot fit on the disk.

        Raises:
            EngineError: the disk has too little free space.
        """
        _, weights = self.bundle.component_files(self.name, self.target.identity.precision)
        needed = 0 if self.target.identity.weights is None else self.bundle.manifest.files[weights].size
        needed = int(needed * _PLAN_OVERHEAD)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.cache.folder).free
            if free < needed:
                raise EngineError(
                    f"{self.name}: its engine needs about {needed / 1e6:,.0f} MB, and {self.cache.folder} has "
                    f"{free / 1e6:,.0f} MB free; make room (latentrt engines prune), or name another folder with "
                    "LATENTRT_CACHE"
                )


def _next_workspace(workspace_bytes: int) -> int | None:
    """Return the next workspace in bytes after one that was too large for the memory; None if none would help.

    Args:
        workspace_bytes: the workspace that was too large; 0 for the library's own limit.
    """
    smaller = min(workspace_bytes // 4, _MAX_RETRY_BYTES) if workspace_bytes else _MAX_RETRY_BYTES
    return smaller if smaller >= _SMALLEST_WORKSPACE_BYTES else None


def _format_mebibytes(count: int) -> str:
    return f"{count >> 20:,} MiB" if count else "the library's own limit"
