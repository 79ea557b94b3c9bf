"""What diffusers' schedulers do, looked at from outside.

A scheduler is linear in the first latent, in every model output and in every noise draw. Run on basis vectors (the
first latent is e0, the k-th model output e(k+1), each draw the next unit vector after those), it writes out its own
coefficients.

It writes them out with its own rounding errors: it computes in float32, and where the signal is weak its differences of
nearly equal numbers lose up to 3e-4. `exact` removes those and keeps the constants that it rounds to float32 by
intention (betas, cumulative products, sigmas), so that what it prints are the true coefficients.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from latentrt.schedule import Recurrence, Schedule

Vectors = NDArray[Any]


def scheduler(class_name: str, config: Mapping[str, Any], steps: int, *, exact: bool) -> Any:
    """The diffusers scheduler, ready to step; `exact` as above, otherwise as it is.

    Its index is set to 0: without that it looks the first timestep up, takes the second of two equal ones, and fails
    in the end.
    """
    with warnings.catch_warnings(), RoundedOnce() if exact else nullcontext():
        # numpy 2 deprecates what torch does in diffusers' np.array(tensor ** 0.5).
        warnings.simplefilter("ignore", DeprecationWarning)
        made = getattr(diffusers, class_name).from_config(dict(config))
        made.set_timesteps(steps)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    if exact:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if hasattr(made, name):
                setattr(made, name, getattr(made, name).double())
    return made


class RoundedOnce(TorchFunctionMode):
    """Square roots, powers, exponentials and logarithms of float32, computed in float64 and rounded.

    torch takes MKL's, of which some are a unit in the last place off (6 square roots in 1,000), and not the same ones
    on every machine.
    """

    FUNCTIONS = frozenset(
        getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("sqrt", "pow", "exp", "log")
    ) | {torch.Tensor.__pow__}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FUNCTIONS and args[0].dtype == torch.float32:
            return func(args[0].double(), *args[1:], **(kwargs or {})).float()
        return func(*args, **(kwargs or {}))


class _StaysFloat64(TorchFunctionMode):
    """`step` casts float64 latents to float32, meaning to widen half ones; not in here."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args == (args[0], torch.float32) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def run(
    made: Any,
    latents: Vectors,
    model: Callable[[int, Vectors], Vectors],
    noise: Callable[[], Vectors],
    eta: float = 0.0,
) -> Iterator[tuple[Vectors, Vectors]]:
    """For each row the denoiser's input and the latents after it; `model` takes the row and the denoiser's input."""
    x = torch.from_numpy(latents)
    extra = {"eta": eta} if type(made).__name__ == "DDIMScheduler" else {}
    module = sys.modules[type(made).__module__]
    for k, t in enumerate(made.timesteps):
        shown = made.scale_model_input(x, t)
        output = torch.from_numpy(model(k, shown.numpy()))
        draw = mock.patch.object(
            module, "randn_tensor", side_effect=lambda *_, **__: torch.from_numpy(noise()), create=True
        )
        with draw, _StaysFloat64():
            x = made.step(output, t, x, return_dict=False, **extra)[0]
        yield shown.numpy(), x.numpy()


def levels(made: Any) -> Vectors:
    """Noise per signal at every row, float64 of the constants that diffusers rounds to float32."""
    if hasattr(made, "sigmas"):
        return np.asarray(made.sigmas[: len(made.timesteps)], np.float64)
    alpha_bar = np.asarray(made.alphas_cumprod[made.timesteps], np.float64)
    with np.errstate(divide="ignore"):  # zero SNR
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def theirs(made: Any, eta: float = 0.0) -> Iterator[tuple[Vectors, Vectors]]:
    """For each row the coefficients of the denoiser's input and of the latents after it, as diffusers has them."""
    basis = _Basis(len(made.timesteps), made.alphas_cumprod.numpy().dtype)
    return run(made, basis.latents(), lambda k, _: basis.output(k), basis.draw, eta)


def beside(
    schedule: Schedule, made: Any, eta: float = 0.0, *, afresh: bool = False
) -> Iterator[tuple[Vectors, Vectors]]:
    """Pairs of what a table of ours and diffusers give: each row's denoiser input, then the latents after it.

    `afresh` starts each row from diffusers' latents, so that a long table's rounding errors do not add up.
    """
    basis = _Basis(len(schedule), np.dtype(np.float32))
    recurrence, x = Recurrence(schedule), basis.latents()
    for k, (shown, after) in enumerate(theirs(made, eta)):
        yield recurrence.scale(k, x), shown
        x = recurrence.step(k, x, basis.output(k), basis.draw() if schedule.noise_draws[k] else None)
        yield x, after
        if afresh:
            x = after.astype(np.float32)


class _Basis:
    """Unit vectors [1, 1, 1, 1 + 2·rows]: the first latent, then the model's outputs, then the draws."""

    def __init__(self, rows: int, dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype, self._draws = rows, dtype, 0

    def latents(self) -> Vectors:
        return self._unit(0)

    def output(self, k: int) -> Vectors:
        return self._unit(1 + k)

    def draw(self) -> Vectors:
        self._draws += 1
        return self._unit(self._rows + self._draws)

    def _unit(self, index: int) -> Vectors:
        vector = np.zeros((1, 1, 1, 1 + 2 * self._rows), self._dtype)
        vector[..., index] = 1
        return vector
