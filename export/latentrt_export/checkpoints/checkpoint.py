"""Which model is this?

A checkpoint's folder is understood, and refused if it must be, before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.documents import find_documents, stated_licence
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import check_crop, read_preprocessor_config
from latentrt_export.checkpoints.weight_files import Weights, find_weights

__all__ = ["Checkpoint", "Layout", "PipelineClass", "open_checkpoint", "preview_factor"]

Layout = Literal["diffusers", "single-file"]
_CLIP_SIDE = 224  # what transformers takes where a vision_config does not say image_size


@dataclass(frozen=True, kw_only=True)
class PipelineClass:
    """The folders of a diffusers pipeline that an export reads. A family declares one for each class it supports.

    Attributes:
        components: folder → stem of its weight files: `model` if transformers wrote them, `diffusion_pytorch_model` if
            diffusers did.
    """

    components: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusers folder that can be exported.

    Attributes:
        folder: where it lies.
        name: what the manifest calls it.
        layout: how the user gave it.
        pipeline_class: the name of its class in diffusers.
        weights: submodule folder → where it is loaded from; `safety_checker` is there only if there is a classifier,
            `preview_decoder` only if one was given.
        sources: the files whose digests the manifest records: name → file.
        scheduler_class, scheduler_config: as read from disk.
        licence: its name as the model card states it, `unknown` if nowhere.
        documents: licence text and model card, as far as they are there: the name they get in the bundle → file.
    """

    folder: Path
    name: str
    layout: Layout
    pipeline_class: str
    weights: Mapping[str, Weights]
    sources: Mapping[str, Path]
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    licence: str
    documents: Mapping[str, Path]


def open_checkpoint(
    folder: Path,
    *,
    pipelines: Mapping[str, PipelineClass],
    variant: str | None = None,
    safety_checker: Path | None = None,
    preview_decoder: Path | None = None,
    name: str | None = None,
    layout: Layout = "diffusers",
) -> Checkpoint:
    """Read a diffusers folder's own description of itself and find its weights, without loading any.

    Args:
        folder: as the hub or `save_pretrained` make it; symlinks are followed.
        pipelines: the supported pipeline classes by name.
        variant: which weight files to take where there are several; by default the plain ones, else `fp16`.
        safety_checker: a classifier to take instead of the folder's own: its folder, or a checkpoint that has one.
        preview_decoder: a tiny autoencoder's folder, for pictures at a fraction of the decoder's work.
        name, layout: what the manifest says of the source; by default a folder of this name.

    Raises:
        CheckpointError: what is there is not a checkpoint that can be exported; the message says what was expected.
    """
    index = _model_index(folder, pipelines)
    pipeline = pipelines[index["_class_name"]]
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    documents = find_documents(folder)
    weights = {part: find_weights(folder, folder / part, stem, variant) for part, stem in pipeline.components.items()}
    if safety_checker is not None:
        weights["safety_checker"] = _find_classifier(safety_checker, variant)
    elif _class_of(index, "safety_checker") is not None and (folder / "safety_checker").is_dir():
        weights["safety_checker"] = _find_classifier(folder, variant)
    if preview_decoder is not None:
        own = read_object(folder / "vae" / "config.json")
        weights["preview_decoder"] = _find_preview_decoder(preview_decoder, own, variant)
    if variant and all(found.variant != variant for found in weights.values()):
        raise CheckpointError(
            f"{folder} has no weights of the variant {variant}; leave --variant out to take the plain ones"
        )
    return Checkpoint(
        folder=folder,
        name=name or _name_of(folder),
        layout=layout,
        pipeline_class=index["_class_name"],
        weights=weights,
        sources={f"{part}/{file.name}": file for part, found in weights.items() for file in found.files},
        scheduler_class=str(scheduler.pop("_class_name", None) or _class_of(index, "scheduler")),
        scheduler_config={key: value for key, value in scheduler.items() if key != "_diffusers_version"},
        licence=stated_licence(documents),
        documents=documents,
    )


def _model_index(folder: Path, pipelines: Mapping[str, PipelineClass]) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; expected a diffusers checkpoint (a folder) or a .safetensors file"
        )
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json; expected a diffusers checkpoint as the hub or save_pretrained make it. "
            "For a single-file checkpoint name the .safetensors file itself"
        )
    index = read_object(folder / "model_index.json")
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in pipelines:
        raise CheckpointError(f"{folder} holds a {found}; supported are: {', '.join(pipelines)}")
    return index


def _class_of(index: Mapping[str, Any], component: str) -> str | None:
    """The class that `model_index.json` names for a component: it holds [library, class], [null, null] for none."""
    match index.get(component):
        case [str(), str(name)]:
            return name
        case None | [None, *_]:
            return None
        case found:
            raise CheckpointError(f"model_index.json says {component}: {found!r}, expected a library and a class")


def _find_classifier(path: Path, variant: str | None) -> Weights:
    whole = (path / "safety_checker").is_dir()
    folder, processor = (path / "safety_checker", path / "feature_extractor") if whole else (path, path)
    if not path.is_dir() or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no safety checker; expected its folder (config.json, model.safetensors, "
            "preprocessor_config.json), or a checkpoint that has one"
        )
    preprocessing = read_preprocessor_config(processor / "preprocessor_config.json")
    vision = read_object(folder / "config.json").get("vision_config")
    side = vision.get("image_size", _CLIP_SIDE) if isinstance(vision, dict) else _CLIP_SIDE
    check_crop(preprocessing, side, processor)
    return find_weights(path, folder, "model", variant)


def _find_preview_decoder(path: Path, autoencoder: Mapping[str, Any], variant: str | None) -> Weights:
    """Its weights, once it is known that it decodes the latents of the checkpoint's own autoencoder."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no tiny autoencoder; expected its folder, with config.json and safetensors")
    config = read_object(path / "config.json")
    if config.get("_class_name") != "AutoencoderTiny":
        raise CheckpointError(f"{path} holds a {config.get('_class_name')}, expected an AutoencoderTiny")
    found = (config.get("latent_channels", 4), preview_factor(config))
    wanted = (autoencoder.get("latent_channels", 4), 2 ** (len(autoencoder.get("block_out_channels", (0,) * 4)) - 1))
    if found != wanted:
        raise CheckpointError(
            f"{path} decodes latents of {found[0]} channels to {found[1]} times their size, and this checkpoint's have "
            f"{wanted[0]} channels and {wanted[1]} times"
        )
    return find_weights(path, path, "diffusion_pytorch_model", variant)


def preview_factor(config: Mapping[str, Any]) -> int:
    """How many pixels of a side a tiny autoencoder makes of a latent, by its configuration; the defaults are
    diffusers'."""
    scale: int = config.get("upsampling_scaling_factor", 2)
    blocks: int = len(config.get("decoder_block_out_channels", (64,) * 4)) - 1
    return int(scale**blocks)


def _name_of(folder: Path) -> str:
    """The folder's name; in a hub cache, where that is a commit, the repository's and the commit."""
    resolved = folder.resolve()
    repository = re.fullmatch(r"models--(.+)", resolved.parent.parent.name)
    if resolved.parent.name == "snapshots" and repository:
        return f"{repository[1].replace('--', '/', 1)}@{resolved.name}"
    return resolved.name
