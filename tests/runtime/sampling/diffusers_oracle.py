"""What diffusers' schedulers do, looked at from outside.

A scheduler is linear in the first latent, in every model output and in every noise draw. Run on basis vectors (the
first latent is e0, the k-th model output e(k+1), each draw the next unit vector after those), it writes out its own
coefficients.

It writes them out with its own rounding errors: it computes in float32, and where the signal is weak its differences of
nearly equal numbers lose up to 3e-4. `exact` removes those and keeps the constants that it rounds to float32 by
intention (betas, cumulative products, sigmas), so that what it prints are the true coefficients.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from latentrt.sampling import row
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Recurrence, Schedule
from tests.runtime.sampling.diffusers_oddities import BrownianPath, descents, run_karras_ve

Vectors = NDArray[Any]

# Modules that `import diffusers` does not name, or names only where an optional package is.
_HOMES = {
    "KarrasVeScheduler": "diffusers.schedulers.deprecated.scheduling_karras_ve",
    "ScoreSdeVpScheduler": "diffusers.schedulers.deprecated.scheduling_sde_vp",
}
# What `set_timesteps` and `step` take of `Steps`.
_OF_GRID = ("timesteps", "sigmas", "mu", "original_inference_steps", "strength", "jump_length", "jump_n_sample")
_OF_STEP = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")


def class_named(class_name: str) -> Any:
    """A class of diffusers, also of those that it only keeps for old checkpoints."""
    return getattr(importlib.import_module(_HOMES.get(class_name, "diffusers")), class_name)


def scheduler(class_name: str, config: Mapping[str, Any], steps: int | Steps, *, exact: bool) -> Any:
    """The diffusers scheduler, ready to step; `exact` as above, otherwise as it is.

    Its index is set: without that it looks the first timestep up, takes the second of two equal ones, and fails in the
    end.
    """
    steps = steps if isinstance(steps, Steps) else Steps(count=steps)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings(), RoundedOnce() if exact else nullcontext():
        # numpy 2 deprecates what torch does in diffusers' np.array(tensor ** 0.5), and diffusers some of its own.
        warnings.simplefilter("ignore")
        made = class_named(class_name).from_config(dict(config))
        derives = exact and class_name in _DERIVES
        with mock.patch.object(torch, "from_numpy", _double) if derives else nullcontext():
            made.set_timesteps(**_grid_arguments(class_name, steps))
            if class_name == "ScoreSdeVeScheduler":
                made.set_sigmas(steps.count)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(steps.begin * getattr(made, "order", 1))
    elif hasattr(made, "_step_index"):
        made._step_index = steps.begin
    if class_name == "RePaintScheduler":
        made.timesteps = descents(made.timesteps)
    if exact:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "sigmas", "discrete_sigmas",
                     "schedule", *(("alphas", "betas") if class_name == "IPNDMScheduler" else ())):  # fmt: skip
            if isinstance(getattr(made, name, None), torch.Tensor):
                setattr(made, name, getattr(made, name).double())
        if class_name == "ScoreSdeVpScheduler":
            made.timesteps = made.timesteps.double()
    return made


# Classes that in `set_timesteps` compute more from the levels that they have rounded.
_DERIVES = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def _grid_arguments(class_name: str, steps: Steps) -> dict[str, Any]:
    given = {name: getattr(steps, name) for name in steps.given() if name in _OF_GRID}
    for name in ("timesteps", "sigmas"):
        if name in given:
            given[name] = np.array(given[name]) if class_name.startswith("UniPC") else list(given[name])
    counted = class_name.startswith("FlowMatch") or not ({"timesteps", "sigmas"} & given.keys())
    return {"num_inference_steps": steps.count if counted else None, **given}


class RoundedOnce(TorchFunctionMode):
    """Square roots, powers, exponentials and the like of float32, computed in float64 and rounded.

    torch takes MKL's, of which some are a unit in the last place off (6 square roots in 1,000), and not the same ones
    on every machine.
    """

    FUNCTIONS = frozenset(
        getattr(owner, name)
        for owner in (torch, torch.Tensor)
        for name in ("sqrt", "pow", "exp", "log", "sin", "sigmoid", "atan2")
    ) | {torch.Tensor.__pow__}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__rpow__ and args[0].dtype == torch.float32:
            return (float(np.float32(args[1])) ** args[0].double()).float()  # torch rounds the base, too
        if func in self.FUNCTIONS and args[0].dtype == torch.float32:
            wide = (each.double() if isinstance(each, torch.Tensor) else each for each in args)
            return func(*wide, **(kwargs or {})).float()
        return func(*args, **(kwargs or {}))


def _double(array: Vectors, original: Any = torch.from_numpy) -> torch.Tensor:
    """What comes from numpy, to go on with in float64."""
    made: torch.Tensor = original(array)
    return made.double() if made.dtype == torch.float32 else made


class _StaysFloat64(TorchFunctionMode):
    """`step` casts float64 latents to float32, meaning to widen half ones; not in here."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args == (args[0], torch.float32) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def told(made: Any, steps: Steps | None = None) -> Any:
    """The timesteps of all rows."""
    begin = 0 if steps is None else steps.begin * getattr(made, "order", 1)
    return made.timesteps[begin:]


def run(
    made: Any,
    latents: Vectors,
    model: Callable[[int, Vectors], Vectors],
    noise: Callable[[], Vectors],
    steps: Steps | None = None,
) -> Iterator[tuple[Vectors, Vectors]]:
    """For each row the denoiser's input and the latents after it; `model` takes the row and the denoiser's input."""
    x = torch.from_numpy(latents)
    given = {} if steps is None else {name: getattr(steps, name) for name in steps.given() if name in _OF_STEP}
    module = sys.modules[type(made).__module__]
    name = type(made).__name__

    def draw() -> torch.Tensor:
        return torch.from_numpy(noise())

    if name == "DPMSolverSDEScheduler":
        made.noise_sampler = BrownianPath(draw)
    if name == "KarrasVeScheduler":
        yield from run_karras_ve(made, x, model, draw)
        return
    for k, t in enumerate(told(made, steps)):
        shown = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        output = torch.from_numpy(model(k, shown.numpy()))
        patched = mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: draw(), create=True)
        with patched, _StaysFloat64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = _step(made, name, output, t, x, given)
        yield shown.numpy(), x.numpy()


def _step(made: Any, name: str, output: Any, t: Any, x: Any, given: dict[str, Any]) -> Any:
    """One step as diffusers' pipelines ask for it."""
    if name == "ScoreSdeVpScheduler":
        return made.step_pred(output, x, t)[0]
    if name == "ScoreSdeVeScheduler":
        return made.step_pred(output, t, x, return_dict=False)[0]
    if name == "RePaintScheduler":
        nothing = torch.zeros_like(x)
        return made.step(output, t, x, nothing, nothing, return_dict=False)[0]
    if name == "UnCLIPScheduler":
        later = made.timesteps[made.timesteps < t]
        following = later[0] if len(later) else None
        return made.step(output, t, x, prev_timestep=following, return_dict=False)[0]
    return made.step(output, t, x, return_dict=False, **given)[0]


def theirs(
    made: Any, steps: Steps | None = None, bases: list[_Basis] | None = None
) -> Iterator[tuple[Vectors, Vectors]]:
    """For each row the coefficients of the denoiser's input and of the latents after it, as diffusers has them."""
    count = len(told(made, steps))
    if type(made).__name__ == "KarrasVeScheduler":
        count = 2 * count - 1
    basis = _Basis(count, _dtype(made))
    if bases is not None:
        bases.append(basis)
    return run(made, basis.latents(), lambda k, _: basis.output(k), basis.draw, steps)


def _dtype(made: Any) -> np.dtype[Any]:
    for name in ("sigmas", "alphas_cumprod", "schedule", "timesteps"):
        found = getattr(made, name, None)
        if isinstance(found, torch.Tensor) and found.dtype in (torch.float32, torch.float64):
            return np.dtype(found.numpy().dtype)
    return np.dtype(np.float32)


class Exactly:
    """A table being run in float64 by the arithmetic of `latentrt.sampling.row`: what its coefficients say, without
    rounding."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._previous, self._history = schedule, None, deque[Any](maxlen=schedule.memory)

    def scale(self, k: int, x: Any) -> Any:
        return row.scaled(self._schedule.c_in[k], x)

    def step(self, k: int, x: Any, m: Any, z: Any = None) -> Any:
        columns = {name: getattr(self._schedule, name)[k] for name in row.COEFFICIENTS}
        self._history.appendleft(row.remembered(columns, x, m))
        after = row.advanced(columns, x, m, self._previous, self._history, z)
        self._previous = x
        return after


def beside(
    schedule: Schedule, made: Any, steps: Steps | None = None, *, exact: bool = False
) -> Iterator[tuple[Vectors, Vectors]]:
    """Pairs of what a table of ours and diffusers give: each row's denoiser input, then the latents after it.

    `exact` runs ours in float64.
    """
    dtype = np.dtype(np.float64 if exact else np.float32)
    basis = _Basis(len(schedule), dtype)
    recurrence: Any = Exactly(schedule) if exact else Recurrence(schedule)
    x, bases = basis.latents(), list[_Basis]()
    for k, (shown, after) in enumerate(theirs(made, steps, bases)):
        yield recurrence.scale(k, x), shown
        z = None
        for _ in range(schedule.noise_draws[k]):
            z = basis.draw()
        x = recurrence.step(k, x, basis.output(k), z)
        yield x, after
    # Also those that go unused, so that seeds agree.
    assert basis.draws == bases[0].draws, f"{basis.draws} draws, diffusers {bases[0].draws}"


class _Basis:
    """Unit vectors [1, 1, 1, 1 + 2·rows]: the first latent, then the model's outputs, then the draws."""

    def __init__(self, rows: int, dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype, self.draws = rows, dtype, 0

    def latents(self) -> Vectors:
        return self._unit(0)

    def output(self, k: int) -> Vectors:
        return self._unit(1 + k)

    def draw(self) -> Vectors:
        self.draws += 1
        return self._unit(self._rows + self.draws)

    def _unit(self, index: int) -> Vectors:
        vector = np.zeros((1, 1, 1, 2 + 2 * self._rows), self._dtype)
        vector[..., index] = 1
        return vector
