"""The record of an engine: its identity, its plan, and measurements of its build and self-check.

An engine is a plan, which is native code for one kind of GPU, and a record stored next to it. The record's
`EngineIdentity` holds everything that can change the plan; the engine's key is a hash of it. So an engine is looked
up by its identity, and `describe_differences` explains how two identities differ.

Kernel timings, and a timing cache that stores them, choose among kernels that compute the same thing. They are not part
of the identity.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from latentrt.bundle.manifest import Count, FileRecord, GateResult, Positive, Precision, Record, Sha256
from latentrt.bundle.tensors import MAX_AXES, MAX_AXIS_SIZE, TensorSpec

__all__ = [
    "ENGINE_FORMAT",
    "BuildStats",
    "EngineIdentity",
    "EngineOptions",
    "EngineRecord",
    "HardwareCompatibility",
    "LibraryName",
    "SelfCheck",
    "ShapeRange",
    "describe_differences",
    "engine_key",
    "serves",
    "this_platform",
]

ENGINE_FORMAT = 1

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


Shape = Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_AXIS_SIZE)], ...], msgspec.Meta(max_length=MAX_AXES)]


class ShapeRange(Record, frozen=True, kw_only=True):
    """The shapes that one input may have: an optimisation profile's minimum, optimum and maximum.

    Raises:
        ValueError: the three have different numbers of axes, or an axis is not minimum ≤ optimum ≤ maximum.
    """

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        ranks = [len(shape) for shape in (self.min, self.opt, self.max)]
        if len(set(ranks)) > 1:
            raise ValueError(f"got shapes of {', '.join(map(str, ranks))} axes, expected as many in all three")
        if not all(low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(
                f"got {self.min}, {self.opt} and {self.max}, expected minimum ≤ optimum ≤ maximum on every axis"
            )

    def __str__(self) -> str:
        shapes = (self.min,) if self.min == self.max else (self.min, self.opt, self.max)
        return " … ".join("×".join(map(str, shape)) for shape in shapes)

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Return whether an input of this shape lies within the range on every axis."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class EngineOptions(Record, frozen=True, kw_only=True):
    """Builder options, named as in trtexec.

    Attributes:
        optimization_level: 0 … 5; higher levels take longer to build and try more kernels.
        workspace_bytes: limit of a layer's scratch memory on the GPU; None is the library's own limit.
        version_compatible: the plan also runs with later releases of the same major version.
        hardware_compatibility: the other GPUs that the plan runs on (`tensorrt`).
        refittable: the plan's weights can be replaced.
        weight_streaming: the plan can run with a fraction of its weights in host memory.
        strip_weights: the plan is stored without its weights, which are put back when it is loaded.
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
        component: name of the component in the bundle's manifest.
        precision: of the graph.
        graph: SHA-256 of the graph's file.
        weights: SHA-256 of the weights file; None for a plan that is stored without weights.
        profile: the shapes of each input, by its name.
        library_version: with the CUDA major version it was made for, as in `1.7.1.116+cu13`.
        platform: operating system and processor, as in `linux-x86_64`.
        compute_capabilities: of the GPUs that the plan is for, as in `8.9`.
        gpu: the GPU's name, where the plan is for that model only.
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


class BuildStats(Record, frozen=True, kw_only=True):
    """Measurements of a build.

    Attributes:
        seconds: wall time.
        peak_bytes: largest resident set of the process that built.
        workspace_bytes: the workspace limit that the build succeeded with.
        built_at: ISO 8601 time, UTC.
        created_by: latentrt and its version.
    """

    seconds: float
    peak_bytes: Count
    workspace_bytes: Count
    built_at: str
    created_by: str


class SelfCheck(Record, frozen=True, kw_only=True):
    """The comparison of an engine with ONNX Runtime, before it is accepted.

    Attributes:
        ran_on: name of the GPU; None if the engine was not run.
        skip_reason: why the engine was not run.
        results: a metric for each output and each tested shape.
    """

    ran_on: str | None
    skip_reason: str | None = None
    results: tuple[GateResult, ...] = ()


class EngineRecord(Record, frozen=True, kw_only=True):
    """The content of an engine's `record.json`.

    Attributes:
        plan: SHA-256 and size of the plan's file, which is named for the SHA-256.
        inputs, outputs: of the engine, as the manifest has them.
        refitted_from: key of the engine whose copy was given these weights.
    """

    format_version: Positive
    identity: EngineIdentity
    plan: FileRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    build: BuildStats
    check: SelfCheck
    refitted_from: str | None = None

    @property
    def key(self) -> str:
        """The engine's key: 64 hexadecimal digits."""
        return engine_key(self.identity)


def engine_key(identity: EngineIdentity) -> str:
    """Return the SHA-256 of an identity's canonical JSON, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(identity, order="deterministic")).hexdigest()


def serves(found: EngineIdentity, wanted: EngineIdentity) -> bool:
    """Return whether an engine can take the place of another: it is equal, or equal and built for more GPUs."""
    if not set(wanted.compute_capabilities) <= set(found.compute_capabilities):
        return False
    narrowed = msgspec.structs.replace(found, compute_capabilities=wanted.compute_capabilities)
    return engine_key(narrowed) == engine_key(wanted)


def this_platform() -> str:
    """Return this machine's operating system and processor, as in `linux-x86_64`; a plan runs on one platform."""
    return f"{sys.platform}-{platform.machine().lower()}"


def describe_differences(found: EngineIdentity, wanted: EngineIdentity, changed_arrays: str = "") -> list[str]:
    """Describe how an existing engine differs from the wanted one, in a clause for each difference.

    Args:
        changed_arrays: number of weight arrays that differ, as in `3 of 208 arrays`; empty if it is not known.

    Returns:
        The clauses; [] if the identities are equal.
    """
    return list(_find_differences(found, wanted, changed_arrays))


def _find_differences(found: EngineIdentity, wanted: EngineIdentity, changed_arrays: str) -> Iterator[str]:
    if found.component != wanted.component:
        yield f"built from {found.component}, wanted {wanted.component}"
        return
    name = wanted.component
    precision = "" if found.precision == wanted.precision else f"found {found.precision}, wanted {wanted.precision}"
    if found.graph != wanted.graph:
        yield f"graph changed: {name}{precision and f' ({precision})'}"
    elif precision:
        yield f"precision: {precision}"
    if found.weights != wanted.weights:
        yield _describe_weights(found, wanted, changed_arrays)
    yield from _target_differences(found, wanted)
    for key in {**wanted.profile, **found.profile}:
        before, after = found.profile.get(key), wanted.profile.get(key)
        if before != after:
            yield f"profile of {key}: found {before or 'nothing'}, wanted {after or 'nothing'}"
    yield from _option_differences(found.options, wanted.options)


def _describe_weights(found: EngineIdentity, wanted: EngineIdentity, changed_arrays: str) -> str:
    if found.weights is None:
        return f"stored without weights, wanted with weights: {wanted.component}"
    if wanted.weights is None:
        return f"stored with weights, wanted without weights: {wanted.component}"
    return f"weights changed: {wanted.component}{changed_arrays and f', {changed_arrays}'}"


def _target_differences(found: EngineIdentity, wanted: EngineIdentity) -> Iterator[str]:
    if found.library != wanted.library:
        yield f"built by {found.library}, wanted {wanted.library}"
    elif found.library_version != wanted.library_version:
        yield f"built by {found.library} {found.library_version}, this is {wanted.library_version}"
    if found.platform != wanted.platform:
        yield f"built for {found.platform}, this is {wanted.platform}"
    if not set(wanted.compute_capabilities) <= set(found.compute_capabilities):
        capabilities = ", ".join(wanted.compute_capabilities)
        yield (
            f"built for {', '.join(found.compute_capabilities)}, "
            f"{'this GPU is' if wanted.gpu else 'wanted'} {capabilities}"
        )
    elif found.gpu != wanted.gpu:
        after = f"this is {wanted.gpu}" if wanted.gpu else "wanted for any GPU of its compute capability"
        yield f"built for {found.gpu or 'any GPU of its compute capability'}, {after}"


def _option_differences(found: EngineOptions, wanted: EngineOptions) -> Iterator[str]:
    before, after = msgspec.structs.asdict(found), msgspec.structs.asdict(wanted)
    for key, value in after.items():
        if before[key] != value:
            yield f"{key.replace('_', ' ')}: found {_format_option(before[key])}, wanted {_format_option(value)}"


def _format_option(value: object) -> str:
    if value is None:
        return "the library's default"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value}"
