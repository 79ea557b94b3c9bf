"""What runs a submodule on a CPU, and in what arithmetic."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.cpu_choice import CpuBackend, Preferences, choose_on_cpu
from latentrt.backends.device import choose_sessions
from latentrt.backends.split_denoiser import SplitDenoiser
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Part
from latentrt.decode.slices import SlicedDecoder
from latentrt.errors import BackendError, BundleError, RequestError

UNET, DECODER, CLASSIFIER = "unet", "vae_decoder", "safety_checker"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the backends, in place of opening it."""
    asked: list[Any] = []
    monkeypatch.setattr(ov, "open_session", lambda *given, **how: asked.append(("openvino", given[1:], how)))
    monkeypatch.setattr(ort, "open_session", lambda *given, **how: asked.append(("onnxruntime", given[1:], how)))
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: True)
    return asked


def changed(bundle: Bundle, component: str, *parts: str, precision: str | None = None, int8: bool = False) -> Bundle:
    """A bundle whose component has parts, or whose weights are int8. Its files are those of before."""
    record = bundle.manifest.components[component]
    graphs: Any = {**record.graphs, **({"int8": record.graphs["float32"]} if int8 else {})}
    made: Any = {name: Part(inputs=record.inputs, outputs=record.outputs, graphs=graphs) for name in parts}
    components = {
        **bundle.manifest.components,
        component: msgspec.structs.replace(record, graphs=graphs, parts=made),
    }
    own: Any = precision or bundle.manifest.precision
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components=components, precision=own)
    return bundle


def words(bundle: Bundle, component: str, backend: CpuBackend, precision: Any = None) -> str:
    return choose_on_cpu(bundle, component, backend, Preferences(precision=precision)).title


def test_a_cpu_computes_in_float32_unless_it_is_told_otherwise(bundle: Bundle, opened: list[Any]) -> None:
    assert words(bundle, UNET, "openvino") == "OpenVINO on the CPU in float32"
    assert words(bundle, UNET, "onnxruntime") == "ONNX Runtime on the CPU"
    assert words(bundle, UNET, "openvino", "bfloat16") == "OpenVINO on the CPU in bfloat16"


def test_what_decides_stays_float32(bundle: Bundle, opened: list[Any]) -> None:
    assert words(bundle, CLASSIFIER, "openvino", "bfloat16") == "OpenVINO on the CPU in float32"
    assert words(bundle, "text_encoder", "openvino", "bfloat16") == "OpenVINO on the CPU in bfloat16"


def test_an_int8_bundle_computes_in_int8(bundle: Bundle, opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changed(bundle, UNET, precision="int8", int8=True)
    assert words(bundle, UNET, "openvino") == "OpenVINO on the CPU in int8 and bfloat16"
    assert words(bundle, DECODER, "openvino") == "OpenVINO on the CPU in bfloat16"
    assert words(bundle, CLASSIFIER, "openvino") == "OpenVINO on the CPU in float32"
    assert words(bundle, UNET, "onnxruntime") == "ONNX Runtime on the CPU in int8"
    assert words(bundle, DECODER, "onnxruntime") == "ONNX Runtime on the CPU"
    assert words(bundle, UNET, "openvino", "float32") == "OpenVINO on the CPU in float32"
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: False)
    assert words(bundle, UNET, "openvino") == "OpenVINO on the CPU in int8"


def test_a_precision_that_cannot_be_had_is_refused(bundle: Bundle, opened: list[Any]) -> None:
    with pytest.raises(BackendError, match=r"does not compute in bfloat16 on a CPU, OpenVINO does: --device openvino"):
        words(bundle, UNET, "onnxruntime", "bfloat16")
    with pytest.raises(BackendError, match="the precision int8 for a bundle of float16; export it in int8"):
        words(bundle, UNET, "openvino", "int8")
    for device in ("cuda", "tensorrt"):
        with pytest.raises(RequestError, match=f"the precision bfloat16 with {device}; it is what a CPU computes in"):
            choose_sessions(bundle, device, preferences=Preferences(precision="bfloat16"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_floats_of_an_int8_graph_alone_are_refused(bundle: Bundle, opened: list[Any], precision: Any) -> None:
    changed(bundle, UNET, precision="int8", int8=True)
    record = bundle.manifest.components[UNET]
    alone = msgspec.structs.replace(record, graphs={"int8": record.graphs["int8"]})
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components={**bundle.manifest.components, UNET: alone})
    with pytest.raises(
        BackendError, match=f"the precision {precision} for a bundle of int8, whose unet has no float32"
    ):
        words(bundle, UNET, "openvino", precision)
    with pytest.raises(BundleError, match=r"no float32 graph of unet; .* a bundle of int8 is for CPUs, export another"):
        bundle.component_files(UNET, "float32")


def test_what_is_no_preference_is_refused(bundle: Bundle) -> None:
    wrong: Any = "float8"
    with pytest.raises(RequestError, match="the precision 'float8', expected one of float32, bfloat16, int8"):
        choose_sessions(bundle, preferences=Preferences(precision=wrong))
    with pytest.raises(RequestError, match="hint 'float8', expected one of latency, throughput"):
        choose_sessions(bundle, preferences=Preferences(performance_hint=wrong))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_denoiser_in_parts_is_run_in_parts(bundle: Bundle, opened: list[Any], backend: CpuBackend) -> None:
    changed(bundle, UNET, "time_embedding", "cross_attention_kv", "body")
    session = choose_on_cpu(bundle, UNET, backend, Preferences(threads=1)).open()
    assert isinstance(session, SplitDenoiser)
    assert opened == [], "a part is loaded when it is needed"
    session.part("body")
    assert [(asked[0], asked[1][0], asked[2]["part"], asked[2]["threads"]) for asked in opened] == [
        (backend, UNET, "body", 1)
    ]


def test_parts_of_another_precision_are_not_taken(bundle: Bundle, opened: list[Any]) -> None:
    changed(bundle, UNET, "time_embedding", "cross_attention_kv", "body")
    bundle = changed(bundle, UNET, precision="int8", int8=True)
    choose_on_cpu(bundle, UNET, "onnxruntime", Preferences()).open()
    assert [asked[2]["part"] for asked in opened] == [None]


def test_slices_are_for_low_memory(bundle: Bundle, opened: list[Any]) -> None:
    changed(bundle, DECODER, "head", "slice.0")
    choice = choose_on_cpu(bundle, DECODER, "openvino", Preferences(low_memory=True))
    assert choice.title == "OpenVINO on the CPU in float32, in slices"
    assert isinstance(choice.open(), SlicedDecoder)
    assert opened == [], "a part is loaded when it is needed"
    choice = choose_on_cpu(bundle, DECODER, "openvino", Preferences())
    choice.open()
    assert choice.title == "OpenVINO on the CPU in float32"
    assert opened[0][2]["part"] is None


def test_what_openvino_holds_in_few_bits_is_decoded_whole(bundle: Bundle, opened: list[Any]) -> None:
    changed(bundle, DECODER, "head", "slice.0")
    low = Preferences(low_memory=True, precision="bfloat16")
    assert choose_on_cpu(bundle, DECODER, "openvino", low).title == "OpenVINO on the CPU in bfloat16"
    changed(bundle, DECODER, precision="int8", int8=True)
    changed(bundle, DECODER, "head", "slice.0", precision="int8", int8=True)
    low = Preferences(low_memory=True)
    assert choose_on_cpu(bundle, DECODER, "openvino", low).title == "OpenVINO on the CPU in int8 and bfloat16"
    assert choose_on_cpu(bundle, DECODER, "onnxruntime", low).title == "ONNX Runtime on the CPU in int8, in slices"


def test_without_slices_a_decoder_is_run_whole(bundle: Bundle, opened: list[Any]) -> None:
    choice = choose_on_cpu(bundle, "preview_decoder", "onnxruntime", Preferences(low_memory=True))
    assert choice.title == "ONNX Runtime on the CPU"
    choice.open()
    assert opened[0][2]["part"] is None
