"""What may a scheduler's configuration say?

A sampler is a frozen dataclass whose fields are the keys of a diffusers scheduler class, with that class's defaults.
The type of a field is the set of values that can be honoured, so that reading a configuration is one loop over the
fields: what is absent is the default, what is not a field is ignored (as diffusers does), and what does not fit its
type is refused and never ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = [
    "Bounded",
    "Kind",
    "PlainBetas",
    "PositiveFloat",
    "PositiveInt",
    "Respaced",
    "Sampler",
    "StepsOffset",
    "TrainedSampler",
]

PlainBetas = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
StepsOffset = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Kind = Literal["diffusion", "flow", "edm", "consistency", "continuous", "score", "discrete"]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """What all samplers have in common. A subclass's fields are the keys of its diffusers class.

    Attributes:
        title: what the sampler is, for people.
        class_name: the diffusers class whose configuration this reads and whose numbers it reproduces.
        kind: what a model has to be trained as.
        takes: which of `Steps`, beyond a number of steps and a beginning, mean anything to it.
        backwards: whether it goes from a picture to noise.
        sigmas_end: how many of the sigmas that it may be given are not the start of a step.
        exception: what a caller has to do beside the table; empty for most samplers. The pipeline runs no others.
    """

    title: ClassVar[str]
    class_name: ClassVar[str]
    kind: ClassVar[Kind] = "diffusion"
    takes: ClassVar[frozenset[str]] = frozenset()
    sigmas_end: ClassVar[int] = 0
    backwards: ClassVar[bool] = False
    exception: ClassVar[str] = ""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """A sampler from `scheduler_config.json` as it stands on disk, as diffusers' `from_config` understands it.

        Raises:
            RequestError: a key that the class has holds a value of the wrong type, or one that cannot be honoured.
        """
        left_to_default = config.get("_use_default_values", ())
        if not isinstance(left_to_default, (list, tuple)):
            raise RequestError(
                f"the scheduler's configuration says _use_default_values: {left_to_default!r}, expected a list of keys"
            )
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            if field.default is MISSING and field.name not in config:
                raise RequestError(
                    f"found no {field.name} in the scheduler's configuration, which {cls.class_name} needs"
                )
        given = [field.name for field in fields(cls) if field.name in config and field.name not in left_to_default]
        return cls(**{name: cls._honoured(name, config[name], hints[name]) for name in given})

    @classmethod
    def _honoured(cls, key: str, value: object, hint: Any) -> Any:
        try:
            return _converted(value, hint)
        except msgspec.ValidationError as problem:
            raise RequestError(
                f"the scheduler's configuration says {key}: {value!r}, which {cls.class_name} cannot honour here: "
                f"{problem}; change {key}, or choose another sampler"
            ) from None

    def schedule(self, steps: Steps) -> Schedule:
        """The table of coefficients.

        Raises:
            RequestError: there is no such table, and why.
        """
        for name in steps.given():
            if name not in self.takes and not (name == "eta" and steps.eta == 0):
                raise RequestError(
                    f"found {name} {getattr(steps, name)!r} with {self.class_name}, which takes none; leave it out, or "
                    "use another sampler (`latentrt samplers --verbose` says what each takes)"
                )
        for key, ends in (("timesteps", 0), ("sigmas", self.sigmas_end)):
            grid = getattr(steps, key)
            if grid is not None:
                steps = replace(steps, count=max(len(grid) - ends, 1))
        try:
            # What is not finite in the end is refused; on the way to it numpy need not warn.
            with np.errstate(all="ignore"):
                return self.table(steps)
        except (ValueError, ArithmeticError) as error:
            raise RequestError(
                f"{self.class_name} has no table of finite numbers with these options ({error}); choose values nearer "
                "to the defaults"
            ) from error

    @abstractmethod
    def table(self, steps: Steps) -> Schedule:
        """The table for steps that this sampler takes."""

    def evaluations(self, count: int) -> int:
        """How many times the model is asked in so many steps."""
        return count


@dataclass(frozen=True, kw_only=True)
class TrainedSampler(Sampler):
    """A sampler over the noise schedule that a model was trained with (Ho et al. 2020)."""

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 1000
    beta_start: PositiveFloat = 0.0001
    beta_end: PositiveFloat = 0.02
    beta_schedule: PlainBetas = "linear"
    trained_betas: Annotated[tuple[float, ...], msgspec.Meta(min_length=2)] | None = None

    def alphas_cumprod(self, *, zero_snr: bool = False) -> NDArray[np.float32]:
        """ᾱ of each training timestep, float32; with `zero_snr` the last one is 0."""
        beta = self.betas()
        return sigmas.alphas_cumprod(sigmas.rescale_zero_snr(beta) if zero_snr else beta)

    def betas(self) -> NDArray[np.float32]:
        """β of each training timestep, float32."""
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise RequestError(
                    f"found {len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps of "
                    "training, expected as many; correct num_train_timesteps in the scheduler's configuration"
                )
            return np.array(self.trained_betas, np.float32)
        return sigmas.betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)

    def whole_timesteps(self, steps: Steps, spacing: sigmas.Spacing, offset: int) -> NDArray[np.int64]:
        """The grid as whole numbers from `begin` on, for samplers that look constants up by timestep."""
        if steps.timesteps is None:
            grid = sigmas.whole_timesteps(spacing, steps.count, self.num_train_timesteps, offset)
        else:
            grid = self.given_timesteps(steps, whole=True).astype(np.int64)
        return grid[steps.begin :]

    def given_timesteps(self, steps: Steps, *, whole: bool) -> NDArray[np.float64]:
        """The timesteps that were asked for.

        Raises:
            RequestError: one lies beyond training, or between its timesteps where `whole` ones are wanted.
        """
        grid, last = np.array(steps.timesteps, np.float64), self.num_train_timesteps - 1
        if grid[0] > last:
            raise RequestError(f"found timestep {grid[0]:g}, but training has only 0 to {last}; give smaller ones")
        if whole and np.any(grid != grid.round()):
            found = grid[grid != grid.round()][0]
            raise RequestError(f"found timestep {found:g}, expected whole ones with {self.class_name}; round them")
        return grid


@dataclass(frozen=True, kw_only=True)
class Bounded(Sampler):
    """A sampler that can keep x0 within limits, fixed ones or those of dynamic thresholding."""

    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.995
    sample_max_value: PositiveFloat = 1.0

    def bounds(self, fixed: float | None = None) -> dict[str, Any]:
        """The columns `limit` and `quantile`; thresholding goes before a fixed limit."""
        if self.thresholding:
            return {"limit": self.sample_max_value, "quantile": self.dynamic_thresholding_ratio}
        return {"limit": np.inf if fixed is None else fixed}


@dataclass(frozen=True, kw_only=True)
class Respaced(Sampler):
    """A sampler whose noise levels can be spread anew between the highest and the lowest."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """As for every sampler; and the ends of levels that another scheduler's configuration brings along, which
        diffusers would take for this one's, are not passed over.

        Raises:
            RequestError: also where there are such ends, and this class has none.
        """
        made = super().read(config)
        for key in ("sigma_min", "sigma_max"):
            if made.respacing and config.get(key) is not None and not hasattr(made, key):
                raise RequestError(
                    f"the scheduler's configuration says {key}: {config[key]!r}, which {cls.class_name} has no such "
                    f"option for beside use_{made.respacing}_sigmas; take {key} out, or use euler or unipc"
                )
        return made

    @property
    def respacing(self) -> str | None:
        """How they are spread: `karras`, `exponential`, `beta` or as the timesteps are.

        Raises:
            RequestError: the configuration wants several at once.
        """
        chosen = [name for name in sigmas.RESPACED if getattr(self, f"use_{name}_sigmas")]
        if len(chosen) > 1:
            found = " and ".join(f"use_{name}_sigmas" for name in chosen)
            raise RequestError(f"found {found}, expected at most one of them; switch the others off")
        return chosen[0] if chosen else None

    def check_custom(self, steps: Steps, *more: str) -> None:
        """A grid that is given cannot be spread anew.

        Raises:
            RequestError: it would have to be.
        """
        wanted = [f"use_{self.respacing}_sigmas"] if self.respacing else []
        wanted += [name for name in more if getattr(self, name)]
        given = "timesteps" if steps.timesteps is not None else "sigmas"
        if getattr(steps, given) is not None and wanted:
            raise RequestError(f"found {given} and {wanted[0]}, expected one of them; switch {wanted[0]} off")


def _converted(value: object, hint: Any) -> Any:
    """The value if it fits the type."""
    # msgspec knows no boolean literals, and does not list the possible values when it refuses.
    if get_origin(hint) is not Literal:
        return msgspec.convert(value, hint)
    if not any(value == possible and type(value) is type(possible) for possible in get_args(hint)):
        raise msgspec.ValidationError(f"expected {' or '.join(map(repr, get_args(hint)))}")
    return value
