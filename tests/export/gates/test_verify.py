"""The gate: its measures, its bounds, and the defects that it catches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import difference
from latentrt.bundle.manifest import MAX_BOUNDS, LatentSpace, Precision, QuantizationMethod
from latentrt.bundle.tensors import TensorSpec, sized
from latentrt.errors import GateError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.component import export_component
from latentrt_export.export_warning import ExportWarning
from latentrt_export.families import PIPELINES, stable_diffusion
from latentrt_export.families.compatibility import read_vae
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.gates.verify import compare, get_tolerance, rms_bound
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.modules.module import ComponentModule, Shapes
from latentrt_export.modules.vae import VaeDecoder
from tests.export.graphs.test_trace import Small
from tests.exported import Exported
from tests.tiny import autoencoder

FEEDS = {"x": np.zeros((2, 4), np.float32)}


def check(expected: Any, found: Any, output: str = "y", precision: Precision = "float32") -> float:
    results = compare("unet", precision, FEEDS, {output: np.asarray(expected)}, {output: np.asarray(found)})
    return results[0].value


def test_relative_to_the_largest_value() -> None:
    expected = np.array([100.0, 0.0, 1.0], np.float32)
    assert check(expected, expected + np.array([0, 0.001, 0], np.float32)) == pytest.approx(1e-5, rel=1e-3)


def test_pixels_are_counted_in_levels_and_do_not_wrap() -> None:
    pixels = np.arange(200, dtype=np.uint8)
    assert check(pixels, pixels + (pixels == 7), "pixels") == 1
    with pytest.raises(GateError, match="is 255"):
        check(np.array([0], np.uint8), np.array([255], np.uint8), "pixels")


def test_a_different_rounding_of_pixels_is_caught() -> None:
    """Each value is within a level, but half of them differ."""
    exact = np.linspace(0.0, 255.0, 10_000)
    rounded, cut_off = np.rint(exact).astype(np.uint8), exact.astype(np.uint8)
    assert difference(rounded, cut_off, "levels") == 1
    with pytest.raises(GateError, match=r"pixels differs in 50\.0% .* at most 1%"):
        check(rounded, cut_off, "pixels")
    assert check(rounded, cut_off, "pixels", "float16") == 1, "half rounds on its own"


def test_cosines_are_compared_absolutely() -> None:
    assert check([0.5, 0.001], [0.5, 0.00105], "concept_cosines") == pytest.approx(5e-5)


def test_int8_is_compared_by_the_mean_of_squares() -> None:
    reference, found = np.array([3.0, 4.0, 0.0]), np.array([3.0, 4.0, 0.5])
    assert difference(reference, found, "rms") == pytest.approx(0.1)
    near = {"y": reference + np.array([0.0, 0.0, 0.05])}
    (result,) = compare("unet", "int8", FEEDS, {"y": reference}, near, "weights")
    assert (result.metric, result.bound) == ("rms", rms_bound("weights"))
    assert result.value == pytest.approx(0.01)
    with pytest.raises(GateError, match=r"0.1 \(rms\) .*`method='weights'` or `precision='float16'`"):
        compare("unet", "int8", FEEDS, {"y": reference}, {"y": found}, "static")
    with pytest.raises(GateError, match=r"in int8: `precision='float16'`"):
        compare("unet", "int8", FEEDS, {"y": reference}, {"y": found}, "weights")


def test_the_verdict_is_not_compared() -> None:
    outputs = {"concept_cosines": np.ones(1), "flagged": np.array([True])}
    other = {**outputs, "flagged": np.array([False])}
    (result,) = compare("safety_checker", "float32", FEEDS, outputs, other)
    assert result.output == "concept_cosines"


def test_an_error_names_component_shape_difference_and_bound() -> None:
    with pytest.raises(GateError) as miss:
        check([1.0, 2.0], [1.0, 2.1])
    message = str(miss.value)
    for part in ("unet", "float32", "y", "0.05 (relative)", "{'x': (2, 4)}", "the bound is 0.0001", "No bundle was"):
        assert part in message


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ([1.0], [np.nan], "has values that are not finite"),
        ([1.0], [np.inf], "has values that are not finite"),
        ([np.nan], [np.nan], "torch's has values that are not finite"),
        ([np.inf], [np.inf], "torch's has values that are not finite"),
        ([1.0, 1.0], [[1.0, 1.0]], r"has the shape \(1, 2\), torch's \(2,\)"),
        ([1.0], [], r"has the shape \(0,\), torch's \(1,\)"),
    ],
)
def test_values_that_are_not_finite_never_pass(expected: Any, found: Any, message: str) -> None:
    with pytest.raises(GateError, match=message):
        check(np.array(expected, np.float32), np.array(found, np.float32))


def test_a_missing_output_never_passes() -> None:
    with pytest.raises(GateError, match="y is missing, torch's is not"):
        compare("unet", "float32", FEEDS, {"y": np.ones(2)}, {"x": np.ones(2)})


@pytest.mark.parametrize("expected", [{}, {"flagged": np.array([True])}])
def test_without_a_comparison_nothing_passes(expected: dict[str, Any]) -> None:
    with pytest.raises(GateError, match=r"no output .* can be compared"):
        compare("unet", "float32", FEEDS, expected, expected)


@pytest.mark.parametrize("found", [None, np.array([True, True]), np.array([1])])
def test_a_verdict_of_another_form_never_passes(found: Any) -> None:
    expected = {"concept_cosines": np.ones(1), "flagged": np.array([True])}
    outputs = {name: each for name, each in {**expected, "flagged": found}.items() if each is not None}
    with pytest.raises(GateError, match=r"flagged (is missing|has the (shape|dtype))"):
        compare("safety_checker", "float32", FEEDS, expected, outputs)


def test_a_reference_of_zeros() -> None:
    assert check(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
    with pytest.raises(GateError):
        check(np.zeros(2, np.float32), np.full(2, 1e-6, np.float32))


@pytest.mark.parametrize(
    ("output", "measure"),
    [
        ("hidden_states", "relative"),
        ("noise_pred", "relative"),
        ("pixels", "levels"),
        ("concept_scores", "absolute"),
        ("special_care_cosines", "absolute"),
    ],
)
def test_float16_has_the_wider_bound(output: str, measure: str) -> None:
    in_float32, in_half = get_tolerance(output, "float32"), get_tolerance(output, "float16")
    assert in_float32[0] == in_half[0] == measure
    assert 0 < in_float32[1] < in_half[1]


# Defects of a module that appear after torch has run and before the graph is traced.


class Normed(Small):
    """Two layers and a norm."""

    gate_shapes: ClassVar[tuple[Shapes, ...]] = ({"batch": 1}, {"batch": 5})

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=1e-5)
        self.first.bias.data.zero_()  # so that what the norm sees is not much larger than its epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(self.norm(self.first(x)))
        return made


LAYERS = ComponentPlan(name="layers", role="decoder", module="", weights="", sources={"x": "encoder.states"})
STATES = {"encoder.states": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * np.float32(0.01)}
SPACE = LatentSpace(channels=4, downscale=8, scale=0.18215)


def spoil_weights(module: Normed) -> None:
    module.first.weight.data, module.second.weight.data = module.second.weight.data, module.first.weight.data


def spoil_epsilon(module: Normed) -> None:
    module.norm.eps = 1e-6


def spoil_with_nan(module: Normed) -> None:
    module.second.bias.data[0] = float("nan")


def spoil_order(module: Normed) -> None:
    module.second.weight.data = module.second.weight.data.flip(0)


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_epsilon, spoil_with_nan, spoil_order])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_defect_between_torch_and_the_graph_is_caught(tmp_path: Path, spoil: Any, precision: Precision) -> None:
    torch.manual_seed(0)
    module = Normed().eval().requires_grad_(False)
    with pytest.raises(GateError, match="layers: the float"):
        export_component(module, LAYERS, tmp_path, precision, STATES, SPACE, _spoil_when_tracing(module, spoil))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_without_a_defect_it_passes(tmp_path: Path, precision: Precision) -> None:
    torch.manual_seed(0)
    module = Normed().eval().requires_grad_(False)
    component, _ = export_component(module, LAYERS, tmp_path, precision, STATES, SPACE, lambda text: None)
    results = [result for graph in component.graphs.values() for result in graph.gate]
    assert len(results) == 2 * len(component.graphs)


def _spoil_when_tracing(module: Normed, spoil: Any) -> Any:
    """Spoil the module after torch has run and before it is traced."""
    return lambda text: spoil(module) if text == "tracing" else None


@pytest.mark.parametrize("scale", [1e6, 1e-7])
def test_a_weight_that_half_cannot_hold_stays_float32(tmp_path: Path, scale: float) -> None:
    """Beyond half's largest number, or with three bits left; the norm makes both matter."""
    torch.manual_seed(0)
    module = Normed().eval().requires_grad_(False)
    module.first.weight.data *= scale
    module.norm.eps = (1e-5 * scale) ** 2
    component, _ = export_component(module, LAYERS, tmp_path, "float16", STATES, SPACE, lambda text: None)
    with safe_open(tmp_path / "model.safetensors", framework="np") as stored:
        dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {"renamed.weight"}
    assert any(node.startswith("first/") for node in component.graphs["float16"].float32_nodes)
    assert all(result.value <= result.bound for graph in component.graphs.values() for result in graph.gate)


# Weights and activations that torch itself cannot use


class Pixels(Normed):
    """Layers that end in bytes, which have no NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = (TensorSpec("pixels", "uint8", self.outputs[0].shape),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x).clamp(0, 1) * 255).to(torch.uint8)


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """By finite weights, in a module whose outputs are finite."""
    module = Pixels().eval().requires_grad_(False)
    module.first.weight.data[:] = 3e38
    states = np.full((5, 4), 9, np.float32)
    with pytest.raises(GateError, match="layers: torch's first returns values from"):
        export_component(module, LAYERS, tmp_path, "float32", {"encoder.states": states}, SPACE, lambda text: None)


def return_grey(module: Pixels) -> None:
    module.second.weight.data[:] = 0
    module.second.bias.data[:] = 0.5


def return_one_colour(module: Pixels) -> None:
    module.second.weight.data[:] = 0
    module.second.bias.data[:] = torch.linspace(0.1, 0.9, len(module.second.bias))


def return_one_picture(module: Pixels) -> None:
    module.first.weight.data[:] = 0


@pytest.mark.parametrize("spoil", [return_grey, return_one_colour, return_one_picture])
def test_an_image_that_is_the_same_for_every_input_is_a_warning(tmp_path: Path, spoil: Any) -> None:
    torch.manual_seed(0)
    module = Pixels().eval().requires_grad_(False)
    spoil(module)
    with pytest.warns(ExportWarning, match="layers: its pixels are constant"):
        export_component(module, LAYERS, tmp_path, "float32", STATES, SPACE, lambda text: None)


@pytest.mark.slow
def test_a_decoder_whose_weights_vanish_in_half(tmp_path: Path) -> None:
    """Its first convolution's weights are zero in half, the next one amplifies. On the small latents of its encoder the
    image hardly depends on them; on latents in the range of a run half weights give another image."""
    torch.manual_seed(3)
    vae = autoencoder(levels=2).requires_grad_(False)
    vae.post_quant_conv.weight *= 1e-8
    vae.post_quant_conv.bias.zero_()
    vae.decoder.conv_in.weight *= 60
    vae.decoder.conv_in.bias.zero_()
    vae.decoder.conv_out.weight *= 3
    decoder = VaeDecoder(vae)
    encoded = np.random.default_rng(0).normal(0, 0.04, (1, 4, 32, 40)).astype(np.float32)
    latents = np.random.default_rng(1).normal(0, 2, (1, 4, 12, 16)).astype(np.float32)
    expected = decoder.torch_outputs({"latents": latents})["pixels"].astype(int)
    rounded = copy.deepcopy(decoder).half().float().torch_outputs({"latents": latents})["pixels"]
    assert np.abs(rounded - expected).max() > 50, "what rounding these weights to half does"
    plan = ComponentPlan(name="vae_decoder", role="decoder", module="", weights="", sources={"latents": "latents"})
    space = LatentSpace(channels=4, downscale=2, scale=0.18215)
    component, _ = export_component(decoder, plan, tmp_path, "float16", {"latents": encoded}, space, lambda text: None)
    for record in component.graphs.values():
        found = Graph(tmp_path / Path(record.file).name).run({"latents": latents})["pixels"]
        assert np.abs(found - expected).max() <= get_tolerance("pixels", "float16")[1]
    assert "post_quant_conv/Conv" in component.graphs["float16"].float32_nodes


@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_manifest_may_have_every_bound(precision: Precision) -> None:
    outputs, methods = ("noise_pred", "pixels", "concept_cosines", "concept_scores"), get_args(QuantizationMethod)
    found = (
        [get_tolerance("noise_pred", precision, method) for method in methods]
        if precision == "int8"
        else [get_tolerance(output, precision) for output in outputs]
    )
    assert all(bound <= MAX_BOUNDS[metric] for metric, bound in found)


# What was exported


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_recorded_result_is_within_its_bound(request: pytest.FixtureRequest, family: str) -> None:
    exported: Exported = request.getfixturevalue(family)
    components = Bundle.open(exported.bundle).manifest.components
    checkpoint = open_checkpoint(exported.checkpoint, pipelines=PIPELINES)
    plans = stable_diffusion._list_components(
        checkpoint, ("text-to-image",), read_vae({}, "AutoencoderKL"), distilled=False
    )
    modules = {plan.name: plan.module for plan in plans}
    assert set(components) == set(modules) - ({"preview_decoder"} if family == "sd1" else set())
    for name, component in components.items():
        traced = {spec.name: sized(spec, _module(modules[name]).trace_shapes) for spec in component.inputs}
        for precision, graph in component.graphs.items():
            compared = {result.output for result in graph.gate}
            assert compared == {output.name for output in component.outputs} - {"flagged"}
            for result in graph.gate:
                assert (result.metric, result.bound) == get_tolerance(result.output, precision)
                assert 0 <= result.value <= result.bound
                assert result.shapes.keys() == {spec.name for spec in component.inputs}
            batches = {next(iter(result.shapes.values()))[0] for result in graph.gate}
            shapes = {next(iter(result.shapes.values())) for result in graph.gate}
            assert len(batches) >= 2
            assert len(shapes) >= 3
            assert all(result.shapes != traced for result in graph.gate)


def _module(name: str) -> type[ComponentModule]:
    import importlib

    module, class_name = name.split(":")
    found: type[ComponentModule] = getattr(importlib.import_module(f"latentrt_export.modules.{module}"), class_name)
    return found
