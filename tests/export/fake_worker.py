"""An exporter whose components take no time: small files in place of graphs and weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Component, GateResult, GraphRecord, InputSpec, Precision, WeightsRecord
from latentrt.bundle.tensors import DType, TensorSpec
from latentrt_export.worker import Done, Job
from tests.export.skeleton import write_skeleton
from tests.runtime.small_bundle import natural_metric
from tests.tiny import write_tokenizer

COST = ComponentCost(seconds=12.3, peak_bytes=3 * 2**30)


@dataclass
class FakeWorker:
    """Stands where `run_jobs` does.

    Attributes:
        content: what the files hold.
        fail: the error to raise at a component, by its name.
        precision: of the graphs; None: the job's.
        warnings: of every component.
        jobs: the jobs received, in order.
    """

    content: bytes = b"fake"
    fail: dict[str, BaseException] = field(default_factory=dict)
    precision: Precision | None = None
    warnings: tuple[str, ...] = ()
    jobs: list[Job] = field(default_factory=list)

    def __call__(
        self, jobs: Sequence[Job], notify: Callable[[str, str], None], warn: Callable[[str], None]
    ) -> Generator[Done, None, None]:
        for job in jobs:
            yield self.run_one(job, partial(notify, job.component.name), warn)

    def run_one(self, job: Job, on_phase: Callable[[str], None], warn: Callable[[str], None]) -> Done:
        self.jobs.append(job)
        on_phase("tracing")
        for text in self.warnings:
            warn(text)
        folder = Path(job.folder)
        folder.mkdir()
        for name in ("model.onnx", "model.safetensors"):
            (folder / name).write_bytes(self.content)
        if job.component.name in self.fail:
            raise self.fail[job.component.name]
        return Done(component=fake_component(job, self.precision), cost=COST)


def fake_component(job: Job, precision: Precision | None = None) -> Component:
    plan = job.component
    inputs, outputs = _signature(job)
    gate = GateResult(
        output=outputs[0].name,
        shapes={"x": (1, 4)},
        metric=natural_metric(plan.role, outputs[0]),
        value=2e-6,
        bound=1e-4,
    )
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


def _signature(job: Job) -> tuple[tuple[InputSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs that a component of the job's role may have."""
    plan, space = job.component, job.latent_space
    latents: tuple[int | str, ...] = ("batch", space.channels, "height", "width")
    factor = "" if space.downscale == 1 else f"{space.downscale}*"
    sides = (f"{factor}height", f"{factor}width")
    of_source: dict[str, tuple[DType, tuple[int | str, ...]]] = {
        "latents": ("float32", latents),
        "image": ("float32", ("batch", 3, *sides)),
        "images": ("uint8", ("batch", "pixel_height", "pixel_width", 3)),
        "tokens": ("int64", ("batch", 77)),
    }
    inputs = tuple(
        InputSpec(name, *of_source.get(source, ("float32", ("batch",))), source)
        for name, source in plan.sources.items()
    )
    outputs: dict[str, tuple[TensorSpec, ...]] = {
        "denoiser": (TensorSpec("noise_pred", "float32", latents),),
        "decoder": (TensorSpec("pixels", "uint8", ("batch", *sides, 3)),),
        "preview-decoder": (TensorSpec("pixels", "uint8", ("batch", *sides, 3)),),
        "encoder": (TensorSpec("mean", "float32", latents), TensorSpec("logvar", "float32", latents)),
        "text-encoder": (TensorSpec("hidden_states", "float32", ("batch", 77, 4)),),
        "classifier": (
            TensorSpec("concept_scores", "float32", ("batch", 17)),
            TensorSpec("special_care_scores", "float32", ("batch", 3)),
            TensorSpec("flagged", "bool", ("batch",)),
        ),
    }
    return inputs, outputs.get(plan.role, (TensorSpec("image_embeds", "float32", ("batch", 4)),))


def install(monkeypatch: pytest.MonkeyPatch, worker: FakeWorker) -> FakeWorker:
    monkeypatch.setattr("latentrt_export.write.run_jobs", worker)
    return worker


def write_described(folder: Path, *, safety: bool = True) -> Path:
    """A checkpoint that everything but a worker can read."""
    write_skeleton(folder, safety=safety)
    write_tokenizer(folder / "tokenizer", "sd1", "bpe")
    return folder
