"""Which model is this? A checkpoint's folder is understood, and refused if it must be, before anything heavy is loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentrt.errors import CheckpointError

__all__ = ["PIPELINE_CLASSES", "Checkpoint", "open_checkpoint", "weight_files"]

PIPELINE_CLASSES = ("StableDiffusionPipeline",)
_SUBMODULES = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONVERT = (
    'python -c "import torch, sys; from safetensors.torch import save_file; '
    "save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])\" {old} {new}"
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusers folder that can be exported.

    Attributes:
        folder: where it lies.
        name: what the manifest calls it.
        layout: how the user gave it.
        variants: submodule folder → the weights variant to read (`fp16`), or None for the plain files.
        scheduler_class, scheduler_config: as read from disk.
        has_safety_checker: whether a classifier lies in it.
        licence: its name as the model card states it, `unknown` if nowhere.
        documents: licence text and model card, as far as they are there: the name they get in the bundle → file.
    """

    folder: Path
    name: str
    layout: Literal["diffusers", "single-file"]
    variants: dict[str, str | None]
    scheduler_class: str
    scheduler_config: dict[str, Any]
    has_safety_checker: bool
    licence: str
    documents: dict[str, Path]


def open_checkpoint(folder: Path, *, variant: str | None = None, name: str | None = None, layout: Literal["diffusers", "single-file"] = "diffusers") -> Checkpoint:
    """Read a diffusers folder's own description of itself and find its weights, without loading any.

    Args:
        folder: as the hub or `save_pretrained` make it; symlinks are followed.
        variant: which weight files to take where there are several; by default the plain ones, else `fp16`.

    Raises:
        CheckpointError: what is there is not a checkpoint that can be exported; the message says what was expected.
    """
    index = _model_index(folder)
    documents, licence = _documents(folder)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    has_safety = (folder / "safety_checker").is_dir() and (index.get("safety_checker") or [None])[0] is not None
    wanted = {**_SUBMODULES, **({"safety_checker": "model"} if has_safety else {})}
    return Checkpoint(
        folder=folder,
        name=name or folder.resolve().name,
        layout=layout,
        variants={part: _find_variant(folder / part, stem, variant) for part, stem in wanted.items()},
        scheduler_class=str(scheduler.pop("_class_name", (index.get("scheduler") or [None, ""])[1])),
        scheduler_config={key: value for key, value in scheduler.items() if not key.startswith("_")},
        has_safety_checker=has_safety,
        licence=licence,
        documents=documents,
    )


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that a submodule's weights are read from."""
    suffix = f".{variant}" if variant else ""
    indexes = sorted(folder.glob(f"*.safetensors.index{suffix}.json"))
    if indexes:
        return [folder / shard for shard in sorted(set(_read_json(indexes[0])["weight_map"].values()))]
    return [path for path in sorted(folder.glob(f"*{suffix}.safetensors")) if suffix or path.name.count(".") == 1]


def _model_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a diffusers checkpoint (a folder) or a .safetensors file")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json; expected a diffusers checkpoint as the hub or save_pretrained make it. "
            "For a single-file checkpoint name the .safetensors file itself"
        )
    index = _read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found not in PIPELINE_CLASSES:
        raise CheckpointError(f"{folder} holds a {found}; supported are: {', '.join(PIPELINE_CLASSES)} (Stable Diffusion 1.x and 2.x)")
    return index


def _find_variant(folder: Path, stem: str, asked: str | None) -> str | None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; the checkpoint is incomplete, get it again")
    for variant in [asked] if asked else [None, "fp16"]:
        files = [file for file in weight_files(folder, variant) if file.name.startswith(stem)]
        if files:
            for file in files:
                _check_whole(file)
            return variant
    return _refuse_missing(folder, stem, asked)


def _refuse_missing(folder: Path, stem: str, asked: str | None) -> None:
    if asked and weight_files(folder, None):
        return None  # the hub's variants need not cover every submodule; diffusers falls back to the plain file as well
    pickles = [path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    if pickles:
        command = _CONVERT.format(old=pickles[0], new=folder / f"{stem}.safetensors")
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened, and no safetensors lie beside it. "
            f"If you trust it, convert it:\n  {command}"
        )
    wanted = f"{stem}.{asked + '.' if asked else ''}safetensors"
    raise CheckpointError(f"{folder} has no weights; expected {wanted}, or its shards with their index")


def _check_whole(file: Path) -> None:
    """A safetensors header says how long the file is: find a truncated download before minutes are spent on it."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing; the index of the shards, or a link, names it. Get the checkpoint again")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size else {}
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or its header is damaged: {error}") from error
    expected = 8 + length + end
    if size != expected:
        raise CheckpointError(f"{file} has {size} bytes, its header promises {expected}; it is truncated or damaged, get it again")


def _documents(folder: Path) -> tuple[dict[str, Path], str]:
    documents: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"(?i)licen[cs]e(\.(txt|md))?", path.name):
            documents.setdefault("LICENSE", path)
        elif re.fullmatch(r"(?i)(readme|model_card)\.md", path.name):
            documents.setdefault("MODEL_CARD.md", path)
    card = documents.get("MODEL_CARD.md")
    stated = list(_front_matter_licence(card)) if card else []
    if stated:
        return documents, stated[0]
    return documents, "see LICENSE" if "LICENSE" in documents else "unknown"


def _front_matter_licence(card: Path) -> Iterator[str]:
    text = card.read_text(errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    for line in front.group(1).splitlines() if front else ():
        found = re.fullmatch(r"licen[cs]e:\s*['\"]?([^'\"#]+?)['\"]?\s*", line)
        if found:
            yield found.group(1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; the checkpoint is incomplete, get it again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; the checkpoint is damaged, get it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
