"""Reports of `latentrt bench` and `latentrt compare` as JSON, for other programs."""

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
    """Check that the report's folder exists, before any work is done.

    Raises:
        OutputError: it does not.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder, so the report cannot be written there; create it")


def write_report(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, with the versions of latentrt and Python and the machine's architecture.

    Raises:
        OutputError: the file cannot be written; an existing one is unchanged.
    """
    from latentrt.bundle.atomic_file import write_atomically

    report = {
        "latentrt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **results,
    }
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
