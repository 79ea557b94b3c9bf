"""The sample bundle, which ships with the package: a small Stable Diffusion model that generates coloured shapes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SAMPLE", "bundle_path", "find_bundle"]

SAMPLE = "sample"
"""The name of the sample bundle wherever a bundle is named; a folder of that name is `./sample`."""


def bundle_path() -> Path:
    """Return the folder of the sample bundle, which `Pipeline.load()` opens by default."""
    return Path(__file__).parent.with_name("sample_bundle")


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle: the sample bundle for the text `sample`, else the path itself."""
    return bundle_path() if name_or_path == SAMPLE else Path(name_or_path)
