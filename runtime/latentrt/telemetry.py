"""Reports of libraries to their makers, which are off unless the user has turned them on.

- ONNX Runtime 1.29 and later writes a device id and a queue below `~/.cache/Microsoft` when it is imported, and sends
  them. `ORT_DISABLE_TELEMETRY` turns that off before the import; a value that the user has set is left as it is, and
  `ORT_DISABLE_TELEMETRY=0` turns it on.
- OpenVINO's Python package sends an event when it is imported, by a package of its own, `openvino_telemetry`, which has
  no such variable. Without that package OpenVINO sends nothing, so it is hidden during the import, unless the user has
  agreed to it with OpenVINO's command `opt_in_out --opt_in`.
- Hugging Face's libraries, which an export imports, have `HF_HUB_DISABLE_TELEMETRY`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["hide_openvino_telemetry", "opt_out"]

_SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_OPENVINO_TELEMETRY = "openvino_telemetry"


def opt_out() -> None:
    """Turn telemetry off for this process and its children unless the user has chosen; call it before imports."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def hide_openvino_telemetry() -> Iterator[None]:
    """Hide OpenVINO's telemetry package while OpenVINO is imported within the block."""
    modules: dict[str, Any] = sys.modules
    if _OPENVINO_TELEMETRY in modules or _has_opted_in():
        yield
        return
    modules[_OPENVINO_TELEMETRY] = None  # an import of it raises ImportError
    try:
        yield
    finally:
        modules.pop(_OPENVINO_TELEMETRY, None)


def _has_opted_in() -> bool:
    """Return whether the user has agreed to OpenVINO's telemetry."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return (Path.home() / "intel" / "openvino_telemetry").read_text().strip() == "1"
    return False
