"""Reports of libraries to their makers, which are off unless the user has turned them on.

- ONNX Runtime 1.29 and later writes a device id and a queue below `~/.cache/Microsoft` when it is imported, and sends
  them. `ORT_DISABLE_TELEMETRY` turns that off before the import, unless the user has set it to `0`, `false`, `no` or
  `off`. An empty value does not turn reports on, although the library reports with it.
- OpenVINO's Python package sends an event when it is imported, by a package of its own, `openvino_telemetry`, which has
  no such variable. Without that package OpenVINO sends nothing, so it is hidden during the import, unless the user has
  agreed to it with OpenVINO's command `opt_in_out --opt_in`.
- Hugging Face's libraries, which an export imports, have `HF_HUB_DISABLE_TELEMETRY`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["end_reports", "hide_openvino_telemetry", "opt_out"]

_ONNXRUNTIME, _HUGGING_FACE = "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"
# The libraries compare with "1", "true", "yes" and "on", and report with any other value.
_WANTS_REPORTS = {"0", "false", "no", "off"}
_OPENVINO_TELEMETRY = "openvino_telemetry"
_HIDING = threading.RLock()


def opt_out() -> None:
    """Turn telemetry off for this process and its children unless the user has chosen; call it before imports."""
    for name in (_ONNXRUNTIME, _HUGGING_FACE):
        if not _is_wanted(name):
            os.environ[name] = "1"


def end_reports(onnxruntime: Any) -> None:
    """Turn off the reports of an ONNX Runtime that the application may have imported before `opt_out`."""
    if not _is_wanted(_ONNXRUNTIME):
        onnxruntime.disable_telemetry_events()


def _is_wanted(name: str) -> bool:
    """Return whether the user has turned a library's reports on."""
    return os.environ.get(name, "").strip().lower() in _WANTS_REPORTS


@contextlib.contextmanager
def hide_openvino_telemetry() -> Iterator[None]:
    """Hide OpenVINO's telemetry package while OpenVINO is imported within the block."""
    modules: dict[str, Any] = sys.modules
    if _has_opted_in():
        yield
        return
    with _HIDING:  # two threads that hide it would each restore what the other has set
        former = {name: modules[name] for name in (_OPENVINO_TELEMETRY,) if name in modules}
        modules[_OPENVINO_TELEMETRY] = None  # an import of it raises ImportError
        try:
            yield
        finally:
            modules.pop(_OPENVINO_TELEMETRY, None)
            modules.update(former)  # the application may have imported it, for another library of Intel's


def _has_opted_in() -> bool:
    """Return whether the user has agreed to OpenVINO's telemetry."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return (Path.home() / "intel" / "openvino_telemetry").read_bytes().strip() == b"1"
    return False
