"""Base classes of the samplers, and the reader of scheduler configurations.

A sampler is a frozen dataclass whose fields are the keys of a diffusers scheduler class, with that class's defaults.
The type of a field is the set of supported values, so reading a configuration is one loop over the fields: a missing
key takes the default, a key that is not a field is ignored (as diffusers does), and an unsupported value is an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import MAX_TIMESTEPS
from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    TimestepSpacing,
    alphas_cumprod,
    rescale_zero_snr,
    space_whole_timesteps,
    training_betas,
)

__all__ = [
    "Kind",
    "PlainBetas",
    "PositiveFloat",
    "PositiveInt",
    "Sampler",
    "SigmaSpacing",
    "StepsOffset",
    "Thresholding",
    "TrainedSampler",
]

PlainBetas = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
StepsOffset = Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMESTEPS)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=MAX_TIMESTEPS)]
Kind = Literal["diffusion", "flow", "edm", "consistency", "continuous", "score", "discrete"]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A sampler: the configuration of a diffusers scheduler class, and the schedule that follows from it.

    Attributes:
        title: a human-readable description.
        class_name: the diffusers class whose configuration this reads and whose numbers it reproduces.
        kind: the kind of model that it samples from.
        run_options: the attributes of `Steps`, besides `count` and `begin`, that it uses.
        inverse: whether it runs from an image to noise.
        sigmas_end: the number of given `Steps.sigmas` that do not start a step.
        unsupported_reason: why the pipeline does not run it, and what runs it instead; empty where the pipeline does.
        without_effect: the keys that change nothing in its table, as in diffusers → the reason.
    """

    title: ClassVar[str]
    class_name: ClassVar[str]
    kind: ClassVar[Kind] = "diffusion"
    run_options: ClassVar[frozenset[str]] = frozenset()
    sigmas_end: ClassVar[int] = 0
    inverse: ClassVar[bool] = False
    unsupported_reason: ClassVar[str] = ""
    without_effect: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of a `scheduler_config.json` as diffusers' `from_config` does.

        Raises:
            RequestError: a required key is missing, or a value is of the wrong type or not supported.
        """
        left_to_default = config.get("_use_default_values", ())
        if not isinstance(left_to_default, (list, tuple)):
            raise RequestError(
                f"the scheduler configuration has _use_default_values {quote(left_to_default)}, expected a list of keys"
            )
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            if field.default is MISSING and field.name not in config:
                raise RequestError(f"the scheduler configuration lacks `{field.name}`, required by {cls.class_name}")
        given = [field.name for field in fields(cls) if field.name in config and field.name not in left_to_default]
        return cls(**{name: cls._convert(name, config[name], hints[name]) for name in given})

    @classmethod
    def _convert(cls, key: str, value: object, hint: Any) -> Any:
        try:
            return _convert(value, hint)
        except (msgspec.ValidationError, ValueError, OverflowError) as problem:  # the others of odd texts and numbers
            raise RequestError(
                f"got `{key}`={quote(value)}, which is not supported with {cls.class_name}: {problem}; change "
                f"`{key}`, or choose another sampler"
            ) from None

    def schedule(self, steps: Steps) -> Schedule:
        """Return the table of coefficients of a run.

        Raises:
            RequestError: the sampler does not use one of the options, or has no table of finite numbers for them.
        """
        for name in steps.given():
            if name not in self.run_options and not (name == "eta" and steps.eta == 0):
                raise RequestError(
                    f"got `{name}`={quote(getattr(steps, name))}, which {self.class_name} does not use; leave it out, "
                    "or choose another sampler (see latentrt samplers --verbose)"
                )
        for key, ends in (("timesteps", 0), ("sigmas", self.sigmas_end)):
            grid = getattr(steps, key)
            if grid is not None:
                steps = replace(steps, count=max(len(grid) - ends, 1))
        try:
            # `Schedule` rejects what is not finite, so numpy need not warn about intermediate results.
            with np.errstate(all="ignore"):
                return self.table(steps)
        except (ValueError, ArithmeticError) as error:
            raise RequestError(
                f"{self.class_name} has no table of finite numbers with these options ({error}); choose values closer "
                "to the defaults"
            ) from error

    @abstractmethod
    def table(self, steps: Steps) -> Schedule:
        """Return the table of a run whose options this sampler uses; the implementation of `schedule`."""

    def evaluations(self, count: int) -> int:
        """Return the number of model evaluations in `count` steps."""
        return count


@dataclass(frozen=True, kw_only=True)
class TrainedSampler(Sampler):
    """A sampler for models trained with a discrete noise schedule (Ho et al. 2020)."""

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=2, le=MAX_TIMESTEPS)] = 1000
    beta_start: PositiveFloat = 0.0001
    beta_end: PositiveFloat = 0.02
    beta_schedule: PlainBetas = "linear"
    trained_betas: Annotated[tuple[float, ...], msgspec.Meta(min_length=2, max_length=MAX_TIMESTEPS)] | None = None

    def alphas_cumprod(self, *, zero_snr: bool = False) -> NDArray[np.float32]:
        """Return ᾱ of each training timestep, float32; with `zero_snr` the last one is 0."""
        betas = self.betas()
        return alphas_cumprod(rescale_zero_snr(betas) if zero_snr else betas)

    def betas(self) -> NDArray[np.float32]:
        """Return β of each training timestep, float32."""
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise RequestError(
                    f"got {len(self.trained_betas)} `trained_betas`, expected {self.num_train_timesteps}; correct "
                    "`num_train_timesteps`"
                )
            return np.array(self.trained_betas, np.float32)
        return training_betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)

    def whole_timesteps(self, steps: Steps, spacing: TimestepSpacing, offset: int) -> NDArray[np.int64]:
        """Return the grid in whole numbers from `begin` on, for samplers that look constants up by timestep."""
        if steps.timesteps is None:
            t = space_whole_timesteps(spacing, steps.count, self.num_train_timesteps, offset)
        else:
            t = self.given_timesteps(steps, whole=True).astype(np.int64)
        return t[steps.begin :]

    def given_timesteps(self, steps: Steps, *, whole: bool) -> NDArray[np.float64]:
        """Return `steps.timesteps` as an array.

        Raises:
            RequestError: one is beyond training, or not a whole number although `whole` is set.
        """
        t, last = np.array(steps.timesteps, np.float64), self.num_train_timesteps - 1
        if t[0] > last:
            raise RequestError(f"`timesteps` has {t[0]:g}, but training has only 0 to {last}; use smaller ones")
        if whole and np.any(t != t.round()):
            fraction = t[t != t.round()][0]
            raise RequestError(f"`timesteps` has {fraction:g}, expected whole numbers with {self.class_name}")
        return t


@dataclass(frozen=True, kw_only=True)
class Thresholding(Sampler):
    """A sampler that can clip x0, to a fixed limit or by dynamic thresholding (Saharia et al. 2022, section 2.3)."""

    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.995
    sample_max_value: PositiveFloat = 1.0

    def limits(self, fixed: float | None = None) -> dict[str, Any]:
        """Return the columns `limit` and `quantile`; thresholding takes precedence over a fixed limit."""
        if self.thresholding:
            return {"limit": self.sample_max_value, "quantile": self.dynamic_thresholding_ratio}
        return {"limit": np.inf if fixed is None else fixed}


@dataclass(frozen=True, kw_only=True)
class SigmaSpacing(Sampler):
    """A sampler whose sigmas can be spaced anew between the highest and the lowest."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read a configuration as `Sampler.read`, and reject ends of the sigmas that the class does not have.

        diffusers uses `sigma_min` and `sigma_max` of another scheduler's configuration for these spacings.

        Raises:
            RequestError: as `Sampler.read`; or sigmas are spaced anew, and the configuration has such an end.
        """
        sampler = super().read(config)
        for key in ("sigma_min", "sigma_max"):
            if sampler.sigma_spacing and config.get(key) is not None and not hasattr(sampler, key):
                raise RequestError(
                    f"got `{key}`={quote(config[key])} and `use_{sampler.sigma_spacing}_sigmas`, but {cls.class_name} "
                    f"has no such option; remove `{key}`, or choose euler or unipc"
                )
        return sampler

    @property
    def sigma_spacing(self) -> str | None:
        """`karras`, `exponential` or `beta`; None where sigmas follow the timesteps.

        Raises:
            RequestError: the configuration has several at once.
        """
        chosen = [name for name in SIGMA_SPACINGS if getattr(self, f"use_{name}_sigmas")]
        if len(chosen) > 1:
            names = " and ".join(f"`use_{name}_sigmas`" for name in chosen)
            raise RequestError(f"got {names}, expected at most one of them")
        return chosen[0] if chosen else None

    def reject_given_grid(self, steps: Steps, *more: str) -> None:
        """Reject `timesteps` or `sigmas` of a run where the configuration spaces sigmas itself.

        Args:
            steps: the options of the run.
            more: further options of this class that space sigmas.

        Raises:
            RequestError: both are set.
        """
        spacings = [f"use_{self.sigma_spacing}_sigmas"] if self.sigma_spacing else []
        spacings += [name for name in more if getattr(self, name)]
        given = "timesteps" if steps.timesteps is not None else "sigmas"
        if getattr(steps, given) is not None and spacings:
            raise RequestError(f"got `{given}` and `{spacings[0]}`, expected one of them")


def _convert(value: object, hint: Any) -> Any:
    """Return the value if it fits the type.

    Raises:
        msgspec.ValidationError: it does not.
    """
    # msgspec has no boolean literals, and its error does not list the possible values.
    if get_origin(hint) is not Literal:
        return msgspec.convert(value, hint)
    if not any(value == possible and type(value) is type(possible) for possible in get_args(hint)):
        raise msgspec.ValidationError(f"expected {' or '.join(map(repr, get_args(hint)))}")
    return value
