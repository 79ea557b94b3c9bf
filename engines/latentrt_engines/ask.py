"""What does a user say of the engines he wants? The options that `build`, `plan` and `engines` share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import click

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import EngineOptions, HardwareCompatibility, LibraryName
from latentrt.errors import RequestError
from latentrt_engines.fleet import FleetGpu, by_driver_name, parse_capabilities, parse_fleet
from latentrt_engines.library import Library
from latentrt_engines.profiles import Guidance, PictureProfile, picture_profile
from latentrt_engines.wanted import Wanted, choose_components, choose_library, choose_targets, wanted_engines

__all__ = ["Ask", "Wants", "ask_options", "parse_bytes", "target_options"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MOST_BYTES = 1 << 50


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The options, as they were given."""

    component: tuple[str, ...] = ()
    precision: Precision | None = None
    size: tuple[str, ...] = ()
    batch: str = "1"
    chunks: str = "1"
    guidance: Guidance | None = None
    builder_optimization_level: int = 3
    workspace: str | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    refittable: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False
    tf32: bool = False
    library: LibraryName | None = None

    def profiles(self, bundle: Bundle) -> list[PictureProfile]:
        """The pictures that are asked for, a profile for each size.

        Raises:
            RequestError: the bundle cannot draw them.
        """
        return [
            picture_profile(bundle.manifest, size=size, batch=self.batch, chunks=self.chunks, guidance=self.guidance)
            for size in self.size or (None,)
        ]

    def options(self) -> EngineOptions:
        """What the builder is told.

        Raises:
            RequestError: the workspace is of no known form.
        """
        return EngineOptions(
            optimization_level=self.builder_optimization_level,
            workspace_bytes=None if self.workspace is None else parse_bytes("workspace", self.workspace),
            version_compatible=self.version_compatible,
            hardware_compatibility=self.hardware_compatibility,
            refittable=self.refittable,
            weight_streaming=self.weight_streaming,
            strip_weights=self.strip_weights,
            tf32=self.tf32,
        )

    def wants(
        self, bundle: Bundle, gpus: str | None, capabilities: str | None, here: Gpu | NoGpu | None = None
    ) -> Wants:
        """Which engines are wanted, everything decided and checked.

        Args:
            gpus, capabilities: for which GPUs; for this machine's if both are None.
            here: the GPU of this machine, if it was looked for already.

        Raises:
            RequestError: it cannot be done. BackendError: no library can do it here.
        """
        gpu = here or find_gpu()
        fleet = parse_fleet(gpus) if gpus else ()
        if isinstance(gpu, Gpu) and fleet == (by_driver_name(gpu.name),):
            fleet = ()  # the one that is named is the one of this machine
        if self.library is None:
            _check_fleet(fleet)
        named = [each.compute_capability for each in fleet]
        named += parse_capabilities(capabilities) if capabilities else []
        profiles = self.profiles(bundle)
        choose_components(bundle, self.component)
        library = choose_library(self.library, gpu, named_targets=bool(named))
        targets = choose_targets(library, gpu, named)
        library.check(self.options(), targets, gpu)
        engines = self.engines(bundle, profiles, library, targets, gpu)
        return Wants(library=library, gpu=gpu, profiles=profiles, engines=engines)

    def engines(
        self,
        bundle: Bundle,
        profiles: Sequence[PictureProfile],
        library: Library,
        targets: tuple[str, ...],
        gpu: Gpu | NoGpu,
    ) -> list[Wanted]:
        """What identifies each engine; one that several sizes share stands there once."""
        engines: dict[str, Wanted] = {}
        for profile in profiles:
            for wanted in wanted_engines(
                bundle,
                choose_components(bundle, self.component),
                profile,
                library=library,
                options=self.options(),
                capabilities=targets,
                gpu=gpu,
                precision=self.precision,
            ):
                engines.setdefault(wanted.key, wanted)
        return list(engines.values())


def _check_fleet(fleet: Sequence[FleetGpu]) -> None:
    """Refuse GPUs whose engines are built on themselves, where they are not the one of this machine."""
    if others := [gpu.label for gpu in fleet if gpu.library == "tensorrt"]:
        names, themselves = ", ".join(others), "itself" if len(others) == 1 else "themselves"
        raise RequestError(
            f"engines for {names} are built with TensorRT on {themselves}: run latentrt build there, without --gpu. "
            "latentrt plan shows who builds what; --library tensorrt_rtx is for whoever wants its plans there"
        )


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What is wanted, and with what it is built."""

    library: Library
    gpu: Gpu | NoGpu
    profiles: list[PictureProfile]
    engines: list[Wanted]


_OPTIONS = (
    click.option("--component", multiple=True, help="Of these submodules only; may be given several times."),
    click.option(
        "--precision", type=click.Choice(["float16", "float32"]), help="Of the graph. The bundle's by default."
    ),
    click.option(
        "--size",
        multiple=True,
        help="WIDTHxHEIGHT, a range 256..1024 (best at the bundle's size) or min:opt:max; may be given several times.",
    ),
    click.option(
        "--batch",
        default="1",
        show_default=True,
        help="Pictures at once: 4, 1..4 or min:opt:max as 1:1:4; prompts of other lengths run apart.",
    ),
    click.option(
        "--chunks", default="1", show_default=True, help="Of 75 tokens that a prompt may fill; the same forms."
    ),
    click.option(
        "--guidance",
        type=click.Choice(["on", "off", "both"]),
        help="Classifier-free guidance. The bundle's by default.",
    ),
    click.option("--builder-optimization-level", type=int, default=3, show_default=True, help="0 to 5."),
    click.option("--workspace", help="Scratch memory of a layer, as 2GiB. The library's own limit by default."),
    click.option("--version-compatible", is_flag=True, help="Plans that later releases of TensorRT run too."),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
        default="none",
        show_default=True,
        help="TensorRT plans that run on other GPUs too.",
    ),
    click.option("--refittable", is_flag=True, help="Plans whose weights can be replaced."),
    click.option("--weight-streaming", is_flag=True, help="Plans that run with part of their weights in host memory."),
    click.option("--strip-weights", is_flag=True, help="Plans without weights, which are put back on loading."),
    click.option("--tf32", is_flag=True, help="float32 products may round to TF32."),
    click.option("--library", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Chosen by the GPU by default."),
)


def ask_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command the options of an `Ask`, which it gets as its argument `ask`."""

    @functools.wraps(command)
    def collecting(**given: Any) -> _R:
        ask = Ask(**{name: given.pop(name) for name in Ask.__dataclass_fields__})
        return command(ask=ask, **given)

    for option in reversed(_OPTIONS):
        collecting = option(collecting)
    return collecting


def target_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--gpu` and `--compute-capabilities`."""
    for option in (
        click.option("--compute-capabilities", "capabilities", help="For these too, as 8.6,8.9 (TensorRT-RTX)."),
        click.option(
            "--gpu",
            "--gpus",
            "gpus",
            help="For these, as rtx4090,rtx5090, one plan for all. This machine's by default.",
        ),
    ):
        command = option(command)
    return command


def parse_bytes(name: str, text: str) -> int:
    """`2GiB`, `512MiB`, `1000000`.

    Raises:
        RequestError: it is of another form, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    count = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2].upper(), 0))
    if not 1 <= count <= _MOST_BYTES:
        raise RequestError(f"found the {name} {text!r}, expected such as 2GiB or 512MiB")
    return count
