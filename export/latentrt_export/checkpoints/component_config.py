"""Reads a component's `config.json`, and makes the configuration of which transformers builds the component.

transformers follows keys that no class of a checkpoint has: `configuration_files` and `transformers_weights` name other
files, and `num_labels` a list to build. So it gets the keys that were checked, and never the file.
Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, NESTED_CONFIGS, NoEffect, drop_keys_left_to_default
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["make_library_config", "read_component_config"]

_TRANSFORMERS_CLASSES = {
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "DPTForDepthEstimation",
    "StableDiffusionSafetyChecker",
}
# The key of an encoder's configuration in that of a whole CLIP.
_KEY_IN_CLIP = {
    "CLIPTextModel": "text_config",
    "CLIPTextModelWithProjection": "text_config",
    "CLIPVisionModelWithProjection": "vision_config",
}


def read_component_config(folder: Path, class_name: str | None) -> dict[str, Any]:
    """Read a component's configuration; an encoder's may be a part of the configuration of a whole CLIP.

    Args:
        folder: the component's folder.
        class_name: its class; None for an autoencoder, whose class is not known yet.

    Returns:
        The keys of the file that its library follows; absent ones have the defaults of diffusers and transformers.

    Raises:
        CheckpointError: the file is missing or damaged, or its `_use_default_values` is not a list of keys.
    """
    config = read_object(folder / "config.json")
    if class_name not in _TRANSFORMERS_CLASSES:
        config = drop_keys_left_to_default(folder.name, config)
    key = None if class_name is None else _KEY_IN_CLIP.get(class_name)
    if key is None or key not in config:
        return config
    if not isinstance(config[key], dict):
        raise CheckpointError(
            f"{folder / 'config.json'} has {key} {quote(config[key])}, expected an object with the encoder's "
            "configuration; correct it"
        )
    return {**config[key], **{name: config[name] for name in ("quantization_config",) if name in config}}


def make_library_config(library_class: Any, folder: Path) -> Any | None:
    """Make the configuration object of a transformers class of the keys in `CONFIG_KEYS` that have an effect.

    Args:
        library_class: a model class of diffusers or transformers.
        folder: the component's folder.

    Returns:
        The configuration; None for a class of diffusers, which reads the file and passes over what it does not have.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    config_class = getattr(library_class, "config_class", None)
    if config_class is None:
        return None
    name = library_class.__name__
    return config_class.from_dict(_select_keys(name, read_component_config(folder, name)))


def _select_keys(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that its class has and that have an effect, also in nested configurations."""
    selected = {}
    for key, value in config.items():
        handling = CONFIG_KEYS[class_name].get(key)
        if handling is None or isinstance(handling, NoEffect):
            continue
        nested = NESTED_CONFIGS.get((class_name, key))
        selected[key] = _select_keys(nested, value) if nested and isinstance(value, dict) else value
    return selected
