"""Finds where DeepCache splits the denoiser (Ma, Fang and Wang 2023, https://arxiv.org/abs/2312.00858).

The features of the deep layers change little from step to step, so a step may reuse those of an earlier one and compute
only the shallow layers: the first blocks of the down path, whose outputs the last blocks of the up path read as skips.
Branch b splits before the b-th residual block of the up path, counted from its end, where the deep features are
concatenated with the skip. It is `cache_branch_id` in the authors' code (horseee/DeepCache,
`DeepCache/extension/deepcache.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from latentrt.errors import ExportError, RequestError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DEEP_FEATURES", "check_branch", "count_branches", "find_deep_features"]

DEEP_FEATURES = "deep_features"
# diffusers' defaults for `up_block_types` and `mid_block_type`.
_DEFAULT_LEVELS, _MIDDLE_BLOCK = range(4), "UNetMidBlock2DCrossAttn"
# Operators that change a value's type and compute nothing.
_RETYPES = {"Cast", "QuantizeLinear", "DequantizeLinear"}
# The norm that a residual block of the up path begins with.
_FIRST_NORM = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.norm1\.weight")


def count_branches(config: Mapping[str, Any]) -> int:
    """Count the branches of a denoiser from its configuration (diffusers' `UNet2DConditionModel`).

    Without a middle block there is no deepest branch: what would enter its residual block is the skip itself.
    """
    levels = len(config.get("up_block_types", _DEFAULT_LEVELS))
    layers = config.get("layers_per_block", 2)
    blocks: int = sum(layers) + levels if isinstance(layers, list) else levels * (layers + 1)
    return blocks if config.get("mid_block_type", _MIDDLE_BLOCK) is not None else blocks - 1


def check_branch(branch: int, count: int) -> None:
    """Reject a branch that a denoiser with `count` branches does not have.

    Raises:
        RequestError: the branch is outside of 0 … count − 1.
    """
    if not count:
        raise RequestError(f"got the DeepCache branch {branch}, and this denoiser has none; leave it out")
    if not 0 <= branch < count:
        raise RequestError(
            f"got the DeepCache branch {branch}, expected one of this denoiser's: 0 (the shallowest) to {count - 1}"
        )


def find_deep_features(model: ir.Model, branch: int) -> ir.Value:
    """Return the value that enters a branch's residual block, before it is concatenated with the skip.

    Raises:
        RequestError: the denoiser has no such branch.
        ExportError: the block does not begin with a concatenation.
    """
    norms = _find_first_norms(model.graph.initializers)
    check_branch(branch, len(norms))
    norm = _find_reader(model.graph.initializers[norms[branch]])
    joined = _skip_retypes(norm.inputs[0]) if norm is not None else None
    join = joined.producer() if joined is not None else None
    deep = join.inputs[0] if join is not None and join.op_type == "Concat" and len(join.inputs) == 2 else None
    if deep is None:
        raise ExportError(
            f"got a graph without a skip concatenation before {norms[branch]}, so DeepCache cannot split it; "
            "pass `deep_cache=None`"
        )
    if join is not None and deep is join.inputs[1]:  # without a middle block
        check_branch(branch, len(norms) - 1)
    return deep


def _find_first_norms(weights: Iterable[str]) -> list[str]:
    """Return the name of the first norm's weight in each residual block of the up path, the last block first."""
    found = [match for name in weights if (match := _FIRST_NORM.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), int(match[2])), reverse=True)]


def _find_reader(weight: ir.Value) -> ir.Node | None:
    """Return the first node that reads a weight, behind any changes of type; None if there is none."""
    for node in weight.consumers():
        return _find_reader(node.outputs[0]) if node.op_type in _RETYPES else node
    return None


def _skip_retypes(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    return _skip_retypes(node.inputs[0]) if node is not None and node.op_type in _RETYPES else value
