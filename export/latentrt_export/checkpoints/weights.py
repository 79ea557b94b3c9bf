"""Finds a component's weight files, checks their headers, and loads them strictly. Pickles are never opened."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.safetensors_header import read_header
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["Weights", "find_weights", "load_pretrained"]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONVERT = (
    'python -c "import torch, sys; from safetensors.torch import save_file; '
    "weights = torch.load(sys.argv[1], weights_only=True); "
    "weights = {{name: weight.clone().contiguous() for name, weight in weights.items()}}; "
    "save_file(weights, sys.argv[2], {{'format': 'pt'}})\" {old} {new}"
)
# The keys of `output_loading_info` and their descriptions in errors.
_PROBLEMS = {
    "missing_keys": "missing",
    "unexpected_keys": "unexpected",
    "mismatched_keys": "of another shape",
    "error_msgs": "unreadable",
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight files of a component.

    Attributes:
        root: the checkpoint's folder, for `ComponentModule.load`.
        variant: the variant of the files (`fp16`), or None for the plain ones.
        files: the safetensors files.
    """

    root: Path
    variant: str | None
    files: tuple[Path, ...]


def find_weights(root: Path, folder: Path, stem: str, preferred: str | None) -> Weights:
    """Find a component's safetensors and check that they are complete.

    Args:
        root: the checkpoint's folder.
        folder: the component's folder.
        stem: the stem of its weight files: `model` or `diffusion_pytorch_model`.
        preferred: the preferred variant. A variant need not cover every component, so the plain files are the second
            choice. By default the plain files are the first choice and `fp16` the second.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file is truncated or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; the checkpoint is incomplete, download it again")
    read_object(folder / "config.json")
    for variant in (preferred, None) if preferred else (None, "fp16"):
        files = _list_files(folder, stem, variant)
        for file in files:
            _check_size(file)
        if files:
            return Weights(root=root, variant=variant, files=files)
    raise _not_found(folder, stem, preferred)


def _list_files(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        return tuple(folder / shard for shard in _read_shards(index))
    single = folder / f"{stem}{suffix}.safetensors"
    # A dangling link, left by an interrupted download, counts as a missing file.
    return (single,) if single.exists() or single.is_symlink() else ()


def _read_shards(index: Path) -> list[str]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
        raise CheckpointError(
            f"{index} names no shards in its weight_map; it is damaged, download the checkpoint again"
        )
    return sorted(set(shards.values()))


def _is_file_name(shard: object) -> bool:
    return isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard


def _not_found(folder: Path, stem: str, preferred: str | None) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    variants = [
        match[1] for match in (re.fullmatch(rf"{stem}\.([\w-]+)\.safetensors", name) for name in names) if match
    ]
    if variants:
        return CheckpointError(
            f"{folder} has no {stem}.safetensors, only the variants {', '.join(variants)}; pass one as `variant`"
        )
    pickles = [folder / name for name in names if name.endswith(_PICKLES)]
    if pickles:
        new = folder / f"{stem}.safetensors"
        command = _CONVERT.format(old=shlex.quote(str(pickles[0])), new=shlex.quote(str(new)))
        return CheckpointError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened, and there are no safetensors. "
            f"If you trust it, convert it:\n  {command}"
        )
    wanted = f"{stem}.{preferred}.safetensors or {stem}.safetensors" if preferred else f"{stem}.safetensors"
    return CheckpointError(f"{folder} has no weights; expected {wanted}, or shards with their index")


def _check_size(file: Path) -> None:
    """Compare a file's size with its safetensors header, to detect a truncated download before it is read.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or damaged.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, but the index of the shards, or a link, names it; download the checkpoint again"
        )
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            expected = read_header(stream, size).file_size
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file, or its header is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if size != expected:
        raise CheckpointError(
            f"{file} has {size} bytes, expected {expected} from its header; it is truncated or damaged, "
            "download it again"
        )


def load_pretrained(library_class: Any, folder: Path, variant: str | None) -> Any:
    """Load a component with its library's `from_pretrained`, which renames old parameters, but strictly.

    Nothing is downloaded, nothing is unpickled, and no missing weight is initialised.

    Args:
        library_class: a diffusers or transformers model class.
        folder: the component's folder, with `config.json` and safetensors, sharded or not.
        variant: `fp16` for `….fp16.safetensors`.

    Returns:
        The module in float32, in evaluation mode.

    Raises:
        CheckpointError: a file is damaged, or its tensors do not match the configuration.
    """
    import torch  # finding weights needs none, and a worker starts in a tenth of the time

    try:
        module, info = library_class.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # an invalid configuration fails with any exception
        raise CheckpointError(f"{folder.name}: its weights cannot be loaded: {error}") from error
    for key, problem in _PROBLEMS.items():
        # position_ids is a constant that old versions of transformers stored like a weight.
        names = sorted(name for name in map(str, info.get(key) or ()) if not name.endswith("position_ids"))
        if names:
            raise CheckpointError(
                f"{folder.name}: {len(names)} tensors are {problem}, the first is {names[0]}; "
                "config.json and the weights must belong together"
            )
    return module.eval().requires_grad_(False)
