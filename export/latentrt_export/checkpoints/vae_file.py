"""Unpacks an autoencoder's single file into a diffusers folder: the original (LDM) layout, or diffusers' own.

The file states no configuration. A `config.json` beside a file in diffusers' layout describes it; any other file is
described by the configuration of the autoencoder in whose place it is used, or, where there is none or it has another
class, by that of Stable Diffusion 1.x or XL, whichever the checkpoint is of, or by the defaults of diffusers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latentrt.bundle.safetensors_header import TensorPlace
from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.conversion import VAE, convert, copy_tensors
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.single_file import CONFIGS, reject_foreign
from latentrt_export.checkpoints.weights import read_header_of

__all__ = ["unpack_vae"]

_ORIGINAL_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def unpack_vae(path: Path, into: Path, *, own: Path) -> Path:
    """Write an autoencoder's single file as a folder of diffusers; return the folder.

    Args:
        path: a `.safetensors` file: in the original layout, alone or in a whole checkpoint, or in diffusers' layout.
        into: the folder to write; created.
        own: the configuration of the autoencoder that it replaces, in the checkpoint's `vae` folder; need not exist.

    Raises:
        CheckpointError: the file is a pickle, is not an autoencoder, or is not of the architecture that the
            configuration describes.
        ExportError: the folder cannot be written.
    """
    reject_foreign(path)
    places = read_header_of(path).tensors
    names = places.keys()
    prefix = VAE.prefix if any(name.startswith(VAE.prefix) for name in names) else ""
    original = any(name.startswith(f"{prefix}encoder.down.") for name in names)
    class_name = "AutoencoderKL" if original else _find_class(path, names)
    config = _read_config(path, class_name, own, original=original)
    target = into / VAE.file
    try:
        into.mkdir(parents=True)
        (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if original:
            copy_tensors(path, convert("vae", VAE, _find_original(places, prefix), config), target)
        else:
            shutil.copyfile(path, target)
    except OSError as error:
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
        return read_object(CONFIGS / _find_family(own.parent.with_name("model_index.json")) / "vae" / "config.json")
    if class_name == "AutoencoderTiny":
        return {"_class_name": class_name}
    raise CheckpointError(f"{path} is an {class_name} without its config.json; put that beside it, or pass its folder")


def _find_original(places: Mapping[str, TensorPlace], prefix: str) -> dict[str, TensorPlace]:
    parts = tuple(f"{prefix}{part}" for part in _ORIGINAL_PARTS)
    return {name: place for name, place in places.items() if name.startswith(parts)}


def _find_family(index: Path) -> str:
    """Return the family whose autoencoder suits a checkpoint, by the class of its pipeline.

    Autoencoders of 1.x and XL have the same architecture, but latents of another scale.
    """
    class_name = read_object(index).get("_class_name") if index.is_file() else None
    is_xl = isinstance(class_name, str) and class_name.startswith("StableDiffusionXL")
    return "stable-diffusion-xl" if is_xl else "stable-diffusion-1"
