"""The process that builds one engine from a graph, and checks it.

The parent sends a `BuildJob` and reads `Phase` messages, then one `Built`, `OutOfMemory` or `Failed`
(`latentrt.worker_process`). The plan is written to the job's draft file, not to the pipe. Run as
`python -m latentrt_engines.worker`.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from latentrt.backends.onnxruntime import open_session, require
from latentrt.backends.session import Session
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.session import EngineSession, NamedWeights
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component, FileRecord, Precision
from latentrt.bundle.printable import printable
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import ENGINE_FORMAT, BuildStats, EngineIdentity, EngineRecord, SelfCheck
from latentrt.errors import BuildError, LatentRTError
from latentrt.worker_process import Failed, peak_bytes, take_job
from latentrt_engines.builder_config import PhaseTree, add_profile, make_config, make_monitor, use_timing_cache
from latentrt_engines.cache import digest_arrays, translating_os_errors
from latentrt_engines.library import Library, load_library
from latentrt_engines.network import Log, check_network, make_log, mark_refittable, parse_network
from latentrt_engines.self_check import check_engine

__all__ = ["BuildJob", "Built", "Message", "OutOfMemory", "Phase"]

NamedArrays = Mapping[str, NDArray[Any]]


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """An engine to build.

    Attributes:
        bundle: the path of the bundle's folder.
        digest: the digest of the bundle.
        workspace_bytes: the limit of a layer's scratch memory in this attempt; None for the library's own limit.
        timing_cache: the path of a file of kernel timings, or None.
        draft: the path of the file for the plan.
    """

    bundle: str
    digest: str
    identity: EngineIdentity
    workspace_bytes: int | None
    timing_cache: str | None
    draft: str


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """The current phase of a build, and the fraction of the build that is done, 0 … 1."""

    text: str
    fraction: float


class Built(msgspec.Struct, frozen=True, tag="built", kw_only=True):
    """A finished build, whose plan is in the draft file.

    Attributes:
        array_digests: a digest of each weight array, by name.
        seconds: the wall time.
        peak_bytes: the largest resident set of the worker.
        workspace_bytes: the workspace limit of the build.
    """

    plan: FileRecord
    check: SelfCheck
    array_digests: dict[str, str]
    seconds: float
    peak_bytes: int
    workspace_bytes: int


class OutOfMemory(msgspec.Struct, frozen=True, tag="out_of_memory"):
    """A build that ran out of memory; it may succeed with a smaller workspace than `workspace_bytes`."""

    workspace_bytes: int
    reason: str


Message = Phase | Built | OutOfMemory | Failed
MESSAGES: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
_JOBS = msgspec.json.Decoder(BuildJob)


class _NoMemoryError(Exception):
    pass


def main() -> None:
    """Read a job from standard input, build, and report the result."""
    line, report = take_job()
    job = _JOBS.decode(line)
    builder = _Builder(job, lambda fraction, text: report(Phase(text, fraction)))
    try:
        report(builder.build())
    except (_NoMemoryError, MemoryError) as error:
        report(OutOfMemory(builder.workspace_bytes, str(error)))
    except LatentRTError as error:
        report(Failed.of(error))


class _Builder:
    """The build of one engine."""

    def __init__(self, job: BuildJob, report: Callable[[float, str], None]) -> None:
        self.job, self.identity = job, job.identity
        self.tree = PhaseTree(report)
        self.workspace_bytes = job.workspace_bytes or 0
        self.log = Log()

    def build(self) -> Built:
        began = time.monotonic()
        library = load_library(self.identity.library)
        if isinstance(find_gpu(), Gpu):
            require("compare the engine with its graph")  # fails before the build, not after it
        bundle, name = Bundle.open(self.job.bundle, self.job.digest), self.identity.component
        component = bundle.manifest.components[name]
        # The weights are compared with their hash here, and must not change until the engine is complete.
        with bundle.weights(name) as opened:
            weights = opened.arrays()
            plan = self._build_plan(library, component, self._read_graph(bundle, weights), weights)
            seconds = round(time.monotonic() - began, 3)
            record = _write(Path(self.job.draft), plan)
            return Built(
                plan=record,
                check=self._check(library, component, plan, record, weights),
                array_digests=digest_arrays(weights),
                seconds=seconds,
                peak_bytes=peak_bytes(),
                workspace_bytes=self.workspace_bytes,
            )

    def _read_graph(self, bundle: Bundle, weights: NamedArrays) -> bytes:
        """Read the graph, compare it with its hash in the manifest, and check it.

        It is checked at the profile's smallest and largest shapes as well, as no run checks the sizes of an engine's.
        Every weight must have an array: for one without, the libraries' parsers would open the file that the graph
        names, in the current folder.

        Raises:
            BuildError: the weights file lacks a weight of the graph.
            BundleError, IntegrityError, GraphError: as for `Bundle.read_graph` and `CheckedGraph.check_sizes`.
        """
        name = self.identity.component
        graph_name, weights_name = bundle.component_files(name, self.identity.precision)
        graph = bundle.read_graph(graph_name)
        profile = self.identity.profile
        graph.check_sizes({input_name: shapes.min for input_name, shapes in profile.items()})
        graph.check_sizes({input_name: shapes.max for input_name, shapes in profile.items()})
        if missing := graph.external_names - weights.keys():
            raise BuildError(
                f"{name}: {weights_name} has no {printable(min(missing))}, which {graph_name} takes from it; export "
                "the bundle again"
            )
        return graph.data

    def _build_plan(self, library: Library, component: Component, graph: bytes, weights: NamedArrays) -> memoryview:
        trt, name, options = library.module, self.identity.component, self.identity.options
        self.log, logger = make_log(library)
        builder = trt.Builder(logger)
        network, parser = parse_network(library, logger, builder, name, graph, weights)
        check_network(library, network, name, component)
        if options.refittable or options.strip_weights:
            mark_refittable(library, network, name, weights)
        config = make_config(library, builder, self.identity, self.job.workspace_bytes)
        self.workspace_bytes = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        save_timings = None
        if self.job.timing_cache is not None:
            save_timings = use_timing_cache(config, Path(self.job.timing_cache), self.tree.notify)
        if not add_profile(builder, config, self.identity.profile):
            raise BuildError(
                f"{name}: {library} rejects the profile: {self.log.text() or 'the library gave no reason'}"
            )
        config.progress_monitor = make_monitor(library, self.tree)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._make_error(library)
        del parser
        if save_timings is not None:
            save_timings()
        return memoryview(plan)

    def _make_error(self, library: Library) -> Exception:
        """Return the error of a failed build, from the library's log."""
        log, name = self.log.text(), self.identity.component
        if (needed := _describe_workspace(log, self.workspace_bytes)) is not None:
            return BuildError(
                f"{name}: a workspace of {self.workspace_bytes:,} bytes is too small for a layer{needed}; pass a "
                "larger --workspace"
            )
        if any(phrase in log for phrase in ("OutOfMemory", "out of memory", "bad_alloc")):
            return _NoMemoryError(log)
        reason = self.log.errors[-1] if self.log.errors else "the library gave no reason"
        return BuildError(f"{name}: {library} cannot build the engine: {reason}")

    def _check(
        self, library: Library, component: Component, plan: memoryview, pinned: FileRecord, weights: NamedArrays
    ) -> SelfCheck:
        """Compare the engine with ONNX Runtime if this machine has a GPU that the engine supports.

        Raises:
            BuildError: an output exceeds its bound.
        """
        gpu, identity = find_gpu(), self.identity
        if isinstance(gpu, NoGpu):
            return SelfCheck(ran_on=None, skip_reason="the machine that built it has no GPU")
        if gpu.compute_capability not in identity.compute_capabilities:
            return SelfCheck(ran_on=None, skip_reason=f"it was built on {gpu.name}, which it does not support")
        self.tree.notify("comparing the engine with ONNX Runtime")
        bundle = Bundle.open(self.job.bundle, self.job.digest)
        record = EngineRecord(
            format_version=ENGINE_FORMAT,
            identity=identity,
            plan=pinned,
            inputs=tuple(spec.tensor for spec in component.inputs),
            outputs=component.outputs,
            build=BuildStats(seconds=0, peak_bytes=0, workspace_bytes=0, built_at="", created_by=""),
            check=SelfCheck(ran_on=None),
        )
        weights_sha256 = bundle.manifest.files[component.weights.file].sha256
        named = NamedWeights(weights, weights_sha256) if identity.weights is None else None
        engine = EngineSession(EngineDevice(library), bytes(plan), record, weights=named)

        def open_reference(name: str, precision: Precision) -> Session:
            return open_session(bundle, name, precision=precision)

        return SelfCheck(ran_on=gpu.name, results=check_engine(engine, identity, bundle, open_reference))


_REQUESTED = re.compile(r"Requested size was (\d+) bytes")


def _describe_workspace(log: str, workspace_bytes: int) -> str | None:
    """Describe the workspace that a layer needs, as the end of a clause; None if the limit was not the cause."""
    if found := _REQUESTED.search(log):
        return f", which needs {int(found[1]):,}" if int(found[1]) > workspace_bytes else None
    return "" if "within workspace limit" in log or "requires workspace memory" in log else None


def _write(path: Path, plan: memoryview) -> FileRecord:
    with translating_os_errors(path.parent.parent), open(path, "wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(sha256=hashlib.sha256(plan).hexdigest(), size=plan.nbytes)


if __name__ == "__main__":
    main()
