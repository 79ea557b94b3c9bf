"""The arithmetic of an int8 layer, its calibration and its simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latentrt.errors import ExportError
from latentrt_export.quantize.layers import (
    LayerMethod,
    LayerRanges,
    Range,
    calibrate,
    find_layers,
    quantize_weight,
    simulate_int8,
    weight_limit,
)


def convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]))
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("method", ["static", "weights"])
def test_a_weight_is_within_half_a_step_for_each_output_channel(method: LayerMethod) -> None:
    weight = torch.randn(6, 3, 2, 2) * torch.logspace(-3, 2, 6)[:, None, None, None]
    integers, scale = quantize_weight(convolution(weight, torch.zeros(6)), method, Range(0.0, 1.0))
    assert integers.dtype == torch.int8
    assert scale.shape == (6, 1, 1, 1)
    assert integers.abs().amax(dim=(1, 2, 3)).tolist() == [weight_limit(method)] * 6
    # The last bits of float32 on top of half a step.
    assert ((integers * scale - weight).abs() <= scale * (0.5 + 1e-5)).all()


def test_a_channel_of_zeros() -> None:
    integers, scale = quantize_weight(convolution(torch.zeros(2, 3, 1, 1), torch.zeros(2)), "static", Range(0, 1))
    assert not integers.any()
    assert scale.flatten().tolist() == [1.0, 1.0]


def test_a_bias_fits_into_an_int32_of_its_scale() -> None:
    """Weights as small as half can store, with an ordinary bias."""
    weight, bias = torch.full((2, 3, 1, 1), 6e-8), torch.tensor([1.5, 0.0])
    input_range = Range(0.0, 5.0)
    integers, scale = quantize_weight(convolution(weight, bias), "static", input_range)
    assert (bias / (input_range.scale * scale.flatten())).abs().max() <= 2**30 * 1.001
    assert integers.flatten().tolist() == [1, 1, 1, 63, 63, 63], "the channel without a bias is not affected"
    exact, _ = quantize_weight(convolution(weight, bias), "weights")
    assert exact.abs().min() == 127, "with int8 weights only, the bias is added in float"


def test_weights_too_small_for_a_scale_become_zero() -> None:
    integers, scale = quantize_weight(convolution(torch.full((1, 1, 1, 1), 1e-44), torch.zeros(1)), "static")
    assert scale.item() > 0
    assert not integers.any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_range_must_be_finite(wrong: float) -> None:
    with pytest.raises(ExportError, match=f"from 0.0 to {wrong}, expected finite"):
        Range(0.0, wrong)


@pytest.mark.parametrize(("low", "high"), [(-0.28, 5.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_range_holds_zero_exactly(low: float, high: float) -> None:
    found = Range(low, high)
    assert found.round(torch.zeros(1)).item() == 0.0
    values = torch.linspace(low, high, 100)
    # Half a step, and half a step more at an end, where the zero point was rounded.
    assert (found.round(values) - values).abs().max() <= found.scale * 1.001


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


def measure(network: nn.Module, *inputs: Tensor) -> dict[str, LayerRanges]:
    with torch.inference_mode():
        return calibrate(find_layers(network), lambda: [network(x) for x in inputs])


def test_ranges_cover_every_evaluation() -> None:
    network = Network()
    inputs = [torch.rand(1, 2, 4, 4) * scale for scale in (1.0, 3.0)]
    found = measure(network, *inputs)
    assert found["conv"].input.high == max(x.max().item() for x in inputs)
    assert found["conv"].input.low == 0.0
    # 16 places, 4 outputs of 2 · 9 products; 16 of 3 outputs of 4.
    assert (found["conv"].multiplications, found["fc"].multiplications) == (16 * 4 * 18, 16 * 3 * 4)
    assert not network.conv._forward_hooks


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_value_that_is_not_finite_is_not_lost_among_evaluations(position: int) -> None:
    inputs = [torch.ones(1, 2, 4, 4) for _ in range(3)]
    inputs[position][0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match="expected finite numbers"):
        measure(Network(), *inputs)


def test_an_unused_layer_has_no_ranges() -> None:
    network = Network()
    network.unused = nn.Linear(2, 2)
    assert sorted(measure(network, torch.rand(1, 2, 4, 4))) == ["conv", "fc"]


def test_a_simulated_layer() -> None:
    """Rounds input and weight, and a convolution's output as well; and is unchanged afterwards."""
    network, x = Network(), torch.randn(2, 2, 4, 4)
    ranges, layers = measure(network, x), find_layers(network)
    with torch.inference_mode():
        before = network(x)
        integers, scale = quantize_weight(network.conv, "static", ranges["conv"].input)
        rounded = nn.functional.conv2d(ranges["conv"].input.round(x), integers * scale, network.conv.bias, padding=1)
        rounded = ranges["conv"].output.round(rounded)
        wanted = network.fc(rounded.flatten(2).transpose(1, 2))
        with simulate_int8(layers, ranges, {"conv": "static", "fc": "float32"}):
            assert torch.equal(network(x), wanted)
        assert torch.equal(network(x), before)


def test_int8_weights_alone_leave_inputs_exact() -> None:
    network, x = Network(), torch.randn(2, 2, 4, 4)
    integers, scale = quantize_weight(network.fc, "weights")
    with torch.inference_mode(), simulate_int8(find_layers(network), {}, {"fc": "weights"}):
        features = network.conv(x).flatten(2).transpose(1, 2)
        assert torch.equal(network(x), nn.functional.linear(features, integers * scale, network.fc.bias))
