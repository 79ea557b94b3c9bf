"""Real plans: every submodule of the tiny bundles and of the sample, in both precisions, static and ranged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import FileRecord, Precision
from latentrt.engines.record import EngineOptions, LibraryName, SelfCheck
from latentrt.engines.store import WEIGHTS_NAME, StoredEngine
from latentrt.errors import BuildError, EngineError, IntegrityError, MissingExtraError
from latentrt.bundle.sample import bundle_path
from latentrt.worker_process import Ending
from latentrt_engines import build as build_module
from latentrt_engines import worker
from latentrt_engines.cache import EngineCache
from latentrt_engines.worker import BuildJob, Built, OutOfMemory
from tests.engines import made_up
from tests.engines.made_up import publish
from tests.engines.real_builds import SIZES, Told, built, usable_libraries, wanted
from tests.exported import Exported
from tests.runtime.small_bundle import change_byte

BUNDLES = [("sd1", "float32"), ("sd2", "float16"), ("sd2", "float32"), ("sample", "float16"), ("sample", "float32")]


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path)


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.mark.parametrize("library", usable_libraries())
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "precision"), BUNDLES)
def test_every_submodule_becomes_a_plan(
    request: pytest.FixtureRequest, cache: EngineCache, library: LibraryName, size: str, name: str, precision: Precision
) -> None:
    folder = bundle_path() if name == "sample" else request.getfixturevalue(name).bundle
    bundle, told = Bundle.open(folder), Told()
    engines = built(bundle, wanted(bundle, size=SIZES[size], precision=precision, library=library), cache, told)
    assert [engine.record.identity.component for engine in engines] == list(bundle.manifest.components)
    for engine in engines:
        record = engine.record
        assert cache.plan(engine) == engine.plan_path.read_bytes()
        assert (record.key, record.plan.size) == (engine.key, engine.plan_path.stat().st_size)
        component = bundle.manifest.components[record.identity.component]
        assert (record.inputs, record.outputs) == (component.inputs, component.outputs)
        weights = bundle.manifest.files[component.weights.file]
        assert record.identity.weights == weights.sha256
        # A plan with its weights is not smaller than they are; a float32 graph over half weights may keep them half.
        assert record.plan.size > weights.size * 0.9
        assert record.build.seconds > 0
        assert record.build.peak_bytes > record.plan.size
        arrays = msgspec.json.decode((engine.folder / WEIGHTS_NAME).read_bytes(), type=dict[str, str])
        assert len(arrays) == component.weights.tensors
    assert told.finished == [(component, True) for component in bundle.manifest.components]


def test_an_engine_that_was_not_run_says_so(sample: Bundle, cache: EngineCache) -> None:
    (engine,) = built(sample, wanted(sample, "text_encoder"), cache)
    assert engine.record.check.ran_on is None
    assert engine.record.check.not_run_because == "there is no GPU in the machine that built it"
    assert engine.record.check.figures == ()


def test_what_is_there_is_not_built_again_unless_forced(sample: Bundle, cache: EngineCache) -> None:
    asked, told = wanted(sample, "text_encoder"), Told()
    (first,) = built(sample, asked, cache, told)
    (again,) = built(sample, asked, cache, told)
    assert again.record == first.record
    (forced,) = build_module.build_engines(sample, asked, cache, told, force=True)
    assert forced.record.build != first.record.build
    assert told.finished == [("text_encoder", True), ("text_encoder", False), ("text_encoder", True)]
    assert [path.name for path in first.folder.glob("*.plan")] == [forced.plan_path.name]


@pytest.fixture
def portable(sample: Bundle, cache: EngineCache) -> StoredEngine:
    """One plan for more GPUs than the tests ask for."""
    (asked,) = wanted(sample, "unet")
    return publish(cache, sample, msgspec.structs.replace(asked.identity, compute_capabilities=("8.6", "8.9")))


def test_one_plan_for_more_gpus_is_not_built_again(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", None)
    told = Told()
    assert built(sample, wanted(sample, "unet"), cache, told) == [portable]
    assert (told.finished, told.warnings) == ([("unet", False)], [])
    assert cache.all_keys() == [portable.key]


def test_a_plan_for_more_gpus_that_is_damaged_is_moved_aside_and_the_engine_built(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_byte(portable.plan_path)
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(made()))
    told = Told()
    (engine,) = built(sample, wanted(sample, "unet"), cache, told)
    assert told.warnings == ["unet: what was there is not what was built; moved aside, and built again"]
    assert engine.record.identity == wanted(sample, "unet")[0].identity
    assert cache.all_keys() == [engine.key]
    assert [path.name.split(".")[0] for path in (cache.folder / "aside").iterdir()] == [portable.key]


def test_force_builds_beside_a_plan_for_more_gpus(
    sample: Bundle, cache: EngineCache, portable: StoredEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(made()))
    (engine,) = build_module.build_engines(sample, wanted(sample, "unet"), cache, Told(), force=True)
    assert sorted(cache.all_keys()) == sorted([engine.key, portable.key])


def test_progress_names_phases_and_does_not_go_back(sample: Bundle, cache: EngineCache) -> None:
    told = Told()
    built(sample, wanted(sample, "unet"), cache, told)
    fractions = [fraction for _, _, fraction in told.phases]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert "Building engine" in {text for _, text, _ in told.phases}


def test_options_reach_the_builder(sample: Bundle, cache: EngineCache) -> None:
    options = EngineOptions(optimization_level=1, workspace_bytes=1 << 30, weight_streaming=True, tf32=True)
    (engine,) = built(sample, wanted(sample, "vae_decoder", options=options), cache)
    assert engine.record.build.workspace_bytes == 1 << 30
    assert engine.record.identity.options == options


def test_a_workspace_that_is_too_small_is_no_want_of_memory(sample: Bundle, cache: EngineCache) -> None:
    told = Told()
    for size in (1 << 10, 1 << 24):  # the second is enough for some layers of pictures of 256 pixels, and not for all
        options = EngineOptions(workspace_bytes=size)
        with pytest.raises(BuildError, match=rf"a workspace of {size:,} bytes is too small .* --workspace"):
            built(sample, wanted(sample, "vae_decoder", size="64..256", options=options), cache, told)
    assert told.warnings == []
    assert list(cache.engines()) == []


def test_a_damaged_bundle_is_found_before_anything_is_parsed(sd1: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sd1.bundle, folder)
    bundle = Bundle.open(folder)
    asked = wanted(bundle, "text_encoder")
    weights = bundle.manifest.components["text_encoder"].weights.file
    data = bytearray((folder / weights).read_bytes())
    data[-1] ^= 1
    (folder / weights).write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        built(bundle, asked, EngineCache(tmp_path))


def test_what_the_check_needs_is_said_before_the_build(
    sample: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU the engine is run beside ONNX Runtime, which has to be there."""
    (asked,) = wanted(sample, "text_encoder")
    job = BuildJob(
        bundle=str(sample.folder),
        digest=sample.digest,
        identity=asked.identity,
        workspace_bytes=None,
        timing_cache=None,
        draft=str(tmp_path / "draft"),
    )
    monkeypatch.setattr(worker, "find_gpu", lambda: made_up.RTX4090)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is needed to run the engine beside its graph .*\[cpu\]"):
        worker._Builder(job, lambda fraction, text: pytest.fail("it has begun")).build()


def test_too_little_room_is_said_before_the_build(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    monkeypatch.setattr(build_module, "WorkerProcess", None)
    with pytest.raises(EngineError, match=r"unet: its engine needs about 7 MB, .* 0 MB left; make room"):
        built(sample, wanted(sample, "unet"), cache)


class Attempts:
    """In place of a build's process: outcomes, one for each attempt, and the workspace that each was given."""

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


def made() -> Built:
    plan = FileRecord(sha256=hash_bytes(b"plan"), size=4)
    return Built(
        plan=plan, check=SelfCheck(ran_on=None), arrays={}, seconds=1.0, peak_bytes=1, workspace_bytes=512 << 20
    )


def test_out_of_memory_is_tried_again_with_less_and_says_so(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(OutOfMemory(64 << 30, "OutOfMemory (Requested size was 1 bytes.)"), Ending(-9, ""), made())
    monkeypatch.setattr(build_module, "WorkerProcess", attempts)
    told = Told()
    (engine,) = built(sample, wanted(sample, "unet"), cache, told)
    assert attempts.workspaces == [None, 2 << 30, 512 << 20]
    assert told.warnings == [
        "unet: out of memory with a workspace of 65,536 MiB, trying again with 2,048 MiB",
        "unet: out of memory with a workspace of 2,048 MiB, trying again with 512 MiB",
    ]
    assert engine.record.build.workspace_bytes == 512 << 20
    # What was asked for identifies the engine; what it got by with is a figure of the build.
    assert engine.record.identity.options.workspace_bytes is None


def test_when_less_does_not_help_either_the_memory_is_too_small(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(*(OutOfMemory(size, "std::bad_alloc") for size in (1 << 30, 256 << 20)))
    monkeypatch.setattr(build_module, "WorkerProcess", attempts)
    asked = wanted(sample, "unet", options=EngineOptions(workspace_bytes=1 << 30))
    with pytest.raises(BuildError, match=r"unet: there is not enough memory .* 256 MiB too \(std::bad_alloc\)"):
        built(sample, asked, cache)
    assert list(cache.engines()) == []


def test_a_crash_of_the_library_is_told_with_its_last_line(
    sample: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "WorkerProcess", Attempts(Ending(-11, "first\nlast words")))
    with pytest.raises(BuildError, match="unet: its process was ended by SIGSEGV and said: last words"):
        built(sample, wanted(sample, "unet"), cache)
