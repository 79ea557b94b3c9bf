"""A quantised submodule, from torch to what both backends draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from latentrt.backends.device import Device
from numpy.typing import NDArray

from latentrt import Pipeline
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import difference
from latentrt.bundle.manifest import Component, LatentSpace, PartName
from latentrt.bundle.weights import map_weights
from latentrt.errors import GateError, RequestError
from latentrt.sampling.guidance import guide
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers.euler import Euler
from latentrt.sampling.samplers.steps import Steps
from latentrt_export.component import export_component
from latentrt_export.export import export_checkpoint
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.parts import Run
from latentrt_export.graphs.slices import slice_decoder
from latentrt_export.graphs.slices_maker import SlicesMaker
from latentrt_export.modules.module import Arrays
from latentrt_export.modules.vae import VaeDecoder
from latentrt_export.quantize import int8
from latentrt_export.quantize.denoising import denoised
from latentrt_export.quantize.quantization_options import Quantizing
from tests.export.fake_worker import FakeWorker, install, write_described
from tests.export.graphs.test_passes_quantize import compiled_file
from tests.export.graphs.test_slices_maker import (
    no_edge,
    not_finite,
    other_epsilon,
    other_weight,
    wrong_half_of_the_halo,
)
from tests.exported import Exported, Silent
from tests.tiny import autoencoder, move_off_initial_values

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(folder: Path, phases: list[str]) -> tuple[VaeDecoder, Component]:
    torch.manual_seed(0)
    model = autoencoder()
    move_off_initial_values(model)
    latents = np.random.default_rng(0).normal(size=(3, 4, 16, 16)).astype(np.float32)
    known: dict[str, NDArray[Any]] = {"latents": latents, "denoised": latents}
    decoder = VaeDecoder(model)
    slices = SlicesMaker(inputs=decoder.inputs, folder=folder, prefix="vae_decoder/", phase=phases.append)
    plan = ComponentPlan(name="vae_decoder", role="decoder", module="", weights="vae", sources={"latents": "latents"})
    space = LatentSpace(channels=4, downscale=8, scale=0.18215)
    component, _ = export_component(decoder, plan, folder, "int8", known, space, phases.append, slices, Quantizing())
    return decoder, component


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Component]:
    """The decoder of a tiny autoencoder, exported in int8."""
    folder = tmp_path_factory.mktemp("int8") / "vae_decoder"
    phases: list[str] = []
    _, component = made(folder, phases)
    assert "calibrating, evaluation 3" in phases
    return folder, component


def test_every_layer_has_a_method_and_a_figure(quantised: tuple[Path, Component]) -> None:
    folder, component = quantised
    (graph,) = component.graphs.values()
    record = graph.quantization
    assert record is not None
    assert (record.method, record.weight_bits, record.evaluations) == ("static", 7, 3)
    stored = map_weights(folder / "model.safetensors")
    shares = 0.0
    for name, layer in record.layers.items():
        shares += layer.share
        weight = stored[f"{name}.weight"]
        assert (weight.dtype == np.int8) == (layer.method != "float32"), name
        assert (f"{name}.weight_scale" in stored) == (layer.method != "float32")
        assert (f"{name}.input_scale" in stored) == (layer.method == "static")
        if layer.method == "static":
            assert np.abs(weight.astype(np.int64)).max() <= 63
    assert shares == pytest.approx(1.0)
    assert any(layer.method == "static" for layer in record.layers.values())
    assert any(layer.method != "static" for layer in record.layers.values())
    assert {array.dtype for name, array in stored.items() if name.endswith(".bias")} == {np.dtype(np.float16)}
    assert component.weights.parameters == sum(
        array.size for name, array in stored.items() if name.endswith((".weight", ".bias"))
    )


def test_both_backends_make_what_the_gate_allows(quantised: tuple[Path, Component]) -> None:
    folder, component = quantised
    (graph,) = component.graphs.values()
    assert all(gate.metric == "rms" and gate.value <= gate.bound for gate in graph.gate)
    latents = np.random.default_rng(1).normal(size=(1, 4, 16, 16)).astype(np.float32)
    on_onnxruntime = Graph(folder / "model.onnx").run({"latents": latents})["pixels"]
    on_openvino = compiled_file(folder / "model.onnx", "latents", latents.shape)({"latents": latents})["pixels"]
    # Both within the gate's bound of torch, so within twice that of one another.
    assert difference(on_onnxruntime, on_openvino, "rms") <= 2 * graph.gate[0].bound


# Decoding in slices


def test_each_slice_is_judged_by_itself(quantised: tuple[Path, Component]) -> None:
    folder, component = quantised
    assert {graph.file for part in component.parts.values() for graph in part.graphs.values()} == {
        f"vae_decoder/{name}.onnx" for name in component.parts
    }
    assert {file.stem for file in folder.glob("*.onnx")} == {"model", *component.parts}
    gates = {name: part.graphs["int8"].gate for name, part in component.parts.items()}
    assert {name for name, gate in gates.items() if not gate} == {"attention", "neck"}, "which head's figure is of too"
    for gate in filter(None, gates.values()):
        shapes = [figure.shapes["latents"] for figure in gate if figure.metric == "rms"]
        assert shapes == [(1, 4, 16, 16), (3, 4, 17, 15), (1, 4, 41, 32)]
        assert all(figure.value <= figure.bound for figure in gate)
    last = [figure for figure in gates["slice.10"] if figure.output == "pixels" and figure.metric == "levels"]
    assert [figure.bound for figure in last] == [1, 1, 1], "without rounding they are the whole's"
    assert any(figure.value for gate in gates.values() for figure in gate), "some integers are decided otherwise"


def test_slices_of_int8_are_the_whole_but_for_a_few_roundings(quantised: tuple[Path, Component]) -> None:
    folder, component = quantised
    latents = np.random.default_rng(2).standard_normal((1, 4, 33, 24), np.float32)
    maker = slices_of(folder, component)
    whole = Graph(folder / "model.onnx").run({"latents": latents})["pixels"]
    found = maker.decoder().run({"latents": latents})["pixels"]
    # Random weights; 0.002 was seen. Beside torch the gate allows 0.05.
    assert difference(whole, found, "rms") < 0.01


def test_nothing_stands_between_integers_and_their_convolution(quantised: tuple[Path, Component]) -> None:
    """Or ONNX Runtime would multiply floats."""
    folder, component = quantised
    fused = 0
    for name in component.parts:
        for node in ir.load(folder / f"{name}.onnx").graph:
            sources = [value.producer() for value in node.inputs[:2] if value is not None]
            if node.op_type == "Conv" and sources[1] is not None and sources[1].op_type == "DequantizeLinear":
                fused += 1
                assert sources[0] is not None
                assert sources[0].op_type == "DequantizeLinear"
                rounded = sources[0].inputs[0]
                assert rounded is not None
                before = rounded.producer()
                assert before is not None
                assert before.op_type == "QuantizeLinear"
                assert [use.node.op_type for use in node.outputs[0].uses()] == ["QuantizeLinear"]
    assert fused > 10


def slices_of(folder: Path, component: Component) -> SlicesMaker:
    maker = SlicesMaker(inputs=component.inputs, folder=folder, prefix="vae_decoder/", phase=lambda text: None)
    maker.parts.update(component.parts)
    return maker


@pytest.mark.parametrize("spoil", [other_weight, other_epsilon, no_edge, wrong_half_of_the_halo, not_finite])
def test_a_defect_in_a_slice_of_int8_is_caught(
    quantised: tuple[Path, Component],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[dict[PartName, ir.Model]], None],
) -> None:
    folder, component = quantised

    def spoilt(model: ir.Model) -> dict[PartName, ir.Model]:
        parts = slice_decoder(model)
        spoil(parts)
        return parts

    for file in ("model.onnx", "model.safetensors"):
        shutil.copy(folder / file, tmp_path)
    monkeypatch.setattr("latentrt_export.graphs.slices_maker.slice_decoder", spoilt)
    maker = SlicesMaker(inputs=component.inputs, folder=tmp_path, prefix="vae_decoder/", phase=lambda text: None)
    runs = [Run({"latents": np.random.default_rng(0).standard_normal((1, 4, 9, 8), np.float32)}, {})]
    with pytest.raises(
        GateError,
        match=r"the int8 graph (without its rounding )?and its slices: .* its own .*--no-parts leaves the slices out",
    ):
        maker.make(ir.load(tmp_path / "model.onnx"), component.graphs["int8"], "int8", runs)
    left = {file.stem for file in tmp_path.glob("*.onnx")}
    assert left == {"model", *component.parts}, "nothing that was only needed on the way"


@pytest.fixture(scope="module")
def bundle(sd1: Exported, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A whole checkpoint in int8, calibrated in as few steps as can be; some two minutes."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    quantizing = Quantizing(prompts=("red circle",), steps=2)
    export_checkpoint(
        sd1.checkpoint, folder, precision="int8", quantization=quantizing, deep_cache=0, progress=Silent()
    )
    return Bundle.open(folder)


@pytest.mark.slow
def test_what_is_quantised_and_what_is_not(bundle: Bundle) -> None:
    graphs = {name: {*component.graphs} for name, component in bundle.manifest.components.items()}
    float32, quantised = {"float32"}, {"int8"}
    assert graphs == {
        "text_encoder": float32,
        "vae_encoder": float32,
        "unet": quantised,
        "vae_decoder": quantised,
        "safety_checker": float32,
    }
    assert bundle.manifest.precision == "int8"
    stored = {name: component.weights.dtype for name, component in bundle.manifest.components.items()}
    assert stored == {name: "int8" if "int8" in each else "float16" for name, each in graphs.items()}


@pytest.mark.slow
def test_a_denoisers_parts_are_the_whole_to_the_bit(bundle: Bundle) -> None:
    """As their graphs stand: folded, the last bit of some values is another, and what it decides is rounded to another
    integer."""
    parts = bundle.manifest.components["unet"].parts
    assert {*parts} == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}
    assert {figure.value for part in parts.values() for figure in part.graphs["int8"].gate} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_pictures_of_int8_are_near_those_of_float(bundle: Bundle, sd1: Exported, device: Device) -> None:
    call: dict[str, Any] = {"seed": 7, "num_inference_steps": 3, "safety": "off", "output_type": "latent"}
    exact = Pipeline.load(sd1.bundle, device="cpu")("red circle", **call).images
    found = Pipeline.load(bundle.folder, device=device)("red circle", **call).images
    # The gate allows 0.05 in a prediction, guided ones differ by some times that; a wrong scale would be off by 1.
    assert 0 < difference(exact, found, "rms") < 0.25


@pytest.mark.slow
def test_a_model_that_does_not_bear_it_gets_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is quantised as if nothing hurt; the gate, which looks at the graph itself, does not let it pass."""
    monkeypatch.setattr(int8, "rms_bound", lambda method: 1e9)
    monkeypatch.setattr("latentrt_export.gates.verify._RMS", {"static": 1e-6, "weights": 1e-6})
    with pytest.raises(
        GateError, match=r"the int8 graph's pixels is .* \(rms\).*--quantization weights or --precision"
    ):
        made(tmp_path / "vae_decoder", [])


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.0])
def test_calibrating_runs_are_the_runtimes_own(scale: float) -> None:
    """The loop by hand, for a denoiser that is a formula; at most 1 is no guidance."""
    embeddings = np.random.default_rng(0).normal(size=(3, 77, 8)).astype(np.float32)
    known: dict[str, NDArray[Any]] = {
        "calibration_embeddings": embeddings,
        "noise_schedule": np.array(json.dumps(NOISE)),
    }
    asked: list[float] = []

    def run(feeds: Arrays) -> Arrays:
        asked.append(float(feeds["timestep"][0]))
        means = feeds["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
        return {"noise_pred": feeds["sample"] * np.float32(0.5) + means}

    quantizing = Quantizing(steps=4, guidance_scale=scale)
    found = denoised(run, known, (4, 8, 8), quantizing)
    assert found.shape == (2, 4, 8, 8)
    assert asked == [999.0, 666.0, 333.0, 0.0] * 2, "from end to end of what the model was trained on"
    table = Euler.read({**NOISE, "timestep_spacing": "linspace"}).table(Steps(count=4))
    for seed, prompt in enumerate(embeddings[1:]):
        x = table.init_noise_sigma * Generator(seed).normal((4, 8, 8))[np.newaxis].astype(np.float64)
        for row in range(4):
            both = table.c_in[row] * np.concatenate([x, x])
            halves = np.asarray(run_formula(both, embeddings[0], prompt), np.float32)
            m = guide(halves, scale, 0.0) if scale > 1 else halves[1:]
            y = table.p[row] * x + table.q[row] * m
            x = table.a[row] * x + table.d[row] * m + table.b[row, 0] * (table.u[row] * x + table.w[row] * y)
        # float32 against float64 over four steps.
        np.testing.assert_allclose(found[seed], x[0], rtol=0, atol=1e-5 * np.abs(x).max())


def run_formula(both: NDArray[np.float64], *embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    means = np.array([each.mean(dtype=np.float64) for each in embeddings])
    predicted: NDArray[np.float64] = both * 0.5 + means[:, None, None, None]
    return predicted


def test_calibrating_runs_are_guided_as_the_bundles_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = install(monkeypatch, FakeWorker())
    model = write_described(tmp_path / "model")
    for precision in ("int8", "float16"):
        export_checkpoint(
            model, tmp_path / precision, precision=precision, default_guidance_scale=1.5, progress=Silent()
        )
    assert {job.precision: job.quantization for job in worker.jobs} == {
        "int8": Quantizing(guidance_scale=1.5),
        "float16": None,
    }


def test_options_of_quantisation_are_for_int8(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got options of quantisation with the precision float16"):
        export_checkpoint(
            tmp_path, tmp_path / "bundle", precision="float16", quantization=Quantizing(), progress=Silent()
        )
