"""How is a training step compiled, and is what the compiler made of it right?

With torch 2.13 on a CPU, the compiled backward of nearest-neighbour upsampling can be zero: everything before the
upsampler then learns nothing, and no error says so. So upsampling is written as a repetition while compiling, and the
compiled gradient is compared with the eager one before it is relied on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.models.upsampling
import torch
from torch import Tensor, nn

__all__ = ["Step", "check_gradients", "compile_step", "run_eagerly"]

Step = Callable[..., Tensor]
# Of the norm: rounding to bfloat16 makes up to 0.3 of a small gradient, one that is lost makes 1.
GRADIENT_DIFFERENCE = 0.5


class _Functional:
    """torch.nn.functional, but for nearest-neighbour upsampling."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)

    @staticmethod
    def interpolate(input: Tensor, scale_factor: float, mode: str) -> Tensor:  # noqa: A002  (torch's name)
        assert (mode, scale_factor) == ("nearest", 2.0)
        batch, channels, height, width = input.shape
        repeated = input[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
        return repeated.reshape(batch, channels, 2 * height, 2 * width)


def run_eagerly(step: Step) -> Step:
    """The step as it is."""
    return step


def compile_step(step: Step) -> Step:
    """The step compiled; needs a C++ compiler on a CPU. diffusers' upsampling is changed for this process."""
    diffusers.models.upsampling.F = _Functional()
    compiled: Step = torch.compile(step)
    return compiled


def check_gradients(model: nn.Module, step: Step, reference: Step, *inputs: Tensor) -> None:
    """Compare each parameter's gradient of a step with the reference's, relative to its norm.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    gradients = [_gradients(model, function, inputs) for function in (reference, step)]
    largest = max(float(value.norm()) for value in gradients[0].values())
    for name, expected in gradients[0].items():
        # A gradient that is next to nothing beside the others is rounding and nothing else.
        difference = float((gradients[1][name] - expected).norm()) / max(float(expected.norm()), 1e-3 * largest)
        if difference > GRADIENT_DIFFERENCE:
            raise RuntimeError(
                f"the compiled gradient of {name} differs by {difference:.2f} of its norm from the eager one, expected "
                f"at most {GRADIENT_DIFFERENCE}; train with --eager"
            )


def _gradients(model: nn.Module, step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    step(*inputs).backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return gradients
