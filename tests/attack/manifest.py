"""Manifests that are valid JSON and wrong: each input, output, part, role and source of the sample bundle is changed.

A case opens the bundle, makes its pipeline on stand-ins for the backends, and generates one step. Nothing may come out
but an image or an error of our own tree.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components, Models
from latentrt.backends.placement import Preferences, place_components
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.manifest import decode_manifest
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec, axis_sizes, check_feeds, sized
from latentrt.errors import BackendError, LatentRTError

__all__ = ["Change", "cases", "run"]

Tree = Any
Change = Callable[[Tree], None]
_ROLES = ("text-encoder", "image-encoder", "denoiser", "encoder", "decoder", "preview-decoder", "classifier")
_SOURCES = (
    "latents",
    "timestep",
    "c-noise",
    "tokens",
    "image",
    "images",
    "mask",
    "noise-level",
    "option:x",
    "unet.noise_pred",
)
_DTYPES = ("float16", "float32", "uint8", "int64", "bool")


def run(change: Change, folder: Path) -> LatentRTError | None:
    """Generate with a changed manifest, which is never written."""
    tree = copy.deepcopy(_sample_tree())
    change(tree)
    try:
        sample = _sample()
        manifest = decode_manifest(json.dumps(tree).encode())
        bundle = Bundle(sample.folder, manifest, sample.digest, sample._files)
        _generate(bundle)
    except LatentRTError as error:
        return error
    return None


def cases() -> Iterator[tuple[str, Change]]:
    """Yield every change of the manifest, by a name that says where and what; two with one name are one."""
    yield from dict(_all_cases()).items()


def _all_cases() -> Iterator[tuple[str, Change]]:
    tree = _sample_tree()
    yield from _change_mapping("components", ())
    for table in ("tokenizers", "schedulers", "latent_spaces"):
        yield from _change_mapping(table, ())
    for name, component in tree["components"].items():
        yield from _change_component(name, component)
    for name in tree["components"]:
        yield f"{name} renamed everywhere", functools.partial(_rename_everywhere, name)
    for key in ("channels", "downscale", "patch", "multiple", "frames"):
        for number in (0, 1, 3, 7, 1 << 20):
            yield _set(f"latent_spaces/unet/{key}={number}", ("latent_spaces", "unet", key), number)


def _change_component(name: str, component: Tree) -> Iterator[tuple[str, Change]]:
    at = ("components", name)
    for role in _ROLES:
        yield _set(f"{name}/role={role}", (*at, "role"), role)
    yield from _change_mapping("graphs", at)
    for kind in ("inputs", "outputs"):
        yield from _change_specs((*at, kind), component[kind], thorough=True)
    for index, spec in enumerate(component["inputs"]):
        for source in _SOURCES:
            yield _set(f"{name}/{spec['name']}/source={source}", (*at, "inputs", index, "source"), source)
    if component["parts"]:
        yield from _change_mapping("parts", at)
        yield _set(f"{name}/parts={{}}", (*at, "parts"), {})
    for part, record in component["parts"].items():
        here = (*at, "parts", part)
        yield from _change_mapping("graphs", here)
        for kind in ("inputs", "outputs"):
            yield from _change_specs((*here, kind), record[kind], thorough=not part.startswith("slice.1"))


def _change_mapping(key: str, at: tuple[Any, ...]) -> Iterator[tuple[str, Change]]:
    """Drop, rename and double each entry of a mapping."""
    table = _get(_sample_tree(), (*at, key))
    for name in table:
        where = "/".join(map(str, (*at, key, name)))
        yield f"{where} dropped", functools.partial(_drop, (*at, key), name)
        for other in ("other", *table):
            if other != name:
                yield f"{where} renamed to {other}", functools.partial(_rename, (*at, key), name, other)


def _change_specs(at: tuple[Any, ...], specs: list[Tree], *, thorough: bool) -> Iterator[tuple[str, Change]]:
    """Change each input or output, and the list of them."""
    where = "/".join(map(str, at))
    yield _set(f"{where}=[]", at, [])
    yield _set(f"{where} reversed", at, specs[::-1])
    yield _set(f"{where} and one more", at, [*specs, {**specs[-1], "name": "more"}])
    if not thorough:
        return
    for index, spec in enumerate(specs):
        here, label = (*at, index), f"{where}/{spec['name']}"
        yield f"{label} dropped", functools.partial(_drop, at, index)
        yield _set(f"{label} twice", at, [*specs, spec])
        for name in ("other", "x" * 100_000, *(other["name"] for other in specs if other is not spec)):
            yield _set(f"{label} renamed to {name[:20]}", (*here, "name"), name)
        for dtype in _DTYPES:
            yield _set(f"{label} {dtype}", (*here, "dtype"), dtype)
        shape = spec["shape"]
        shapes: list[Tree] = [[], [1], shape[1:], shape[:-1], [*shape, 2], shape[::-1], [1] * 9, ["x"] * len(shape)]
        for axis in range(len(shape)):
            shapes += [[*shape[:axis], size, *shape[axis + 1 :]] for size in (0, -1, 5, 1 << 40, "x", "2*x", "0*x")]
        for changed in shapes:
            yield _set(f"{label} of shape {changed}", (*here, "shape"), changed)


def _set(name: str, at: tuple[Any, ...], value: Tree) -> tuple[str, Change]:
    return name, functools.partial(_replace, at, value)


def _replace(at: tuple[Any, ...], value: Tree, tree: Tree) -> None:
    _get(tree, at[:-1])[at[-1]] = copy.deepcopy(value)


def _drop(at: tuple[Any, ...], key: Any, tree: Tree) -> None:
    del _get(tree, at)[key]


def _rename(at: tuple[Any, ...], name: str, other: str, tree: Tree) -> None:
    table = _get(tree, at)
    table[other] = table.pop(name)


def _rename_everywhere(name: str, tree: Tree) -> None:
    for key in ("components", "tokenizers", "schedulers", "latent_spaces"):
        if name in tree[key]:
            _rename((key,), name, "other", tree)
    for component in tree["components"].values():
        for spec in component["inputs"]:
            spec["source"] = spec["source"].replace(f"{name}.", "other.")


def _get(tree: Tree, at: tuple[Any, ...]) -> Tree:
    return functools.reduce(lambda found, key: found[key], at, tree)


@functools.cache
def _sample() -> Bundle:
    return Bundle.open(bundle_path())


@functools.cache
def _sample_tree() -> Tree:
    return json.loads((bundle_path() / "bundle.json").read_bytes())


class _StandIn(Session):
    """A backend that checks its inputs and returns numbers of the signature's shapes."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        check_feeds(self.inputs, feeds)
        sizes = axis_sizes(self.inputs, {name: array.shape for name, array in feeds.items()})
        sizes.setdefault("tokens", sizes.get("height", 1) * sizes.get("width", 1))
        sizes.setdefault("rows", sizes.get("halo_rows", 3) - 2)
        arrays: Arrays = {}
        for spec in self.outputs:
            try:
                shape = sized(spec, sizes)
            except KeyError as error:  # a graph that makes axes of its own
                raise BackendError(f"no size of {error}") from None
            if np.prod(shape, dtype=np.float64) > 1 << 24 or min(shape, default=1) < 0:
                raise BackendError(f"cannot allocate {shape}")
            arrays[spec.name] = np.zeros(shape, spec.dtype)
        return arrays


def _generate(bundle: Bundle) -> None:
    """Generate an image in one step: with parts, in slices, and from an image."""
    for low_memory in (False, True):
        placements = place_components(bundle, "cpu", preferences=Preferences(low_memory=low_memory))
        for name, placement in placements.items():
            open_stand_in = functools.partial(_open_stand_in, bundle, name)
            placements[name] = replace(placement, open=open_stand_in, key=(object(),))
        components = Components(placements, low_memory=True, models=Models())
        pipeline = Pipeline(bundle, components)
        image = Image.new("RGB", (64, 64)) if low_memory else None
        options: dict[str, Any] = {"image": image} if image is not None else {}
        pipeline("a red circle", num_inference_steps=2, height=64, width=64, seed=1, **options)


def _open_stand_in(bundle: Bundle, name: str, part: str | None) -> Session:
    component = bundle.manifest.components[name]
    bundle.component_files(name, next(iter(component.graphs)), None)
    signature = component if part is None else component.parts[part]
    return _StandIn(
        tuple(TensorSpec(spec.name, spec.dtype, spec.shape) for spec in signature.inputs), signature.outputs
    )
