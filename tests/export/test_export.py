"""Options that an export cannot honour are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.export import export_checkpoint
from tests.exported import Exported, Silent


def test_a_single_file_has_no_variants(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="--variant: got fp16"):
        export_checkpoint(file, tmp_path / "bundle", variant="fp16", progress=Silent())


@pytest.mark.parametrize("options", [{"prediction_type": "v_prediction"}, {"config": Path("elsewhere")}])
def test_options_for_single_files_are_refused_with_a_folder(
    sd1: Exported, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="with a single file only"):
        export_checkpoint(sd1.checkpoint, tmp_path / "bundle", progress=Silent(), **options)
    assert list(tmp_path.iterdir()) == []
