"""Which files hold a submodule's weights, and are they whole? Headers are read; a pickle is never opened."""

from __future__ import annotations

import json
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["Weights", "find_weights"]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONVERT = (
    'python -c "import torch, sys; from safetensors.torch import save_file; '
    "weights = torch.load(sys.argv[1], weights_only=True); "
    "weights = {{name: weight.clone().contiguous() for name, weight in weights.items()}}; "
    "save_file(weights, sys.argv[2], {{'format': 'pt'}})\" {old} {new}"
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a submodule is loaded from.

    Attributes:
        root: the checkpoint's folder, as `Submodule.load` takes it.
        variant: which of the folder's weights (`fp16`), or None for the plain files.
        files: the safetensors files themselves.
    """

    root: Path
    variant: str | None
    files: tuple[Path, ...]


def find_weights(root: Path, folder: Path, stem: str, asked: str | None) -> Weights:
    """Find a submodule's safetensors and check that they are whole.

    Args:
        root: the checkpoint's folder.
        folder: the submodule's.
        stem: what the library calls its weights: `model`, `diffusion_pytorch_model`.
        asked: the variant to prefer; the hub's need not cover every submodule, so the plain files are the second
            choice. Without one the plain files are the first choice and `fp16` the second.

    Raises:
        CheckpointError: there are none, a part is missing, or a file is truncated or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; the checkpoint is incomplete, get it again")
    read_object(folder / "config.json")
    for variant in (asked, None) if asked else (None, "fp16"):
        files = _files(folder, stem, variant)
        for file in files:
            _check_whole(file)
        if files:
            return Weights(root=root, variant=variant, files=files)
    raise _nothing_found(folder, stem, asked)


def _files(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        return tuple(folder / shard for shard in _shards(index))
    single = folder / f"{stem}{suffix}.safetensors"
    # A dangling link, as an interrupted download leaves it, is a file that is missing, not one that is not expected.
    return (single,) if single.exists() or single.is_symlink() else ()


def _shards(index: Path) -> list[str]:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
        raise CheckpointError(f"{index} names no shards in its weight_map; it is damaged, get the checkpoint again")
    return sorted(set(shards.values()))


def _is_file_name(shard: object) -> bool:
    return isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard


def _nothing_found(folder: Path, stem: str, asked: str | None) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    variants = [
        match[1] for match in (re.fullmatch(rf"{stem}\.([\w-]+)\.safetensors", name) for name in names) if match
    ]
    if variants:
        return CheckpointError(
            f"{folder} has no {stem}.safetensors, only the variants {', '.join(variants)}; name one with --variant"
        )
    pickles = [folder / name for name in names if name.endswith(_PICKLES)]
    if pickles:
        new = folder / f"{stem}.safetensors"
        command = _CONVERT.format(old=shlex.quote(str(pickles[0])), new=shlex.quote(str(new)))
        return CheckpointError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened, and no safetensors lie beside it. "
            f"If you trust it, convert it:\n  {command}"
        )
    wanted = f"{stem}.{asked}.safetensors or {stem}.safetensors" if asked else f"{stem}.safetensors"
    return CheckpointError(f"{folder} has no weights; expected {wanted}, or its shards with their index")


def _check_whole(file: Path) -> None:
    """A safetensors header says how long the file is: find a truncated download before minutes are spent on it."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; the index of the shards, or a link, names it. Get the checkpoint again"
        )
    size = file.stat().st_size
    try:
        expected = _promised_size(file, size)
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or its header is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if size != expected:
        raise CheckpointError(
            f"{file} has {size} bytes, its header promises {expected}; it is truncated or damaged, get it again"
        )


def _promised_size(file: Path, size: int) -> int:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        # A damaged length would ask for more memory than there is.
        header = json.loads(stream.read(length)) if length <= size else {}
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return int(8 + length + max(ends, default=0))
