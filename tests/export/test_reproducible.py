"""The same checkpoint and options give the same bundle, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.export_report import REPORT_NAME, read_report
from latentrt_export import write
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.export import export_checkpoint
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.worker import Done, Job, run_job, run_jobs
from tests.exported import Exported, Silent


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != REPORT_NAME]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def export(exported: Exported, folder: Path, **options: Any) -> Bundle:
    export_checkpoint(exported.checkpoint, folder, variant=exported.variant, deep_cache=0, progress=Silent(), **options)
    return Bundle.open(folder)


class StoppedError(Exception):
    """Ends an export after its first component."""


def test_a_component_exported_in_two_processes_is_the_same(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has its own seed of string hashes."""
    found: dict[str, dict[str, bytes]] = {}

    def run(
        jobs: Sequence[Job], notify: Callable[[str, str], None], warn: Callable[[str], None]
    ) -> Generator[Done, None, None]:
        job = jobs[0]
        (done,) = run_jobs([job], notify, warn)
        assert done.cost.seconds > 0
        assert done.cost.peak_bytes > 1 << 20
        found["worker"] = contents(Path(job.folder))
        here = msgspec.structs.replace(job, folder=str(tmp_path / job.component.name))
        assert run_job(here, lambda text: None) == done.component
        found["here"] = contents(Path(here.folder))
        yield done
        raise StoppedError

    monkeypatch.setattr(write, "run_jobs", run)
    with pytest.raises(StoppedError):
        export(sd1, tmp_path / "bundle")
    assert len(found["worker"]) == 2  # the graph and the weights
    assert found["worker"] == found["here"]


@pytest.mark.slow
def test_a_second_export_is_the_same(sd1: Exported, tmp_path: Path) -> None:
    first, second = (export(sd1, tmp_path / name) for name in ("first", "second"))
    assert second.digest == first.digest
    assert contents(second.folder) == contents(first.folder)
    report = read_report(second.folder)
    assert report is not None
    assert {*report.components} == {*second.manifest.components}
    assert all(cost.seconds > 0 and cost.peak_bytes > 1 << 20 for cost in report.components.values())


@pytest.mark.slow
def test_a_second_export_in_half_is_the_same(sd2: Exported, tmp_path: Path) -> None:
    given = GivenComponents(preview_decoder=sd2.checkpoint.with_name("sd2-preview"))
    first, second = (export(sd2, tmp_path / name, precision="float16", given=given) for name in ("first", "second"))
    assert second.digest == first.digest
    assert contents(second.folder) == contents(first.folder)


@pytest.mark.slow
def test_a_second_export_in_int8_is_the_same(sd1: Exported, tmp_path: Path) -> None:
    quantization = QuantizationOptions(prompts=("red circle",), steps=2)
    first, second = (
        export(sd1, tmp_path / name, precision="int8", quantization=quantization) for name in ("first", "second")
    )
    assert second.digest == first.digest
    assert contents(second.folder) == contents(first.folder)
