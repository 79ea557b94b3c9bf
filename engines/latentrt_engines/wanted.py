"""Which engines does a bundle want, for which GPU?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineIdentity, EngineOptions, LibraryName, engine_key, this_platform
from latentrt.errors import BundleError, RequestError
from latentrt_engines.library import Library, installed_libraries, load_library
from latentrt_engines.profiles import PictureProfile, check_merging, component_profile

__all__ = ["Wanted", "choose_components", "choose_library", "choose_targets", "wanted_engines"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An engine that is wanted: what identifies it, and what it is for in words."""

    identity: EngineIdentity
    profile: PictureProfile

    @property
    def component(self) -> str:
        """Of which submodule."""
        return self.identity.component

    @property
    def key(self) -> str:
        """The engine's key."""
        return engine_key(self.identity)


def choose_library(name: LibraryName | None, gpu: Gpu | NoGpu, *, named_targets: bool) -> Library:
    """The library that is asked for; else the one that fits: TensorRT on the GPU of this machine, TensorRT-RTX for GPUs
    that are named or where there is none.

    Raises:
        MissingExtraError, BackendError: it cannot be loaded.
    """
    if name is not None:
        return load_library(name)
    found = installed_libraries()
    order: tuple[LibraryName, ...] = ("tensorrt_rtx", "tensorrt")
    if isinstance(gpu, Gpu) and not named_targets:
        order = ("tensorrt", "tensorrt_rtx")
    for candidate in order:
        library = found[candidate]
        if isinstance(library, Library) and _serves(library, gpu, named_targets=named_targets):
            return library
    return load_library(order[0])


def _serves(library: Library, gpu: Gpu | NoGpu, *, named_targets: bool) -> bool:
    if library.needs_gpu or named_targets:
        return True
    return isinstance(gpu, NoGpu) or gpu.compute_capability in library.capabilities()


def choose_targets(library: Library, gpu: Gpu | NoGpu, capabilities: Iterable[str]) -> tuple[str, ...]:
    """The compute capabilities to build for: those that are named, else this machine's.

    Raises:
        RequestError: none is named, and there is no GPU here.
    """
    named = tuple(sorted(set(capabilities), key=_as_numbers))
    if named:
        return named
    if isinstance(gpu, NoGpu):
        known = ", ".join(library.capabilities())
        raise RequestError(
            f"nothing says which GPU to build for, and here {gpu.reason}; name one, as in --gpu rtx4090 or "
            f"--compute-capabilities 8.9 ({library} knows {known})"
        )
    return (gpu.compute_capability,)


def _as_numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def choose_components(bundle: Bundle, names: Iterable[str]) -> tuple[str, ...]:
    """The submodules to build: those that are named, else all.

    Raises:
        RequestError: the bundle has no such submodule.
    """
    has = bundle.manifest.components
    for name in names:
        if name not in has:
            raise RequestError(f"found the component {name!r}, this bundle has {', '.join(has)}")
    return tuple(dict.fromkeys(names)) or tuple(has)


def wanted_engines(
    bundle: Bundle,
    components: Iterable[str],
    profile: PictureProfile,
    *,
    library: Library,
    options: EngineOptions,
    capabilities: tuple[str, ...],
    gpu: Gpu | NoGpu,
    precision: Precision | None = None,
) -> list[Wanted]:
    """What identifies each engine that is wanted.

    Args:
        capabilities: the compute capabilities a plan is for.
        gpu: of this machine; a TensorRT plan is for its model alone, unless it is built to be compatible.
        precision: of the graph; the bundle's own if None.

    Raises:
        BundleError: the bundle has no graph of that precision, or is one for CPUs.
        RequestError: the pictures have more merged tokens than a library can rank.
    """
    if (precision or bundle.manifest.precision) == "int8":
        raise BundleError(
            f"{bundle.folder} is a bundle of int8, which is for CPUs; engines are built of float16 or float32: "
            "latentrt export CHECKPOINT BUNDLE --precision float16"
        )
    model = None
    if library.needs_gpu and isinstance(gpu, Gpu) and options.hardware_compatibility == "none":
        model = gpu.name
    wanted = []
    for name in components:
        chosen = precision or bundle.manifest.precision
        graph, weights = bundle.component_files(name, chosen)
        files = bundle.manifest.files
        shapes = component_profile(name, bundle.manifest.components[name], profile, bundle.manifest)
        check_merging(bundle.manifest.components[name], shapes)
        identity = EngineIdentity(
            component=name,
            precision=chosen,
            graph=files[graph].sha256,
            weights=None if options.strip_weights else files[weights].sha256,
            profile=shapes,
            options=options,
            library=library.name,
            library_version=library.version,
            platform=this_platform(),
            compute_capabilities=capabilities,
            gpu=model,
        )
        wanted.append(Wanted(identity=identity, profile=profile))
    return wanted
