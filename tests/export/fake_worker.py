"""An exporter whose components take no time: small files in place of graphs and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Component, GateResult, GraphRecord, InputSpec, Precision, WeightsRecord
from latentrt.bundle.tensors import TensorSpec
from latentrt_export.worker import Done, Job
from tests.export.skeleton import write_skeleton
from tests.tiny import write_tokenizer

COST = ComponentCost(seconds=12.3, peak_bytes=3 * 2**30)


@dataclass
class FakeWorker:
    """Stands where `run_worker` does.

    Attributes:
        content: what the files hold.
        fail: the error to raise at a component, by its name.
        precision: of the graphs; None: the job's.
        jobs: the jobs received, in order.
    """

    content: bytes = b"fake"
    fail: dict[str, BaseException] = field(default_factory=dict)
    precision: Precision | None = None
    jobs: list[Job] = field(default_factory=list)

    def __call__(self, job: Job, on_phase: Callable[[str], None]) -> Done:
        self.jobs.append(job)
        on_phase("tracing")
        folder = Path(job.folder)
        folder.mkdir()
        for name in ("model.onnx", "model.safetensors"):
            (folder / name).write_bytes(self.content)
        if job.component.name in self.fail:
            raise self.fail[job.component.name]
        return Done(component=fake_component(job, self.precision), cost=COST)


def fake_component(job: Job, precision: Precision | None = None) -> Component:
    plan = job.component
    shapes: dict[str, tuple[int | str, ...]] = {"tokens": ("chunks", 77)}
    inputs = tuple(
        InputSpec(name, "float32", shapes.get(source, ("batch", 4)), source) for name, source in plan.sources.items()
    )
    outputs = tuple(TensorSpec(name, "float32", ("batch", 4)) for name in ("x", "hidden_states"))
    gate = GateResult(output="x", shapes={"x": (1, 4)}, metric="relative", value=2e-6, bound=1e-4)
    graph = GraphRecord(file=f"{plan.name}/model.onnx", opset=21, nodes=3, gate=(gate,))
    return Component(
        role=plan.role,
        inputs=inputs,
        outputs=outputs,
        weights=WeightsRecord(
            file=f"{plan.name}/model.safetensors", dtype=job.precision, tensors=1, parameters=123_456_789
        ),
        graphs={precision or job.precision: graph},
    )


def install(monkeypatch: pytest.MonkeyPatch, worker: FakeWorker) -> FakeWorker:
    monkeypatch.setattr("latentrt_export.write.run_worker", worker)
    return worker


def write_described(folder: Path, *, safety: bool = True) -> Path:
    """A checkpoint that everything but a worker can read."""
    write_skeleton(folder, safety=safety)
    write_tokenizer(folder / "tokenizer", "sd1", "bpe")
    return folder
