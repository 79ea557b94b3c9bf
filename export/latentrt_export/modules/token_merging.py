"""Token merging in the denoiser's self-attention (ToMe for Stable Diffusion: Bolya and Hoffman 2023,
https://arxiv.org/abs/2303.17604).

Neighbouring tokens often say the same. Of each cell of 2 × 2 tokens the first is a destination, the others are sources.
A share of all tokens, those sources that are most like a destination (by the cosine of what enters the block), is
averaged into the destination that each is most like; attention runs over what is left; and a merged token takes what
its destination got. The defaults are the authors' (dbolya/tomesd): blocks of the highest resolution only, their
self-attention only, the matching made anew in each block.

Four things are decided here. The highest resolution is the highest that has attention, where most of a model's tokens
are; the authors' is that of the latents in any case, at which some models have none. The destinations are the first of
each cell, which the authors call `use_rand=False`: a seed has to give one image. The last row or column of an odd
side belongs to no cell, so it is all sources, as theirs. The number of merged tokens is rounded down from the ratio as
it is written: 0.29 of 100 is 29, where floats make it 28.
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
    """Which tokens are merged into which. B samples of N tokens, D destinations, M merged, R = N − M that are left.

    Attributes:
        first: (D,), the destinations among a sample's tokens.
        unmerged: (B, R − D), the sources that stay, counted through all samples' tokens (B · N).
        merged: (B, M), those that are merged, counted likewise.
        shares: (B, D, M), what of each merged token is in a destination's mean.
        own: (B, D, 1), what of a destination is in its mean.
        back: (B, N), where each token is in what is left, counted through all samples (B · R).
    """

    first: Tensor
    unmerged: Tensor
    merged: Tensor
    shares: Tensor
    own: Tensor
    back: Tensor


class TokenMatching(nn.Module):
    """Decides which tokens are merged, in float32 whatever its input: nearly equal cosines are compared here."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = Fraction(repr(ratio))
        # The decisions of the last evaluation: the destination of each token, and the order of merging.
        self.decisions: dict[str, Tensor] = {}
        # Decisions that are forced in every evaluation.
        self.forced: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Matching:
        """tokens: (B, N, C), what enters the block. size: their height and width."""
        batch, count, _ = tokens.shape
        first = _first_of_cells(size)
        cells = first.shape[0]
        merged = count * self.ratio.numerator // self.ratio.denominator
        best, cell = self._most_similar(tokens, first)
        order = self._order(best, first)
        if self.forced:
            cell, order = self.forced["ArgMax"], self.forced["TopK"]
        if not torch.compiler.is_exporting():
            self.decisions = {"ArgMax": cell, "TopK": order}
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(count).expand(batch, count))
        # Splits, as the tracer knows the sizes of what they give.
        gone, stay, _ = torch.split_with_sizes(order, [merged, count - cells - merged, cells], dim=1)
        into = cell.gather(1, gone)
        one_hot = (into[:, None, :] == torch.arange(cells)[None, :, None]).float()  # (B, D, M)
        own = (one_hot.sum(dim=2, keepdim=True) + 1).reciprocal()
        left = count - merged
        # The sources that stay come first, then the destinations.
        back = torch.where(rank < merged, left - cells + cell, rank - merged)
        sample = torch.arange(batch)[:, None]
        return Matching(
            first=first,
            unmerged=stay + sample * count,
            merged=gone + sample * count,
            shares=one_hot * own,
            own=own,
            back=back + sample * left,
        )

    def _most_similar(self, tokens: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The largest cosine of each token with a destination, and which: (B, N) each."""
        tokens = tokens.float()
        direction = tokens / tokens.norm(dim=2, keepdim=True)
        similarity = direction @ direction.index_select(1, first).transpose(1, 2)  # (B, N, D)
        return similarity.amax(dim=2), similarity.argmax(dim=2)

    def _order(self, best: Tensor, first: Tensor) -> Tensor:
        """The tokens (B, N), the sources from the most similar on, then the destinations as they stand."""
        below = -(torch.arange(first.shape[0]) + 2.0)  # every cosine, and no two alike
        ranked = best.scatter(1, first.expand(best.shape[0], -1), below.expand(best.shape[0], -1))
        return ranked.topk(ranked.shape[1], dim=1).indices


def merge(tokens: Tensor, matching: Matching) -> Tensor:
    """(B, N, C) → (B, R, C): the sources that stay, then each destination's mean."""
    rows = tokens.flatten(0, 1)
    merged = functional.embedding(matching.merged, rows)
    means = tokens.index_select(1, matching.first) * matching.own + matching.shares @ merged
    return torch.cat([functional.embedding(matching.unmerged, rows), means], dim=1)


def unmerge(tokens: Tensor, matching: Matching) -> Tensor:
    """(B, R, C) → (B, N, C): a merged token takes its destination's."""
    return functional.embedding(matching.back, tokens.flatten(0, 1))


def _first_of_cells(size: tuple[int, int]) -> Tensor:
    """(D,): where the destinations are among the tokens, row by row."""
    height, width = size
    rows, columns = torch.arange(height // 2) * (2 * width), torch.arange(width // 2) * 2
    return (rows[:, None] + columns).flatten()


def install(model: Any, ratio: float) -> TokenMerging:
    """Make a UNet2DConditionModel merge tokens in the self-attention of its blocks of the highest resolution that has
    any.

    Returns:
        The record for the manifest.

    Raises:
        RequestError: the ratio is impossible.
        CheckpointError: there is no attention in the down and up blocks.
    """
    check_ratio(ratio)
    names = _attending(model)
    if not names:
        raise CheckpointError(
            "unet: it has no attention in its down and up blocks, where tokens are merged; leave --token-merging out"
        )
    for name in names:
        transformer, _, _ = name.rpartition(".transformer_blocks.")
        _Merging(model.get_submodule(transformer), model.get_submodule(name), ratio)
    return TokenMerging(ratio=ratio, blocks=names)


def _attending(model: Any) -> tuple[str, ...]:
    """The transformer blocks of the highest resolution that has any. A down block attends before it halves its sides,
    an up block before it doubles them."""
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
    """Return the decisions of each matching in the last evaluation, by the name of the graph's node that decides
    (`latentrt_export.gates.token_merging`)."""
    return {
        f"{name}/{decision}": array.numpy()
        for name, module in model.named_modules()
        if isinstance(module, TokenMatching)
        for decision, array in module.decisions.items()
    }


@contextmanager
def force_matchings(model: Any, matchings: Mapping[str, NDArray[np.int64]]) -> Iterator[None]:
    """Force the decisions of another evaluation (`read_matchings`) inside the context."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, TokenMatching)]
    for name, module in modules:
        module.forced = {each: torch.from_numpy(matchings[f"{name}/{each}"]) for each in ("ArgMax", "TopK")}
    try:
        yield
    finally:
        for _, module in modules:
            module.forced = {}


class _Merging:
    """One block that merges. Hooks, as diffusers' modules stay the ones that the weights are named after."""

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
        # By way of the module, so that the tracer names the nodes after it.
        self.current = module.get_submodule(MATCHING)(inputs[0], self.size)

    def _merge(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (merge(inputs[0], self.current), *inputs[1:])

    def _unmerge(self, module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return unmerge(output, self.current)
