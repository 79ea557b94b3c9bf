"""JSON files of a checkpoint are bounded before anything is made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import json_file
from latentrt_export.checkpoints.json_file import read_object


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_the_bounds(tmp_path: Path) -> None:
    path, most, keys = tmp_path / "config.json", json_file._MAX_VALUES, json_file._MAX_KEYS
    assert len(read_object(write(path, {"a": [0] * (most - 10)}))["a"]) == most - 10
    with pytest.raises(CheckpointError, match=f"more than {most:,} values"):
        read_object(write(path, {"a": [0] * (most + 1)}))
    assert len(read_object(write(path, dict.fromkeys(range(keys))))) == keys
    with pytest.raises(CheckpointError, match=rf"has {keys + 1:,} keys, expected at most {keys:,}"):
        read_object(write(path, dict.fromkeys(range(keys + 1))))
    os.truncate(path, json_file._MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"expected at most {json_file._MAX_BYTES:,}"):
        read_object(path)
