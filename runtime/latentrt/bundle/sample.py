"""The sample bundle, which ships with the package: a small Stable Diffusion model that generates coloured shapes."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

__all__ = ["SAMPLE", "bundle_argument", "bundle_path", "find_bundle"]

SAMPLE = "sample"
"""The name of the sample bundle wherever a bundle is named; a folder of that name is `./sample`."""


def bundle_path() -> Path:
    """Return the folder of the sample bundle, which `Pipeline.load()` opens by default."""
    return Path(__file__).parent.with_name("sample_bundle")


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle: the sample bundle for the text `sample`, else the path itself."""
    return bundle_path() if name_or_path == SAMPLE else Path(name_or_path)


def bundle_argument(path: str | os.PathLike[str]) -> str:
    """Return a bundle's name for a command line, quoted for a shell: `find_bundle` of it is `path`."""
    if Path(path) == bundle_path():
        return SAMPLE
    return f"./{path}" if os.fspath(path) == SAMPLE else shlex.quote(os.fspath(path))
