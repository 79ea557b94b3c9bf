"""The export of one component. Its gate is in tests/export/gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentrt.errors import ExportError
from latentrt_export.component import export_component
from latentrt_export.worker import _check_graphs
from tests.export.gates.test_verify import LAYERS, SPACE, STATES, Normed


class Summed(Normed):
    """Layers with an operator that no exported graph has yet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(super().forward(x), dim=1)


def test_an_operator_that_the_runtime_would_refuse_fails_while_it_is_exported(tmp_path: Path) -> None:
    module = Summed().eval().requires_grad_(False)
    component, _ = export_component(module, LAYERS, tmp_path, "float32", STATES, SPACE, lambda text: None)
    with pytest.raises(ExportError, match=r"operator CumSum .* rule in latentrt\.bundle\.graph_shapes"):
        _check_graphs(component, tmp_path, {})  # with which a worker ends
