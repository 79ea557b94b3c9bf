"""Converts a pickled checkpoint to safetensors without running any code in it.

Nothing in this package opens a pickle. An export that is given one refuses it and prints a command that calls
`convert`, so that the user decides, and in a process of its own.

A pickle names functions and classes that are called while it is read. `convert` knows a handful, which rebuild tensors;
every other name (the original checkpoints of Stable Diffusion hold PyTorch Lightning's) becomes an object that does
nothing.
"""

from __future__ import annotations

import collections
import os
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latentrt.bundle.digests import open_regular

__all__ = ["convert"]

_REBUILDS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}
# Keys under which trainers nest the weights.
_NESTED = "state_dict"


def convert(old: Sequence[str | os.PathLike[str]], new: str | os.PathLike[str]) -> None:
    """Write the tensors of torch's pickles to one safetensors file; ends the process with a message if it cannot.

    Args:
        old: the pickles: one, or the shards of one component.
        new: the file to write; it must not exist.
    """
    if Path(new).exists():
        sys.exit(f"{new} exists; move it away first")
    tensors: dict[str, Tensor] = {}
    for path in old:
        found = _load(Path(path))
        while isinstance(found, dict) and isinstance(found.get(_NESTED), dict):
            found = found[_NESTED]
        if isinstance(found, dict):
            tensors |= {str(name): each for name, each in found.items() if isinstance(each, Tensor)}
    if not tensors:
        sys.exit(f"{old[0]} has no named tensors; expected the weights of a model, or a dictionary with {_NESTED}")
    # Clones, because tensors may share memory, which safetensors does not allow. It writes to another file, which it
    # renames, so that `new` is never a part of one.
    clones = {name: each.detach().clone().contiguous() for name, each in tensors.items()}
    try:
        save_file(clones, new, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        sys.exit(f"{new} cannot be written: {error}; free some space, or choose another path")


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
                sys.exit(f"{path} is a TorchScript program, expected weights")
    elif not _begins_as_pickle(path):
        sys.exit(f"{path} is not a file of torch.save, or is damaged; download it again")
    try:
        return torch.load(path, map_location="cpu", pickle_module=_RESTRICTED, weights_only=False)
    except Exception as error:
        sys.exit(f"{path} cannot be read: {error}")


def _begins_as_pickle(path: Path) -> bool:
    try:
        with open_regular(path) as stream:
            return stream.read(1) == b"\x80"
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")


class _Inert(dict[Any, Any]):
    """Stands for an object of an unknown class; accepts everything that a pickle does to one, and ignores it."""

    def __new__(cls, *args: Any, **keywords: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **keywords: Any) -> _Inert:
        return _Inert()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, value: Any) -> None:
        """Ignore an item."""

    def extend(self, values: Any) -> None:
        """Ignore items."""

    def add(self, value: Any) -> None:
        """Ignore a member."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows the functions which rebuild tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        return _REBUILDS.get((module, name), _Inert)


def _load_restricted(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# What `torch.load` uses of a module for pickles.
_RESTRICTED: Any = SimpleNamespace(__name__="restricted", Unpickler=_Unpickler, load=_load_restricted)
