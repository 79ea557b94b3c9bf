"""What may a scheduler's configuration say?

A sampler is a frozen dataclass whose fields are the keys of a diffusers scheduler class, with that class's defaults.
The type of a field is the set of values that can be honoured, so that reading a configuration is one loop over the
fields: what is absent is the default, what is not a field is ignored (as diffusers does), and what does not fit its
type is refused and never ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt import sigmas
from latentrt.errors import RequestError
from latentrt.schedule import Schedule

__all__ = ["PositiveFloat", "Sampler"]

PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """What the samplers over a training noise schedule have in common; the keys are diffusers'.

    Attributes:
        title: what the sampler is, for people.
        class_name: the diffusers class whose configuration this reads and whose numbers it reproduces.
        takes_eta: whether `eta` means anything to it.
    """

    title: ClassVar[str]
    class_name: ClassVar[str]
    takes_eta: ClassVar[bool] = False

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 1000
    beta_start: PositiveFloat = 0.0001
    beta_end: PositiveFloat = 0.02
    beta_schedule: sigmas.BetaSchedule = "linear"
    trained_betas: Annotated[tuple[float, ...], msgspec.Meta(min_length=2)] | None = None
    steps_offset: Annotated[int, msgspec.Meta(ge=0)] = 0

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

    @abstractmethod
    def schedule(self, num_inference_steps: int, eta: float = 0.0) -> Schedule:
        """The table of coefficients.

        Args:
            num_inference_steps: how many steps were asked for, at least 1; a table may have more rows than steps.
            eta: how much noise DDIM adds, 0 to 1; 0 for a sampler that takes none.

        Raises:
            RequestError: there is no such table, and why.
        """

    def alphas_cumprod(self, *, zero_snr: bool = False) -> NDArray[np.float32]:
        """ᾱ of each training timestep, float32; with `zero_snr` the last one is 0."""
        beta: NDArray[np.float32]
        if self.trained_betas is not None:
            beta = np.array(self.trained_betas, np.float32)
        else:
            beta = sigmas.betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        return sigmas.alphas_cumprod(sigmas.rescale_zero_snr(beta) if zero_snr else beta)


def _converted(value: object, hint: Any) -> Any:
    """The value if it fits the type."""
    # msgspec knows no boolean literals, and does not list the possible values when it refuses.
    if get_origin(hint) is not Literal:
        return msgspec.convert(value, hint)
    if not any(value == possible and type(value) is type(possible) for possible in get_args(hint)):
        raise msgspec.ValidationError(f"expected {' or '.join(map(repr, get_args(hint)))}")
    return value
