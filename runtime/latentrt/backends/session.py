"""The interface between the runtime and the backends that execute graphs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.tensors import TensorSpec, check_feeds
from latentrt.errors import BackendError, LatentRTError

__all__ = ["Arrays", "Session", "Shapes", "run", "translating_library_errors"]

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]  # by input name


class Session(ABC):
    """A graph loaded on one backend. Threads may share it.

    Attributes:
        inputs, outputs: the graph's signature.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once on feeds that match `inputs`; return every output by name.

        Raises:
            BackendError: the backend failed. EngineError: no engine covers the shapes.
        """

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the sizes of the first axis that run without compiling or re-recording, ascending; None: any.

        Args:
            shapes: of the inputs; their first axes do not matter.
        """
        return None

    def prepare(self, shapes: Shapes) -> None:
        """Compile or load the model for inputs of these shapes.

        Raises:
            EngineError: no engine covers them.
            BackendError: the backend failed.
        """

    def device_context(self, shapes: Shapes) -> Any | None:
        """Return buffers that stay on the device between runs of inputs of these shapes; None on a host backend."""
        return None

    def close(self) -> None:
        """Release memory. The session must not be used afterwards."""


@contextlib.contextmanager
def translating_library_errors(library: str, problem: str = "") -> Iterator[None]:
    """Turn whatever a library raises within the block into a BackendError.

    Libraries' exceptions have no common class: some are RuntimeErrors, and a panic in Rust is a BaseException. The
    interpreter's own (Ctrl-C, the end of the process or of a generator) pass, and so do errors of latentrt.

    Args:
        library: the library's name.
        problem: the beginning of the message; by default "LIBRARY failed".
    """
    try:
        yield
    except (LatentRTError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = str(error) or type(error).__name__
        raise BackendError(f"{problem or f'{library} failed'}: {text}") from error


def run(session: Session, **feeds: NDArray[Any]) -> Arrays:
    """Check the feeds against the graph's signature, then run it.

    Raises:
        FeedError: a feed is missing, unknown, or of the wrong dtype or shape.
    """
    check_feeds(session.inputs, feeds)
    return session.run(feeds)
