"""diffusers' schedulers as the oracle.

A scheduler is linear in the initial latents, in every model output and in every noise array. Run on basis vectors (the
initial latents are e0, the k-th model output e(k+1), each noise array the next unit vector after those), it returns its
own coefficients.

They include its own rounding errors: it computes in float32, and where the signal is weak its differences of nearly
equal numbers lose up to 3e-4. `exact` removes those errors and keeps the constants that it rounds to float32 on purpose
(betas, cumulative products, sigmas), so the result are the true coefficients.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Recurrence, Schedule

Vectors = NDArray[Any]

# Modules that `import diffusers` does not export.
_HOMES = {
    "KarrasVeScheduler": "diffusers.schedulers.deprecated.scheduling_karras_ve",
    "ScoreSdeVpScheduler": "diffusers.schedulers.deprecated.scheduling_sde_vp",
}
# The attributes of `Steps` that `set_timesteps` and `step` take.
_OF_GRID = ("timesteps", "sigmas", "mu", "original_inference_steps", "strength", "jump_length", "jump_n_sample")
_OF_STEP = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")


def class_named(class_name: str) -> Any:
    """Return a class of diffusers, also a deprecated one."""
    return getattr(importlib.import_module(_HOMES.get(class_name, "diffusers")), class_name)


def scheduler(class_name: str, config: Mapping[str, Any], steps: int | Steps, *, exact: bool) -> Any:
    """Return a diffusers scheduler that is ready to step; `exact` as above, otherwise unchanged.

    Its step index is set: otherwise it looks up the first timestep, takes the second of two equal ones, and fails at
    the end.
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


# Classes whose `set_timesteps` computes with sigmas that it has rounded.
_DERIVES = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def _grid_arguments(class_name: str, steps: Steps) -> dict[str, Any]:
    given = {name: getattr(steps, name) for name in steps.given() if name in _OF_GRID}
    for name in ("timesteps", "sigmas"):
        if name in given:
            given[name] = np.array(given[name]) if class_name.startswith("UniPC") else list(given[name])
    counted = class_name.startswith("FlowMatch") or not ({"timesteps", "sigmas"} & given.keys())
    return {"num_inference_steps": steps.count if counted else None, **given}


class RoundedOnce(TorchFunctionMode):
    """Computes square roots, powers, exponentials etc. of float32 in float64 and rounds once.

    Some of MKL's, which torch uses, are a unit in the last place off (6 square roots in 1,000), and not the same ones
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
    """Replace `torch.from_numpy` and continue in float64."""
    made: torch.Tensor = original(array)
    return made.double() if made.dtype == torch.float32 else made


class _StaysFloat64(TorchFunctionMode):
    """Keeps float64 latents, which `step` casts to float32 (meaning to widen half precision)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args == (args[0], torch.float32) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def timesteps(made: Any, steps: Steps | None = None) -> Any:
    """Return the timesteps of all rows."""
    begin = 0 if steps is None else steps.begin * getattr(made, "order", 1)
    return made.timesteps[begin:]


def run(
    made: Any,
    latents: Vectors,
    model: Callable[[int, Vectors], Vectors],
    noise: Callable[[], Vectors],
    steps: Steps | None = None,
) -> Iterator[tuple[Vectors, Vectors]]:
    """Yield for each row the denoiser's input and the latents after it; `model` takes the row and the input."""
    x = torch.from_numpy(latents)
    given = {} if steps is None else {name: getattr(steps, name) for name in steps.given() if name in _OF_STEP}
    module = sys.modules[type(made).__module__]
    name = type(made).__name__

    def sample_noise() -> torch.Tensor:
        return torch.from_numpy(noise())

    if name == "DPMSolverSDEScheduler":
        made.noise_sampler = BrownianPath(sample_noise)
    if name == "KarrasVeScheduler":
        yield from run_karras_ve(made, x, model, sample_noise)
        return
    for k, t in enumerate(timesteps(made, steps)):
        model_input = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        output = torch.from_numpy(model(k, model_input.numpy()))
        patched = mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: sample_noise(), create=True)
        with patched, _StaysFloat64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = _step(made, name, output, t, x, given)
        yield model_input.numpy(), x.numpy()


def _step(made: Any, name: str, output: Any, t: Any, x: Any, given: dict[str, Any]) -> Any:
    """Run one step as diffusers' pipelines do."""
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


def coefficients(
    made: Any, steps: Steps | None = None, bases: list[_Basis] | None = None
) -> Iterator[tuple[Vectors, Vectors]]:
    """Yield for each row diffusers' coefficients of the denoiser's input and of the latents after it."""
    count = len(timesteps(made, steps))
    if type(made).__name__ == "KarrasVeScheduler":
        count = 2 * count - 1
    basis = _Basis(count, _dtype(made))
    if bases is not None:
        bases.append(basis)
    return run(made, basis.latents(), lambda k, _: basis.output(k), basis.sample_noise, steps)


def _dtype(made: Any) -> np.dtype[Any]:
    for name in ("sigmas", "alphas_cumprod", "schedule", "alphas", "timesteps"):
        found = getattr(made, name, None)
        if isinstance(found, torch.Tensor) and found.dtype in (torch.float32, torch.float64):
            return np.dtype(found.numpy().dtype)
    return np.dtype(np.float32)


def compare(
    schedule: Schedule, made: Any, steps: Steps | None = None, *, exact: bool = False
) -> Iterator[tuple[Vectors, Vectors]]:
    """Yield pairs of coefficients, ours and diffusers': of each row's denoiser input, then of the latents after it.

    Coefficients are those of the initial latents [1], the model outputs [rows] and the noise arrays [rows + 1].
    `exact` runs ours in float64.
    """
    dtype = np.dtype(np.float64 if exact else np.float32)
    basis, recurrence = _Basis(len(schedule), dtype), Recurrence(schedule, dtype)
    x, bases = basis.latents(), list[_Basis]()
    for k, (model_input, after) in enumerate(coefficients(made, steps, bases)):
        yield recurrence.model_input(k, x), model_input
        z = None
        for _ in range(schedule.noise_draws[k]):
            z = basis.sample_noise()
        x = recurrence.step(k, x, basis.output(k), z)
        yield x, after
    # Also unused noise arrays, so that seeds agree.
    assert basis.noise_count == bases[0].noise_count, (
        f"{basis.noise_count} noise arrays, diffusers {bases[0].noise_count}"
    )


class _Basis:
    """Unit vectors [1, 1, 1, 2 + 2·rows]: the initial latents, the model outputs, the noise arrays."""

    def __init__(self, rows: int, dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype, self.noise_count = rows, dtype, 0

    def latents(self) -> Vectors:
        return self._unit(0)

    def output(self, k: int) -> Vectors:
        return self._unit(1 + k)

    def sample_noise(self) -> Vectors:
        self.noise_count += 1
        return self._unit(self._rows + self.noise_count)

    def _unit(self, index: int) -> Vectors:
        vector = np.zeros((1, 1, 1, 2 + 2 * self._rows), self._dtype)
        vector[..., index] = 1
        return vector


def descents(timesteps: torch.Tensor) -> torch.Tensor:
    """Return RePaint's timesteps without the jumps back, at which the model is not evaluated."""
    last = torch.cat([timesteps[:1] + 1, timesteps[:-1]])
    falling: torch.Tensor = timesteps[timesteps < last]
    return falling


def run_karras_ve(
    made: Any, x: Any, model: Callable[[int, Vectors], Vectors], sample_noise: Callable[[], Any]
) -> Iterator[tuple[Vectors, Vectors]]:
    """Run diffusers' pipeline of this scheduler, without the 1/2 that it adds to the model's input."""
    module, last = sys.modules[type(made).__module__], len(made.timesteps) - 1
    k, model_input = 0, np.zeros(0)
    for i, t in enumerate(made.timesteps):
        sigma, following = made.schedule[t], made.schedule[t - 1] if t > 0 else torch.zeros(())
        with mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: sample_noise()):
            sample_hat, sigma_hat = made.add_noise_to_input(x, sigma)
        # The table adds a step's noise with the row before.
        if k:
            yield model_input, sample_hat.numpy()
        model_input = (sample_hat / 2).numpy()
        output = torch.from_numpy(model(k, model_input)) * (sigma_hat / 2)
        stepped, slope = made.step(output, sigma_hat, following, sample_hat, return_dict=False)
        k += 1
        if i == last:
            yield model_input, stepped.numpy()
            return
        yield model_input, stepped.numpy()
        model_input = (stepped / 2).numpy()
        output = torch.from_numpy(model(k, model_input)) * (following / 2)
        x = made.step_correct(output, sigma_hat, following, sample_hat, stepped, slope, return_dict=False)[0]
        k += 1


class BrownianPath:
    """Replaces `BrownianTreeNoiseSampler`: a path of fresh noise, whose increments can be read again."""

    def __init__(self, sample_noise: Callable[[], torch.Tensor]) -> None:
        self._sample_noise = sample_noise
        self._known: list[tuple[float, torch.Tensor]] = []

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = float(sigma), float(sigma_next)
        if not self._known or abs(self._known[0][0] - start) > 1e-9 * start:
            self._known = [(start, torch.zeros(()))]
        at, value = self._known[-1]
        value = value + self._sample_noise() * abs(at - end) ** 0.5
        self._known.append((end, value))
        increment: torch.Tensor = value / abs(start - end) ** 0.5
        return increment


def sigmas(made: Any, rows: int, begin: int = 0) -> Vectors | None:
    """Return σ / α at every row, in float64 of the constants that diffusers rounds to float32; None if unknown."""
    name = type(made).__name__
    if name == "DPMSolverSDEScheduler":
        return None  # the second stages' are computed in `step`
    if name == "KarrasVeScheduler":
        return 2 * np.array(karras_ve_timesteps(made))[:rows]
    if name == "ScoreSdeVeScheduler":
        index = (made.timesteps * (len(made.timesteps) - 1)).long()
        return np.asarray(made.discrete_sigmas.double()[index][begin:], np.float64)
    if name == "ScoreSdeVpScheduler":
        return _sigmas_of_sde_vp(made)[begin:]
    if name == "IPNDMScheduler":
        return np.asarray(made.betas / made.alphas, np.float64)[begin:][:rows]
    if name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        grid = np.asarray(made.sigmas[2 * begin :], np.float64)
        middle = np.asarray(made.sigmas_interpol[2 * begin :], np.float64)
        if name == "KDPM2AncestralDiscreteScheduler":
            middle = np.append(0, middle)
        return np.where(np.arange(rows) % 2, np.resize(middle, rows), grid[:rows])
    if name in ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        first = np.asarray(made.sigmas[2 * begin :][: rows + 1], np.float64)
        grid = np.concatenate([first[:1], np.repeat(first[1::2], 2)])[:rows]
    elif hasattr(made, "sigmas"):
        grid = np.asarray(made.sigmas[begin:][:rows], np.float64)
    else:
        t = made.timesteps[begin:]
        if name == "DDIMInverseScheduler":
            t = torch.clamp(t - made.config.num_train_timesteps // made.num_inference_steps, max=len(made.betas) - 1)
        alpha_bar = np.asarray(made.alphas_cumprod[t.clamp(min=0)], np.float64)
        if name == "DDIMInverseScheduler":
            alpha_bar = np.where(t.numpy() >= 0, alpha_bar, float(made.initial_alpha_cumprod))
        with np.errstate(divide="ignore"):  # zero SNR
            return np.sqrt((1 - alpha_bar) / alpha_bar)
    flow = name.startswith("FlowMatch") or made.config.get("use_flow_sigmas")
    with np.errstate(divide="ignore"):
        return grid / (1 - grid) if flow else grid


def _sigmas_of_sde_vp(made: Any) -> Vectors:
    """Return σ / α of the VP SDE, of the coefficients of its step: −β·dt / σ of ε, and 1 + ½·β·dt of x."""
    zero, one = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 1.0))
    sigma = []
    for t in made.timesteps:
        beta_dt = 2 * (made.step_pred(zero, one, t)[1] - 1)
        sigma.append(float(beta_dt / -made.step_pred(one, zero, t)[1]))
    variance = np.array(sigma) ** 2
    per_signal: Vectors = np.sqrt(variance / (1 - variance))
    return per_signal


def karras_ve_timesteps(made: Any) -> list[float]:
    """Return σ̂ / 2 and σ' / 2 of each step, the timesteps of both stages."""
    t: list[float] = []
    for index in made.timesteps:
        t.append(float(made.add_noise_to_input(torch.zeros(1), made.schedule[index])[1]) / 2)
        if index > 0:
            t.append(float(made.schedule[index - 1]) / 2)
    return t


def add_noise(made: Any, row: int, clean: float, noise: float) -> float | None:
    """Return clean latents with noise added at the level of a row; None where the class cannot."""
    name, order = type(made).__name__, getattr(made, "order", 1)
    if name in ("RePaintScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler") or (order == 2 and row % 2):
        return None  # no run begins at a second stage, and diffusers has no level for it
    if hasattr(made, "set_begin_index"):
        made._step_index = None
        made.set_begin_index(row)
    elif int((made.timesteps == made.timesteps[row]).sum()) > 1:
        return None  # looked up by its timestep, of which there are several
    place = getattr(made, "scale_noise", None) or getattr(made, "add_noise", None)
    if place is None:
        return None
    latents, epsilon = (torch.tensor([[each]], dtype=torch.float64) for each in (clean, noise))
    timestep = made.timesteps[row]
    result = (
        place(latents, timestep[None], epsilon)
        if hasattr(made, "scale_noise")
        else place(latents, epsilon, timestep[None])
    )
    return float(result)
