"""The conversion of a pickle runs none of its code, whatever classes it names."""

from __future__ import annotations

import os
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentrt_export.checkpoints.pickles import convert
from tests.killed import in_child

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture
def lightning() -> Iterator[type]:
    """A class as original checkpoints hold it, whose module is gone when the file is read."""
    parts = LIGHTNING.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    sys.modules.update({name: types.ModuleType(name) for name in names})
    kind: Any = type("ModelCheckpoint", (dict,), {"__module__": LIGHTNING})
    sys.modules[LIGHTNING].ModelCheckpoint = kind  # type: ignore[attr-defined]
    yield kind
    for name in names:
        sys.modules.pop(name, None)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.evidence),)


@pytest.mark.parametrize("zipped", [True, False])
def test_unknown_classes_do_nothing(lightning: type, tmp_path: Path, zipped: bool) -> None:
    made = lightning(best=1.0)
    made.state = {"epoch": 3}
    shared = torch.arange(4.0)
    content = {
        "state_dict": {"state_dict": {"a": shared, "b": shared[1:], "steps": 3, "half": torch.ones(2).half()}},
        "callbacks": {lightning: made, "list": [made]},
        "trap": Trap(tmp_path / "sprung"),
    }
    old, new = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    torch.save(content, old, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    convert([old], new)
    found = load_file(new)
    assert {name: weight.tolist() for name, weight in found.items()} == {
        "a": [0, 1, 2, 3],
        "b": [1, 2, 3],
        "half": [1, 1],
    }
    assert found["half"].dtype == torch.float16
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(SystemExit, match="exists"):
        convert([old], new)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut off", b"\x80\x02cut off"])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"is not a file of torch\.save|cannot be read"):
        convert([tmp_path / "model.ckpt"], tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "model.ckpt")
    with pytest.raises(SystemExit, match="has no named tensors"):
        convert([tmp_path / "model.ckpt"], tmp_path / "new.safetensors")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"model\.ckpt cannot be read: No such file"):
        convert([tmp_path / "model.ckpt"], tmp_path / "new.safetensors")


def test_a_conversion_that_ends_in_the_middle_leaves_no_part_of_the_file(tmp_path: Path) -> None:
    """The next call would refuse it, as a file that exists. Where the disk is full stands for a kill at this moment."""
    old, new = tmp_path / "model.ckpt", tmp_path / "new.safetensors"
    torch.save({"a": torch.zeros(1 << 20)}, old)

    def convert_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(SystemExit, match="cannot be written"):
            convert([old], new)

    assert in_child(convert_on_a_full_disk) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]
    convert([old], new)
    assert load_file(new)["a"].shape == (1 << 20,)
