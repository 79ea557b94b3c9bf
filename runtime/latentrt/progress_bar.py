"""A progress bar of the sampling loop, as diffusers shows it: in terminals and notebooks, and nowhere else."""

from __future__ import annotations

import contextlib
import sys
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from latentrt.sampling.loop import Step

__all__ = ["ProgressBar", "is_watched"]


def is_watched() -> bool:
    """Return whether someone sees progress: stderr is a terminal, or this is a notebook."""
    # A program may have replaced stderr by an object that only writes, or closed it.
    with contextlib.suppress(AttributeError, ValueError):
        if sys.stderr.isatty():
            return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class ProgressBar:
    """A bar of tqdm's; none where nobody sees it, so that programs, pipes and tests print nothing.

    Args:
        total: evaluations of the model.
        enabled: False shows no bar anywhere.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any = None
        if enabled and is_watched():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tqdm's advice to install ipywidgets; without them it prints text
                from tqdm.auto import tqdm

            self._bar = tqdm(total=total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, step: Step) -> None:
        """Show that a step is done. A family of several stages counts each from its own beginning."""
        if self._bar is None:
            return
        if self._bar.total != step.total or step.index + 1 < self._bar.n:
            self._bar.reset(step.total)
        self._bar.update(step.index + 1 - self._bar.n)
