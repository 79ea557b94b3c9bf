"""A bundle whose denoiser merges tokens: its graphs, its parts, and images on both CPU backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt import Pipeline
from latentrt.bundle.bundle import Bundle
from latentrt_export.export import export_checkpoint
from tests.exported import Exported, Silent

pytestmark = pytest.mark.slow  # an export of its own


@pytest.fixture(scope="module")
def merged(sd2: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merged") / "bundle"
    export_checkpoint(sd2.checkpoint, place, precision="float16", deep_cache=0, token_merging=0.5, progress=Silent())
    return place


def test_the_manifest_records_ratio_and_blocks(merged: Path, sd2: Exported) -> None:
    components = Bundle.open(merged).manifest.components
    record = components["unet"].token_merging
    assert record is not None
    assert (record.ratio, len(record.blocks)) == (0.5, 3)
    assert all(component.token_merging is None for name, component in components.items() if name != "unet")
    assert all(component.token_merging is None for component in Bundle.open(sd2.bundle).manifest.components.values())


def test_the_matching_computes_in_float32_in_every_graph(merged: Path) -> None:
    unet = Bundle.open(merged).manifest.components["unet"]
    graphs = [("whole", record) for record in unet.graphs.values()]
    graphs += [(name, record) for name in ("body", "shallow_body") for record in unet.parts[name].graphs.values()]
    for name, record in graphs:
        model = ir.load(merged / record.file)
        deciding = [node for node in model.graph if node.op_type in ("ArgMax", "TopK")]
        # At branch 0 the last block alone is shallow.
        assert len(deciding) == 2 * (1 if name == "shallow_body" else 3), record.file
        assert {node.inputs[0].dtype for node in deciding if node.inputs[0] is not None} == {ir.DataType.FLOAT}


def test_its_gates_compare_the_matchings(merged: Path) -> None:
    unet = Bundle.open(merged).manifest.components["unet"]
    for graph in unet.graphs.values():
        matchings = {result.output for result in graph.gate if result.output.endswith(".token_matching")}
        assert len(matchings) == 3
        assert all(result.value <= result.bound for result in graph.gate)


@pytest.mark.parametrize("deep_cache", [1, 2])
def test_both_backends_generate_the_same_image_and_record_the_ratio(
    merged: Path, sd2: Exported, deep_cache: int
) -> None:
    images = {}
    for name, bundle, device in (
        ("cpu", merged, "cpu"),
        ("openvino", merged, "openvino"),
        ("exact", sd2.bundle, "cpu"),
    ):
        generated = Pipeline.load(bundle, device=device)(  # type: ignore[arg-type]
            "a star", seed=7, num_inference_steps=4, height=72, width=88, deep_cache=deep_cache, safety="off"
        )
        images[name] = np.asarray(generated.images[0]).astype(int)
        assert generated.records[0].token_merging == (0.0 if name == "exact" else 0.5)
    assert np.abs(images["cpu"] - images["exact"]).max() > 2
    # Sums in another order, then rounding; where two cosines are alike, a token may go elsewhere.
    assert np.abs(images["cpu"] - images["openvino"]).mean() < 1
