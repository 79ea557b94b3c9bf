"""Which samplers are there?

To add one: write a module here with a subclass of `Sampler`, name it in `_CLASSES`, and add a line to the parity test.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from latentrt.errors import RequestError
from latentrt.sampling.samplers.aliases import ALIASES, RESPACINGS, normalised
from latentrt.sampling.samplers.options import Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = [
    "SAMPLERS",
    "Choice",
    "Sampler",
    "Steps",
    "aliases_of",
    "check_suits",
    "choose",
    "find",
    "name_of",
    "schedule",
]

# name, which is its module → the class in it, and the diffusers class whose configuration that reads.
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
    """name → class, whose module is loaded when it is asked for."""

    def __getitem__(self, name: str) -> type[Sampler]:
        module = importlib.import_module(f"{__name__}.{name}") if name in _CLASSES else None
        if module is None:
            raise KeyError(name)
        found: type[Sampler] = getattr(module, _CLASSES[name][0])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


SAMPLERS: Mapping[str, type[Sampler]] = _Samplers()


@dataclass(frozen=True)
class Choice:
    """A sampler, and what the name that it was asked by says of its configuration."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> type[Sampler]:
        """Its class."""
        return SAMPLERS[self.name]


def choose(name: str) -> Choice:
    """The sampler of this name: ours (`euler_a`), that of its diffusers class (`EulerAncestralDiscreteScheduler`), or
    one that other tools have for it (`Euler a`, `dpmpp_2m_karras`, `DPM++ 2M SDE Karras`).

    Raises:
        RequestError: there is none.
    """
    plain = normalised(name).removeprefix("sample_").removesuffix("scheduler")
    for known, (_, class_name) in _CLASSES.items():
        if plain in (known, normalised(class_name).removesuffix("scheduler")):
            return Choice(known)
    if plain in ALIASES:
        return Choice(*ALIASES[plain])
    for ending, kind in RESPACINGS.items():
        if plain.endswith(ending) and plain != ending:
            choice = choose(plain.removesuffix(ending))
            if any(f"use_{each}_sigmas" in choice.options for each in RESPACINGS.values()):
                raise RequestError(
                    f"found sampler {name!r}, which spreads its noise levels twice; leave out one ending"
                )
            return replace(choice, options={**choice.options, **_respacing(choice.sampler, kind)})
    import difflib  # here, as a run needs it not

    near = difflib.get_close_matches(plain, [*_CLASSES, *ALIASES], n=2)
    words = f" (near it: {' or '.join(near)})" if near else ""
    raise RequestError(
        f"found sampler {name!r}, expected one of "
        f"{', '.join(_CLASSES)}, or another name for one of them{words}; `latentrt samplers` lists them all"
    )


def find(name: str) -> type[Sampler]:
    """The class of a sampler, by any of its names.

    Raises:
        RequestError: there is none.
    """
    return choose(name).sampler


def name_of(name: str) -> str:
    """Our name of a sampler, of whichever name it goes by.

    Raises:
        RequestError: there is no such sampler.
    """
    return choose(name).name


def aliases_of(name: str) -> list[str]:
    """The other names of a sampler, without those that only add an ending."""
    return [alias for alias, (known, _) in ALIASES.items() if known == name]


def check_suits(name: str, model: str) -> None:
    """Whether a sampler can draw with a model whose own scheduler is `model`.

    Raises:
        RequestError: it cannot, or it is no table, and what can be done.
    """
    sampler = find(name)
    if sampler.backwards:
        raise RequestError(
            f"found sampler {name_of(name)}, which goes from a picture to the noise that it is drawn from; to draw, "
            "take another"
        )
    if sampler.exception:
        raise RequestError(f"found sampler {name_of(name)}, which is more than a table: {sampler.exception}")
    own = find(model) if any(model == class_name for _, class_name in _CLASSES.values()) else None
    if own is not None and own.kind != sampler.kind:
        raise RequestError(
            f"found sampler {name_of(name)} for {sampler.kind} models, but this bundle's model is one of {own.kind} "
            f"({model}); `latentrt samplers` says which is for what"
        )


def schedule(
    name: str,
    config: Mapping[str, Any],
    steps: int | Steps,
    *,
    karras: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """The table of coefficients that diffusers' class would run with this configuration.

    Args:
        name: a sampler, as `choose` takes it.
        config: `scheduler_config.json` as it stands on disk. It may be another scheduler's: keys that this one has
            count, keys that are absent are its class's defaults, the rest is ignored.
        steps: how many steps, or all that is asked of them.
        karras: whether the noise levels are those of Karras et al. 2022, whatever the configuration says; None leaves
            it to that.
        options: by name, what goes before the configuration and the steps: keys of this sampler's own configuration
            and attributes of `Steps`.

    Raises:
        RequestError: a name, value or combination that cannot be honoured, and what can.
    """
    choice = choose(name)
    steps = steps if isinstance(steps, Steps) else Steps(count=steps)
    wanted = dict(choice.options)
    if karras is not None:
        wanted |= _karras(choice.sampler, karras)
    known = {each.name for each in fields(choice.sampler)}
    asked: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key in known:
            wanted[key] = value
        elif key in choice.sampler.takes | {"begin", "eta"}:
            asked[key] = tuple(value) if isinstance(value, list) else value
        else:
            raise RequestError(
                f"found option {key!r}, which {choice.name} does not have; expected one of "
                f"{', '.join(sorted(known | choice.sampler.takes | {'begin'}))}"
            )
    sampler = choice.sampler.read(_with(config, wanted))
    return sampler.schedule(replace(steps, **asked) if asked else steps)


def _with(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values for some keys, which then are no defaults any more."""
    changed = {**config, **wanted}
    defaults = changed.get("_use_default_values")
    if isinstance(defaults, (list, tuple)):
        changed["_use_default_values"] = [key for key in defaults if key not in wanted]
    return changed


def steps_of_grid(name: str, options: Mapping[str, Any]) -> int | None:
    """How many steps the grid has that is given among a request's options; None where none is."""
    for key, ends in (("timesteps", 0), ("sigmas", find(name).sigmas_end)):
        grid = options.get(key)
        if isinstance(grid, (list, tuple)):
            return max(len(grid) - ends, 1)
    return None


def _respacing(sampler: type[Sampler], kind: str) -> dict[str, bool]:
    names = {each.name for each in fields(sampler)}
    if f"use_{kind}_sigmas" not in names:
        able = ", ".join(name for name, each in SAMPLERS.items() if hasattr(each, f"use_{kind}_sigmas"))
        raise RequestError(
            f"found {kind} with {sampler.class_name}, which has no such noise levels; those that have: {able}"
        )
    return {f"use_{each}_sigmas": each == kind for each in ("karras", "exponential", "beta")}


def _karras(sampler: type[Sampler], karras: bool) -> dict[str, bool]:
    if karras:
        return _respacing(sampler, "karras")
    return {"use_karras_sigmas": False} if hasattr(sampler, "use_karras_sigmas") else {}
