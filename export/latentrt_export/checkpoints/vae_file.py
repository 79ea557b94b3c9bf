"""Unpacks an autoencoder's single file into a diffusers folder: the original (LDM) layout, or diffusers' own.

The file states no configuration. A `config.json` beside a file in diffusers' layout describes it; any other file is
described by the configuration of the autoencoder in whose place it is used, or, where that has another class, by that
of Stable Diffusion 1.x or by the defaults of diffusers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.single_file import COMPONENTS, CONFIGS, convert, reject_foreign
from latentrt_export.checkpoints.weights import read_header_of

__all__ = ["unpack_vae"]

_ORIGINAL_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def unpack_vae(path: Path, into: Path, *, own: Path) -> Path:
    """Write an autoencoder's single file as a folder of diffusers; return the folder.

    Args:
        path: a `.safetensors` file: in the original layout, alone or in a whole checkpoint, or in diffusers' layout.
        into: the folder to write; created.
        own: the configuration of the autoencoder that it replaces; need not exist.

    Raises:
        CheckpointError: the file is a pickle, is not an autoencoder, or is not of the architecture that the
            configuration describes.
        ExportError: the folder cannot be written.
    """
    reject_foreign(path)
    names = read_header_of(path).tensors.keys()
    prefix = COMPONENTS["vae"].prefix if any(name.startswith(COMPONENTS["vae"].prefix) for name in names) else ""
    original = any(name.startswith(f"{prefix}encoder.down.") for name in names)
    class_name = "AutoencoderKL" if original else _find_class(path, names)
    config = _read_config(path, class_name, own, original=original)
    target = into / COMPONENTS["vae"].file
    try:
        into.mkdir(parents=True)
        (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if original:
            weights = convert("vae", _read_original(path, names, prefix), config)
            save_file(weights, target, metadata={"format": "pt"})
        else:
            shutil.copyfile(path, target)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path.name} cannot be unpacked into {into}: {error}") from error
    return into


def _find_class(path: Path, names: Collection[str]) -> str:
    """Return the class of an autoencoder in diffusers' layout, by the names of its tensors."""
    if any(name.startswith("decoder.condition_encoder.") for name in names):
        return "AsymmetricAutoencoderKL"
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return "AutoencoderKL"
    if any(name.startswith("encoder.layers.") for name in names):
        return "AutoencoderTiny"
    raise CheckpointError(
        f"{path.name} is not an autoencoder (its first tensor is {min(names, default=None)}); expected encoder and "
        "decoder in the original layout or in diffusers'"
    )


def _read_config(path: Path, class_name: str, own: Path, *, original: bool) -> dict[str, Any]:
    candidates = [*([] if original else [path.with_name("config.json")]), own]
    for candidate in candidates:
        found = read_object(candidate) if candidate.is_file() else {}
        if found.get("_class_name", "AutoencoderKL") == class_name and found:
            return {**found, "_class_name": class_name}
    if class_name == "AutoencoderKL":
        return read_object(CONFIGS / "stable-diffusion-1" / "vae" / "config.json")
    if class_name == "AutoencoderTiny":
        return {"_class_name": class_name}
    raise CheckpointError(f"{path} is an {class_name} without its config.json; put that beside it, or pass its folder")


def _read_original(path: Path, names: Collection[str], prefix: str) -> dict[str, Any]:
    parts = tuple(f"{prefix}{part}" for part in _ORIGINAL_PARTS)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names if name.startswith(parts)}
