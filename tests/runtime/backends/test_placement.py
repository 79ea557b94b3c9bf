"""Which backend runs each component without engines, in which arithmetic, and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from latentrt import Pipeline
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends import placement as placement_module
from latentrt.backends.models import Components, Models
from latentrt.backends.placement import (
    MAX_THREADS,
    Backend,
    ComputePrecision,
    Device,
    Placement,
    Preferences,
    place_components,
)
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Part
from latentrt.decode import autoencoder
from latentrt.decode.slices import SlicedDecoder
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.errors import BackendError, BundleError, MissingExtraError, RequestError
from latentrt.sampling.denoiser import SplitDenoiser, WholeDenoiser

UNET, DECODER, CLASSIFIER, TEXT_ENCODER = "unet", "vae_decoder", "safety_checker", "text_encoder"
COMPONENTS = {"preview_decoder", CLASSIFIER, TEXT_ENCODER, UNET, DECODER, "vae_encoder"}
NO_GPU = NoGpu(reason="there is no NVIDIA driver", mend="buy one")
GPU = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_bytes=24 << 30, cuda="13.0")
BACKENDS: dict[Backend, Device] = {"onnxruntime": "cpu", "openvino": "openvino"}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, with bfloat16 arithmetic and OpenVINO, which is not opened."""
    monkeypatch.setattr(placement_module, "find_gpu", lambda: NO_GPU)
    monkeypatch.setattr(ov, "is_installed", lambda: True)
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever the backends are to open: backend, arguments after the bundle, keywords. Nothing is opened."""
    calls: list[Any] = []
    monkeypatch.setattr(ov, "open_session", lambda *given, **how: calls.append(("openvino", given[1:], how)))
    monkeypatch.setattr(ort, "open_session", lambda *given, **how: calls.append(("onnxruntime", given[1:], how)))
    return calls


def change(bundle: Bundle, component: str, *parts: str, precision: str | None = None, int8: bool = False) -> Bundle:
    """Give a component these parts and no others, or an int8 graph. The files stay those of before."""
    record = bundle.manifest.components[component]
    graphs: Any = {**record.graphs, **({"int8": record.graphs["float32"]} if int8 else {})}
    made: Any = {name: Part(inputs=record.inputs, outputs=record.outputs, graphs=graphs) for name in parts}
    components = {**bundle.manifest.components, component: msgspec.structs.replace(record, graphs=graphs, parts=made)}
    own: Any = precision or bundle.manifest.precision
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components=components, precision=own)
    return bundle


def place(
    bundle: Bundle, component: str, backend: Backend, precision: ComputePrecision | None = None, **preferences: Any
) -> Placement:
    wanted = Preferences(precision=precision, **preferences)
    return place_components(bundle, BACKENDS[backend], preferences=wanted)[component]


def arithmetic(
    bundle: Bundle, component: str, opened: list[Any], backend: Backend, precision: ComputePrecision | None = None
) -> tuple[str, str]:
    """Return the graph's precision and the arithmetic of its floats, as the backend is to open it."""
    opened.clear()
    place(bundle, component, backend, precision).open(None)
    ((found, given, how),) = opened
    assert found == backend
    if backend == "openvino":
        return given[1], how["arithmetic"]
    return how["precision"], "float32"


# Devices.


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_gpu_the_cpu_runs_everything_and_says_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(ov, "is_installed", lambda: installed)
    placements = place_components(bundle)
    assert {*placements} == COMPONENTS
    for each in placements.values():
        assert each.backend == ("openvino" if installed else "onnxruntime")
        assert (each.device, each.reason) == ("cpu", NO_GPU.reason)
        assert str(each) == f"{each.title}: {NO_GPU.reason}"
        assert each.summary == f"{each.title} ({NO_GPU.reason})"


def test_the_summary_of_an_ordinary_run_is_what_runs_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason that nobody wants to change would read like a fault."""
    monkeypatch.setattr(placement_module, "find_gpu", lambda: replace(NO_GPU, is_usual=True))
    for each in (*place_components(bundle).values(), *place_components(bundle, "cpu").values()):
        assert each.summary == each.title


@pytest.mark.parametrize(("device", "backend"), [("cpu", "onnxruntime"), ("openvino", "openvino")])
def test_a_cpu_backend_that_is_named_runs_everything(bundle: Bundle, device: Device, backend: Backend) -> None:
    for each in place_components(bundle, device).values():
        assert (each.backend, each.device, each.reason) == (backend, "cpu", "as requested")


def test_a_device_that_is_named_is_used_or_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=f"{NO_GPU.reason}; {NO_GPU.mend}"):
        place_components(bundle, "tensorrt")
    with pytest.raises(BackendError, match=r"`device`: got cuda.*latentrt\[gpu\]"):
        place_components(bundle, "cuda")
    with pytest.raises(RequestError, match=r"`device`.*'tpu'.*auto, cpu, openvino, cuda, tensorrt"):
        place_components(bundle, "tpu")  # type: ignore[arg-type]
    for threads in (0, -1, MAX_THREADS + 1, 10**6, True, 1.5):
        with pytest.raises(RequestError, match=r"`threads`: .*from 1 to"):
            place_components(bundle, "cpu", preferences=Preferences(threads=threads))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"`device` cpu.*`provider`"):
        place_components(bundle, "cpu", provider="cpu")
    monkeypatch.setattr(ov, "is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"latentrt\[openvino\]"):
        place_components(bundle, "openvino")


def test_a_provider_by_name(bundle: Bundle) -> None:
    placements = place_components(bundle, provider="cpu", preferences=Preferences(threads=1))
    assert {(each.backend, each.device) for each in placements.values()} == {("onnxruntime", "cpu")}
    session = placements[DECODER].open(None)
    assert session.inputs == bundle.manifest.components[DECODER].inputs
    with pytest.raises(BackendError, match=r"'npu'.*CPUExecutionProvider"):
        place_components(bundle, provider="npu")


@pytest.mark.parametrize("int8", [True, False])
def test_components_for_the_cpu_run_there_beside_a_gpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    monkeypatch.setattr(placement_module, "find_gpu", lambda: GPU)
    monkeypatch.setattr(ort, "available_providers", lambda: [ort.CUDA])
    if int8:
        bundle.manifest = msgspec.structs.replace(bundle.manifest, precision="int8")
    placements = place_components(bundle, preferences=Preferences(precision=None if int8 else "float32"))
    assert Components(placements).on_cpu
    for each in placements.values():
        assert ("int8" if int8 else "float32 was requested") in each.reason


def test_an_image_records_the_backend_of_its_denoiser() -> None:
    pipeline = Pipeline.load(device="cpu")
    result = pipeline("a red circle", seed=7, num_inference_steps=1)
    assert result.records[0].backend == pipeline.runs_on[UNET].title
    assert pipeline.runs_on[UNET].backend == "onnxruntime"


# Without engines on a GPU.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and an ONNX Runtime that was made with CUDA, whose libraries are missing."""
    monkeypatch.setattr(placement_module, "find_gpu", lambda: GPU)
    monkeypatch.setattr(placement_module, "find_libraries", lambda: {"tensorrt": "no", "tensorrt_rtx": "no"})
    monkeypatch.setattr(ort, "available_providers", lambda: [ort.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "check_provider", lambda provider, given: None)


@pytest.mark.usefixtures("cuda")
def test_onnxruntime_on_the_gpu_comes_before_the_cpu(bundle: Bundle) -> None:
    placements = place_components(bundle)
    assert {(each.backend, each.device) for each in placements.values()} == {("onnxruntime", "gpu")}
    for name, each in placements.items():
        assert name in each.reason
        assert "latentrt build" in each.reason
        assert each.summary == f"ONNX Runtime on the GPU ({each.reason})"
    assert not Components(placements).on_cpu


@pytest.mark.usefixtures("cuda")
def test_the_cpu_steps_in_where_cuda_cannot_be_loaded_and_nowhere_else(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA's libraries are loaded when a graph is opened, and a missing one fails there."""
    models = Models()
    auto, named = (Components(place_components(bundle, device), models=models) for device in ("auto", "cuda"))
    with caplog.at_level(logging.WARNING, "latentrt"):
        session = auto.session(DECODER)
    assert session.inputs == bundle.manifest.components[DECODER].inputs
    assert DECODER in caplog.text
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        named.session(DECODER)  # and not the CPU's session of the other


def test_a_gpu_without_cuda_in_onnxruntime_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, cuda: None) -> None:
    monkeypatch.setattr(ort, "available_providers", lambda: ["CPUExecutionProvider"])
    for each in place_components(bundle).values():
        assert each.device == "cpu"
        assert "latentrt build" in each.reason
        assert "latentrt[gpu]" in each.reason


# Arithmetic.


def test_a_cpu_computes_in_float32_unless_another_precision_is_named(bundle: Bundle, opened: list[Any]) -> None:
    for backend in BACKENDS:
        assert arithmetic(bundle, UNET, opened, backend) == ("float32", "float32")
    assert arithmetic(bundle, UNET, opened, "openvino", "bfloat16") == ("float32", "bfloat16")
    assert place(bundle, UNET, "openvino", "bfloat16").title != place(bundle, UNET, "openvino").title


def test_a_classifier_stays_in_float32(bundle: Bundle, opened: list[Any]) -> None:
    assert arithmetic(bundle, CLASSIFIER, opened, "openvino", "bfloat16") == ("float32", "float32")
    assert arithmetic(bundle, TEXT_ENCODER, opened, "openvino", "bfloat16") == ("float32", "bfloat16")


def test_an_int8_bundle_computes_in_int8(bundle: Bundle, opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    change(bundle, UNET, precision="int8", int8=True)
    assert arithmetic(bundle, UNET, opened, "openvino") == ("int8", "bfloat16")
    assert arithmetic(bundle, DECODER, opened, "openvino") == ("float32", "bfloat16")
    assert arithmetic(bundle, CLASSIFIER, opened, "openvino") == ("float32", "float32")
    assert arithmetic(bundle, UNET, opened, "onnxruntime") == ("int8", "float32")
    assert arithmetic(bundle, DECODER, opened, "onnxruntime") == ("float32", "float32")
    assert arithmetic(bundle, UNET, opened, "openvino", "float32") == ("float32", "float32")
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: False)
    assert arithmetic(bundle, UNET, opened, "openvino") == ("int8", "float32")


def test_the_title_names_the_arithmetic(bundle: Bundle, opened: list[Any]) -> None:
    assert "float32" in place(bundle, UNET, "openvino").title
    assert "bfloat16" in place(bundle, UNET, "openvino", "bfloat16").title
    change(bundle, UNET, precision="int8", int8=True)
    assert "int8 and bfloat16" in place(bundle, UNET, "openvino").title
    assert "int8" in place(bundle, UNET, "onnxruntime").title


def test_a_precision_that_is_not_available_is_refused(
    bundle: Bundle, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r"`precision`.*bfloat16.*`device` openvino"):
        place(bundle, UNET, "onnxruntime", "bfloat16")
    with pytest.raises(BackendError, match=r"`precision`.*int8.*float16.*--precision int8"):
        place(bundle, UNET, "openvino", "int8")
    for device in ("cuda", "tensorrt"):
        with pytest.raises(RequestError, match=f"`precision`: got bfloat16 with {device}"):
            place_components(bundle, device, preferences=Preferences(precision="bfloat16"))
    with pytest.raises(RequestError, match="`precision`: got float32 with npu"):
        place_components(bundle, provider="npu", preferences=Preferences(precision="float32"))
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: False)
    with pytest.raises(BackendError, match="`precision=float32`"):
        place(bundle, UNET, "openvino", "bfloat16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_floats_of_a_component_that_is_int8_alone_are_refused(
    bundle: Bundle, opened: list[Any], precision: ComputePrecision
) -> None:
    change(bundle, UNET, precision="int8", int8=True)
    record = bundle.manifest.components[UNET]
    alone = msgspec.structs.replace(record, graphs={"int8": record.graphs["int8"]})
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components={**bundle.manifest.components, UNET: alone})
    with pytest.raises(BackendError, match=f"`precision`: got {precision}.*{UNET}"):
        place(bundle, UNET, "openvino", precision)
    with pytest.raises(BundleError, match=f"no float32 graph of {UNET}"):
        bundle.component_files(UNET, "float32")


def test_unknown_preferences_are_refused(bundle: Bundle) -> None:
    wrong: Any = "float8"
    with pytest.raises(RequestError, match=r"`precision`.*'float8'.*float32, bfloat16, int8"):
        place_components(bundle, preferences=Preferences(precision=wrong))
    with pytest.raises(RequestError, match=r"`performance_hint`.*'float8'.*latency, throughput"):
        place_components(bundle, preferences=Preferences(performance_hint=wrong))


def test_preferences_reach_the_backend(bundle: Bundle, opened: list[Any]) -> None:
    place(bundle, UNET, "openvino", threads=3, performance_hint="throughput", low_memory=True).open("body")
    place(bundle, UNET, "onnxruntime", threads=3).open("body")
    (_, given, how), (_, other, otherwise) = opened
    assert given == (UNET, "float32")
    assert how == {
        "part": "body",
        "arithmetic": "float32",
        "performance_hint": "throughput",
        "threads": 3,
        "low_memory": True,
    }
    assert (other, otherwise) == ((UNET,), {"part": "body", "threads": 3, "precision": "float32"})


# Parts and slices.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_denoiser_in_parts_is_run_in_parts(bundle: Bundle, opened: list[Any], backend: Backend) -> None:
    placement = place(bundle, UNET, backend)
    assert (placement.split, placement.reuses_features) == (True, True)
    assert placement.first_parts == ("body", "cross_attention_kv", "time_embedding")
    pipeline = Pipeline(bundle, Components({UNET: placement}, models=Models()))
    denoiser = pipeline.family.stages[0].open_denoiser()
    assert isinstance(denoiser, SplitDenoiser)
    assert denoiser.reuses_features
    assert opened == [], "a part is loaded when it is needed"
    # Without a shallow body nothing can be reused.
    change(bundle, UNET, "time_embedding", "cross_attention_kv", "body")
    placement = place(bundle, UNET, backend)
    assert (placement.split, placement.reuses_features) == (True, False)


@pytest.mark.parametrize("parts", [(), ("time_embedding", "body"), ("shallow_body",)])
def test_a_denoiser_without_all_its_parts_is_run_whole(
    bundle: Bundle, opened: list[Any], parts: tuple[str, ...]
) -> None:
    placement = place(change(bundle, UNET, *parts), UNET, "onnxruntime")
    assert (placement.split, placement.reuses_features, placement.first_parts) == (False, False, (None,))


def test_a_denoiser_that_is_not_split_is_one_session(bundle: Bundle) -> None:
    placements = place_components(change(bundle, UNET), "cpu", preferences=Preferences(threads=1))
    own = Components(placements, models=Models())
    denoiser = Pipeline(bundle, own).family.stages[0].open_denoiser()
    assert isinstance(denoiser, WholeDenoiser)
    assert denoiser.session is own.session(UNET)


def test_parts_of_another_precision_are_not_used(bundle: Bundle, opened: list[Any]) -> None:
    record = bundle.manifest.components[UNET]
    change(bundle, UNET, precision="int8", int8=True)
    int8 = msgspec.structs.replace(bundle.manifest.components[UNET], parts=record.parts)  # of float32
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components={**bundle.manifest.components, UNET: int8})
    assert not place(bundle, UNET, "onnxruntime").split
    assert place(bundle, UNET, "onnxruntime", "float32").split


def test_slices_are_for_little_memory(bundle: Bundle, opened: list[Any]) -> None:
    whole, sliced = (place(bundle, DECODER, "openvino", low_memory=low) for low in (False, True))
    assert (whole.sliced, sliced.sliced) == (False, True)
    assert whole.first_parts == (None,)
    assert sliced.first_parts == (), "one part is in memory at a time, so none is prefetched"
    assert "slices" in sliced.title
    own = Components({DECODER: sliced}, models=Models())
    assert isinstance(autoencoder.open_decoder(bundle, own, DECODER), SlicedDecoder)
    assert opened == [], "a part is loaded when it is needed"


def test_a_narrow_decoder_on_openvino_is_run_whole(bundle: Bundle, opened: list[Any]) -> None:
    """It needs no more memory than slices, which hold floats between them."""
    assert not place(bundle, DECODER, "openvino", "bfloat16", low_memory=True).sliced
    change(bundle, DECODER, "head", "slice.0", precision="int8", int8=True)
    change(bundle, DECODER, "head", "slice.0", int8=True)
    assert not place(bundle, DECODER, "openvino", low_memory=True).sliced
    assert place(bundle, DECODER, "onnxruntime", low_memory=True).sliced


def test_a_decoder_without_slices_is_run_whole(bundle: Bundle, opened: list[Any]) -> None:
    assert not place(bundle, "preview_decoder", "onnxruntime", low_memory=True).sliced
    assert not place(change(bundle, DECODER, "head"), DECODER, "onnxruntime", low_memory=True).sliced


# Keys.


def test_placements_of_one_bundle_have_one_key(bundle: Bundle) -> None:
    first, second = (place_components(bundle, "cpu") for _ in range(2))
    assert {name: each.key for name, each in first.items()} == {name: each.key for name, each in second.items()}
    assert len({each.key for each in first.values()}) == len(COMPONENTS)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("onnxruntime", {}),
        ("openvino", {"precision": "bfloat16"}),
        ("openvino", {"threads": 1}),
        ("openvino", {"performance_hint": "throughput"}),
        ("openvino", {"low_memory": True}),
    ],
    ids=str,
)
def test_options_that_change_the_session_change_its_key(
    bundle: Bundle, opened: list[Any], backend: Backend, changes: dict[str, Any]
) -> None:
    assert place(bundle, UNET, backend, **changes).key != place(bundle, UNET, "openvino").key


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_other_files_make_another_key(bundle: Bundle, device: Device) -> None:
    before = place_components(bundle, device)
    name = bundle.manifest.components[UNET].weights.file
    files = {**bundle.manifest.files, name: msgspec.structs.replace(bundle.manifest.files[name], sha256="0" * 64)}
    bundle.manifest = msgspec.structs.replace(bundle.manifest, files=files)
    after = place_components(bundle, device)
    assert {name for name in COMPONENTS if before[name].key != after[name].key} == {UNET}


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**6, 10**30, True, 2.0, "2"])
def test_an_impossible_number_of_threads_is_refused(bundle: Bundle, threads: object) -> None:
    with pytest.raises(RequestError, match="`threads`"):
        place_components(bundle, preferences=Preferences(threads=threads))  # type: ignore[arg-type]
