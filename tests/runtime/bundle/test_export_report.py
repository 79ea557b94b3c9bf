from __future__ import annotations

import os
from pathlib import Path

from latentrt.bundle.export_report import REPORT_NAME, ComponentCost, ExportReport, read_report, write_report


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = ExportReport(components={"unet": ComponentCost(seconds=1.5, peak_bytes=7)})
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


def test_a_missing_report_and_a_pipe(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    os.mkfifo(tmp_path / REPORT_NAME)
    assert read_report(tmp_path) is None
