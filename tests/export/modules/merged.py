"""Token merging as a module of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.modules.module import Arrays, ComponentModule
from latentrt_export.modules.token_merging import TokenMatching, merge, read_matchings, unmerge


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


class Merged(ComponentModule):
    """Tokens there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.token_matching = TokenMatching(0.5)
        self.inputs = (TensorSpec("x", "float32", ("batch", 8, "height", "width")),)
        self.outputs = (
            TensorSpec("long", "float32", ("batch", "tokens", 8)),
            TensorSpec("short", "float32", ("batch", "left", 8)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(2).transpose(1, 2)
        matching = self.token_matching(tokens, (x.shape[2], x.shape[3]))
        short = merge(tokens, matching)
        return unmerge(short, matching), short

    def matchings(self) -> Arrays:
        return read_matchings(self)
