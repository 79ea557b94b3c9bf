"""Sessions of this process: shared between bundles, opened when first needed, closed with their last user."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from latentrt.backends.placement import Placement
from latentrt.backends.session import Session
from latentrt.bundle.printable import quote
from latentrt.bundle.tensors import sized
from latentrt.errors import BackendError, RequestError
from latentrt.timings import measured

__all__ = ["Components", "Models"]

Key = tuple[Hashable, ...]


@dataclass
class _Entry:
    session: Future[Session]
    users: int = 0


class Models:
    """Sessions by graph digest, weight set and backend options; each is loaded once and reference counted."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def acquire(self, key: Key, load: Callable[[], Session]) -> Session:
        """Return the session of a key, loading it if necessary; concurrent calls wait for the first.

        Raises:
            Whatever `load` raises, in every call that waited; the next call loads again.
        """
        with self._lock:
            entry = self._entries.get(key)
            first = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry(Future())
            entry.users += 1
        if first:
            try:
                entry.session.set_result(load())
            except BaseException as error:
                with self._lock:
                    self._entries.pop(key, None)
                entry.session.set_exception(error)
        return entry.session.result()

    def release(self, key: Key) -> None:
        """Drop one reference to a session; it is closed with the last."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return
            entry.users -= 1
            if entry.users > 0:
                return
            self._entries.pop(key)
        if entry.session.done() and entry.session.exception() is None:
            entry.session.result().close()


PROCESS = Models()


class Components:
    """The sessions of one pipeline, by component and part. Threads may share it.

    Args:
        placements: what runs each component.
        low_memory: prefetch nothing, and release a component as soon as its work is done.
        models: holds the sessions.

    Attributes:
        placements, low_memory: as given.
        on_cpu: whether all run on a CPU, so that loading one never disturbs work that another recorded on a GPU.
    """

    def __init__(
        self, placements: Mapping[str, Placement], *, low_memory: bool = False, models: Models = PROCESS
    ) -> None:
        self.placements, self.low_memory = dict(placements), low_memory
        self.on_cpu = bool(placements) and all(placement.device == "cpu" for placement in placements.values())
        self._models, self._lock = models, threading.Lock()
        self._held: dict[tuple[str, str | None], Key] = {}
        self._runs, self._deferred, self._closed = 0, set[tuple[str, str | None]](), False
        self._calls, self._thread = 0, threading.local()  # its `calls`: of this thread
        weakref.finalize(self, _release_all, models, self._held, self._lock)

    def session(self, name: str, part: str | None = None) -> Session:
        """Return the session of a component, or of one of its parts.

        Raises:
            BackendError: the bundle has no such component, or it cannot be loaded.
            BundleError: its files are missing or differ from those the manifest pins.
            RequestError: `close` was called.
        """
        placement = self.placements.get(name)
        if placement is None:
            raise BackendError(f"got the component {quote(name)}, this bundle has {', '.join(self.placements)}")
        key = (*placement.key, part)
        with measured("loading"):
            session = self._models.acquire(key, lambda: placement.open(part))
        with self._lock:
            usable = not self._closed or self._is_used
            if usable and (name, part) not in self._held:
                self._held[name, part] = key
                return session
        self._models.release(key)  # this object holds one reference per session
        if not usable:
            raise closed_error()
        return session

    def prefetch(self, name: str, sizes: Mapping[str, int]) -> None:
        """Start loading a component in a thread and compiling it for axes of these sizes.

        Errors are suppressed here: the call that needs the session raises them.
        """
        if self.low_memory or name not in self.placements:
            return
        parts = self.placements[name].first_parts
        if any((name, part) in self._held for part in parts):
            return
        thread = threading.Thread(target=self._prefetch, args=(name, parts, dict(sizes)), name=f"latentrt-load-{name}")
        thread.start()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count a run of the pipeline. While several are in progress, releases are deferred until the last ends.

        Raises:
            RequestError: `close` was called, and this is not within a `call` of this thread.
        """
        with self._lock:
            if self._closed and not getattr(self._thread, "calls", 0):
                raise closed_error()
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
                deferred = list(self._deferred) if self._runs == 0 else []
            self._release(deferred)
            self._release_closed()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Let this thread do several runs within the block, such as sampling and decoding, also if `close` is called
        meanwhile.

        Raises:
            RequestError: `close` was called before.
        """
        with self._lock:
            if self._closed:
                raise closed_error()
            self._calls += 1
        self._thread.calls = getattr(self._thread, "calls", 0) + 1
        try:
            yield
        finally:
            self._thread.calls -= 1
            with self._lock:
                self._calls -= 1
            self._release_closed()

    def done_with(self, name: str) -> None:
        """Release a component's sessions if `low_memory` is set; its work in this run is done."""
        if self.low_memory:
            self._release([each for each in list(self._held) if each[0] == name])

    def release(self, name: str, part: str | None) -> None:
        """Release one part regardless of `low_memory`, as a sliced decoder holds one at a time; None: the whole."""
        self._release([(name, part)])

    def close(self) -> None:
        """Release every session, once the runs and calls in progress have ended; no other begins. Idempotent."""
        with self._lock:
            self._closed = True
        self._release_closed()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def _is_used(self) -> bool:
        return self._runs > 0 or self._calls > 0

    def _release_closed(self) -> None:
        """Release every session if `close` was called and nothing is in progress."""
        with self._lock:
            released = self._closed and not self._is_used
        if released:
            _release_all(self._models, self._held, self._lock)

    def _release(self, sessions: list[tuple[str, str | None]]) -> None:
        with self._lock:
            if self._runs > 1:
                self._deferred.update(sessions)
                return
            self._deferred.difference_update(sessions)
            keys = [self._held.pop(each) for each in sessions if each in self._held]
        for key in keys:
            self._models.release(key)

    def _prefetch(self, name: str, parts: tuple[str | None, ...], sizes: dict[str, int]) -> None:
        for part in parts:
            with suppress(Exception):
                session = self.session(name, part)
                session.prepare({spec.name: sized(spec, sizes) for spec in session.inputs})


def closed_error() -> RequestError:
    """Return the error of a use after `close`."""
    return RequestError("this pipeline is closed; load it again with Pipeline.load")


def _release_all(models: Models, held: dict[tuple[str, str | None], Key], lock: threading.Lock) -> None:
    with lock:
        keys = list(held.values())
        held.clear()
    for key in keys:
        models.release(key)
