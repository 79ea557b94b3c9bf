"""The command `latentrt doctor`: prints the backends that this machine can run, and how to enable the others."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.cli.output import echo

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle

__all__ = ["doctor"]

Lines = Iterator[tuple[str, str]]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
def doctor(bundle: Path | None) -> None:
    """Print the GPU, the libraries and the engines of this machine, and files that killed commands left behind. With
    BUNDLE, also the backend of each of its components, and why."""
    from latentrt.bundle.bundle import Bundle

    opened = None if bundle is None else Bundle.open(bundle)
    for key, text in _machine_lines():
        echo(f"{key:<16} {text}")
    beside = None if opened is None else opened.folder.parent
    for number, text in enumerate(_list_leftovers(beside)):
        echo(f"{'' if number else 'leftovers':<16} {text}")
    if opened is not None:
        echo()
        for key, text in _bundle_lines(opened):
            echo(f"{key:<16} {text}")


def _machine_lines() -> Lines:
    from latentrt import __version__
    from latentrt.backends.tensorrt.library import LoadedLibrary, find_libraries
    from latentrt.engines.gpu import NoGpu, describe_driver, find_gpu

    yield "latentrt", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        yield "GPU", f"no: {gpu.reason}; {gpu.mend}"
    else:
        yield "GPU", f"{gpu}, {describe_driver(gpu)}"
    for name, found in find_libraries().items():
        yield name, found.version if isinstance(found, LoadedLibrary) else f"no: {found}"
    yield "onnxruntime", _describe_onnxruntime()
    yield "openvino", _describe_openvino()
    yield "engines", _describe_cache()


def _describe_onnxruntime() -> str:
    from latentrt.backends.onnxruntime import require
    from latentrt.errors import BackendError, MissingExtraError

    try:
        onnxruntime = require()
    except MissingExtraError:
        return "no: not installed; pip install 'latentrt[cpu]', or 'latentrt[gpu]' with an NVIDIA GPU"
    except BackendError as error:
        return f"no: {error}"
    return f"{onnxruntime.__version__}, with {', '.join(onnxruntime.get_available_providers())}"


def _describe_openvino() -> str:
    from latentrt.backends.openvino import computes_in_bfloat16, is_installed
    from latentrt.errors import BackendError

    if not is_installed():
        return "no: not installed; pip install 'latentrt[openvino]', the fastest on a CPU"
    from importlib.metadata import version

    try:
        has = computes_in_bfloat16()
    except BackendError as error:
        return f"no: {error}"
    return f"{version('openvino')}, this CPU has {'' if has else 'no '}bfloat16 arithmetic"


def _describe_cache() -> str:
    from latentrt.engines.store import EngineStore
    from latentrt.errors import EngineError

    try:
        store = EngineStore()
    except EngineError as error:
        return f"no: {error}"
    return f"{len(list(store.engines()))} in {store.folder}"


def _list_leftovers(beside: Path | None) -> Iterator[str]:
    """Describe the files of killed commands in the current folder, in the folder `beside` and in the cache."""
    from latentrt.bundle.atomic_file import find_abandoned_drafts
    from latentrt.bundle.printable import counted, printable
    from latentrt.bundle.staging import find_abandoned_stages
    from latentrt.bundle.user_cache import cache_root
    from latentrt.engines.store import EngineStore
    from latentrt.errors import EngineError

    folders = [] if beside is None else [beside]
    with contextlib.suppress(OSError):  # the current folder may have been deleted
        folders.insert(0, Path(os.getcwd()))
    for folder in dict.fromkeys(folders):
        for stage in find_abandoned_stages(folder):
            holds = " and holds the bundle that was there, which is moved back" if stage.holds_former else ""
            yield printable(
                f"{stage.path}, of a killed export or seal to {stage.destination.name}{holds}; the next export or seal "
                f"to {folder} removes it"
            )
        if drafts := find_abandoned_drafts(folder):
            yield printable(
                f"{counted(len(drafts), 'draft')} of killed commands in {folder}, such as {drafts[0].name}; the next "
                "command that writes an image or a report there removes them"
            )
    if (root := cache_root()) is not None:
        count = sum(len(find_abandoned_drafts(folder)) for folder in (*root.glob("*/"), *root.glob("engines/*/")))
        if count:
            yield printable(f"{counted(count, 'draft')} of killed commands in {root}, removed by the next ones")
    with contextlib.suppress(EngineError):
        store = EngineStore()
        if unneeded := store.find_leftovers():
            yield printable(
                f"{counted(len(unneeded), 'damaged or unfinished engine')} in {store.folder}; latentrt engines prune "
                "removes them"
            )


def _bundle_lines(bundle: Bundle) -> Lines:
    from latentrt.backends.placement import find_machine, place_components
    from latentrt.engines.choice import choose_engines
    from latentrt.engines.gpu import Gpu, find_gpu

    gpu = find_gpu()
    for component, placement in place_components(bundle).items():
        yield component, str(placement)
        if not isinstance(gpu, Gpu):
            continue
        fit, others = choose_engines(bundle, component, find_machine(gpu)[0])
        for source in fit:
            profile = "; ".join(f"{name} {shapes}" for name, shapes in source.record.identity.profile.items())
            yield "", f"  fits: {source.record.key[:12]}, {profile}"
        for other in others:
            yield "", f"  does not fit: {other.record.key[:12]}, {', '.join(other.reasons)}"
        if not fit:
            yield "", f"  to build one: latentrt build {bundle.folder} --component {component}"
