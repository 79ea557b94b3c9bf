"""The command `latentrt doctor`: prints the backends that this machine can run, and how to enable the others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from latentrt.bundle.sample import bundle_argument
from latentrt.cli.command import command, settings
from latentrt.cli.document import MachineDocument, echo_document
from latentrt.cli.output import echo
from latentrt.cli.values import BundlePath

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle

__all__ = ["Availability", "DoctorDocument", "doctor", "suggest"]


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """Availability of a library, a device or a folder on this machine.

    Attributes:
        available: whether it can be used.
        text: its version, or why it cannot be used and what to do.
    """

    available: bool
    text: str


class PlacementDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The backend of a component.

    Attributes:
        text: backend and device for people, with the reason.
        backend: the library. device: `cpu`, `gpu` or the name of an execution provider.
        reason: why nothing better runs it; may be empty.
        engines: a line for each engine of the component.
    """

    text: str
    backend: str
    device: str
    reason: str
    engines: list[str]


class NextStep(msgspec.Struct, frozen=True, kw_only=True):
    """A command that helps on this machine, and why."""

    command: str
    reason: str


class DoctorDocument(MachineDocument, frozen=True, kw_only=True):
    """The document of `latentrt doctor --json`.

    Attributes:
        parts: the GPU, libraries and the cache of engines, by name.
        leftovers: files that killed commands left behind.
        components: of BUNDLE, by name.
        next: what to do next, the most useful first.
    """

    parts: dict[str, Availability]
    leftovers: list[str]
    components: dict[str, PlacementDocument]
    next: list[NextStep]


@command(
    examples=(
        "latentrt doctor",
        "latentrt doctor my-bundle    # also: what runs each of its components",
    )
)
@click.argument("bundle", type=BundlePath(), required=False)
def doctor(bundle: Path | None) -> None:
    """Print the GPU, the libraries and the engines of this machine, files that killed commands left behind, and what
    to do next. With BUNDLE, also the backend of each of its components, and why."""
    from latentrt.bundle.bundle import Bundle

    opened = None if bundle is None else Bundle.open(bundle)
    parts = dict(_inspect_machine())
    document = DoctorDocument.here(
        parts=parts,
        leftovers=list(_list_leftovers(None if opened is None else opened.folder.parent)),
        components={} if opened is None else dict(_place(opened)),
        next=suggest(parts, bundle),
    )
    if settings().json:
        echo_document(document)
    else:
        _print(document)


def _print(document: DoctorDocument) -> None:
    echo(f"{'latentrt':<16} {document.latentrt}, Python {document.python}, {document.machine}")
    for name, part in document.parts.items():
        echo(f"{name:<16} {part.text if part.available else f'no: {part.text}'}")
    for number, text in enumerate(document.leftovers):
        echo(f"{'' if number else 'leftovers':<16} {text}")
    if document.components:
        echo()
    for component, placed in document.components.items():
        echo(f"{component:<16} {placed.text}")
        for line in placed.engines:
            echo(f"{'':<16}   {line}")
    echo()
    echo("What to do next:")
    width = max(len(step.command) for step in document.next)
    for step in document.next:
        echo(f"  {step.command:<{width}}  {step.reason}")


def suggest(parts: Mapping[str, Availability], bundle: Path | None) -> list[NextStep]:
    """Return the one or two commands that help most on this machine."""
    can = {name: part.available for name, part in parts.items()}
    gpu, engines = can["GPU"], can["tensorrt"] or can["tensorrt_rtx"]
    on_cpu = can["onnxruntime"] or can["openvino"]
    named = "BUNDLE" if bundle is None else bundle_argument(bundle)
    steps = [
        (gpu and "CUDA" not in parts["onnxruntime"].text and not engines, _install("gpu"), "use the GPU"),
        (not on_cpu and not gpu, _install("cpu"), "nothing can run a bundle yet"),
        (not gpu and on_cpu and not can["openvino"], _install("openvino"), "the fastest on a CPU"),
        (gpu and engines, f"latentrt build {named}", "build engines, the fastest on this GPU"),
        (bundle is not None, f"latentrt run {named} PROMPT", "generate an image"),
        (bundle is None, "latentrt demo", "generate a sheet of images with the sample bundle"),
        (bundle is None, 'latentrt run sample "a red circle on a blue background"', "generate one image"),
    ]
    return [NextStep(command=command, reason=reason) for helps, command, reason in steps if helps][:2]


def _install(extra: str) -> str:
    return f"pip install 'latentrt[{extra}]'"


def _inspect_machine() -> Iterator[tuple[str, Availability]]:
    from latentrt.backends.tensorrt.library import LoadedLibrary, find_libraries
    from latentrt.engines.gpu import NoGpu, describe_driver, find_gpu

    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        yield "GPU", _no(f"{gpu.reason}; {gpu.mend}")
    else:
        yield "GPU", _yes(f"{gpu}, {describe_driver(gpu)}")
    for name, found in find_libraries().items():
        yield name, _yes(found.version) if isinstance(found, LoadedLibrary) else _no(str(found))
    yield "onnxruntime", _inspect_onnxruntime()
    yield "openvino", _inspect_openvino()
    yield "engines", _inspect_cache()


def _yes(text: str) -> Availability:
    return Availability(available=True, text=text)


def _no(text: str) -> Availability:
    return Availability(available=False, text=text)


def _inspect_onnxruntime() -> Availability:
    from latentrt.backends.onnxruntime import require
    from latentrt.errors import BackendError, MissingExtraError

    try:
        onnxruntime = require()
    except MissingExtraError:
        return _no("not installed; pip install 'latentrt[cpu]', or 'latentrt[gpu]' with an NVIDIA GPU")
    except BackendError as error:
        return _no(str(error))
    return _yes(f"{onnxruntime.__version__}, with {', '.join(onnxruntime.get_available_providers())}")


def _inspect_openvino() -> Availability:
    from latentrt.backends.openvino import computes_in_bfloat16, is_installed
    from latentrt.errors import BackendError

    if not is_installed():
        return _no("not installed; pip install 'latentrt[openvino]', the fastest on a CPU")
    from importlib.metadata import version

    try:
        has = computes_in_bfloat16()
    except BackendError as error:
        return _no(str(error))
    return _yes(f"{version('openvino')}, this CPU has {'' if has else 'no '}bfloat16 arithmetic")


def _inspect_cache() -> Availability:
    from latentrt.engines.store import EngineStore
    from latentrt.errors import EngineError

    try:
        store = EngineStore()
    except EngineError as error:
        return _no(str(error))
    return _yes(f"{len(list(store.engines()))} in {store.folder}")


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


def _place(bundle: Bundle) -> Iterator[tuple[str, PlacementDocument]]:
    """Yield the backend of each component."""
    from latentrt.backends.placement import place_components

    for component, placed in place_components(bundle).items():
        yield (
            component,
            PlacementDocument(
                text=str(placed),
                backend=placed.backend,
                device=placed.device,
                reason=placed.reason,
                engines=list(_list_engines(bundle, component)),
            ),
        )


def _list_engines(bundle: Bundle, component: str) -> Iterator[str]:
    """Describe each engine of a component, whether it fits this machine's GPU, and how to build one."""
    from latentrt.backends.placement import find_machine
    from latentrt.engines.choice import choose_engines
    from latentrt.engines.gpu import Gpu, find_gpu

    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        return
    fit, others = choose_engines(bundle, component, find_machine(gpu)[0])
    for source in fit:
        profile = "; ".join(f"{name} {shapes}" for name, shapes in source.record.identity.profile.items())
        yield f"fits: {source.record.key[:12]}, {profile}"
    for other in others:
        yield f"does not fit: {other.record.key[:12]}, {', '.join(other.reasons)}"
    if not fit:
        yield f"to build one: latentrt build {bundle_argument(bundle.folder)} --component {component}"
