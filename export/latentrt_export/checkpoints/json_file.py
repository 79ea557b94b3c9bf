"""Reads the JSON files of a checkpoint, with an error for each kind of damage.

Their dialect is Python's, as `save_pretrained` writes it: numbers may be `Infinity` or `-Infinity`, and of two equal
keys the last counts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from latentrt.bundle.strict_json import AmbiguousJSONError, check_extent
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint_files import read_small_file

__all__ = ["read_object"]

# A configuration has a few kB, a hundred keys and lists of a thousand values; an index of shards has a key of each
# tensor, and a tokenizer's settings six values of each added token.
_MAX_BYTES, _MAX_VALUES, _MAX_KEYS = 1 << 20, 100_000, 10_000


def read_object(path: Path, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        path: the file.
        max_bytes: its largest size; by default that of a configuration.

    Raises:
        CheckpointError: the file is missing, cannot be read, is too large or nested too deep, has too many values or
            keys, is not JSON, does not contain an object, or has a NaN, which no setting can be.
    """
    try:
        data = read_small_file(path, max_bytes)
        check_extent(data, max_values=_MAX_VALUES)
        value = json.loads(data.decode("utf-8"))
        nan = _find_nan(value)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; the checkpoint is incomplete, download it again"
        ) from error
    except AmbiguousJSONError as error:
        raise CheckpointError(f"{path} {error}; the checkpoint is damaged, download it again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; the checkpoint is damaged, download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    if len(value) > _MAX_KEYS:
        raise CheckpointError(f"{path} has {len(value):,} keys, expected at most {_MAX_KEYS:,}; correct the file")
    if nan is not None:
        raise CheckpointError(f"{path} has {nan.lstrip('.')}: NaN, expected a number; correct the configuration")
    return value


def _find_nan(value: Any) -> str | None:
    """Return the place of the first NaN, such as `.trained_betas[3]`; None if there is none."""
    if isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, dict):
        places = ((f".{key}", each) for key, each in value.items())
    elif isinstance(value, list):
        places = ((f"[{index}]", each) for index, each in enumerate(value))
    else:
        return None
    return next((name + inner for name, each in places if (inner := _find_nan(each)) is not None), None)
