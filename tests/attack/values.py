"""Single wrong values of a manifest and of a request, one at a time.

`manifest_cases` and `request_cases` yield (name, case); `run` opens the bundle and resolves the request in process. A
case either succeeds or fails with an error of latentrt's own tree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.errors import LatentRTError
from latentrt.images.files import check_output
from latentrt.request import OPTIONS, Request
from latentrt.resolve import resolve
from latentrt.result import expected_texts
from tests.attack.mutations import Place, leaves, open_tree, replaced, sample_text, sample_tree

__all__ = ["Case", "cases", "manifest_cases", "request_cases", "run"]

Case = Callable[[], tuple[bytes, dict[str, Any], str]]
"""Makes the manifest's text, the request's keywords, and the name of the output."""

NUMBERS: tuple[Any, ...] = (-1, 0, 1, 10**6, 2**31, 2**53, 2**63 - 1, 1e308, "x", None, [], {})
TEXTS: tuple[Any, ...] = ("", "\0", "\x1b]0;x\x07", "\u202e", "../../x", "/etc/passwd", "a" * 100_000, 1, None, [])
PROMPT = {"prompt": "a cat", "seed": 1}


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case."""
    yield from manifest_cases()
    yield from request_cases()


def manifest_cases() -> Iterator[tuple[str, Case]]:
    """Yield each number of the sample's manifest as each of `NUMBERS`, each kind of text as each of `TEXTS`."""
    tree, seen = sample_tree(), set[Place]()
    for place in leaves(tree):
        value = tree
        for key in place:
            value = value[key]
        kind = _kind(place)
        if kind in seen or isinstance(value, (dict, list)):
            continue
        seen.add(kind)
        for wrong in TEXTS if isinstance(value, str) else NUMBERS:
            yield f"{'.'.join(map(str, place))}={_name(wrong)}", partial(_changed, [(place, wrong)])
    yield from _larger_manifests()


def _kind(place: Place) -> Place:
    """Return a place with an asterisk for each index within a list that has many alike, and each name of such names."""
    kind, previous = [], ""
    for key in place:
        many = (place[2] if len(place) > 2 else "") in ("graphs", "parts")
        free = (isinstance(key, int) and many) or previous in ("files", "graphs", "parts", "shapes", "weights")
        kind.append("*" if free else key)
        previous = str(key)
    return tuple(kind)


def _larger_manifests() -> Iterator[tuple[str, Case]]:
    """Yield manifests with far too much of something, or whose values contradict each other."""
    space, limits, config = ("latent_spaces", "unet"), ("limits",), ("schedulers", "unet", "config")
    scheduler = (*config, "num_train_timesteps")
    changed: dict[str, list[tuple[Place, Any]]] = {
        "limits of 16384": [((*limits, "max_side"), 16384), ((*limits, "max_batch"), 1024)],
        "limits in the wrong order": [((*limits, "min_side"), 512), ((*limits, "max_side"), 256)],
        "no size fits": [((*limits, "min_side"), 65), ((*limits, "max_side"), 65)],
        "patch and multiple": [((*space, "patch"), 1023), ((*space, "multiple"), 1024)],
        "no scale": [((*space, "scale"), 0)],
        "a scale of nothing": [((*space, "scale"), 1e-300)],
        "10^12 timesteps": [(scheduler, 10**12)],
        "10^6 timesteps": [(scheduler, 10**6)],
        "10^6 betas": [(scheduler, 10**6), ((*config, "trained_betas"), [0.001] * 10**6)],
        "betas of 1e308": [(scheduler, 3), ((*config, "trained_betas"), [1e308] * 3)],
        "a nested configuration": [(config, json.loads('{"a":' * 25 + "1" + "}" * 25))],
        "a configuration of many keys": [(config, {f"key {index}": index for index in range(100_000)})],
        "another scheduler": [(("schedulers", "unet", "class_name"), "_karras" * 1000)],
        "many files": [(("files", f"f{index}"), {"sha256": "0" * 64, "size": 1}) for index in range(5000)],
        "files of 2^53 bytes": [(("files", "LICENSE", "size"), 2**53)],
        "many nodes": [(("components", "unet", "graphs", "float16", "float32_nodes"), ["n" * 100] * 50_000)],
        "many shapes": [(("components", "unet", "inputs", 0, "shape"), [1] * 100_000)],
        "a family of another kind": [(("family",), "flux")],
        "no tasks": [(("tasks",), [])],
        "an unknown task": [(("tasks",), ["text-to-music"])],
        "every option of the unet gone": [(("components", "unet", "inputs"), [])],
    }
    for name, changes in changed.items():
        yield name, partial(_changed, changes)
    text = sample_text()
    for name, spoilt in {
        "duplicate keys of 12 MB": b"{" + b'"a":1,' * 2_000_000 + text[1:],
        "a duplicate key at the end of 12 MB": b"{"
        + b",".join(b'"k%07d":1' % index for index in range(900_000))
        + b',"k0899999":1}',
        "900 levels": b'{"format_version": 2, "a": ' + b"[" * 900 + b"]" * 900 + b"}",
        "a million lists": b'{"a": [' + b"[]," * 1_000_000 + b"[]]}",
        "a number of a million digits": text.replace(b'"max_side": 1024', b'"max_side": ' + b"9" * 1_000_000, 1),
        "NaN": text.replace(b'"max_side": 1024', b'"max_side": NaN', 1),
        "Infinity": text.replace(b'"max_side": 1024', b'"max_side": Infinity', 1),
        "1e999": text.replace(b'"max_side": 1024', b'"max_side": 1e999', 1),
        "UTF-16": text.decode().encode("utf-16"),
        "a mark of byte order": b"\xef\xbb\xbf" + text,
        "half": text[: len(text) // 2],
        "17 MiB": text + b" " * (17 << 20),
        "nothing": b"",
        "a list": b"[]",
    }.items():
        yield name, partial(_request, text=spoilt)


def _changed(changes: list[tuple[Place, Any]]) -> tuple[bytes, dict[str, Any], str]:
    tree = sample_tree()
    for place, value in changes:
        tree = replaced(tree, place, value)
    return json.dumps(tree).encode(), PROMPT, "out.png"


def _request(
    options: dict[str, Any] = PROMPT, *, text: bytes | None = None, output: str = "out.png"
) -> tuple[bytes, dict[str, Any], str]:
    return sample_text() if text is None else text, options, output


def request_cases() -> Iterator[tuple[str, Case]]:
    """Yield each option of a request with each wrong value, and combinations that need too much."""
    wrong = (
        *NUMBERS,
        *(2**64, 10**30, 10**5000, -1e308, float("inf"), float("-inf"), float("nan")),
        *("\0", "a" * 10_000, b"x", object(), range(10**30), [None], {"x": []}),
        *(np.float32("nan"), np.int64(-1), np.array(3), np.zeros((3, 3)), np.array([object()])),
    )
    for keyword in OPTIONS:
        for value in wrong:
            yield f"{keyword}={_name(value)}", partial(_request, {**PROMPT, keyword: value})
    for options in (
        *({"timesteps": [*range(count)][::-1]} for count in (0, 1, 1001, 100_000)),
        *({"sigmas": [1e308, 0.0]}, {"sigmas": [0.0]}, {"sigmas": [float("nan")]}, {"timesteps": [1e9, -1]}),
        *({"num_train_timesteps": 10**12}, {"num_train_timesteps": 2}, {"trained_betas": [0.1] * 10**6}),
        *({"beta_start": 1e308}, {"beta_start": 1e-308, "beta_end": 1e-308}, {"solver_order": 10**9}, {"order": 10**9}),
        *({"s_churn": 1e308}, {"s_noise": float("inf")}, {"begin": 10**9}, {"original_inference_steps": 10**9}),
        *({"dynamic_thresholding_ratio": 1e-300, "thresholding": True}, {"sample_max_value": 1e308}, {"": 1}),
        *({"_use_default_values": 1}, {"_use_default_values": ["x"] * 1000}, {"steps_offset": 10**6}, {1: 1}),
    ):
        for sampler in ("ddim", "euler", "lcm"):
            yield (
                f"{sampler} {_name(options)}",
                partial(_request, {**PROMPT, "sampler": sampler, "sampler_options": options}),
            )
    for sampler in (
        "karras",
        "_karras_karras",
        " Karras" * 5000,
        "euler" + "_beta" * 20,
        "\x1b[2J",
        "scheduler",
        "sample_",
    ):
        yield f"sampler {_name(sampler)}", partial(_request, {**PROMPT, "sampler": sampler})
    for seeds in (
        range(0),
        range(10**30),
        range(2**63, 2**63 + 1),
        [2**63],
        [-1],
        ["7"],
        "7",
        [[7]],
        np.zeros((2, 2), int),
    ):
        yield f"seeds {_name(seeds)}", partial(_request, {**PROMPT, "seed": seeds})
    for name in ("a" * 300 + ".png", "b/" * 3000 + "c.png", "\0.png", ".png", "", "loop.png", "fifo.png", "\ud800.png"):
        yield f"output {_name(name)}", partial(_request, output=name)


def run(case: Case, folder: Path) -> LatentRTError | None:
    """Open the manifest, resolve the request, and check the place of its image in `folder`."""
    text, values, output = case()
    loop = folder / "loop.png"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    try:
        bundle, family = open_tree(text)
        request = resolve(Request.of(**values), bundle.manifest, family)
        check_output(folder / output, expected_texts(bundle, family, request))
    except LatentRTError as error:
        return error
    return None


def _name(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 30 else f"{text[:20]}…{len(text)}"
