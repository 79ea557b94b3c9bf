"""Compiles a training step, and checks its gradient.

With torch 2.13 on a CPU, the compiled backward of nearest-neighbour upsampling can be zero: everything before the
upsampler then learns nothing, without an error. So upsampling is written as a repetition while compiling, and the
compiled gradient is compared with the eager one before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.models.upsampling
import torch
from torch import Tensor, nn

__all__ = ["CompilerError", "Step", "check_compiler", "check_gradients", "compile_step"]

Step = Callable[..., Tensor]
# Relative to the norm of a parameter's gradient, or to SMALLEST_GRADIENT of the largest norm where that is more. At the
# first step, rounding to bfloat16 made a difference of 0.08; a lost gradient makes 1, and the parameters that lost it
# had gradients of 0.16 of the largest.
GRADIENT_DIFFERENCE = 0.25
SMALLEST_GRADIENT = 0.01


class _Functional:
    """torch.nn.functional with another nearest-neighbour upsampling."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)

    @staticmethod
    def interpolate(input: Tensor, scale_factor: float, mode: str) -> Tensor:  # noqa: A002  (torch's name)
        assert (mode, scale_factor) == ("nearest", 2.0)
        batch, channels, height, width = input.shape
        repeated = input[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
        return repeated.reshape(batch, channels, 2 * height, 2 * width)


class CompilerError(Exception):
    """Nothing can be compiled on this machine, or the compiled result is wrong."""


def check_compiler(device: str) -> None:
    """Compile a small function, to fail before the training.

    Raises:
        CompilerError: compilation failed.
    """

    def double(x: Tensor) -> Tensor:
        return (2 * x).sum()

    try:
        torch.compile(double)(torch.ones(8, device=device, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CompilerError(
            f"torch cannot compile here ({reason}), expected a C++ compiler; train with --eager"
        ) from None


def compile_step(step: Step) -> Step:
    """Compile a training step, and replace diffusers' upsampling in this process. Needs a C++ compiler on a CPU."""
    diffusers.models.upsampling.F = _Functional()
    compiled: Step = torch.compile(step)
    return compiled


def check_gradients(model: nn.Module, step: Step, reference: Step, *inputs: Tensor) -> None:
    """Compare each parameter's gradient of a step with the reference's.

    The difference is relative to the norm, or to a hundredth of the largest norm: a gradient far smaller than the
    others is mostly rounding.

    Raises:
        CompilerError: a gradient is missing, or differs by more than rounding.
    """
    expected, found = (_gradients(model, function, inputs) for function in (reference, step))
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        lost = value - found.get(name, torch.zeros_like(value))
        difference = float(lost.norm()) / max(float(value.norm()), SMALLEST_GRADIENT * largest)
        if not difference <= GRADIENT_DIFFERENCE:  # so that NaN is rejected too
            raise CompilerError(
                f"the compiled gradient of {name} differs by {difference:.2f} of its size from the eager one, expected "
                f"at most {GRADIENT_DIFFERENCE}; train with --eager"
            )


def _gradients(model: nn.Module, step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    step(*inputs).backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return gradients
