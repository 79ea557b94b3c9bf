"""Where DeepCache splits: each branch of each kind of graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from diffusers import UNet2DConditionModel

from latentrt.errors import ExportError, RequestError
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.graphs.deep_cache import check_branch, count_branches, find_deep_features
from tests.exported import Exported
from tests.tiny import unet


@pytest.mark.parametrize(
    ("family", "graph"), [("sd1", "model"), ("sd2", "model"), ("sd2", "model.float32")], ids=["whole", "half", "casts"]
)
def test_the_deep_features_of_each_branch(request: pytest.FixtureRequest, family: str, graph: str) -> None:
    exported: Exported = request.getfixturevalue(family)
    model = ir.load(exported.bundle / "unet" / f"{graph}.onnx")
    found = [str(find_deep_features(model, branch).name).split("/")[0] for branch in range(6)]
    # The up path of the tiny denoiser, from its end: the value before each of two blocks on three levels.
    assert found == [
        "up_blocks.2.attentions.0",
        "up_blocks.1.upsamplers.0.conv",
        "up_blocks.1.attentions.0",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.0.resnets.0",
        "mid_block.resnets.1",
    ]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_branches_are_counted_from_the_configuration(request: pytest.FixtureRequest, family: str) -> None:
    exported: Exported = request.getfixturevalue(family)
    assert count_branches(read_object(exported.checkpoint / "unet" / "config.json")) == 6


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 12),
        ({"layers_per_block": 1}, 8),
        ({"layers_per_block": [1, 2, 3], "up_block_types": ["", "", ""]}, 9),
        ({"mid_block_type": None}, 11),
    ],
)
def test_missing_keys_have_diffusers_defaults(config: dict[str, Any], count: int) -> None:
    assert count_branches(config) == count


def test_counts_are_those_of_the_module() -> None:
    module = unet("sd1")
    assert isinstance(module, UNet2DConditionModel)
    assert count_branches(module.config) == sum(len(block.resnets) for block in module.up_blocks)


@pytest.mark.parametrize("branch", [-1, 6, 100])
def test_an_unknown_branch(sd1: Exported, branch: int) -> None:
    message = rf"branch {branch}, expected .* to 5"
    with pytest.raises(RequestError, match=message):
        check_branch(branch, 6)
    with pytest.raises(RequestError, match=message):
        find_deep_features(ir.load(sd1.bundle / "unet" / "model.onnx"), branch)


def test_a_block_without_a_skip_is_rejected(sd1: Exported, tmp_path: Path) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    join = find_deep_features(model, 0).consumers()[0]
    ir.convenience.replace_all_uses_with(join.outputs[0], join.inputs[1])  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"concatenation before up_blocks\.2\.resnets\.1\.norm1\.weight"):
        find_deep_features(model, 0)


def test_without_a_middle_block_there_is_no_deepest_branch() -> None:
    """The value that enters the deepest residual block of the up path is the skip that is joined to it."""
    value = ir.val("x", dtype=ir.DataType.FLOAT, shape=["evaluations", 4, "height", "width"])
    join = ir.node("Concat", [value, value], {"axis": 1})
    weights = [
        ir.val("up_blocks.0.resnets.0.norm1.weight", const_value=ir.tensor([1.0] * 8, name="weight")),
    ]
    norm = ir.node("GroupNormalization", [join.outputs[0], *weights])
    model = ir.Model(
        ir.Graph([value], norm.outputs, nodes=[join, norm], initializers=weights, opset_imports={"": 21}), ir_version=10
    )
    with pytest.raises(RequestError, match="this denoiser has none"):
        find_deep_features(model, 0)
