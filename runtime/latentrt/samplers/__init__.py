"""Which samplers are there?

To add one: write a module here with a subclass of `Sampler`, name it in `SAMPLERS`, and add a line to the parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from latentrt.errors import RequestError
from latentrt.samplers.ddim import DDIM
from latentrt.samplers.dpmpp_2m import DPMSolverMultistep
from latentrt.samplers.euler import Euler
from latentrt.samplers.euler_a import EulerAncestral
from latentrt.samplers.options import Sampler
from latentrt.samplers.pndm import PNDM
from latentrt.schedule import Schedule

__all__ = ["SAMPLERS", "Sampler", "find", "name_of", "schedule"]

SAMPLERS: Mapping[str, type[Sampler]] = {
    "ddim": DDIM,
    "pndm": PNDM,
    "euler": Euler,
    "euler_a": EulerAncestral,
    "dpmpp_2m": DPMSolverMultistep,
}


def find(name: str) -> type[Sampler]:
    """The sampler of this name: ours (`euler_a`) or that of its diffusers class (`EulerAncestralDiscreteScheduler`).

    Raises:
        RequestError: there is none.
    """
    return SAMPLERS[name_of(name)]


def name_of(name: str) -> str:
    """Our name of a sampler, of whichever name it goes by.

    Raises:
        RequestError: there is no such sampler.
    """
    for known, sampler in SAMPLERS.items():
        if name in (known, sampler.class_name):
            return known
    names = ", ".join(f"{known} ({sampler.class_name})" for known, sampler in SAMPLERS.items())
    raise RequestError(f"found sampler {name!r}, expected one of {names}")


def schedule(
    name: str, config: Mapping[str, Any], num_inference_steps: int, *, karras: bool | None = None, eta: float = 0.0
) -> Schedule:
    """The table of coefficients that diffusers' class would run with this configuration.

    Args:
        name: a sampler, as `find` takes it.
        config: `scheduler_config.json` as it stands on disk. It may be another scheduler's: keys that this one has
            count, keys that are absent are its class's defaults, the rest is ignored.
        num_inference_steps: at least 1.
        karras: whether the noise levels are those of Karras et al. 2022, whatever the configuration says; None leaves
            it to that.
        eta: how much noise DDIM adds, 0 (none) to 1 (as much as DDPM). diffusers ignores it with other samplers; here
            it is refused.

    Raises:
        RequestError: a name, value or combination that cannot be honoured, and what can.
    """
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise RequestError(f"found num_inference_steps {num_inference_steps!r}, expected a whole number of at least 1")
    if not 0 <= eta <= 1:
        raise RequestError(f"found eta {eta}, expected a number from 0 to 1")
    sampler = find(name).read(config)
    if eta and not sampler.takes_eta:
        names = ", ".join(known for known, each in SAMPLERS.items() if each.takes_eta)
        raise RequestError(
            f"found eta {eta:g} with {sampler.class_name}, which takes none; leave it at 0, or use {names}"
        )
    if karras is not None:
        sampler = _with_karras(sampler, karras)
    return sampler.schedule(num_inference_steps, eta)


def _with_karras(sampler: Sampler, karras: bool) -> Sampler:
    if _has_karras(type(sampler)):
        return replace(sampler, use_karras_sigmas=karras)  # type: ignore[call-arg]  # not every sampler has the field
    if not karras:
        return sampler
    names = ", ".join(name for name, known in SAMPLERS.items() if _has_karras(known))
    raise RequestError(
        f"found karras with {sampler.class_name}, which has no such noise levels; those that have: {names}"
    )


def _has_karras(sampler: type[Sampler]) -> bool:
    return any(field.name == "use_karras_sigmas" for field in fields(sampler))
