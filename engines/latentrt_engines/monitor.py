"""How far is a build, in a fraction and the words of its phase?

TensorRT tells of nested phases, each with its number of steps (`IProgressMonitor`). A phase takes part of one step of
the phase it is in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentrt_engines.library import Library

__all__ = ["PhaseTree", "make_monitor"]

_SECONDS_BETWEEN_REPORTS = 0.1


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """The phases that are going on. Called from whichever threads build; reports from one at a time.

    Args:
        report: given the fraction of the whole, 0 … 1, which never falls, and the innermost phase.
    """

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self._report, self._lock = report, threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._furthest, self._reported = 0.0, 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._tell(name)

    def step(self, name: str, step: int) -> None:
        """Step number `step`, counted from 0, is done."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._tell(name)

    def finish(self, name: str) -> None:
        """A phase ends, with whatever was left of it."""
        with self._lock:
            self._phases.pop(name, None)

    def tell(self, text: str) -> None:
        """Report something that is not one of the library's phases."""
        with self._lock:
            self._report(self._furthest, text)

    def _tell(self, name: str) -> None:
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
    """The library's own progress monitor, which tells the tree."""
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
            return True  # a build is stopped by ending its process

    return Monitor()
