"""How are figures written for another program to read?"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt import __version__
from latentrt.errors import OutputError

__all__ = ["check_report", "write_report"]


def check_report(path: Path | None) -> None:
    """Ask before the work whether figures can be written there.

    Raises:
        OutputError: there is no such folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; the figures could not be written there")


def write_report(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, below what they belong to: versions and the machine.

    Raises:
        OutputError: they cannot be written; what was there is untouched.
    """
    from latentrt.bundle.atomic_file import write_atomically

    report = {
        "latentrt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **figures,
    }
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
