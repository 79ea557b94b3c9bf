"""Builds of real plans: all components of the tiny bundles and the sample, in both precisions, static and ranged."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import FileRecord, Precision
from latentrt.bundle.sample import bundle_path
from latentrt.engines.record import EngineOptions, LibraryName, SelfCheck
from latentrt.engines.store import WEIGHTS_NAME, StoredEngine
from latentrt.errors import BuildError, EngineError, IntegrityError, MissingExtraError
from latentrt.worker_process import Ending
from latentrt_engines import build as build_module
from latentrt_engines import worker
from latentrt_engines.cache import EngineCache
from latentrt_engines.worker import BuildJob, Built, OutOfMemory
from tests.engines import made_up
from tests.engines.made_up import publish
from tests.engines.real_builds import SIZES, RecordedProgress, build, list_usable_libraries, make_targets
from tests.exported import Exported
from tests.runtime.small_bundle import change_byte

# In CI each precision and each kind of size once.
BUILDS = [
    ("sample", "float32", "static"),
    ("sd2", "float16", "ranged"),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("sample", "float32", "ranged"),
            ("sd2", "float16", "static"),
            *(
                (*bundle, size)
                for bundle in (("sample", "float16"), ("sd1", "float32"), ("sd2", "float32"))
                for size in SIZES
            ),
        )
    ),
]


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path)


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.mark.parametrize("library", list_usable_libraries())
@pytest.mark.parametrize(("name", "precision", "size"), BUILDS)
def test_every_component_is_built(
    request: pytest.FixtureRequest, cache: EngineCache, library: LibraryName, size: str, name: str, precision: Precision
) -> None:
    folder = bundle_path() if name == "sample" else request.getfixturevalue(name).bundle
    bundle, progress = Bundle.open(folder), RecordedProgress()
    engines = build(
        bundle, make_targets(bundle, size=SIZES[size], precision=precision, library=library), cache, progress
    )
    assert [engine.record.identity.component for engine in engines] == list(bundle.manifest.components)
    for engine in engines:
        record = engine.record
        assert cache.plan(engine) == engine.plan_path.read_bytes()
        assert (record.key, record.plan.size) == (engine.key, engine.plan_path.stat().st_size)
        component = bundle.manifest.components[record.identity.component]
        assert record.inputs == tuple(spec.tensor for spec in component.inputs)
        assert record.outputs == component.outputs
        weights = bundle.manifest.files[component.weights.file]
        assert record.identity.weights == weights.sha256
        # A plan with its weights is not smaller than they are; a float32 graph over half weights may keep them half.
        assert record.plan.size > weights.size * 0.9
        assert record.build.seconds > 0
        assert record.build.peak_bytes > record.plan.size
        arrays = msgspec.json.decode((engine.folder / WEIGHTS_NAME).read_bytes(), type=dict[str, str])
        assert len(arrays) == component.weights.tensors
    assert progress.finished == [(component, True) for component in bundle.manifest.components]


def test_an_engine_that_was_not_run(sample: Bundle, cache: EngineCache) -> None:
    (engine,) = build(sample, make_targets(sample, "text_encoder"), cache)
    assert engine.record.check.ran_on is None
    assert "no GPU" in (engine.record.check.skip_reason or "")
    assert engine.record.check.results == ()


def test_an_existing_engine_is_not_built_again_unless_forced(sample: Bundle, cache: EngineCache) -> None:
    targets, progress = make_targets(sample, "text_encoder"), RecordedProgress()
    (first,) = build(sample, targets, cache, progress)
    (again,) = build(sample, targets, cache, progress)
    assert again.record == first.record
    (forced,) = build_module.build_engines(sample, targets, cache, progress, force=True)
    assert forced.record.build != first.record.build
    assert progress.finished == [("text_encoder", True), ("text_encoder", False), ("text_encoder", True)]
    assert [path.name for path in first.folder.glob("*.plan")] == [forced.plan_path.name]


@pytest.fixture
def portable(sample: Bundle, cache: EngineCache) -> StoredEngine:
    """One plan for more GPUs than the tests build for."""
    (target,) = make_targets(sample, "unet")
    return publish(cache, sample, msgspec.structs.replace(target.identity, compute_capabilities=("8.6", "8.9")))


def test_one_plan_for_more_gpus_is_not_built_again(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", None)
    progress = RecordedProgress()
    assert build(sample, make_targets(sample, "unet"), cache, progress) == [portable]
    assert (progress.finished, progress.warnings) == ([("unet", False)], [])
    assert cache.list_keys() == [portable.key]


def test_a_damaged_plan_for_more_gpus_is_quarantined_and_the_engine_built(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_byte(portable.plan_path)
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(make_built()))
    progress = RecordedProgress()
    (engine,) = build(sample, make_targets(sample, "unet"), cache, progress)
    (warning,) = progress.warnings
    assert "quarantined" in warning
    assert engine.record.identity == make_targets(sample, "unet")[0].identity
    assert cache.list_keys() == [engine.key]
    assert [path.name.split(".")[0] for path in (cache.folder / "quarantine").iterdir()] == [portable.key]


def test_force_builds_beside_a_plan_for_more_gpus(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(make_built()))
    (engine,) = build_module.build_engines(sample, make_targets(sample, "unet"), cache, RecordedProgress(), force=True)
    assert sorted(cache.list_keys()) == sorted([engine.key, portable.key])


def test_progress_names_phases_and_never_decreases(sample: Bundle, cache: EngineCache) -> None:
    progress = RecordedProgress()
    build(sample, make_targets(sample, "unet"), cache, progress)
    fractions = [fraction for _, _, fraction in progress.phases]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert "Building engine" in {text for _, text, _ in progress.phases}


def test_options_reach_the_builder(sample: Bundle, cache: EngineCache) -> None:
    options = EngineOptions(optimization_level=1, workspace_bytes=1 << 30, weight_streaming=True, tf32=True)
    (engine,) = build(sample, make_targets(sample, "vae_decoder", options=options), cache)
    assert engine.record.build.workspace_bytes == 1 << 30
    assert engine.record.identity.options == options


def test_a_workspace_that_is_too_small_is_not_out_of_memory(sample: Bundle, cache: EngineCache) -> None:
    progress = RecordedProgress()
    for size in (1 << 10, 1 << 24):  # the second is enough for some layers of 256-pixel images, not for all
        options = EngineOptions(workspace_bytes=size)
        with pytest.raises(BuildError, match=rf"{size:,} bytes is too small .* --workspace"):
            build(sample, make_targets(sample, "vae_decoder", size="64..256", options=options), cache, progress)
    assert progress.warnings == []
    assert list(cache.engines()) == []


def test_a_damaged_bundle_is_found_before_anything_is_parsed(sd1: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sd1.bundle, folder)
    bundle = Bundle.open(folder)
    targets = make_targets(bundle, "text_encoder")
    weights = bundle.manifest.components["text_encoder"].weights.file
    data = bytearray((folder / weights).read_bytes())
    data[-1] ^= 1
    (folder / weights).write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        build(bundle, targets, EngineCache(tmp_path))


def test_the_self_check_needs_onnxruntime_before_the_build(
    sample: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU the engine is compared with ONNX Runtime, which has to be installed."""
    (target,) = make_targets(sample, "text_encoder")
    job = BuildJob(
        bundle=str(sample.folder),
        digest=sample.digest,
        identity=target.identity,
        workspace_bytes=None,
        timing_cache=None,
        draft=str(tmp_path / "draft"),
    )
    monkeypatch.setattr(worker, "find_gpu", lambda: made_up.RTX4090)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime .*\[cpu\]"):
        worker._Builder(job, lambda fraction, text: pytest.fail("the build has started")).build()


def test_a_full_disk_is_an_error_before_the_build(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    monkeypatch.setattr(build_module, "WorkerProcess", None)
    with pytest.raises(EngineError, match=r"unet: .* 7 MB, .* 0 MB free; .*latentrt engines prune"):
        build(sample, make_targets(sample, "unet"), cache)


class Attempts:
    """A stand-in for the worker process: an outcome for each attempt, and a record of the workspaces."""

    def __init__(self, *outcomes: OutOfMemory | Ending | Built) -> None:
        self.outcomes, self.workspaces = list(outcomes), list[int | None]()

    def __call__(self, module: str, job: BuildJob) -> Attempts:
        self.workspaces.append(job.workspace_bytes)
        self.outcome = self.outcomes.pop(0)
        if isinstance(self.outcome, Built):
            Path(job.draft).write_bytes(b"plan")
        return self

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def messages(self) -> list[bytes]:
        return [] if isinstance(self.outcome, Ending) else [msgspec.json.encode(self.outcome)]

    def ending(self) -> Ending:
        assert isinstance(self.outcome, Ending)
        return self.outcome


def make_built() -> Built:
    plan = FileRecord(sha256=hash_bytes(b"plan"), size=4)
    return Built(
        plan=plan, check=SelfCheck(ran_on=None), array_digests={}, seconds=1.0, peak_bytes=1, workspace_bytes=512 << 20
    )


def test_out_of_memory_is_retried_with_a_smaller_workspace_and_a_warning(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(
        OutOfMemory(64 << 30, "OutOfMemory (Requested size was 1 bytes.)"), Ending(-9, ""), make_built()
    )
    monkeypatch.setattr(build_module, "WorkerProcess", attempts)
    progress = RecordedProgress()
    (engine,) = build(sample, make_targets(sample, "unet"), cache, progress)
    assert attempts.workspaces == [None, 2 << 30, 512 << 20]
    first, second = progress.warnings
    assert first.startswith("unet: out of memory")
    assert re.findall(r"([\d,]+) MiB", first) == ["65,536", "2,048"]
    assert re.findall(r"([\d,]+) MiB", second) == ["2,048", "512"]
    assert engine.record.build.workspace_bytes == 512 << 20
    # The requested workspace identifies the engine; the one of the build is a measurement.
    assert engine.record.identity.options.workspace_bytes is None


def test_the_smallest_workspace_fails_too(sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(*(OutOfMemory(size, "std::bad_alloc") for size in (1 << 30, 256 << 20)))
    monkeypatch.setattr(build_module, "WorkerProcess", attempts)
    targets = make_targets(sample, "unet", options=EngineOptions(workspace_bytes=1 << 30))
    with pytest.raises(BuildError, match=r"unet: not enough memory .* 256 MiB \(std::bad_alloc\)"):
        build(sample, targets, cache)
    assert list(cache.engines()) == []


def test_a_crash_of_the_library_is_reported_with_its_last_line(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(Ending(-11, "first\nlast words")))
    with pytest.raises(BuildError, match=r"unet: .*SIGSEGV.*last words"):
        build(sample, make_targets(sample, "unet"), cache)


def test_a_killed_process_with_the_smallest_workspace(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that the kernel kills writes no message."""
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(Ending(-9, "")))
    targets = make_targets(sample, "unet", options=EngineOptions(workspace_bytes=256 << 20))
    with pytest.raises(BuildError, match=r"unet: not enough memory .* 256 MiB \(its process was killed\)"):
        build(sample, targets, cache)
