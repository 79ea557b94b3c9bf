"""Engine targets: the engines to build from a bundle, and the choice of library, GPUs and components."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.bundle.printable import quote
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineIdentity, EngineOptions, LibraryName, engine_key, this_platform
from latentrt.errors import BundleError, RequestError
from latentrt_engines.library import Library, load_libraries, load_library
from latentrt_engines.profiles import ImageProfile, check_merging, component_profile

__all__ = ["EngineTarget", "choose_capabilities", "choose_components", "choose_library", "list_targets"]


@dataclass(frozen=True, kw_only=True)
class EngineTarget:
    """An engine to build.

    Attributes:
        identity: everything that can change its plan.
        profile: the requests that it supports.
    """

    identity: EngineIdentity
    profile: ImageProfile

    @property
    def component(self) -> str:
        """The name of the component whose graph is built."""
        return self.identity.component

    @property
    def key(self) -> str:
        """The engine's key."""
        return engine_key(self.identity)


def choose_library(name: LibraryName | None, gpu: Gpu | NoGpu, *, named_targets: bool) -> Library:
    """Choose the library that builds.

    By default this is TensorRT for the GPU of this machine, and TensorRT-RTX for named GPUs or a machine without a GPU.
    If it is not installed, the other library is chosen where that supports the build.

    Args:
        name: the user's choice, if any.
        gpu: the GPU of this machine.
        named_targets: whether the user named the GPUs or compute capabilities to build for.

    Raises:
        MissingExtraError, BackendError: the library cannot be loaded.
    """
    if name is not None:
        return load_library(name)
    libraries = load_libraries()
    order: tuple[LibraryName, ...] = ("tensorrt_rtx", "tensorrt")
    if isinstance(gpu, Gpu) and not named_targets:
        order = ("tensorrt", "tensorrt_rtx")
    for candidate in order:
        library = libraries[candidate]
        if isinstance(library, Library) and _supports(library, gpu, named_targets=named_targets):
            return library
    return load_library(order[0])


def _supports(library: Library, gpu: Gpu | NoGpu, *, named_targets: bool) -> bool:
    if library.needs_gpu or named_targets:
        return True
    return isinstance(gpu, NoGpu) or gpu.compute_capability in library.capabilities()


def choose_capabilities(library: Library, gpu: Gpu | NoGpu, named: Iterable[str]) -> tuple[str, ...]:
    """Choose the compute capabilities to build for: the named ones, sorted and without duplicates, else this machine's.

    Raises:
        RequestError: no capability is named, and this machine has no GPU.
    """
    if capabilities := tuple(sorted(set(named), key=_as_numbers)):
        return capabilities
    if isinstance(gpu, NoGpu):
        raise RequestError(
            f"got no GPU to build for, and on this machine {gpu.reason}; name one, as in --gpu rtx4090 or "
            f"--compute-capabilities 8.9 ({library} supports {', '.join(library.capabilities())})"
        )
    return (gpu.compute_capability,)


def _as_numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def choose_components(bundle: Bundle, names: Iterable[str]) -> tuple[str, ...]:
    """Choose the components to build: the named ones without duplicates, else all of the bundle's.

    Raises:
        RequestError: the bundle does not have one of them.
    """
    components = bundle.manifest.components
    for name in names:
        if name not in components:
            raise RequestError(f"got the component {quote(name)}, expected one of {', '.join(components)}")
    return tuple(dict.fromkeys(names)) or tuple(components)


def list_targets(
    bundle: Bundle,
    components: Iterable[str],
    profile: ImageProfile,
    *,
    library: Library,
    options: EngineOptions,
    capabilities: tuple[str, ...],
    gpu: Gpu | NoGpu,
    precision: Precision | None = None,
) -> list[EngineTarget]:
    """List the engines of a bundle's components for one profile.

    Args:
        capabilities: the compute capabilities that a plan has to support.
        gpu: the GPU of this machine; a TensorRT plan supports its model only, unless it is built for hardware
            compatibility.
        precision: the precision of the graph; None for the bundle's.

    Raises:
        BundleError: the bundle has no graph of the precision, or the graph is int8, which is for CPUs.
        RequestError: the images have more merged tokens than the library can rank.
    """
    precision = precision or bundle.manifest.precision
    if precision == "int8":
        raise BundleError(
            f"{bundle.folder} has int8 graphs, which are for CPUs; engines need float16 or float32: "
            "latentrt export CHECKPOINT BUNDLE --precision float16"
        )
    model = None
    if library.needs_gpu and isinstance(gpu, Gpu) and options.hardware_compatibility == "none":
        model = gpu.name
    files, targets = bundle.manifest.files, []
    for name in components:
        graph, weights = bundle.component_files(name, precision)
        shapes = component_profile(name, bundle.manifest.components[name], profile, bundle.manifest)
        check_merging(bundle.manifest.components[name], shapes)
        identity = EngineIdentity(
            component=name,
            precision=precision,
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
        targets.append(EngineTarget(identity=identity, profile=profile))
    return targets
