"""The gate: its measures, its bounds, and the defects that it catches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import difference
from latentrt.bundle.manifest import LatentSpace, Precision
from latentrt.bundle.tensors import sized
from latentrt.errors import GateError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.component import export_component
from latentrt_export.families import PIPELINES, stable_diffusion
from latentrt_export.families.compatibility import read_vae
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.gates.verify import compare, get_tolerance, rms_bound
from latentrt_export.modules.module import ComponentModule, Shapes
from tests.export.graphs.test_trace import Small
from tests.exported import Exported

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
    assert (
        compare("safety_checker", "float32", FEEDS, {"flagged": np.array([True])}, {"flagged": np.array([False])}) == []
    )


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


def test_a_weight_beyond_half_is_caught(tmp_path: Path) -> None:
    module = Normed().eval().requires_grad_(False)
    module.second.weight.data[0, 0] = 1e5
    with pytest.raises(GateError, match="not finite"):
        export_component(module, LAYERS, tmp_path, "float16", STATES, SPACE, lambda text: None)


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
