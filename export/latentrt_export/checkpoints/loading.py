"""How are a submodule's weights read? By the libraries' own loaders, which rename old parameters, but strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentrt.errors import CheckpointError

__all__ = ["load_pretrained"]

_KINDS = {
    "missing_keys": "missing",
    "unexpected_keys": "unexpected",
    "mismatched_keys": "of another shape",
    "error_msgs": "unreadable",
}


def load_pretrained(library_class: Any, folder: Path, variant: str | None) -> Any:
    """`from_pretrained` that looks nowhere but in the folder, never unpickles, and never makes up a missing weight.

    Args:
        library_class: a diffusers or transformers model class.
        folder: the submodule's folder: `config.json` and safetensors, sharded or not.
        variant: `fp16` for `….fp16.safetensors`.

    Returns:
        The module in float32, in evaluation mode.

    Raises:
        CheckpointError: a file is damaged, or its tensors are not the ones the configuration asks for.
    """
    try:
        module, info = library_class.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # a configuration of nonsense fails in as many ways as there are layers
        raise CheckpointError(f"{folder.name}: its weights cannot be loaded: {error}") from error
    for kind, words in _KINDS.items():
        # position_ids is a constant that old transformers stored as if it were a weight.
        names = sorted(name for name in map(str, info.get(kind) or ()) if not name.endswith("position_ids"))
        if names:
            raise CheckpointError(
                f"{folder.name}: {len(names)} tensors are {words}, the first is {names[0]}; "
                "config.json and the weights must belong together"
            )
    return module.eval().requires_grad_(False)
