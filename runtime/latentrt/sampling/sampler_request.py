"""What may a request say of its sampler, whatever the bundle is?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import samplers

__all__ = ["karras_levels", "sampler_name", "sampler_options"]


def sampler_name(name: object) -> str:
    """A name that some sampler goes by.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(name, str):
        raise RequestError(f"sampler: found {name!r}, expected a name")
    samplers.find(name)
    return name


def sampler_options(options: object) -> dict[str, Any]:
    """What goes before the bundle's configuration. It is written into the picture, so it has to be what JSON can carry.

    Raises:
        RequestError: it is not, or belongs to what the pipeline does not do.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"sampler_options: found {options!r}, expected names and values")
    for name in ("begin", "strength"):
        if name in options:
            raise RequestError(f"found sampler option {name!r}, which is of image to image, and that is not there yet")
    if not all(map(_is_plain, options.values())):
        raise RequestError(f"sampler_options: found {options!r}, expected numbers, texts, and lists of them")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(each, (int, float, str)) for each in value)
    return value is None or (isinstance(value, (int, float, str)) and value == value)  # NaN is not


def karras_levels(value: object) -> bool | None:
    """Whether the levels are Karras'; None where the configuration says.

    Raises:
        RequestError: it is neither.
    """
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise RequestError(f"karras: found {value!r}, expected True, False or None")
    return None if value is None else bool(value)
