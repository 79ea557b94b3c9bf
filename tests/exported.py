"""Bundles exported from tiny checkpoints, made once for all the tests of a run (and of all its processes).

Exporting takes most of a minute, so pytest-xdist's workers share them behind a lock, and LATENTRT_TEST_BUNDLES names a
folder in which they are kept from run to run while one works on something else than the exporter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Component, Precision
from latentrt_export import write
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.export import export_checkpoint
from latentrt_export.worker import Done, Job, run_job
from tests.tiny import Family, Task, make_checkpoint
from tests.tiny_preview import make_preview_decoder
from tests.tiny_xl import Kind, make_xl_checkpoint
from tests.traced_once import tracing_once


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A checkpoint and the bundle that was made of it."""

    family: Family
    checkpoint: Path
    variant: str | None
    bundle: Path


class Silent:
    """A progress that keeps warnings and phases for a test to look at."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.phases: list[tuple[str, str]] = []

    def phase(self, component: str, text: str) -> None:
        self.phases.append((component, text))

    def done(self, component: str, record: Component, cost: ComponentCost) -> None:
        self.phases.append((component, "done"))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextlib.contextmanager
    def download(self, title: str, size: int) -> Iterator[Callable[[int], None]]:
        received: list[int] = []
        yield received.append
        self.phases.append((title, f"{sum(received)} of {size} bytes"))


def exported(factory: pytest.TempPathFactory, family: Family) -> Exported:
    """SD 1.x in float32 from sharded weights, or SD 2.x in float16 from the hub's fp16 variant and with a tiny
    autoencoder; both with a part for DeepCache."""
    root = _root(factory)
    if not _make(root, family, wait=False):
        # Another process is at it. Meanwhile make the other one, which will be wanted as well.
        _make(root, "sd2" if family == "sd1" else "sd1", wait=False)
        _make(root, family, wait=True)
    variant = "fp16" if family == "sd2" else None
    return Exported(family=family, checkpoint=root / f"{family}-checkpoint", variant=variant, bundle=root / family)


def exported_task(
    factory: pytest.TempPathFactory, task: Task, family: Family = "sd1", *, parts: bool = False
) -> Exported:
    """A bundle of another task in float32, without a classifier."""
    root = _root(factory)
    checkpoint, bundle = root / f"{task}-checkpoint", root / task
    with FileLock(root / f"{task}.lock"):
        if not bundle.exists():
            make_checkpoint(checkpoint, family, task=task, safety="none")
            with exporting_in_process(), tracing_once(root / "traces"):
                export_checkpoint(checkpoint, bundle, parts=parts, progress=Silent())
    return Exported(family=family, checkpoint=checkpoint, variant=None, bundle=bundle)


def exported_xl(
    factory: pytest.TempPathFactory, kind: Kind = "base", *, statistics: bool = False, parts: bool = True
) -> tuple[Path, Path]:
    """Return a checkpoint of Stable Diffusion XL and its bundle in float32, without a classifier."""
    root, name = _root(factory), f"xl-{kind}{'-statistics' if statistics else ''}{'' if parts else '-whole'}"
    checkpoint, bundle = root / f"{name}-checkpoint", root / name
    with FileLock(root / f"{name}.lock"):
        if not bundle.exists():
            make_xl_checkpoint(checkpoint, kind, statistics=statistics)
            with exporting_in_process(), tracing_once(root / "traces"):
                export_checkpoint(checkpoint, bundle, parts=parts, progress=Silent())
    return checkpoint, bundle


@contextlib.contextmanager
def exporting_in_process() -> Iterator[None]:
    """Run component exports in this process, where torch is loaded, instead of one worker process each."""

    def run(job: Job, notify: Callable[[str], None], warn: Callable[[str], None]) -> Done:
        return Done(component=run_job(job, notify), cost=ComponentCost(seconds=0.0, peak_bytes=0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "run_worker", run)
        yield


def _root(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of bundles that all processes share."""
    shared = factory.getbasetemp().parent if os.environ.get("PYTEST_XDIST_WORKER") else factory.getbasetemp()
    root = Path(os.environ.get("LATENTRT_TEST_BUNDLES", shared / "bundles"))
    root.mkdir(parents=True, exist_ok=True)
    return root


def _make(root: Path, family: Family, *, wait: bool) -> bool:
    """Make a checkpoint and its bundle where they are not there yet; False where another process makes them."""
    try:
        with FileLock(root / f"{family}.lock", timeout=-1 if wait else 0):
            if not (root / family).exists():
                _make_now(root / f"{family}-checkpoint", root / family, family)
    except Timeout:
        return False
    return True


def _make_now(checkpoint: Path, bundle: Path, family: Family) -> None:
    if family == "sd1":
        make_checkpoint(checkpoint, family, max_shard_size="600KB", tokenizer="bpe")
    else:
        make_checkpoint(checkpoint, family, variant="fp16", tokenizer="json")
    precision: Precision = "float32" if family == "sd1" else "float16"
    preview = None if family == "sd1" else make_preview_decoder(checkpoint.with_name(f"{family}-preview"))
    with exporting_in_process(), tracing_once(bundle.parent / "traces"):
        export_checkpoint(
            checkpoint,
            bundle,
            precision=precision,
            given=GivenComponents(preview_decoder=preview),
            deep_cache=0,
            progress=Silent(),
        )
