"""Work on a stream that is executed once, recorded as a CUDA graph, and launched from then on.

A run of a large graph puts hundreds of kernels on a stream, one by one; a CUDA graph launches them together. The first
run is executed directly, since libraries set things up in it; the second is recorded; later ones launch the recording,
as long as shapes and addresses stay the same.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any

from latentrt.backends.cuda.api import Cuda
from latentrt.errors import BackendError

__all__ = ["RecordedWork"]

_log = logging.getLogger("latentrt")


class RecordedWork:
    """Work on one stream that is the same at every run.

    Args:
        name: of the work, for the log.
        records: False to execute every run directly.

    Attributes:
        runs: since the last call of `reset`.
    """

    def __init__(self, cuda: Cuda, stream: Any, name: str, *, records: bool = True) -> None:
        self._cuda, self._stream, self._name, self._records = cuda, stream, name, records
        self._graph: Any = None
        self.runs = 0

    def run(self, work: Callable[[], None]) -> None:
        """Execute the work, or launch its recording."""
        if self.runs == 1 and self._records:
            self._record(work)
        self.runs += 1
        if self._graph is None:
            work()
        else:
            self._cuda.launch_graph(self._graph, self._stream)

    def reset(self) -> None:
        """Discard the recording, which shapes, addresses or weights have invalidated."""
        self.runs = 0
        if self._graph is not None:
            self._graph = None
            self._finalizer()  # a graph that is running is freed once it is done (cuda.h, cuGraphExecDestroy)

    def _record(self, work: Callable[[], None]) -> None:
        try:
            self._cuda.begin_capture(self._stream)
            try:
                work()
            except BaseException:
                with contextlib.suppress(BackendError):
                    self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
                raise
            self._graph = self._cuda.end_capture(self._stream)
        except BackendError as error:
            self._records = False
            _log.info("%s runs without a CUDA graph: %s", self._name, error)
            return
        self._finalizer = weakref.finalize(self, self._cuda.destroy_graph, self._graph)
        self._finalizer.atexit = False  # CUDA may be gone before
