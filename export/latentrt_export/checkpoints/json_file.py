"""Reads the JSON files of a checkpoint, with an error for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint_files import read_text_file

__all__ = ["read_object"]

# The index of a model's shards has some 100 kB.
_LARGEST_BYTES = 16 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        CheckpointError: the file is missing, cannot be read, is too large, is not JSON, or does not contain an object.
    """
    try:
        value = json.loads(read_text_file(path, _LARGEST_BYTES).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; the checkpoint is incomplete, download it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; the checkpoint is damaged, download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
