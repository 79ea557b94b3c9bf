"""One graph becomes a plan, in a process of its own.

The parent gives a `BuildJob` and reads `Phase` messages, then one `Built`, `OutOfMemory` or `Failed`
(`latentrt.worker_process`). The plan goes into the draft's file, not through the pipe. Run as
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
from latentrt.bundle.weights import map_weights
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import ENGINE_FORMAT, BuildFigures, EngineIdentity, EngineRecord, SelfCheck
from latentrt.errors import BuildError, LatentRTError
from latentrt.worker_process import Failed, peak_bytes, take_job
from latentrt_engines.array_digests import array_digests
from latentrt_engines.cache import in_words
from latentrt_engines.library import Library, load_library
from latentrt_engines.monitor import PhaseTree, make_monitor
from latentrt_engines.network import Log, check_network, make_log, parse_network
from latentrt_engines.self_check import check_engine
from latentrt_engines.timing_cache import use_timing_cache

__all__ = ["BuildJob", "Built", "Message", "OutOfMemory", "Phase"]

NamedArrays = Mapping[str, NDArray[Any]]


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: an engine of a bundle, into the file `draft`.

    `workspace_bytes` is this attempt's; None is the library's own limit.
    """

    bundle: str
    digest: str
    identity: EngineIdentity
    workspace_bytes: int | None
    timing_cache: str | None
    draft: str


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """What the build is at, and how much of it is done, 0 … 1."""

    text: str
    fraction: float


class Built(msgspec.Struct, frozen=True, tag="built", kw_only=True):
    """The plan is in the draft's file."""

    plan: FileRecord
    check: SelfCheck
    arrays: dict[str, str]
    seconds: float
    peak_bytes: int
    workspace_bytes: int


class OutOfMemory(msgspec.Struct, frozen=True, tag="out_of_memory"):
    """There was not enough memory; a smaller workspace than `workspace_bytes` may do."""

    workspace_bytes: int
    said: str


Message = Phase | Built | OutOfMemory | Failed


class _NoMemoryError(Exception):
    pass


def main() -> None:
    """Read the job, do it, report."""
    line, report = take_job()
    job = msgspec.json.decode(line, type=BuildJob)
    builder = _Builder(job, lambda fraction, text: report(Phase(text, fraction)))
    try:
        report(builder.build())
    except (_NoMemoryError, MemoryError) as error:
        report(OutOfMemory(builder.workspace_bytes, str(error)))
    except LatentRTError as error:
        report(Failed.of(error))


class _Builder:
    """One build."""

    def __init__(self, job: BuildJob, report: Any) -> None:
        self.job, self.identity = job, job.identity
        self.tree = PhaseTree(report)
        self.workspace_bytes = job.workspace_bytes or 0
        self.log = Log()
        self.save_times: Callable[[], None] = lambda: None

    def build(self) -> Built:
        began = time.monotonic()
        library = load_library(self.identity.library)
        if isinstance(find_gpu(), Gpu):
            require("run the engine beside its graph")  # said before the work
        component, graph, weights = self._read()
        plan = self._plan(library, component, graph, weights)
        seconds = round(time.monotonic() - began, 3)
        record = _write(Path(self.job.draft), plan)
        return Built(
            plan=record,
            check=self._check(library, component, plan, record, weights),
            arrays=array_digests(weights),
            seconds=seconds,
            peak_bytes=peak_bytes(),
            workspace_bytes=self.workspace_bytes,
        )

    def _check(
        self, library: Library, component: Component, plan: memoryview, pinned: FileRecord, weights: NamedArrays
    ) -> SelfCheck:
        """Run the engine, where there is a GPU that it is for."""
        gpu, identity = find_gpu(), self.identity
        if isinstance(gpu, NoGpu):
            return SelfCheck(ran_on=None, not_run_because="there is no GPU in the machine that built it")
        if gpu.compute_capability not in identity.compute_capabilities:
            return SelfCheck(ran_on=None, not_run_because=f"it was built on {gpu.name}, which is not what it is for")
        self.tree.tell("running the engine beside ONNX Runtime")
        bundle = Bundle.open(self.job.bundle, self.job.digest)
        figures = BuildFigures(seconds=0, peak_bytes=0, workspace_bytes=0, built_at="", created_by="")
        record = EngineRecord(
            format_version=ENGINE_FORMAT,
            identity=identity,
            plan=pinned,
            inputs=tuple(spec.tensor for spec in component.inputs),
            outputs=component.outputs,
            build=figures,
            check=SelfCheck(ran_on=None),
        )
        stored = bundle.manifest.files[component.weights.file].sha256
        given = NamedWeights(weights, stored) if identity.weights is None else None
        engine = EngineSession(EngineDevice(library), bytes(plan), record, weights=given)

        def reference(name: str, precision: Precision) -> Session:
            return open_session(bundle, name, precision=precision)

        return SelfCheck(ran_on=gpu.name, figures=check_engine(engine, identity, bundle, reference))

    def _read(self) -> tuple[Component, bytes, NamedArrays]:
        """The graph and its weights, compared with the hashes that identify the engine."""
        bundle = Bundle.open(self.job.bundle, self.job.digest)
        graph, weights = bundle.component_files(self.identity.component, self.identity.precision)
        component = bundle.manifest.components[self.identity.component]
        return component, bundle.read(graph), map_weights(bundle.path(weights))

    def _plan(self, library: Library, component: Component, graph: bytes, weights: NamedArrays) -> memoryview:
        trt, name = library.module, self.identity.component
        self.log, logger = make_log(library)
        builder = trt.Builder(logger)
        network, parser = parse_network(library, logger, builder, name, graph, weights)
        check_network(library, network, name, component)
        if self.identity.options.refittable or self.identity.options.strip_weights:
            _mark_refittable(library, network, name, weights)
        config = self._config(library, builder)
        config.progress_monitor = make_monitor(library, self.tree)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._failure(library)
        del parser
        self.save_times()
        return memoryview(plan)

    def _config(self, library: Library, builder: Any) -> Any:
        trt, options = library.module, self.identity.options
        config = builder.create_builder_config()
        config.builder_optimization_level = options.optimization_level
        pool = trt.MemoryPoolType.WORKSPACE
        if self.job.workspace_bytes is not None:
            config.set_memory_pool_limit(pool, self.job.workspace_bytes)
        self.workspace_bytes = config.get_memory_pool_limit(pool)
        for flag, wanted in _flags(library, self.identity).items():
            (config.set_flag if wanted else config.clear_flag)(getattr(trt.BuilderFlag, flag))
        if options.hardware_compatibility != "none":
            level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
            config.hardware_compatibility_level = level
        # Memory for activations is then what the shapes at hand need, not the largest.
        if (preview := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None)) is not None:
            config.set_preview_feature(preview, True)
        if not library.needs_gpu:
            _set_capabilities(library, config, self.identity.compute_capabilities)
        if self.job.timing_cache is not None:
            self.save_times = use_timing_cache(config, Path(self.job.timing_cache), self.tree.tell)
        self._add_profile(builder, config)
        return config

    def _add_profile(self, builder: Any, config: Any) -> None:
        profile = builder.create_optimization_profile()
        for name, shapes in self.identity.profile.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{self.identity.component}: the profile is refused: {self.log.text()}")

    def _failure(self, library: Library) -> Exception:
        """Why there is no plan, by what the library logged."""
        said, name = self.log.text(), self.identity.component
        if (needed := _workspace_needed(said, self.workspace_bytes)) is not None:
            return BuildError(
                f"{name}: a workspace of {self.workspace_bytes:,} bytes is too small for a layer{needed}; give more "
                "with --workspace"
            )
        if any(words in said for words in ("OutOfMemory", "out of memory", "bad_alloc")):
            return _NoMemoryError(said)
        last = self.log.errors[-1] if self.log.errors else "it does not say why"
        error = f"{name}: {library} cannot build the engine: {last}"
        return BuildError(error)


def _flags(library: Library, identity: EngineIdentity) -> dict[str, bool]:
    """Builder flags by their names, set or cleared whatever the library's default."""
    options = identity.options
    flags = {"TF32": options.tf32}
    if options.refittable or options.strip_weights:
        flags["REFIT_INDIVIDUAL"] = True
    if options.strip_weights:  # what is marked as refittable is what is left out
        flags["STRIP_PLAN"] = True
    if options.weight_streaming:
        flags["WEIGHT_STREAMING"] = True
    if options.version_compatible:
        # With the lean runtime inside, loading the plan would run code that came with it.
        flags |= {"VERSION_COMPATIBLE": True, "EXCLUDE_LEAN_RUNTIME": True}
    return flags


def _set_capabilities(library: Library, config: Any, capabilities: tuple[str, ...]) -> None:
    known = library.capabilities()
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(known[capability], index):
            raise BuildError(f"{library} does not take compute capability {capability}")


def _mark_refittable(library: Library, network: Any, name: str, weights: NamedArrays) -> None:
    """Each weight by its own name, so that a refit is complete or refused."""
    if strangers := [weight for weight in weights if not network.mark_weights_refittable(weight)]:
        raise BuildError(
            f"{name}: {library} knows no weights called {', '.join(strangers[:3])}"
            f"{' …' if len(strangers) > 3 else ''}, {len(strangers)} of {len(weights)}: they could not be replaced"
        )


_REQUESTED = re.compile(r"Requested size was (\d+) bytes")


def _workspace_needed(said: str, workspace_bytes: int) -> str | None:
    """Words for how much a layer wanted, where the limit that was set is what stopped the build."""
    if found := _REQUESTED.search(said):
        return f", which wants {int(found[1]):,}" if int(found[1]) > workspace_bytes else None
    return "" if "within workspace limit" in said or "requires workspace memory" in said else None


def _write(path: Path, plan: memoryview) -> FileRecord:
    with in_words(path.parent.parent), open(path, "wb") as stream:
        stream.write(plan)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(sha256=hashlib.sha256(plan).hexdigest(), size=plan.nbytes)


if __name__ == "__main__":
    main()
