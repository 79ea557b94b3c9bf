"""Checkpoints of unknown origin: headers of safetensors, and JSON files, that are huge, contradictory or of no kind.

A case changes one file of a checkpoint of tiny weights. `run` plans the export, up to where weights are loaded; it also
reads a header as that of a single-file checkpoint, of an autoencoder's file and of a bundle's weights.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.safetensors_header import MAX_HEADER_BYTES, MAX_METADATA, MAX_TENSORS
from latentrt.bundle.weights import map_weights
from latentrt.errors import BundleError, LatentRTError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.checkpoints.single_file import detect
from latentrt_export.checkpoints.vae_file import unpack_vae
from latentrt_export.families import PIPELINES, plan_export
from tests.export.skeleton import write_shards, write_skeleton

__all__ = ["Case", "cases", "run"]

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
HOSTILE = "\x1b]0;x\x07[red][/]\u202e"
CONFIGS = (
    *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "safety_checker/config.json", "feature_extractor/preprocessor_config.json"),
)


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        file: its name in the checkpoint.
        make: makes its content, given the content of the file that it replaces, when the case runs: some are large.
        foreign: no reader may accept it.
    """

    file: str
    make: Callable[[bytes], bytes]
    foreign: bool = True


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case."""
    for name, header in _headers().items():
        yield f"header: {name}", Case(WEIGHTS, functools.partial(_weights, header))
    for name, header in _harmless_headers().items():
        yield f"header: {name}", Case(WEIGHTS, functools.partial(_weights, header), foreign=False)
    for file in CONFIGS:
        for name, make in _texts().items():
            yield f"{file}: {name}", Case(file, make)
        for name, change in _changes().items():
            yield f"{file}: {name}", Case(file, functools.partial(_changed, change), foreign=False)
    for name, weight_map in _indices().items():
        index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        yield f"index: {name}", Case(INDEX, functools.partial(_constant, index))


def run(case: Case, folder: Path) -> LatentRTError | None:
    """Plan the export of a checkpoint with the file, and read a header in every other way.

    Raises:
        AssertionError: a foreign file was read, or the message about a header is long.
    """
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    write_skeleton(place)
    if case.file == INDEX:
        write_shards(place / "unet", "diffusion_pytorch_model")
    path = place / case.file
    path.write_bytes(case.make(path.read_bytes()))
    endings: list[LatentRTError | None] = [_attempt(lambda: _plan(place))]
    if case.file == WEIGHTS:
        endings += [
            _attempt(lambda: detect(path)),
            _attempt(lambda: unpack_vae(path, folder / "vae", own=place / "vae" / "config.json")),
            _attempt(lambda: map_weights(path), BundleError),
        ]
    for error in endings:
        assert error is not None or not case.foreign, "a reader accepts the file"
        assert case.file != WEIGHTS or len(str(error)) < 3000, "a long error"
    return endings[0]


def _attempt(read: Callable[[], object], expected: type[LatentRTError] = LatentRTError) -> LatentRTError | None:
    try:
        read()
    except expected as error:
        return error
    return None


def _plan(folder: Path) -> None:
    plan = plan_export(open_checkpoint(folder, pipelines=PIPELINES))
    assert len(plan.warnings) < 30, "a warning for each of many keys"


def _constant(data: bytes, former: bytes) -> bytes:
    return data


def _changed(change: Callable[[Any], None], former: bytes) -> bytes:
    tree = json.loads(former)
    change(tree)
    return json.dumps(tree).encode()


def _weights(header: Callable[[], bytes], former: bytes) -> bytes:
    text = header()
    return len(text).to_bytes(8, "little") + text + bytes(16)


# Headers


def _entry(first: int = 0, last: int = 0, **changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last], **changes}
    return json.dumps(entry, separators=(",", ":")).encode()


def _many(count: int, entry: bytes, *more: bytes) -> bytes:
    """Return a header of so many equal entries, and further texts of a name and its entry."""
    return b"{" + b",".join([*(b'"%x":' % index + entry for index in range(count)), *more]) + b"}"


def _last(first: int = 0) -> bytes:
    """Return the name and the entry of the tensor that covers the data from `first` on."""
    return b'"weight":' + _entry(first, 16)


def _headers() -> dict[str, Callable[[], bytes]]:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    metadata = b'{"__metadata__":{%s},' + _last() + b"}"
    wide = _entry(shape=[0] * 16)
    return {
        "10^6 tensors": lambda: _many(1_000_000, _entry(), _last()),
        "one tensor too many": lambda: _many(MAX_TENSORS, _entry(), _last()),
        "10^5 tensors of 16 axes": lambda: _many(100_000, wide, _last()),
        "a tensor of 10^6 axes": lambda: b'{"weight":' + _entry(0, 16, shape=[1] * 1_000_000) + b"}",
        "10^6 texts": lambda: metadata % b",".join(b'"%x":""' % index for index in range(1_000_000)),
        "one text too many": lambda: metadata % b",".join(b'"%x":""' % index for index in range(MAX_METADATA + 1)),
        "a text beyond the bound": lambda: metadata % (b'"a":"' + b"x" * MAX_HEADER_BYTES + b'"'),
        "metadata of lists": lambda: metadata % b'"a":[]',
        "metadata of 10^5 lists": lambda: metadata % (b'"a":[' + b"[]," * 100_000 + b"[]]"),
        "metadata that is a number": lambda: b'{"__metadata__":1,' + _last() + b"}",
        "two metadata": lambda: b'{"__metadata__":{},"__metadata__":{},' + _last() + b"}",
        "nested": lambda: deep,
        "a number of 10^6 digits": lambda: (
            b'{"weight":' + _entry().replace(b"[0]", b"[" + b"9" * 1_000_000 + b"]") + b"}"
        ),
        "a fraction": lambda: b'{"weight":' + _entry(0, 16).replace(b"[4]", b"[4.0]") + b"}",
        "a name twice": lambda: b"{" + _last() + b"," + _last() + b"}",
        "a name of 10^6 characters": lambda: b'{"' + b"x" * 1_000_000 + b'":' + _entry(0, 12) + b"}",
        "a hostile dtype": lambda: b'{"weight":' + _entry(0, 16, dtype=HOSTILE * 1000) + b"}",
        "an overlap": lambda: b'{"a":' + _entry(0, 12) + b"," + _last(8) + b"}",
        "a hole": lambda: b'{"a":' + _entry(0, 4) + b"," + _last(8) + b"}",
        "offsets beyond the file": lambda: b'{"weight":' + _entry(0, 2**62) + b"}",
        "an empty object": lambda: b"{}",
        "a list": lambda: b"[]",
        "spaces": lambda: b" " * (MAX_HEADER_BYTES - 8),
        "no UTF-8": lambda: b'{"\xff":' + _entry(0, 16) + b"}",
        "half a surrogate pair": lambda: b'{"\\ud800":' + _entry(0, 16) + b"}",
        "zeros": lambda: bytes(1_000_000),
    }


def _harmless_headers() -> dict[str, Callable[[], bytes]]:
    """Return headers at the bounds; each reader may accept them, or miss the tensors that it needs."""
    large = b'{"__metadata__":{"a":"' + b"x" * (MAX_HEADER_BYTES - 1000) + b'"},' + _last() + b"}"
    return {
        "as many tensors as there may be": lambda: _many(MAX_TENSORS - 1, _entry(), _last()),
        "of 16 axes": lambda: _many(MAX_TENSORS - 1, _entry(shape=[0] * 16), _last()),
        "as many texts as there may be": lambda: _many(
            0, b"", b'"__metadata__":{' + b",".join(b'"%x":""' % index for index in range(MAX_METADATA)) + b"}", _last()
        ),
        "as long as it may be": lambda: large,
    }


# JSON


def _texts() -> dict[str, Callable[[bytes], bytes]]:
    def added(text: bytes) -> Callable[[bytes], bytes]:
        return lambda former: former.rstrip()[:-1] + b"," + text + b"}"

    return {
        "10^6 keys": added(b",".join(b'"_%x":0' % index for index in range(1_000_000))),
        "10^5 keys": added(b",".join(b'"%x":0' % index for index in range(100_000))),
        "a list of 10^6 numbers": added(b'"_x":[' + b"0," * 1_000_000 + b"0]"),
        "a text of 64 MB": added(b'"_x":"' + b"x" * (64 << 20) + b'"'),
        "nested": added(b'"_x":' + b"[" * 100_000 + b"]" * 100_000),
        "objects in objects": added(b'"_x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a number of 10^6 digits": added(b'"_x":' + b"9" * 1_000_000),
        "NaN": added(b'"_x":[{"a":NaN}]'),
        "empty": lambda former: b"",
        "a list": lambda former: b"[" + former + b"]",
        "cut off": lambda former: former[:-1],
        "followed by another": lambda former: former + former,
        "no UTF-8": lambda former: b"\xff" + former,
        "a web page": lambda former: b"<!DOCTYPE html><html></html>",
        "zeros": lambda former: bytes(1_000_000),
    }


def _changes() -> dict[str, Callable[[Any], None]]:
    values: tuple[Any, ...] = (
        None,
        True,
        -1,
        0,
        2**31,
        2**63,
        10**30,
        1e308,
        float("inf"),
        "",
        HOSTILE,
        "x" * 100_000,
        [],
        {},
        [[]],
        [[1]],
        {"model_type": "clip"},
    )

    def set_all(value: Any) -> Callable[[Any], None]:
        return lambda tree: tree.update(dict.fromkeys(tree, value))

    changes = {f"every value is {str(value)[:20]!r}": set_all(value) for value in values}
    return {
        **changes,
        "without keys": dict.clear,
        "within an empty key": _hide_in(""),
        "within the configuration of an encoder": _hide_in("text_config"),
        "with other files": lambda tree: tree.update(transformers_weights="x.safetensors", configuration_files=["x"]),
        "with 10^9 labels": lambda tree: tree.update(num_labels=10**9),
        "with a hostile key": lambda tree: tree.update({HOSTILE: HOSTILE}),
        "with 5000 keys of no class": lambda tree: tree.update({f"x{index}": index for index in range(5000)}),
        "with as many values as there may be": lambda tree: tree.update(
            {f"_{index}": [0] * 90 for index in range(900)}
        ),
    }


def _hide_in(key: str) -> Callable[[Any], None]:
    """Return a change that leaves the former values to a reader of one key, and 2^31 in each place to others."""

    def change(tree: Any) -> None:
        former = dict(tree) if isinstance(tree, dict) else {}
        tree.update(dict.fromkeys(former, 2**31))
        tree.update({"model_type": "clip", key: former})

    return change


def _indices() -> dict[str, Any]:
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    return {
        "none": {},
        "a list": [shard],
        "a number": {"first": 1},
        "outside": {"first": f"../unet/{shard}"},
        "absolute": {"first": f"/etc/{shard}"},
        "no safetensors": {"first": "config.json"},
        "missing": {"first": "x.safetensors"},
        "hostile": {"first": f"{HOSTILE}.safetensors"},
        "of 10^5 shards": {f"{index}": f"{index}.safetensors" for index in range(100_000)},
        "a long name": {"first": "x" * 100_000 + ".safetensors"},
        "a name with a zero byte": {"first": "x\0.safetensors"},
    }
