"""Families: everything that is particular to one kind of model, one file each, imported when a bundle needs it.

To add one, write a module here with a subclass of `Family` and list it in `_FAMILIES`; the exporter has a module of the
same name. No other module depends on a kind of model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from latentrt.bundle.printable import quote
from latentrt.errors import BundleError
from latentrt.families.family import Family

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle

__all__ = ["Family", "open_family"]

# The manifest's name → module and class.
_FAMILIES = {
    "stable-diffusion-1": "stable_diffusion:StableDiffusion",
    "stable-diffusion-2": "stable_diffusion:StableDiffusion",
    "stable-diffusion-xl": "stable_diffusion_xl:StableDiffusionXL",
}


def open_family(bundle: Bundle, components: Components) -> Family:
    """Return the family of a bundle.

    Raises:
        BundleError: this version of latentrt does not support it.
    """
    name = bundle.manifest.family
    if name not in _FAMILIES:
        raise BundleError(
            f"{bundle.folder}: got the family {quote(name)}, expected one that this latentrt supports: "
            f"{', '.join(_FAMILIES)}; upgrade latentrt: pip install -U latentrt"
        )
    module, attribute = _FAMILIES[name].split(":")
    cls: type[Family] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return cls(bundle, components)
