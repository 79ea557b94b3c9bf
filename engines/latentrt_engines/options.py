"""The user's options of a build, and the build request that they resolve to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.engines.gpu import Gpu, NoGpu, find_gpu
from latentrt.engines.record import EngineOptions, HardwareCompatibility, LibraryName
from latentrt.errors import RequestError
from latentrt_engines.gpus import GpuModel, find_by_driver_name, parse_capabilities, parse_gpus
from latentrt_engines.library import Library
from latentrt_engines.profiles import Guidance, ImageProfile, image_profile
from latentrt_engines.targets import EngineTarget, choose_capabilities, choose_components, choose_library, list_targets

__all__ = ["BuildOptions", "BuildRequest", "parse_bytes"]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A checked request to build engines.

    Attributes:
        gpu: the GPU of this machine.
        profiles: the supported images, a profile for each size.
        targets: the engines, without duplicates.
    """

    library: Library
    gpu: Gpu | NoGpu
    profiles: list[ImageProfile]
    targets: list[EngineTarget]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The user's options of `build`, `plan` and `engines why`.

    Attributes:
        component: the names of the components; empty for all of the bundle's.
        precision: the precision of the graph; None for the bundle's.
        size, batch, chunks, guidance: the images that the engines support (`latentrt_engines.profiles`).
        width, height: in place of `size`, in pixels; None for the bundle's default.
        workspace: the scratch memory of a layer, as in `2GiB`; None for the library's own limit.
        library: the library that builds; None for the one that supports the GPUs.
    """

    component: tuple[str, ...] = ()
    precision: Precision | None = None
    size: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None
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

    def parse_profiles(self, bundle: Bundle) -> list[ImageProfile]:
        """Parse the image options; return a profile for each size.

        Raises:
            RequestError: an option is invalid, or the bundle cannot generate such images.
        """
        sides = {"width": self.width, "height": self.height}
        if self.size and (given := [name for name, side in sides.items() if side is not None]):
            raise RequestError(f"got `size` and `{given[0]}`, expected one of the two")
        images: dict[str, Any] = {**sides, "batch": self.batch, "chunks": self.chunks, "guidance": self.guidance}
        return [image_profile(bundle.manifest, size=size, **images) for size in self.size or (None,)]

    def parse_engine_options(self) -> EngineOptions:
        """Parse the builder options.

        Raises:
            RequestError: the workspace is not a number of bytes.
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

    def resolve(
        self, bundle: Bundle, gpus: str | None, capabilities: str | None, here: Gpu | NoGpu | None = None
    ) -> BuildRequest:
        """Choose the library and the GPUs, check the options, and list the engines to build.

        Args:
            gpus: GPU models to build for, as in `rtx4090,rtx5090`.
            capabilities: compute capabilities to build for, as in `8.6,8.9`. This machine's GPU if both are None.
            here: the GPU of this machine; None to detect it.

        Raises:
            RequestError: an option is invalid, or unsupported by the library.
            BackendError: no library can be loaded, or it needs a GPU that this machine does not have.
            BundleError: the bundle has no graph of the precision.
        """
        gpu = here or find_gpu()
        models = parse_gpus(gpus) if gpus else ()
        if isinstance(gpu, Gpu) and models == (find_by_driver_name(gpu.name),):
            models = ()  # this machine's GPU, by its name
        if self.library is None:
            _check_models(models)
        named = [model.compute_capability for model in models]
        named += parse_capabilities(capabilities) if capabilities else []
        profiles = self.parse_profiles(bundle)
        choose_components(bundle, self.component)
        library = choose_library(self.library, gpu, named_targets=bool(named))
        chosen = choose_capabilities(library, gpu, named)
        library.check(self.parse_engine_options(), chosen, gpu)
        targets = self.list_targets(bundle, profiles, library, chosen, gpu)
        return BuildRequest(library=library, gpu=gpu, profiles=profiles, targets=targets)

    def list_targets(
        self,
        bundle: Bundle,
        profiles: Sequence[ImageProfile],
        library: Library,
        capabilities: tuple[str, ...],
        gpu: Gpu | NoGpu,
    ) -> list[EngineTarget]:
        """List the engines to build; an engine that several sizes share is listed once."""
        targets: dict[str, EngineTarget] = {}
        for profile in profiles:
            for target in list_targets(
                bundle,
                choose_components(bundle, self.component),
                profile,
                library=library,
                options=self.parse_engine_options(),
                capabilities=capabilities,
                gpu=gpu,
                precision=self.precision,
            ):
                targets.setdefault(target.key, target)
        return list(targets.values())


def _check_models(models: Sequence[GpuModel]) -> None:
    """Reject models whose engines are built with TensorRT on the GPU itself; this machine's GPU is not among them."""
    if labels := [model.label for model in models if model.library == "tensorrt"]:
        raise RequestError(
            f"got --gpu {','.join(labels)}, whose engines are built with TensorRT on the GPU itself; run latentrt "
            "build there without --gpu. latentrt plan shows where each engine is built; --library tensorrt_rtx builds "
            "with TensorRT-RTX here"
        )


_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MAX_BYTES = 1 << 50


def parse_bytes(name: str, text: str) -> int:
    """Parse a number of bytes, as in `2GiB`, `512MiB` or `1000000`.

    Args:
        name: the option's name, for the message.

    Raises:
        RequestError: the text has another form, or the number is below 1 or above 1 PiB.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    count = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2].upper(), 0))
    if not 1 <= count <= _MAX_BYTES:
        raise RequestError(f"got the {name} {text!r}, expected a size such as 2GiB or 512MiB")
    return count
