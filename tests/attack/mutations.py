"""Mutated manifests and requests, in process: each is accepted, or refused by an error of latentrt's own tree.

A mutation is made from its number alone.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.backends.models import Components
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import decode_manifest
from latentrt.bundle.pinned_files import PinnedFiles
from latentrt.bundle.root import BundleRoot
from latentrt.bundle.sample import bundle_path
from latentrt.errors import LatentRTError
from latentrt.families import open_family
from latentrt.request import OPTIONS, Request
from latentrt.resolve import resolve
from latentrt.sampling import samplers

__all__ = ["VALUES", "cases", "leaves", "open_tree", "replaced", "run", "sample_text", "sample_tree"]

VALUES: tuple[Any, ...] = (
    *(-(2**63), -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**53, 2**63 - 1, 2**64, 10**30),
    *(-1.5, 1e-308, 0.5, 1e308, float("inf"), float("nan")),
    *(None, True, False, "", "x", "\0", "\ud800", "\x1b]0;x\x07", "a" * 5000, "../x", "[/]", "1" * 400),
    *([], {}, [[]], [1], [1, 2, 3, 4], ["x"], {"x": 1}, [None], [float("nan")], list(range(2000))),
)
"""What any value is replaced by."""

Place = tuple[Any, ...]


@cache
def sample_text() -> bytes:
    """Return the text of the sample bundle's manifest without most of its similar entries, to save time."""
    tree = json.loads((bundle_path() / "bundle.json").read_bytes())
    for component in tree["components"].values():
        for owner in (component, *component.get("parts", {}).values()):
            for graph in owner["graphs"].values():
                graph["float32_nodes"], graph["gate"] = graph.get("float32_nodes", [])[:2], graph.get("gate", [])[:1]
    return json.dumps(tree).encode()


def sample_tree() -> Any:
    """Return the sample bundle's manifest as plain values, anew."""
    return json.loads(sample_text())


def leaves(tree: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of every value below the root, as keys and indices."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from leaves(value, (*place, key))


def replaced(tree: Any, place: Place, value: Any) -> Any:
    """Return the tree with another value at a place; the tree itself is changed."""
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return tree


def open_tree(text: bytes) -> tuple[Bundle, Any]:
    """Open a manifest as a bundle without files, and its family."""
    folder = bundle_path()
    manifest = decode_manifest(text)
    bundle = Bundle(Path(folder), manifest, f"sha256:{'0' * 64}", PinnedFiles(BundleRoot(folder), {}, None))
    return bundle, open_family(bundle, Components({}))


@cache
def _places() -> tuple[Place, ...]:
    return tuple(leaves(sample_tree()))


def _mutate_manifest(chance: random.Random) -> bytes:
    tree = sample_tree()
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.choice(_places())
        kind = chance.randrange(5)
        try:
            node = tree
            for key in place[:-1]:
                node = node[key]
            if kind == 0 and isinstance(node, dict):
                node.pop(place[-1], None)
            elif kind == 1 and isinstance(node, dict):
                node[chance.choice(("x", "", "unet", "\ud800", "patch", "parts", "multiple"))] = chance.choice(VALUES)
            elif kind == 2:
                node[place[-1]] = json.loads(json.dumps(_value_at(sample_tree(), chance.choice(_places()))))
            elif kind == 3 and isinstance(node[place[-1]], (int, float)):
                node[place[-1]] *= chance.choice((-1, 2, 3, 10, 1000, 0.5))
            else:
                node[place[-1]] = chance.choice(VALUES)
        except (KeyError, IndexError, TypeError):  # gone with an earlier mutation
            continue
    text = json.dumps(tree).encode()
    return _mutate_bytes(chance, text) if chance.random() < 0.1 else text


def _value_at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _mutate_bytes(chance: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(3)] = chance.choice(
            (b"", b"{", b"[", b'"', b"9", b",", b"\xff", b"\\", b"-", b"e9")
        )
    return bytes(data)


@cache
def _sampler_names() -> tuple[str, ...]:
    known = [name for name in samplers.SAMPLERS if not samplers.SAMPLERS[name].unsupported_reason]
    return (
        *known,
        "Euler a",
        "DPM++ 2M SDE Karras",
        "dpmpp_2m_karras_karras",
        "_karras" * 500,
        "x" * 9000,
        "\ud800",
        "",
    )


@cache
def _sampler_options() -> tuple[str, ...]:
    import dataclasses

    known = {each.name for sampler in samplers.SAMPLERS.values() for each in dataclasses.fields(sampler)}
    run_options = {name for sampler in samplers.SAMPLERS.values() for name in sampler.run_options}
    return (*sorted(known | run_options), "begin", "eta", "x")


def _mutate_request(chance: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {"prompt": "a cat", "seed": 1}
    for _ in range(chance.choice((1, 1, 2, 3))):
        values[chance.choice(tuple(OPTIONS))] = chance.choice(VALUES + _of_python())
    if chance.random() < 0.5:
        values["sampler"] = chance.choice(_sampler_names())
    if chance.random() < 0.5:
        names = chance.sample(_sampler_options(), chance.choice((1, 1, 2)))
        values["sampler_options"] = {name: chance.choice(VALUES) for name in names}
    return values


@cache
def _of_python() -> tuple[Any, ...]:
    """Return values that only a caller in Python can give."""
    return (
        *(np.int64(3), np.float32("nan"), np.float64(0.5), 10**5000, range(10**30), b"x", (1, 2), {1, 2}, object()),
        *(
            np.zeros((1, 4, 16, 16), np.float32),
            np.zeros(0),
            np.array(["a"]),
            np.array([object()]),
            np.full((2, 2), 1e300),
        ),
        *(np.zeros((1, 77, 1), np.float32), np.zeros((8, 8, 3), np.uint8), np.array(5)),
    )


def cases() -> Iterator[tuple[str, int]]:
    """Yield the number of each mutation, without an end: odd ones are of manifests, even ones of requests."""
    for seed in itertools.count():
        yield str(seed), seed


def run(seed: int, folder: Path) -> LatentRTError | None:
    """Resolve a request for a manifest, one of which is mutated; nothing is written."""
    chance = random.Random(seed)
    text = _mutate_manifest(chance) if seed % 2 else sample_text()
    values = {"prompt": "a cat", "seed": 1} if seed % 2 else _mutate_request(chance)
    try:
        bundle, family = open_tree(text) if seed % 2 else _sample()
        resolve(Request.of(**values), bundle.manifest, family)
    except LatentRTError as error:
        return error
    return None


@cache
def _sample() -> tuple[Bundle, Any]:
    return open_tree(sample_text())
