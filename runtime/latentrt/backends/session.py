"""How is one graph run?

The seam between the runtime and whatever executes graphs is one method. A backend, and the fake that a test uses,
implement the same seam; everything that is common to backends (the check of what is fed) lives on this side of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from latentrt.bundle.tensors import TensorSpec, check_feeds

__all__ = ["Arrays", "Session", "ToldShapes", "run"]

Arrays = dict[str, NDArray[Any]]


class Session(Protocol):
    """A graph that is loaded and ready to run."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph takes."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once on feeds that have been checked; return every output by name."""


@runtime_checkable
class ToldShapes(Protocol):
    """A session that does not run every shape."""

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse, or make ready for, inputs of these shapes before a run begins that will bring them.

        Raises:
            EngineError: nothing here runs them.
        """


def run(session: Session, **feeds: NDArray[Any]) -> Arrays:
    """Check the feeds against the graph's signature, then run it.

    Raises:
        FeedError: a feed is missing, unknown, or of the wrong dtype or shape.
    """
    check_feeds(session.inputs, feeds)
    return session.run(feeds)
