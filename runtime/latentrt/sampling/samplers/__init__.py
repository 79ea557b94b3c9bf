"""The samplers by name.

To add one: write a module here with a subclass of `Sampler`, name it in `_CLASSES`, and add its options to the parity
test (`tests/runtime/sampling/sampler_grid.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.sampling.samplers.aliases import ALIASES, SPACING_SUFFIXES, normalize
from latentrt.sampling.samplers.options import Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = [
    "MAX_NAME_LENGTH",
    "SAMPLERS",
    "Sampler",
    "SamplerChoice",
    "Steps",
    "aliases_of",
    "check_suits",
    "choose",
    "find",
    "name_of",
    "schedule",
    "steps_of_grid",
]

MAX_NAME_LENGTH = 100
"""Longest name of a sampler, in letters."""

# name, which is that of its module → the class in it, and the diffusers class whose configuration it reads.
_CLASSES = {
    "ddim": ("DDIM", "DDIMScheduler"),
    "ddim_inverse": ("DDIMInverse", "DDIMInverseScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler"),
    "pndm": ("PNDM", "PNDMScheduler"),
    "euler": ("Euler", "EulerDiscreteScheduler"),
    "euler_a": ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
    "heun": ("Heun", "HeunDiscreteScheduler"),
    "dpm2": ("KDPM2", "KDPM2DiscreteScheduler"),
    "dpm2_a": ("KDPM2Ancestral", "KDPM2AncestralDiscreteScheduler"),
    "lms": ("LMS", "LMSDiscreteScheduler"),
    "dpmpp_sde": ("DPMSolverSDE", "DPMSolverSDEScheduler"),
    "dpmpp_2m": ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_inverse": ("DPMSolverMultistepInverse", "DPMSolverMultistepInverseScheduler"),
    "dpmpp_2s": ("DPMSolverSinglestep", "DPMSolverSinglestepScheduler"),
    "deis": ("DEIS", "DEISMultistepScheduler"),
    "unipc": ("UniPC", "UniPCMultistepScheduler"),
    "sa_solver": ("SASolver", "SASolverScheduler"),
    "lcm": ("LCM", "LCMScheduler"),
    "tcd": ("TCD", "TCDScheduler"),
    "unclip": ("UnCLIP", "UnCLIPScheduler"),
    "repaint": ("RePaint", "RePaintScheduler"),
    "ipndm": ("IPNDM", "IPNDMScheduler"),
    "consistency": ("Consistency", "CMStochasticIterativeScheduler"),
    "edm_euler": ("EDMEuler", "EDMEulerScheduler"),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistep", "EDMDPMSolverMultistepScheduler"),
    "flow_euler": ("FlowEuler", "FlowMatchEulerDiscreteScheduler"),
    "flow_heun": ("FlowHeun", "FlowMatchHeunDiscreteScheduler"),
    "flow_lcm": ("FlowLCM", "FlowMatchLCMScheduler"),
    "karras_ve": ("KarrasVe", "KarrasVeScheduler"),
    "sde_ve": ("ScoreSdeVe", "ScoreSdeVeScheduler"),
    "sde_vp": ("ScoreSdeVp", "ScoreSdeVpScheduler"),
    "vq_diffusion": ("VQDiffusion", "VQDiffusionScheduler"),
}


class _Samplers(Mapping[str, type[Sampler]]):
    """name → class, whose module is imported on first use."""

    def __getitem__(self, name: str) -> type[Sampler]:
        module = importlib.import_module(f"{__name__}.{name}") if name in _CLASSES else None
        if module is None:
            raise KeyError(name)
        sampler: type[Sampler] = getattr(module, _CLASSES[name][0])
        return sampler

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


SAMPLERS: Mapping[str, type[Sampler]] = _Samplers()


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler, and the options that the name it was chosen by implies."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> type[Sampler]:
        """The class of the sampler."""
        return SAMPLERS[self.name]


def choose(name: str) -> SamplerChoice:
    """Return the sampler of a name: ours (`euler_a`), its diffusers class (`EulerAncestralDiscreteScheduler`), or that
    of another tool (`Euler a`, `dpmpp_2m_karras`, `DPM++ 2M SDE Karras`).

    Raises:
        RequestError: no sampler has that name.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise RequestError(
            f"got a `sampler` of {len(name):,} letters, expected at most {MAX_NAME_LENGTH}; see latentrt samplers"
        )
    plain = normalize(name).removeprefix("sample_").removesuffix("scheduler")
    for known, (_, class_name) in _CLASSES.items():
        if plain in (known, normalize(class_name).removesuffix("scheduler")):
            return SamplerChoice(known)
    if plain in ALIASES:
        return SamplerChoice(*ALIASES[plain])
    for suffix, spacing in SPACING_SUFFIXES.items():
        if plain.endswith(suffix) and plain != suffix:
            stem = plain.removesuffix(suffix)
            if any(stem.endswith(each) for each in SPACING_SUFFIXES):
                raise RequestError(
                    f"`sampler`: got {quote(name)}, which names two spacings of the sigmas; remove one suffix"
                )
            choice = choose(stem)
            return replace(choice, options={**choice.options, **_spacing_options(choice.sampler, spacing)})
    import difflib  # only on errors

    near = difflib.get_close_matches(plain, [*_CLASSES, *ALIASES], n=2)
    suggestion = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise RequestError(
        f"`sampler`: got {quote(name)}, which is unknown{suggestion}; expected one of {', '.join(_CLASSES)}, or an "
        "alias (see latentrt samplers)"
    )


def find(name: str) -> type[Sampler]:
    """Return the class of a sampler, by any of its names.

    Raises:
        RequestError: no sampler has that name.
    """
    return choose(name).sampler


def name_of(name: str) -> str:
    """Return our name of a sampler, by any of its names.

    Raises:
        RequestError: no sampler has that name.
    """
    return choose(name).name


def aliases_of(name: str) -> list[str]:
    """Return the other names of a sampler, except those that only add a suffix for the spacing of the sigmas."""
    return [alias for alias, (known, _) in ALIASES.items() if known == name]


def check_suits(name: str, model: str) -> None:
    """Check that the pipeline can run a sampler with a model.

    Args:
        name: the sampler, by any of its names.
        model: the diffusers class of the model's own scheduler.

    Raises:
        RequestError: the sampler runs from an image to noise, is more than a table, or is for another kind of model.
    """
    sampler = find(name)
    if sampler.inverse:
        raise RequestError(
            f"got `sampler` {name_of(name)}, which runs from an image to noise; choose another to generate images"
        )
    if sampler.unsupported_reason:
        raise RequestError(
            f"got `sampler` {name_of(name)}, which the pipeline does not run: {sampler.unsupported_reason}"
        )
    own = find(model) if any(model == class_name for _, class_name in _CLASSES.values()) else None
    if own is not None and own.kind != sampler.kind:
        raise RequestError(
            f"got `sampler` {name_of(name)} for {sampler.kind} models, but this is a {own.kind} model ({model}); see "
            "latentrt samplers"
        )


def schedule(
    name: str,
    config: Mapping[str, Any],
    steps: int | Steps,
    *,
    karras: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """Return the table of coefficients that the diffusers class would run with this configuration.

    Args:
        name: a sampler, by any of its names.
        config: the content of a `scheduler_config.json`, possibly of another scheduler: keys that this one has count,
            missing ones take its class's defaults, the rest is ignored.
        steps: the number of steps, or all options of the run.
        karras: whether to use the sigmas of Karras et al. 2022; None leaves it to the configuration.
        options: overrides of the configuration and of the steps, by the names of this sampler's fields and of the
            attributes of `Steps`.

    Raises:
        RequestError: an unknown name, or an unsupported value or combination.
    """
    choice = choose(name)
    steps = steps if isinstance(steps, Steps) else Steps(count=steps)
    overrides = dict(choice.options)
    if karras is not None:
        overrides |= _karras_options(choice.sampler, karras)
    known = {each.name for each in fields(choice.sampler)}
    run_options: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key in known:
            overrides[key] = value
        elif key in choice.sampler.run_options | {"begin", "eta"}:
            run_options[key] = tuple(value) if isinstance(value, list) else value
        else:
            expected = sorted(known | choice.sampler.run_options | {"begin"})
            raise RequestError(
                f"sampler {choice.name} has no option {quote(key)}; expected one of {', '.join(expected)}"
            )
    sampler = choice.sampler.read(_override(config, overrides))
    return sampler.schedule(replace(steps, **run_options) if run_options else steps)


def _override(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other values for some keys, which are then no longer marked as defaults."""
    changed = {**config, **overrides}
    defaults = changed.get("_use_default_values")
    if isinstance(defaults, (list, tuple)):
        changed["_use_default_values"] = [key for key in defaults if key not in overrides]
    return changed


def steps_of_grid(name: str, options: Mapping[str, Any]) -> int | None:
    """Return the number of steps of the grid given in sampler options; None without a grid."""
    for key, ends in (("timesteps", 0), ("sigmas", find(name).sigmas_end)):
        grid = options.get(key)
        if isinstance(grid, (list, tuple)):
            return max(len(grid) - ends, 1)
    return None


def _spacing_options(sampler: type[Sampler], spacing: str) -> dict[str, bool]:
    names = {each.name for each in fields(sampler)}
    if f"use_{spacing}_sigmas" not in names:
        able = ", ".join(name for name, each in SAMPLERS.items() if hasattr(each, f"use_{spacing}_sigmas"))
        raise RequestError(
            f"got {spacing} sigmas with {sampler.class_name}, which does not support them; choose one of {able}"
        )
    return {f"use_{each}_sigmas": each == spacing for each in ("karras", "exponential", "beta")}


def _karras_options(sampler: type[Sampler], karras: bool) -> dict[str, bool]:
    if karras:
        return _spacing_options(sampler, "karras")
    return {"use_karras_sigmas": False} if hasattr(sampler, "use_karras_sigmas") else {}
