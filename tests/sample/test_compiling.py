from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sample.compiling import CompilerError, _Functional, check_gradients


def test_upsampling_by_repetition_is_upsampling() -> None:
    pixels = torch.randn(2, 3, 5, 4, requires_grad=True)
    expected = nn.functional.interpolate(pixels, scale_factor=2.0, mode="nearest")
    repeated = _Functional.interpolate(pixels, scale_factor=2.0, mode="nearest")
    assert torch.equal(repeated, expected)
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad((values * weights).sum(), pixels)[0] for values in (expected, repeated)]
    torch.testing.assert_close(*gradients)
    assert _Functional().silu is nn.functional.silu


def test_a_lost_gradient_is_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def right(x: Tensor) -> Tensor:
        value: Tensor = model(x).square().mean()
        return value

    def wrong(x: Tensor) -> Tensor:
        value: Tensor = model[1](model[0](x).detach()).square().mean()
        return value + 0 * right(x)

    def missing(x: Tensor) -> Tensor:
        value: Tensor = model[1](model[0](x).detach()).square().mean()
        return value

    def broken(x: Tensor) -> Tensor:
        return right(x) * torch.nan

    x = torch.randn(16, 4)
    check_gradients(model, right, right, x)
    for step, difference in ((wrong, r"1\.00"), (missing, r"1\.00"), (broken, "nan")):
        with pytest.raises(CompilerError, match=rf"0\.weight differs by {difference} .*--eager"):
            check_gradients(model, step, right, x)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rounding_of_a_tiny_gradient_is_accepted() -> None:
    """Where sums cancel, most of a gradient in bfloat16 may be rounding."""
    model = nn.Linear(4, 1)

    def right(x: Tensor) -> Tensor:
        value: Tensor = model(x).square().mean() + 1e-3 * model.weight[0, 0]
        return value

    def rounded(x: Tensor, *, part: float) -> Tensor:
        return right(x) + part * model.bias.sum()

    with torch.no_grad():
        model.bias.fill_(1e-3)
        model.weight.fill_(1.0)
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)  # so that the bias has a tiny gradient: 2e-3, where the weight's is 4
    check_gradients(model, partial(rounded, part=2e-3), right, x)
    with pytest.raises(CompilerError, match="bias differs by"):
        check_gradients(model, partial(rounded, part=0.1), right, x)
