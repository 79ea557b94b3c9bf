"""When is a submodule loaded, and when is it let go?

When it is first needed, or a little before: what a run will need next is loaded by a thread while the run is at
something else. Where memory is short nothing is loaded ahead, and each is let go when its work is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, runtime_checkable

from latentrt.backends.session import Session

__all__ = ["OpenSession", "Prepares", "Submodules"]

OpenSession = Callable[[str], Session]


@runtime_checkable
class Prepares(Protocol):
    """A session that has work to do before the first run of a shape."""

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Do that for inputs whose named axes have these sizes."""


class Submodules:
    """The sessions of a pipeline, one for each submodule. Threads may share it.

    Args:
        open_session: loads a submodule by name.
        low_memory: load nothing ahead, and let go what is done with.
    """

    def __init__(self, open_session: OpenSession, *, low_memory: bool) -> None:
        self._open, self._low_memory = open_session, low_memory
        self._sessions: dict[str, Future[Session]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Session:
        """The session of a submodule. An error is raised again by whoever asks again."""
        with self._lock:
            found, mine = self._sessions.get(name), name not in self._sessions
            if found is None:
                found = self._sessions[name] = Future()
        if mine:
            self._load(name, found)
        return found.result()

    def load_ahead(self, name: str, sizes: Mapping[str, int]) -> None:
        """Begin to load a submodule that is not there yet, and to prepare it for axes of these sizes."""
        if name not in self._sessions and not self._low_memory:
            threading.Thread(target=self._prepare, args=(name, sizes), name=f"latentrt-load-{name}").start()

    def done_with(self, name: str) -> None:
        """A submodule's work is done, for now."""
        if self._low_memory:
            with self._lock:
                self._sessions.pop(name, None)

    def _prepare(self, name: str, sizes: Mapping[str, int]) -> None:
        # Whoever needs what cannot be had is told then; until it is needed, nobody is.
        with suppress(Exception):
            session = self(name)
            if isinstance(session, Prepares):
                session.prepare(sizes)

    def _load(self, name: str, future: Future[Session]) -> None:
        try:
            future.set_result(self._open(name))
        except BaseException as error:
            with self._lock:
                self._sessions.pop(name, None)
            future.set_exception(error)
