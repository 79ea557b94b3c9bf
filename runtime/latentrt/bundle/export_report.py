"""The export report, `export-report.json` beside `bundle.json`: time and memory that an export took.

It is not part of the bundle: the manifest does not pin it and nothing needs it to run. Durations are kept out of the
manifest so that two exports of a checkpoint give the same digest.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.manifest import ComponentName, Count, Record
from latentrt.bundle.strict_json import AmbiguousJSONError, StrictDecoder

__all__ = ["REPORT_NAME", "ComponentCost", "ExportReport", "read_report", "write_report"]

REPORT_NAME = "export-report.json"
_MAX_BYTES = 1 << 20


class ComponentCost(Record, frozen=True, kw_only=True):
    """The wall time of a component's export, and the largest resident set of its process."""

    seconds: float
    peak_bytes: Count


class ExportReport(Record, frozen=True, kw_only=True):
    """The content of `export-report.json`, by component."""

    components: dict[ComponentName, ComponentCost]


_DECODER = StrictDecoder(ExportReport, max_bytes=_MAX_BYTES)


def write_report(folder: Path, report: ExportReport) -> None:
    """Write the report of the bundle in `folder`."""
    data = msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=2) + b"\n"
    (folder / REPORT_NAME).write_bytes(data)


def read_report(folder: Path) -> ExportReport | None:
    """Return the report of the bundle in `folder`; None if it is missing or cannot be read."""
    try:
        with open_regular(folder / REPORT_NAME) as file:
            return _DECODER.decode(read_at_most(file, _MAX_BYTES))
    except (OSError, AmbiguousJSONError):
        return None
