"""The TensorRT builder config: flags, limits, profile, timing cache and progress monitor of one build."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.engines.record import EngineIdentity, EngineOptions, ShapeRange
from latentrt.errors import BuildError
from latentrt_engines.library import Library

__all__ = ["PhaseTree", "add_profile", "make_config", "make_monitor", "use_timing_cache"]


def make_config(library: Library, builder: Any, identity: EngineIdentity, workspace_bytes: int | None) -> Any:
    """Make the library's builder config for an engine, without a profile.

    Args:
        builder: the library's `Builder`.
        workspace_bytes: the limit of a layer's scratch memory; None for the library's own limit.

    Raises:
        BuildError: the library rejects a compute capability.
    """
    trt, options = library.module, identity.options
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    for flag, is_set in _select_flags(options).items():
        (config.set_flag if is_set else config.clear_flag)(getattr(trt.BuilderFlag, flag))
    if options.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    # Memory for activations is then allocated for the shapes of a run instead of the largest shapes.
    if (preview := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None)) is not None:
        config.set_preview_feature(preview, True)
    if not library.needs_gpu:
        _set_capabilities(library, config, identity.compute_capabilities)
    return config


def _select_flags(options: EngineOptions) -> dict[str, bool]:
    """Return builder flag → whether it is set; listed flags override the library's defaults."""
    flags = {"TF32": options.tf32}
    if options.refittable or options.strip_weights:
        flags["REFIT_INDIVIDUAL"] = True
    if options.strip_weights:  # omits the weights that are marked as refittable
        flags["STRIP_PLAN"] = True
    if options.weight_streaming:
        flags["WEIGHT_STREAMING"] = True
    if options.version_compatible:
        # With the lean runtime inside, loading a plan would run code from the plan.
        flags |= {"VERSION_COMPATIBLE": True, "EXCLUDE_LEAN_RUNTIME": True}
    return flags


def _set_capabilities(library: Library, config: Any, capabilities: tuple[str, ...]) -> None:
    known = library.capabilities()
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(known[capability], index):
            raise BuildError(
                f"{library} rejects the compute capability {capability}, expected one of {', '.join(known)}"
            )


def add_profile(builder: Any, config: Any, profile: Mapping[str, ShapeRange]) -> bool:
    """Add an optimization profile to a config; return whether the library accepts it."""
    made = builder.create_optimization_profile()
    for name, shapes in profile.items():
        made.set_shape(name, shapes.min, shapes.opt, shapes.max)
    return bool(config.add_optimization_profile(made) >= 0)


# Timing cache


_TIMINGS_HEADER = b"latentrt timing cache, format 1\n"
_MAX_TIMINGS_BYTES = 256 << 20  # those of a model have a few MB


def use_timing_cache(config: Any, path: Path, warn: Callable[[str], None]) -> Callable[[], None]:
    """Load kernel timings of earlier builds on this GPU into a config, so that they are not repeated (`tensorrt`).

    Args:
        config: the library's builder config.
        path: the file, which the first build creates. The library may accept any bytes, so latentrt's own line at the
            beginning keeps another file from being overwritten.
        warn: called with a message if the file's timings are of another GPU or library version, or cannot be saved.

    Returns:
        A function that writes the file: the timings of this build, and those that other builds have added meanwhile.
        A failure is a warning: the engine is built by then.

    Raises:
        BuildError: the file cannot be read, is not a timing cache that latentrt wrote, or has no folder.
    """
    if not path.parent.is_dir():
        raise BuildError(
            f"{path.parent} is not a folder, so {path.name} cannot be written; choose another --timing-cache"
        )
    cache = config.create_timing_cache(_read_timings(path))
    if cache is None or not config.set_timing_cache(cache, False):
        warn(f"{path} has timings of another GPU or library version; starting a new timing cache")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)

    def save() -> None:
        try:
            _save_timings(config, path)
        except BuildError as error:
            warn(f"The kernel timings of this build were not saved: {error}")

    return save


def _save_timings(config: Any, path: Path) -> None:
    measured = config.get_timing_cache()
    others = config.create_timing_cache(_read_timings(path))
    if others is not None:
        # Returns False for timings of another version, which are then replaced.
        measured.combine(others, False)
    timings = bytes(memoryview(measured.serialize()))
    if len(timings) > _MAX_TIMINGS_BYTES:
        raise BuildError(
            f"{path} would have {len(timings):,} bytes, expected at most {_MAX_TIMINGS_BYTES:,}; choose another "
            "--timing-cache"
        )
    try:
        write_atomically(path, _TIMINGS_HEADER + timings)
    except OSError as error:
        raise BuildError(f"{path} cannot be written: {error.strerror}; choose another --timing-cache") from error


def _read_timings(path: Path) -> bytes:
    """Return the library's timings in a file; b"" where it is missing or empty."""
    try:
        with open_regular(path) as stream:
            header = stream.read(len(_TIMINGS_HEADER))
            timings = read_at_most(stream, _MAX_TIMINGS_BYTES) if header == _TIMINGS_HEADER else b""
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; choose another --timing-cache") from error
    if len(timings) > _MAX_TIMINGS_BYTES:
        raise BuildError(
            f"{path} has more than {_MAX_TIMINGS_BYTES:,} bytes of timings, expected those of a few models; choose "
            "another --timing-cache"
        )
    if header not in (b"", _TIMINGS_HEADER):
        raise BuildError(
            f"{path} is not a timing cache that latentrt wrote, expected one or a new file; choose another "
            "--timing-cache, so that this file is not replaced"
        )
    return timings


# Progress

_SECONDS_BETWEEN_REPORTS = 0.1


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """The nested phases of a build, which determine the completed fraction of the whole build.

    TensorRT reports nested phases with a number of steps each (`IProgressMonitor`). A phase is a fraction of one step
    of its parent phase. Methods may be called from any thread; reports come from one thread at a time.

    Args:
        report: called with the fraction of the whole build, 0 … 1, which never decreases, and the innermost phase.
    """

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self._report, self._lock = report, threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._furthest, self._reported = 0.0, 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Start a phase."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._report_phase(name)

    def step(self, name: str, step: int) -> None:
        """Complete step number `step` of a phase, counted from 0."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._report_phase(name)

    def finish(self, name: str) -> None:
        """Finish a phase, whether or not its steps are complete."""
        with self._lock:
            self._phases.pop(name, None)

    def notify(self, text: str) -> None:
        """Report a message that is not the name of a phase."""
        with self._lock:
            self._report(self._furthest, text)

    def _report_phase(self, name: str) -> None:
        self._furthest = max(self._furthest, self._fraction(name))
        if time.monotonic() - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._reported = time.monotonic()
            self._report(self._furthest, name)

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        fraction = min(phase.done / phase.steps, 1.0)
        while phase.parent in self._phases:
            phase = self._phases[phase.parent]
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
        return fraction


def make_monitor(library: Library, tree: PhaseTree) -> Any:
    """Make the library's progress monitor that updates a tree of phases."""
    base: Any = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the library's classes have no types
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tree.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            tree.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tree.step(phase_name, step)
            return True  # a build is cancelled by ending its process

    return Monitor()
