"""The arithmetic of int8, and how ranges, errors and choices are made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentrt.errors import ExportError, RequestError
from latentrt_export.quantize.calibration import LayerRanges, calibrate
from latentrt_export.quantize.fake_quantization import fake_quantized
from latentrt_export.quantize.quantization import LayerMethod, Range, layers_of, quantized_weight, weight_limit
from latentrt_export.quantize.quantization_options import Quantizing, read_options
from latentrt_export.quantize.sensitivity import choose


def convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]))
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("method", ["static", "weights"])
def test_a_weight_is_within_half_a_step_for_each_output_channel(method: LayerMethod) -> None:
    weight = torch.randn(6, 3, 2, 2) * torch.logspace(-3, 2, 6)[:, None, None, None]
    integers, scale = quantized_weight(convolution(weight, torch.zeros(6)), method, Range(0.0, 1.0))
    assert integers.dtype == torch.int8
    assert scale.shape == (6, 1, 1, 1)
    assert integers.abs().amax(dim=(1, 2, 3)).tolist() == [weight_limit(method)] * 6
    # The last bits of float32 on top of half a step.
    assert ((integers * scale - weight).abs() <= scale * (0.5 + 1e-5)).all()


def test_a_channel_of_zeros_stays_that() -> None:
    integers, scale = quantized_weight(convolution(torch.zeros(2, 3, 1, 1), torch.zeros(2)), "static", Range(0, 1))
    assert not integers.any()
    assert scale.flatten().tolist() == [1.0, 1.0]


def test_a_bias_fits_into_an_int32_of_its_channels_scale() -> None:
    """Weights that are nearly nothing beside an ordinary bias, as half stores them at its smallest."""
    weight, bias = torch.full((2, 3, 1, 1), 6e-8), torch.tensor([1.5, 0.0])
    taken = Range(0.0, 5.0)
    integers, scale = quantized_weight(convolution(weight, bias), "static", taken)
    assert (bias / (taken.scale * scale.flatten())).abs().max() <= 2**30 * 1.001
    assert integers.flatten().tolist() == [1, 1, 1, 63, 63, 63], "of the channel without a bias as ever"
    exact, _ = quantized_weight(convolution(weight, bias), "weights")
    assert exact.abs().min() == 127, "floats are added to what is decompressed"


def test_what_is_too_small_for_a_scale_becomes_nothing() -> None:
    integers, scale = quantized_weight(convolution(torch.full((1, 1, 1, 1), 1e-44), torch.zeros(1)), "static")
    assert scale.item() > 0
    assert not integers.any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_range_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(ExportError, match=f"found a range of values from 0.0 to {wrong}, expected finite numbers"):
        Range(0.0, wrong)


@pytest.mark.parametrize(("low", "high"), [(-0.28, 5.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_range_holds_zero_exactly(low: float, high: float) -> None:
    found = Range(low, high)
    assert found.rounded(torch.zeros(1)).item() == 0.0
    values = torch.linspace(low, high, 100)
    # Half a step, and half a step more at an end, where the zero point was rounded.
    assert (found.rounded(values) - values).abs().max() <= found.scale * 1.001


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


def ranges_of(network: nn.Module, *inputs: Tensor) -> dict[str, LayerRanges]:
    with torch.inference_mode():
        return calibrate(layers_of(network), lambda: [network(x) for x in inputs])


def test_ranges_hold_what_any_evaluation_met() -> None:
    network = Network()
    inputs = [torch.rand(1, 2, 4, 4) * scale for scale in (1.0, 3.0)]
    found = ranges_of(network, *inputs)
    assert found["conv"].input.high == max(x.max().item() for x in inputs)
    assert found["conv"].input.low == 0.0
    # 16 places, 4 outputs of 2 · 9 products; 16 of 3 outputs of 4.
    assert (found["conv"].multiplications, found["fc"].multiplications) == (16 * 4 * 18, 16 * 3 * 4)
    assert not network.conv._forward_hooks


def test_a_layer_that_is_never_reached_has_no_ranges() -> None:
    network = Network()
    network.unused = nn.Linear(2, 2)
    assert sorted(ranges_of(network, torch.rand(1, 2, 4, 4))) == ["conv", "fc"]


def test_what_a_quantised_layer_computes() -> None:
    """Rounded input times rounded weight, and a convolution's output rounded as well; afterwards as before."""
    network, x = Network(), torch.randn(2, 2, 4, 4)
    ranges, layers = ranges_of(network, x), layers_of(network)
    with torch.inference_mode():
        before = network(x)
        integers, scale = quantized_weight(network.conv, "static", ranges["conv"].input)
        rounded = nn.functional.conv2d(ranges["conv"].input.rounded(x), integers * scale, network.conv.bias, padding=1)
        rounded = ranges["conv"].output.rounded(rounded)
        wanted = network.fc(rounded.flatten(2).transpose(1, 2))
        with fake_quantized(layers, ranges, {"conv": "static", "fc": "float32"}):
            assert torch.equal(network(x), wanted)
        assert torch.equal(network(x), before)


def test_weights_alone_leave_inputs_as_they_are() -> None:
    network, x = Network(), torch.randn(2, 2, 4, 4)
    integers, scale = quantized_weight(network.fc, "weights")
    with torch.inference_mode(), fake_quantized(layers_of(network), {}, {"fc": "weights"}):
        features = network.conv(x).flatten(2).transpose(1, 2)
        assert torch.equal(network(x), nn.functional.linear(features, integers * scale, network.fc.bias))


# Choosing: errors of layers add up as squares, as those of a real network nearly do.

COSTS = {"cheap": 10, "hurts": 1000, "harmless": 1000, "middling": 1000}
ERRORS = {"cheap": 0.05, "hurts": 0.2, "harmless": 0.01, "middling": 0.04}
BY_WEIGHTS = {"cheap": 0.001, "hurts": 0.15, "harmless": 0.009, "middling": 0.001}


def simulated(methods: Mapping[str, LayerMethod]) -> float:
    by = {"static": ERRORS, "weights": BY_WEIGHTS, "float32": dict.fromkeys(ERRORS, 0.0)}
    return float(np.sqrt(sum(by[method][name] ** 2 for name, method in methods.items())))


def chosen(bound: float, method: str = "static") -> dict[str, LayerMethod]:
    told: list[str] = []
    found = choose(
        method,  # type: ignore[arg-type]
        COSTS,
        alone=simulated,
        together=simulated,
        bound=bound,
        told=told.append,
    )
    assert told
    assert {name: layer.error for name, layer in found.layers.items()} == pytest.approx(ERRORS)
    assert sum(layer.share for layer in found.layers.values()) == pytest.approx(1.0)
    assert simulated(found.methods) <= bound
    return found.methods


def test_what_costs_nothing_is_kept_and_the_rest_quantised() -> None:
    assert chosen(bound=1.0) == {"cheap": "weights", "hurts": "static", "harmless": "static", "middling": "static"}


def test_what_hurts_most_is_kept_until_the_bound_is_met() -> None:
    # Its weights alone are nearly as harmful, so they are kept too.
    assert chosen(bound=0.1)["hurts"] == "float32"
    assert chosen(bound=0.1)["middling"] == "static"
    assert chosen(bound=0.02)["middling"] == "weights"
    assert chosen(bound=0.02)["harmless"] == "static"


def test_a_bound_that_nothing_meets_keeps_everything() -> None:
    found = choose("static", COSTS, alone=simulated, together=lambda methods: 1.0, bound=0.1, told=lambda text: None)
    assert "static" not in found.methods.values()


def test_where_weights_alone_are_quantised_what_is_kept_is_float() -> None:
    found = choose("weights", COSTS, alone=simulated, together=simulated, bound=0.1, told=lambda text: None)
    assert found.methods["hurts"] == "float32"
    assert set(found.methods.values()) == {"float32", "weights"}


# Options


def test_options_that_are_left_out_are_the_defaults(tmp_path: Path) -> None:
    assert read_options(None, None, None, 7.5) is None
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \n")
    found = read_options("static", prompts, None, 5.0)
    assert found == Quantizing(prompts=("a red circle", "a blue square"), guidance_scale=5.0)
    assert read_options("weights", None, None, 5.0) == Quantizing(method="weights", guidance_scale=5.0)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found --calibration-prompts with --quantization weights, which calibrates"):
        read_options("weights", tmp_path / "prompts.txt", None, 5.0)
    with pytest.raises(RequestError, match="found --calibration-steps with --quantization weights"):
        read_options("weights", None, 4, 5.0)


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [("\n \n", None, "found no prompt in"), (None, None, "cannot be read"), ("a", 0, "found 0 steps to calibrate in")],
)
def test_options_that_are_impossible(tmp_path: Path, text: str | None, steps: int | None, words: str) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=words):
        read_options(None, file, steps, 7.5)
