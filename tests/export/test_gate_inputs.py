"""The exporter and the engine builder compare on the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.onnxruntime import open_session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate_inputs import make_gate_inputs
from latentrt.bundle.graph_check import find_ranges
from latentrt.bundle.staging import Stage
from latentrt.bundle.tensors import sized
from latentrt_engines.self_check import GateInputs
from latentrt_export import write
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.families import PIPELINES, plan_export
from latentrt_export.worker import Job, run_job
from tests.exported import Exported

SIZES = {
    "chunks": 3,
    "batch": 1,
    "evaluations": 3,
    "images": 2,
    "height": 9,
    "width": 12,
    "tokens": 154,
    "pixel_height": 40,
    "pixel_width": 56,
}


@pytest.fixture(scope="module")
def exporters(sd1: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.generic]]:
    """The arrays that the exporter's workers pass on."""
    folder = tmp_path_factory.mktemp("arrays")
    checkpoint = open_checkpoint(sd1.checkpoint, pipelines=PIPELINES)
    plan, bundle = plan_export(checkpoint), Bundle.open(sd1.bundle)
    stage = Stage(bundle=bundle.folder, scratch=folder)
    path = write._write_first_arrays(plan, stage, bundle.manifest.tokenizers, None)
    for component in plan.components:
        if component.role in ("text-encoder", "encoder"):
            weights = checkpoint.weights[component.weights]
            job = Job(
                component=component,
                checkpoint=str(weights.root),
                variant=weights.variant,
                precision="float32",
                folder=str(folder / component.name),
                gate_inputs=str(path),
                latent_space=plan.latent_spaces["unet"],
                ranges=find_ranges(plan.limits, bundle.manifest.tokenizers.get(component.name)),
            )
            run_job(job, lambda text: None)
    with np.load(path) as stored:
        return dict(stored)


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder", "unet", "vae_decoder", "safety_checker"])
def test_they_are_the_builders(sd1: Exported, exporters: dict[str, NDArray[np.generic]], name: str) -> None:
    bundle = Bundle.open(sd1.bundle)
    inputs = bundle.manifest.components[name].inputs
    shapes = {spec.name: sized(spec, SIZES) for spec in inputs}
    theirs = GateInputs(bundle, lambda each, precision: open_session(bundle, each, precision=precision))
    found, expected = theirs.feeds(name, shapes), make_gate_inputs(name, inputs, shapes, exporters)
    assert list(found) == list(expected) == [spec.name for spec in inputs]
    for spec in inputs:
        if spec.source == "latents" or "." in spec.source:
            # Made by torch for the one and by ONNX Runtime for the other: within the bound of their gate.
            difference = np.abs(found[spec.name] - expected[spec.name]).max()
            assert difference <= 1e-4 * np.abs(expected[spec.name]).max()
        else:
            np.testing.assert_array_equal(found[spec.name], expected[spec.name])
