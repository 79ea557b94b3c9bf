"""Engines that are built for the GPU of this machine and run on it: `make test-gpu`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Pipeline
from latentrt.backends.cuda.device_loop import COLUMNS, Slot, TensorNames, loop_table
from latentrt.backends.onnxruntime import CUDA, available_providers
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.session import EngineSession
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.engines.gpu import Gpu
from latentrt.engines.record import EngineOptions, LibraryName
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents, Recurrence
from latentrt_engines.build import build_engines
from latentrt_engines.cache import EngineCache
from latentrt_engines.library import Library, load_libraries
from latentrt_engines.profiles import image_profile
from latentrt_engines.targets import EngineTarget, list_targets
from tests.engines.real_builds import RecordedProgress
from tests.engines.test_refit import named, retune

pytestmark = pytest.mark.gpu

PROMPTS = ("a large red circle on a blue background", "a white heart above a small red square on a black background")
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, gpu: Gpu) -> Library:
    """Each library that builds for this GPU."""
    found = load_libraries()[request.param]
    """Return each library that builds for this GPU."""
    found = load_libraries()[request.param]
    if not isinstance(found, Library):
        pytest.skip(found)
    if not found.needs_gpu and gpu.compute_capability not in found.capabilities():
        pytest.skip(f"{found} does not build for compute capability {gpu.compute_capability}")
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


def wanted(
    bundle: Bundle, library: Library, gpu: Gpu, *components: str, options: EngineOptions | None = None
) -> list[EngineTarget]:
    return list_targets(
        bundle,
        components or tuple(bundle.manifest.components),
        image_profile(bundle.manifest, size="64..128", batch="1..2"),
        library=library,
        options=options or EngineOptions(),
        capabilities=(gpu.compute_capability,),
        gpu=gpu,
    )


def psnr(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the peak signal-to-noise ratio of two images in 0 … 1, in dB."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def generate(pipeline: Pipeline, width: int = 64) -> tuple[NDArray[np.float32], list[bool]]:
    result = pipeline(PROMPTS, seed=7, width=width, height=64, output_type="np", safety="report")
    return np.asarray(result.images), [verdict.flagged for verdict in result.verdicts or ()]


def test_every_engine_is_checked_and_generates_the_images_of_the_cpu(
    gpu: Gpu, library: Library, cache: EngineCache
) -> None:
    bundle = Bundle.open(bundle_path())
    for engine in build_engines(bundle, wanted(bundle, library, gpu), cache, RecordedProgress()):
        assert engine.record.check.ran_on == gpu.name
        assert engine.record.check.results
    with_engines, on_cpu = Pipeline.load(device="tensorrt"), Pipeline.load(device="cpu")
    for width in (64, 96, 64):  # the range is used, and each shape has a recording of its own
        (found, flagged), (expected, verdicts) = generate(with_engines, width), generate(on_cpu, width)
        assert psnr(found, expected) >= 40  # half's rounding; a wrong step or weight is below 25
        assert flagged == verdicts
    again, _ = generate(with_engines)
    np.testing.assert_array_equal(again, generate(with_engines)[0])


def test_onnxruntime_on_the_gpu_generates_the_images_of_the_cpu(gpu: Gpu) -> None:
    if CUDA not in available_providers():
        pytest.skip("this ONNX Runtime has no CUDA: pip install 'latentrt[gpu]'")
    on_gpu, on_cpu = Pipeline.load(device="cuda"), Pipeline.load(device="cpu")
    for width in (64, 96, 64):
        (found, flagged), (expected, verdicts) = generate(on_gpu, width), generate(on_cpu, width)
        assert psnr(found, expected) >= 40
        assert flagged == verdicts


def test_refitting_there_and_back_gives_the_same_bits(
    gpu: Gpu, library: Library, cache: EngineCache, tmp_path: Path
) -> None:
    base = Bundle.open(bundle_path())
    tuned = retune(Path(shutil.copytree(bundle_path(), tmp_path / "tuned")))
    (engine,) = build_engines(
        base,
        wanted(base, library, gpu, "vae_decoder", options=EngineOptions(refittable=True)),
        cache,
        RecordedProgress(),
    )
    session = EngineSession(EngineDevice(library), cache.plan(engine), engine.record)
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)
    seen = [session.run({"latents": latents})["pixels"].tobytes() for _ in range(3)]
    for bundle in (tuned, base):
        session.refit(named(bundle))
        seen += [session.run({"latents": latents})["pixels"].tobytes() for _ in range(3)]
    assert len(set(seen[:3])) == 1
    assert seen[:3] == seen[6:]
    assert seen[3] != seen[0]


def test_a_stripped_plan_is_smaller_than_the_weights_and_passes_its_check(
    gpu: Gpu, library: Library, cache: EngineCache
) -> None:
    bundle = Bundle.open(bundle_path())
    (engine,) = build_engines(
        bundle,
        wanted(bundle, library, gpu, "unet", options=EngineOptions(strip_weights=True)),
        cache,
        RecordedProgress(),
    )
    weights = bundle.manifest.files[bundle.manifest.components["unet"].weights.file].size
    assert engine.record.plan.size < weights
    assert engine.record.check.ran_on == gpu.name


def test_latents_that_stay_on_the_device_equal_those_of_the_host(
    gpu: Gpu, library: Library, cache: EngineCache
) -> None:
    """A mix of samples, guided and not, in a padded batch; to the bit, as the same engine runs the same batches."""
    bundle = Bundle.open(bundle_path())
    (engine,) = build_engines(bundle, wanted(bundle, library, gpu, "unet"), cache, RecordedProgress())
    session = EngineSession(EngineDevice(library), cache.plan(engine), engine.record)
    rng, shape, batch = np.random.default_rng(0), (4, 16, 24), 4
    embeddings = rng.standard_normal((batch, 77, 128), np.float32)
    embeddings.setflags(write=False)
    places: tuple[tuple[int, ...], ...] = ((0, 2), (3,))
    owners = [0, 0, 0, 1]  # place 1 pads the batch: it repeats the first sample
    schedules = [samplers.schedule(name, {}, Steps(count=6)) for name in ("euler_a", "dpmpp_2m")]
    latents: list[Latents] = [rng.standard_normal(shape, np.float32) for _ in schedules]
    noise = [[rng.standard_normal(shape, np.float32) for _ in schedule.t] for schedule in schedules]

    loop = session.device.loops.take(shape, TensorNames(latents="sample", timesteps="timestep", output="noise_pred"))
    slots: list[Slot] = []
    for schedule, x in zip(schedules, latents, strict=True):
        slots.append(loop.add(x, loop_table({name: getattr(schedule, name) for name in COLUMNS}, 5.0)))
    context = session.device_context(
        {"sample": (batch, *shape), "timestep": (batch,), "encoder_hidden_states": embeddings.shape}
    )
    assert context is not None
    for k in range(6):
        loop.step(
            context,
            dict(zip(slots, places, strict=True)),
            {"encoder_hidden_states": embeddings},
            noise={slot: own[k] for slot, own in zip(slots, noise, strict=True)},
        )
    on_device = [loop.fetch(slot) for slot in slots]

    recurrences = [Recurrence(schedule) for schedule in schedules]
    for k in range(6):
        feeds = {
            "sample": np.stack([np.float32(schedules[owner].c_in[k]) * latents[owner] for owner in owners]),
            "timestep": np.array([schedules[owner].t[k] for owner in owners], np.float32),
            "encoder_hidden_states": embeddings,
        }
        outputs = session.run(feeds)["noise_pred"]
        for index, own in enumerate(places):
            *negative, m = (outputs[place] for place in own)
            m = negative[0] + np.float32(5) * (m - negative[0]) if negative else m
            latents[index] = recurrences[index].step(k, latents[index], m, noise[index][k])
    for (found, nonfinite_row), expected in zip(on_device, latents, strict=True):
        assert nonfinite_row is None
        assert found.tobytes() == expected.tobytes()
