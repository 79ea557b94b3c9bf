"""Attacks on the time between check and use, and on entries of the user's cache.

A case makes a bundle of its own and attacks it. The attack succeeds where a run returns anything but the right output
or an error of latentrt, or where a later run, with the attack over and the same cache, does not return the right
output.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.bundle import digest_cache, pinned_files
from latentrt.bundle import weights as weights_module
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.errors import LatentRTError
from tests.runtime import tiny_graph

Backend = Literal["descriptor", "mapped", "openvino", "arrays"]
BACKENDS: tuple[Backend, ...] = ("descriptor", "mapped", "openvino", "arrays")
RIGHT = 2.5
Moment = Literal["hashed", "rewritten", "loaded", "end"]
WINDOWS: tuple[tuple[Moment, Moment], ...] = (
    ("hashed", "loaded"),
    ("hashed", "end"),
    ("rewritten", "loaded"),
    ("loaded", "end"),
)
_HOUR_NS = 3600 * 10**9
Act = Callable[[], None]


@dataclass(frozen=True)
class Swap:
    """Another graph or other weights in place of the pinned ones, from one moment to another."""

    backend: Backend
    target: str
    kind: str
    window: tuple[Moment, Moment]


@dataclass(frozen=True)
class Entry:
    """A damaged or planted entry of a cache."""

    cache: Literal["digests", "compiled", "kernels", "folder"]
    kind: str


def cases() -> Iterator[tuple[str, Swap | Entry]]:
    """Yield every case."""
    for backend, target, kind, window in product(BACKENDS, (tiny_graph.GRAPH, tiny_graph.WEIGHTS), SWAPS, WINDOWS):
        if backend != "arrays" or target == tiny_graph.WEIGHTS:
            name = "-".join((backend, target.rpartition(".")[2], kind, *window))
            yield name, Swap(backend, target, kind, window)
    for cache, kinds in (("digests", DIGESTS), ("compiled", FILES), ("kernels", FILES), ("folder", FOLDERS)):
        for kind in kinds:
            yield f"{cache}-{kind}", Entry(cache, kind)  # type: ignore[arg-type]


def run(case: Swap | Entry, folder: Path) -> LatentRTError | None:
    """Run one case in a new folder below `folder`."""
    with TemporaryDirectory(dir=folder) as new:
        place = Path(new)
        with patch.dict(os.environ, {"LATENTRT_CACHE": str(place / "cache")}):
            tiny_graph.write_bundle(place / "bundle")
            time.sleep(0.01)  # an attack in the clock's tick in which a file was made leaves its times as they are
            return _run_swap(case, place) if isinstance(case, Swap) else _run_entry(case, place)


# Swaps


class _Attack:
    """Does and undoes a swap at two moments, each once."""

    def __init__(self, window: tuple[Moment, Moment], do: Act, undo: Act) -> None:
        self.window, self.do, self.undo = window, do, undo
        self.done = self.undone = False

    def reach(self, moment: Moment) -> None:
        if moment == self.window[0] and not self.done:
            self.done = True
            self.do()
        elif moment in (self.window[1], "end") and self.done and not self.undone:
            self.undone = True
            self.undo()


def _run_swap(case: Swap, folder: Path) -> LatentRTError | None:
    refusal, attack = None, _Attack(case.window, *SWAPS[case.kind](folder, case.target))
    try:
        with _hooks(case, attack.reach):
            found = _compute(case.backend, Bundle.open(folder / "bundle"), lambda: attack.reach("loaded"))
        assert found == RIGHT, f"the run computed {found}, with another {case.target}"
    except LatentRTError as error:
        refusal = error
    attack.reach("end")
    assert attack.undone, "the attack did not take place"
    found = _compute(case.backend, Bundle.open(folder / "bundle"), lambda: None)
    assert found == RIGHT, f"a later run computes {found}: the cache was poisoned"
    return refusal


def _hooks(case: Swap, reach: Callable[[Moment], None]) -> ExitStack:
    """Let the moments take place: after the target was hashed, after the graph was rewritten, after it was loaded."""
    stack = ExitStack()

    def after(owner: Any, name: str, moment: Moment, wanted: Callable[..., bool] = lambda *_: True) -> None:
        function = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if wanted(*arguments):
                reach(moment)
            return result

        stack.enter_context(patch.object(owner, name, wrapped))

    after(pinned_files, "_check_hash", "hashed", lambda name, *_: name == case.target)
    after(ort, "relocate", "rewritten")
    after(ov, "detach", "rewritten")
    after(weights_module, "_map", "rewritten")
    after(ort, "_load", "loaded")
    after(ov, "_insert", "loaded")
    if case.backend == "mapped":
        stack.enter_context(patch.object(ort, "_DESCRIPTORS", "proc/self/nowhere"))
    return stack


def _compute(backend: Backend, bundle: Bundle, loaded: Callable[[], None]) -> float:
    if backend == "arrays":
        with bundle.weights(tiny_graph.COMPONENT) as weights:
            arrays = weights.arrays()
            loaded()
            return float(arrays["weight"].mean() + arrays["bias"].item())
    session = (ov if backend == "openvino" else ort).open_session(bundle, tiny_graph.COMPONENT, threads=1)
    output = session.run(tiny_graph.feeds())["hidden_states"]
    session.close()
    assert np.all(output == output.flat[0])
    return float(output.flat[0])


def _evil(target: str) -> bytes:
    return tiny_graph.addition("Sub") if target == tiny_graph.GRAPH else tiny_graph.stored(9)


def _exchange(first: Path, second: Path) -> Act:
    def act() -> None:
        aside = first.with_name(f"{first.name}.aside")
        os.rename(first, aside)
        os.rename(second, first)
        os.rename(aside, second)

    return act


def _file_swap(folder: Path, target: str) -> tuple[Act, Act]:
    other = folder / "other"
    other.write_bytes(_evil(target))
    act = _exchange(folder / "bundle" / target, other)
    return act, act


def _link_swap(make: Callable[[Path, Path], None]) -> Callable[[Path, str], tuple[Act, Act]]:
    def prepare(folder: Path, target: str) -> tuple[Act, Act]:
        place, evil, aside = folder / "bundle" / target, folder / "bundle" / "evil", folder / "aside"
        evil.write_bytes(_evil(target))

        def do() -> None:
            os.rename(place, aside)
            make(evil, place)

        def undo() -> None:
            os.unlink(place)
            os.rename(aside, place)

        return do, undo

    return prepare


def _folder_swap(depth: int) -> Callable[[Path, str], tuple[Act, Act]]:
    def prepare(folder: Path, target: str) -> tuple[Act, Act]:
        place = (folder / "bundle" / target).parents[depth]
        other = folder / "other"
        shutil.copytree(place, other)
        (other / (folder / "bundle" / target).relative_to(place)).write_bytes(_evil(target))
        act = _exchange(place, other)
        return act, act

    return prepare


def _write_in_place(*, restores_mtime: bool) -> Callable[[Path, str], tuple[Act, Act]]:
    def prepare(folder: Path, target: str) -> tuple[Act, Act]:
        place = folder / "bundle" / target
        right, evil, state = place.read_bytes(), _evil(target), place.stat()
        assert len(right) == len(evil)

        def write(data: bytes) -> None:
            with place.open("r+b") as stream:
                stream.write(data)
            if restores_mtime:
                os.utime(place, ns=(state.st_atime_ns, state.st_mtime_ns))

        return lambda: write(evil), lambda: write(right)

    return prepare


SWAPS: dict[str, Callable[[Path, str], tuple[Act, Act]]] = {
    "rename": _file_swap,
    "hardlink": _link_swap(os.link),
    "symlink": _link_swap(os.symlink),
    "component-folder": _folder_swap(0),
    "bundle-folder": _folder_swap(1),
    "in-place": _write_in_place(restores_mtime=False),
    "in-place-mtime": _write_in_place(restores_mtime=True),
}


# Entries of the cache


def _run_entry(case: Entry, folder: Path) -> LatentRTError | None:
    if case.cache == "folder":
        return _run_folder(case.kind, folder)
    if case.cache == "kernels":
        return _run_kernels(case.kind, folder)
    return _run_digests(case.kind, folder) if case.cache == "digests" else _run_compiled(case.kind, folder)


def _run_digests(kind: str, folder: Path) -> LatentRTError | None:
    """A record vouches for weights that are wrong; only the true record of a true file may be believed."""
    place = folder / "bundle" / tiny_graph.WEIGHTS
    clock = time.time_ns
    with patch.object(digest_cache, "_SMALLEST_BYTES", 0), patch.object(time, "time_ns", lambda: clock() + _HOUR_NS):
        Bundle.open(folder / "bundle").path(tiny_graph.WEIGHTS)
        (record,) = (each for each in (folder / "cache" / "digests").iterdir() if _is_of(each, place))
        place.write_bytes(tiny_graph.stored(9))
        DIGESTS[kind](record)
        try:
            found = _compute("descriptor", Bundle.open(folder / "bundle"), lambda: None)
        except LatentRTError as error:
            return error
    raise AssertionError(f"the run computed {found}, with other weights")


def _is_of(record: Path, place: Path) -> bool:
    state = place.stat()
    return record.name == f"{state.st_dev:x}-{state.st_ino:x}.json"


def _run_compiled(kind: str, folder: Path) -> LatentRTError | None:
    assert _compute("openvino", Bundle.open(folder / "bundle"), lambda: None) == RIGHT
    (entry,) = (folder / "cache" / "compiled").iterdir()
    FILES[kind](entry)
    for _ in range(2):
        found = _compute("openvino", Bundle.open(folder / "bundle"), lambda: None)
        assert found == RIGHT, f"the run computed {found} from a planted entry"
    return None


class _Kernels:
    """TensorRT-RTX's cache of kernels; it fails where it is given others than were stored."""

    def __init__(self) -> None:
        self.given = b""

    def create_runtime_cache(self) -> _Kernels:
        return self

    def deserialize(self, data: bytes) -> bool:
        self.given = data
        return True

    def serialize(self) -> bytes:
        return b"kernels of this engine"

    def set_runtime_cache(self, cache: object) -> None:
        pass


def _run_kernels(kind: str, folder: Path) -> LatentRTError | None:
    (folder / "engine").mkdir()
    kept = RuntimeCache(folder / "engine")
    kept.attach(_Kernels())
    kept.save()
    (entry,) = (folder / "engine").iterdir()
    FILES[kind](entry)
    kernels = _Kernels()
    RuntimeCache(folder / "engine").attach(kernels)
    assert kernels.given in (b"", b"kernels of this engine"), f"the library was given {kernels.given!r}"
    return None


def _run_folder(kind: str, folder: Path) -> LatentRTError | None:
    shutil.rmtree(folder / "cache")  # which opening the bundle made
    FOLDERS[kind](folder / "cache")
    for _ in range(2):
        assert _compute("openvino", Bundle.open(folder / "bundle"), lambda: None) == RIGHT
    outside = folder / "outside"
    assert not outside.exists() or not any(outside.iterdir()), "the cache was written outside its folder"
    return None


def _change(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda place: place.write_bytes(edit(place.read_bytes()))


def _replace_by(make: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """Replace an entry by something of another kind; the entry is beside it."""

    def act(place: Path) -> None:
        aside = place.with_name("aside")
        os.rename(place, aside)
        make(place, aside)

    return act


def _link_away(place: Path) -> None:
    """Let an entry lead to a file of the user, which must stay as it is."""
    place.unlink()
    (place.parent.parent / "precious").write_bytes(b"precious")
    place.symlink_to(place.parent.parent / "precious")


FILES: dict[str, Callable[[Path], object]] = {
    "empty": _change(lambda data: b""),
    "one-byte": _change(lambda data: data[:1]),
    "header-only": _change(lambda data: data[:32]),
    "truncated": _change(lambda data: data[:-1]),
    "longer": _change(lambda data: data + b"\0"),
    "first-bit": _change(lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "last-bit": _change(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "zeros": _change(lambda data: bytes(len(data))),
    "text": _change(lambda data: b"not what was stored"),
    "own-hash": _change(lambda data: bytes.fromhex(hash_bytes(b"planted")) + b"planted"),
    "mode": lambda place: place.chmod(0o666),
    "unreadable": lambda place: place.chmod(0),
    "symlink": _replace_by(lambda place, aside: place.symlink_to(aside)),
    "symlink-away": _link_away,
    "symlink-dangling": _replace_by(lambda place, aside: place.symlink_to("nothing")),
    "symlink-loop": _replace_by(lambda place, aside: place.symlink_to(place)),
    "folder": _replace_by(lambda place, aside: place.mkdir()),
    "fifo": _replace_by(lambda place, aside: os.mkfifo(place)),
    "missing": _replace_by(lambda place, aside: None),
}

_TRUE = hash_bytes(tiny_graph.stored(2)).encode()
DIGESTS: dict[str, Callable[[Path], object]] = {
    "as-it-was": lambda place: None,
    "empty": _change(lambda data: b""),
    "truncated": _change(lambda data: data[:-1]),
    "garbage": _change(lambda data: b"\xff" * 64),
    "array": _change(lambda data: b"[" * 4000),
    "other-keys": _change(lambda data: b'{"sha256":"' + _TRUE + b'"}'),
    "no-state": _change(lambda data: b'{"state":null,"sha256":"' + _TRUE + b'"}'),
    "huge": _change(lambda data: data + b" " * (1 << 20)),
    "mode": lambda place: place.chmod(0o666),
    "symlink": _replace_by(lambda place, aside: place.symlink_to(aside)),
    "folder": _replace_by(lambda place, aside: place.mkdir()),
    "fifo": _replace_by(lambda place, aside: os.mkfifo(place)),
}


def _folder_link(cache: Path) -> None:
    outside = cache.parent / "outside"
    outside.mkdir(mode=0o700)
    cache.symlink_to(outside)


def _inner_link(cache: Path) -> None:
    outside = cache.parent / "outside"
    outside.mkdir(mode=0o700)
    cache.mkdir(mode=0o700)
    for name in ("compiled", "digests"):
        (cache / name).symlink_to(outside)


def _open_to_all(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def _inner_open(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    (cache / "compiled").mkdir()
    (cache / "compiled").chmod(0o770)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "open-to-all": _open_to_all,
    "open-to-the-group": _inner_open,
    "link": _folder_link,
    "link-inside": _inner_link,
    "file": lambda cache: cache.write_bytes(b""),
    "fifo": lambda cache: os.mkfifo(cache),
}
if os.geteuid() == 0:

    def _of_another(cache: Path) -> None:
        cache.mkdir(mode=0o700)
        os.chown(cache, 12345, 12345)

    FOLDERS["of-another-user"] = _of_another
