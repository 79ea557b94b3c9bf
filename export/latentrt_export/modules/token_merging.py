"""Token merging in the denoiser's self-attention (ToMe for Stable Diffusion: Bolya and Hoffman 2023,
https://arxiv.org/abs/2303.17604).

Neighbouring tokens are often nearly equal. The first token of each cell of 2 × 2 is a destination, the other three are
sources. The sources most similar to a destination (by the cosine of the block's input) are averaged into their most
similar destination, as many as the ratio says; attention runs over the remaining tokens; a merged token then gets the
output of its destination. The defaults are the authors' (dbolya/tomesd): only blocks of the highest resolution, only
their self-attention, with a new matching in each block.

Differences from the authors' code, and choices that it leaves open:

- The highest resolution is the highest that has attention, where most of a model's tokens are. The authors use the
  resolution of the latents, at which some models have no attention.
- The destination is the first token of each cell (the authors' `use_rand=False`), so that a seed gives one image.
- The last row or column of an odd side belongs to no cell and has sources only, as in the authors' code.
- The number of merged tokens is rounded down from the ratio's decimal value: 0.29 of 100 is 29, where binary floats
  give 28.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from latentrt.bundle.manifest import TokenMerging
from latentrt.errors import CheckpointError
from latentrt_export.token_merging_ratio import MATCHING, check_ratio

__all__ = ["Matching", "TokenMatching", "force_matchings", "install", "merge", "read_matchings", "unmerge"]


class Matching(NamedTuple):
    """The merged tokens and their destinations: B samples, N tokens, D destinations, M merged, R = N − M remaining.

    Attributes:
        first: int64 (D,), the indices of the destinations among a sample's tokens.
        unmerged: int64 (B, R − D), the indices of the remaining sources in the flattened tokens of all samples (B · N).
        merged: int64 (B, M), the indices of the merged tokens in the same flattened tokens.
        shares: float32 (B, D, M), the weight of each merged token in each destination's mean.
        own: float32 (B, D, 1), the weight of the destination itself in its mean.
        back: int64 (B, N), the index of each token's result in the flattened remaining tokens (B · R).
    """

    first: Tensor
    unmerged: Tensor
    merged: Tensor
    shares: Tensor
    own: Tensor
    back: Tensor


class TokenMatching(nn.Module):
    """The decision which tokens are merged. Computes in float32 for every input, because cosines are nearly equal."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = Fraction(repr(ratio))
        # The decisions of the last evaluation: the destination of each token, and the order of merging.
        self.decisions: dict[str, Tensor] = {}
        # The decisions to use in every evaluation in place of computed ones; empty for none.
        self.forced: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Matching:
        """Match tokens.

        Args:
            tokens: (B, N, C), the block's input.
            size: the height and width of the N tokens.
        """
        batch, count, _ = tokens.shape
        first = _find_first_of_cells(size)
        cells = first.shape[0]
        merged = count * self.ratio.numerator // self.ratio.denominator
        best, cell = self._find_destinations(tokens, first)
        order = self._sort_by_similarity(best, first)
        if self.forced:
            cell, order = self.forced["ArgMax"], self.forced["TopK"]
        if not torch.compiler.is_exporting():
            self.decisions = {"ArgMax": cell, "TopK": order}
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(count).expand(batch, count))
        # Splits, not slices: the tracer knows the sizes of their results.
        gone, stay, _ = torch.split_with_sizes(order, [merged, count - cells - merged, cells], dim=1)
        into = cell.gather(1, gone)
        one_hot = (into[:, None, :] == torch.arange(cells)[None, :, None]).float()  # (B, D, M)
        own = (one_hot.sum(dim=2, keepdim=True) + 1).reciprocal()
        left = count - merged
        # The remaining sources come first, then the destinations.
        # The clamp changes no index that is chosen; it proves to `latentrt.bundle.graph_ranges` that none is below 0.
        back = torch.where(rank < merged, left - cells + cell, (rank - merged).clamp(min=0))
        sample = torch.arange(batch)[:, None]
        return Matching(
            first=first,
            unmerged=stay + sample * count,
            merged=gone + sample * count,
            shares=one_hot * own,
            own=own,
            back=back + sample * left,
        )

    def _find_destinations(self, tokens: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's largest cosine with a destination, and that destination's index: (B, N) each."""
        tokens = tokens.float()
        direction = tokens / tokens.norm(dim=2, keepdim=True)
        similarity = direction @ direction.index_select(1, first).transpose(1, 2)  # (B, N, D)
        return similarity.amax(dim=2), similarity.argmax(dim=2)

    def _sort_by_similarity(self, best: Tensor, first: Tensor) -> Tensor:
        """Return token indices (B, N): sources by decreasing similarity, then the destinations in their order."""
        below = -(torch.arange(first.shape[0]) + 2.0)  # distinct, and below every cosine
        ranked = best.scatter(1, first.expand(best.shape[0], -1), below.expand(best.shape[0], -1))
        return ranked.topk(ranked.shape[1], dim=1).indices


def merge(tokens: Tensor, matching: Matching) -> Tensor:
    """Merge tokens (B, N, C) → (B, R, C): the remaining sources, then each destination's mean."""
    rows = tokens.flatten(0, 1)
    merged = functional.embedding(matching.merged, rows)
    means = tokens.index_select(1, matching.first) * matching.own + matching.shares @ merged
    return torch.cat([functional.embedding(matching.unmerged, rows), means], dim=1)


def unmerge(tokens: Tensor, matching: Matching) -> Tensor:
    """Expand merged tokens (B, R, C) → (B, N, C): each merged token gets the value of its destination."""
    return functional.embedding(matching.back, tokens.flatten(0, 1))


def _find_first_of_cells(size: tuple[int, int]) -> Tensor:
    """Return the indices (D,) of each cell's first token, for tokens counted row by row."""
    height, width = size
    rows, columns = torch.arange(height // 2) * (2 * width), torch.arange(width // 2) * 2
    return (rows[:, None] + columns).flatten()


def install(model: Any, ratio: float) -> TokenMerging:
    """Make a UNet2DConditionModel merge tokens in the self-attention of its highest resolution that has attention.

    Returns:
        The record for the manifest.

    Raises:
        RequestError: the ratio is out of range.
        CheckpointError: the down and up blocks have no attention.
    """
    check_ratio(ratio)
    names = _find_attention_blocks(model)
    if not names:
        raise CheckpointError(
            "unet: got no attention in its down and up blocks, expected some to merge tokens in; omit --token-merging"
        )
    for name in names:
        transformer, _, _ = name.rpartition(".transformer_blocks.")
        _Merging(model.get_submodule(transformer), model.get_submodule(name), ratio)
    return TokenMerging(ratio=ratio, blocks=names)


def _find_attention_blocks(model: Any) -> tuple[str, ...]:
    """Return the names of the transformer blocks of the highest resolution that has any; empty if there are none.

    A down block attends before it halves its sides, an up block before it doubles them.
    """
    for level in range(len(model.down_blocks)):
        names = [
            f"{side}.attentions.{number}.transformer_blocks.{position}"
            for side in (f"down_blocks.{level}", f"up_blocks.{len(model.up_blocks) - 1 - level}")
            for number, transformer in enumerate(getattr(model.get_submodule(side), "attentions", ()))
            for position in range(len(transformer.transformer_blocks))
        ]
        if names:
            return tuple(names)
    return ()


def read_matchings(model: Any) -> dict[str, NDArray[np.int64]]:
    """Return the decisions of each matching in the last evaluation, int64 [B, N], by the name of the graph's node.

    The names are those of `latentrt_export.gates.token_merging.force_decisions`.
    """
    return {
        f"{name}/{decision}": array.numpy()
        for name, module in model.named_modules()
        if isinstance(module, TokenMatching)
        for decision, array in module.decisions.items()
    }


@contextmanager
def force_matchings(model: Any, matchings: Mapping[str, NDArray[np.int64]]) -> Iterator[None]:
    """Use the decisions of another evaluation (`read_matchings`) in every evaluation inside the context."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, TokenMatching)]
    for name, module in modules:
        module.forced = {each: torch.from_numpy(matchings[f"{name}/{each}"]) for each in ("ArgMax", "TopK")}
    try:
        yield
    finally:
        for _, module in modules:
            module.forced = {}


class _Merging:
    """The hooks of one block that merges tokens. Hooks keep diffusers' modules, after which the weights are named."""

    def __init__(self, transformer: Any, block: Any, ratio: float) -> None:
        block.add_module(MATCHING, TokenMatching(ratio))
        self.size: tuple[int, int] = (0, 0)
        self.current: Any = None
        transformer.register_forward_pre_hook(self._measure)
        block.register_forward_pre_hook(self._match)
        block.attn1.register_forward_pre_hook(self._merge)
        block.attn1.register_forward_hook(self._unmerge)

    def _measure(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.size = (inputs[0].shape[2], inputs[0].shape[3])

    def _match(self, module: Any, inputs: tuple[Any, ...]) -> None:
        # A call of the block's child module, so that the tracer names the nodes after it.
        self.current = module.get_submodule(MATCHING)(inputs[0], self.size)

    def _merge(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (merge(inputs[0], self.current), *inputs[1:])

    def _unmerge(self, module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return unmerge(output, self.current)
