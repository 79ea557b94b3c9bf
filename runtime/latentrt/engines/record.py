"""What identifies an engine, and what is known of it?

An engine is a plan, which is native code for one kind of GPU, and a record that lies beside it. The record's
`EngineIdentity` holds everything that can change the plan; the engine's key is a hash of it. So an engine is looked
up by what is wanted of it, and two records say in words what differs between them (`differences`).

What a build measures (times of kernels, or a timing cache that remembers them) chooses among ways of computing the same
thing and is no part of the identity.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from latentrt.bundle.manifest import Count, FileRecord, GateResult, Positive, Precision, Record, Sha256
from latentrt.bundle.tensors import TensorSpec

__all__ = [
    "ENGINE_FORMAT",
    "BuildFigures",
    "EngineIdentity",
    "EngineOptions",
    "EngineRecord",
    "HardwareCompatibility",
    "LibraryName",
    "SelfCheck",
    "ShapeRange",
    "differences",
    "engine_key",
    "serves",
    "this_platform",
]

ENGINE_FORMAT = 1

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


class ShapeRange(Record, frozen=True, kw_only=True):
    """The shapes that one input may have: an optimisation profile's minimum, optimum and maximum."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        shapes = (self.min,) if self.min == self.max else (self.min, self.opt, self.max)
        return " … ".join("×".join(map(str, shape)) for shape in shapes)

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of this shape may be fed."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class EngineOptions(Record, frozen=True, kw_only=True):
    """What the builder is told, by trtexec's names.

    Attributes:
        optimization_level: 0 … 5; higher levels take longer to build and look at more kernels.
        workspace_bytes: what a layer may use of the GPU's memory for scratch; None is the library's own limit.
        version_compatible: the plan runs with later releases of the same major version too.
        hardware_compatibility: on which other GPUs the plan runs (`tensorrt`).
        refittable: the plan's weights can be replaced.
        weight_streaming: the plan can run with part of its weights in the host's memory.
        strip_weights: the plan is kept without its weights, which are put back when it is loaded.
        tf32: float32 products may be computed with ten bits of fraction.
    """

    optimization_level: int = 3
    workspace_bytes: Positive | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    refittable: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False
    tf32: bool = False


class EngineIdentity(Record, frozen=True, kw_only=True):
    """Everything that can change a plan.

    Attributes:
        component: `unet`, `text_encoder`, ….
        precision, graph: of the graph, and the SHA-256 of its file.
        weights: SHA-256 of the weights' file; None for a plan that is kept without weights.
        profile: the shapes each input may have.
        library_version: with the CUDA major version it was made for, as in `1.7.1.116+cu13`.
        platform: operating system and processor, as in `linux-x86_64`.
        compute_capabilities: the GPUs the plan is for, as in `8.9`.
        gpu: the GPU's name, where the plan is for that model alone.
    """

    component: str
    precision: Precision
    graph: Sha256
    weights: Sha256 | None
    profile: dict[str, ShapeRange]
    options: EngineOptions
    library: LibraryName
    library_version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None = None


class BuildFigures(Record, frozen=True, kw_only=True):
    """What a build took: wall time, the largest resident set of its process, the workspace that it got by with."""

    seconds: float
    peak_bytes: Count
    workspace_bytes: Count
    built_at: str
    created_by: str


class SelfCheck(Record, frozen=True, kw_only=True):
    """Whether the plan was run before it was accepted: where, and how far it was from ONNX Runtime; or why it was
    not."""

    ran_on: str | None
    not_run_because: str | None = None
    figures: tuple[GateResult, ...] = ()


class EngineRecord(Record, frozen=True, kw_only=True):
    """The whole of an engine's `record.json`.

    Attributes:
        plan: what pins the plan's file, which is named for its SHA-256.
        inputs, outputs: the engine's, by the manifest.
        refitted_from: the key of the engine that was given these weights.
    """

    format_version: Positive
    identity: EngineIdentity
    plan: FileRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    build: BuildFigures
    check: SelfCheck
    refitted_from: str | None = None

    @property
    def key(self) -> str:
        """The engine's key: 64 hexadecimal digits."""
        return engine_key(self.identity)


def engine_key(identity: EngineIdentity) -> str:
    """The hash of everything that identifies an engine: SHA-256 of its canonical JSON, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(identity, order="deterministic")).hexdigest()


def serves(found: EngineIdentity, wanted: EngineIdentity) -> bool:
    """Whether an engine that is there does what another one is wanted for: the same one, or one plan for more GPUs."""
    if not set(wanted.compute_capabilities) <= set(found.compute_capabilities):
        return False
    aimed = msgspec.structs.replace(found, compute_capabilities=wanted.compute_capabilities)
    return engine_key(aimed) == engine_key(wanted)


def this_platform() -> str:
    """Operating system and processor, which a plan belongs to."""
    return f"{sys.platform}-{platform.machine().lower()}"


def differences(found: EngineIdentity, wanted: EngineIdentity, arrays: str = "") -> list[str]:
    """What differs between an engine that is there and the one that is wanted: a clause each, none if they are one.

    Args:
        arrays: how many weights changed, in words, where that is known.
    """
    return list(_differences(found, wanted, arrays))


def _differences(found: EngineIdentity, wanted: EngineIdentity, arrays: str) -> Iterator[str]:
    if found.component != wanted.component:
        yield f"built of {found.component}, wanted {wanted.component}"
        return
    name = wanted.component
    precision = "" if found.precision == wanted.precision else f"{found.precision} there, {wanted.precision} wanted"
    if found.graph != wanted.graph:
        yield f"graph changed: {name}{precision and f' ({precision})'}"
    elif precision:
        yield f"precision: {precision}"
    if found.weights != wanted.weights:
        yield _weights_words(found, wanted, arrays)
    yield from _target_differences(found, wanted)
    for key in {**wanted.profile, **found.profile}:
        there, here = found.profile.get(key), wanted.profile.get(key)
        if there != here:
            yield f"profile of {key}: {there or 'nothing'} there, {here or 'nothing'} wanted"
    yield from _option_differences(found.options, wanted.options)


def _weights_words(found: EngineIdentity, wanted: EngineIdentity, arrays: str) -> str:
    if found.weights is None:
        return f"kept without weights, wanted with: {wanted.component}"
    if wanted.weights is None:
        return f"kept with its weights, wanted without: {wanted.component}"
    return f"weights changed: {wanted.component}{arrays and f', {arrays}'}"


def _target_differences(found: EngineIdentity, wanted: EngineIdentity) -> Iterator[str]:
    if found.library != wanted.library:
        yield f"built by {found.library}, wanted {wanted.library}"
    elif found.library_version != wanted.library_version:
        yield f"built by {found.library} {found.library_version}, this is {wanted.library_version}"
    if found.platform != wanted.platform:
        yield f"built for {found.platform}, this is {wanted.platform}"
    if not set(wanted.compute_capabilities) <= set(found.compute_capabilities):
        yield f"built for {', '.join(found.compute_capabilities)}, {_gpu_words(wanted)}"
    elif found.gpu != wanted.gpu:
        here = f"this is {wanted.gpu}" if wanted.gpu else "wanted for any of its kind"
        yield f"built for {found.gpu or 'any GPU of its kind'}, {here}"


def _gpu_words(wanted: EngineIdentity) -> str:
    capabilities = ", ".join(wanted.compute_capabilities)
    return f"this GPU is {capabilities}" if wanted.gpu else f"wanted {capabilities}"


def _option_differences(found: EngineOptions, wanted: EngineOptions) -> Iterator[str]:
    there, here = _plain(found), _plain(wanted)
    for key, value in here.items():
        if there[key] != value:
            yield f"{key.replace('_', ' ')}: {_said(there[key])} there, {_said(value)} wanted"


def _plain(options: EngineOptions) -> Mapping[str, object]:
    return msgspec.structs.asdict(options)


def _said(value: object) -> str:
    if value is None:
        return "the library's own"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value}"
