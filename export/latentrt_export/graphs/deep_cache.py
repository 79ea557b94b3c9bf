"""Where does DeepCache cut the denoiser? (Ma, Fang and Wang 2023, https://arxiv.org/abs/2312.00858)

What the deep layers make changes little from step to step, so a step may take it from an earlier one and compute only
the shallow layers: the first ones of the way down, whose outputs the last ones of the way up take as skips. Branch b
cuts before the b-th residual block of the way up, counted from its end, where the deep features meet that skip; it is
the `cache_branch_id` of the authors' code (horseee/DeepCache, `DeepCache/extension/deepcache.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from latentrt.errors import ExportError, RequestError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DEEP_FEATURES", "check_branch", "count_branches", "deep_value"]

DEEP_FEATURES = "deep_features"
_DIFFUSERS_LEVELS = range(4)  # what a configuration means that does not name its blocks
# They change a value's type and compute nothing with it.
_RETYPES = {"Cast", "QuantizeLinear", "DequantizeLinear"}
# The norm that a residual block of the way up begins with.
_FIRST_NORM = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.norm1\.weight")


def count_branches(config: Mapping[str, Any]) -> int:
    """How many branches a denoiser has, by its configuration (diffusers' `UNet2DConditionModel`)."""
    levels = len(config.get("up_block_types", _DIFFUSERS_LEVELS))
    layers = config.get("layers_per_block", 2)
    return sum(layers) + levels if isinstance(layers, list) else levels * (layers + 1)


def check_branch(branch: int, count: int) -> None:
    """Refuse a branch that a denoiser with so many does not have.

    Raises:
        RequestError: naming those it has.
    """
    if not 0 <= branch < count:
        raise RequestError(
            f"found the DeepCache branch {branch}, expected one of this denoiser's, 0 (the shallowest) to {count - 1}"
        )


def deep_value(model: ir.Model, branch: int) -> ir.Value:
    """What enters a branch's residual block, before it is joined with the skip.

    Raises:
        RequestError: there is no such branch.
        ExportError: the block does not begin as Stable Diffusion's do.
    """
    norms = _first_norms(model.graph.initializers)
    check_branch(branch, len(norms))
    norm = _reader(model.graph.initializers[norms[branch]])
    joined = _original(norm.inputs[0]) if norm is not None else None
    join = joined.producer() if joined is not None else None
    deep = join.inputs[0] if join is not None and join.op_type == "Concat" and len(join.inputs) == 2 else None
    if deep is None:
        raise ExportError(f"no features are joined with a skip before {norms[branch]}, so DeepCache cannot cut there")
    return deep


def _first_norms(weights: Iterable[str]) -> list[str]:
    """The weight that each residual block of the way up begins with, the last block first."""
    found = [match for name in weights if (match := _FIRST_NORM.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), int(match[2])), reverse=True)]


def _reader(weight: ir.Value) -> ir.Node | None:
    """The node that computes with a weight, in whatever type."""
    for node in weight.consumers():
        return _reader(node.outputs[0]) if node.op_type in _RETYPES else node
    return None


def _original(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    return _original(node.inputs[0]) if node is not None and node.op_type in _RETYPES else value
