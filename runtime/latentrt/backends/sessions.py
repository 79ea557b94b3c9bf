"""What runs each submodule, once that is decided?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from latentrt.backends.session import Session
from latentrt.errors import BackendError, RequestError
from latentrt.request import Order

__all__ = ["Choice", "Sessions"]


@dataclass(frozen=True)
class Choice:
    """What runs one submodule.

    Attributes:
        title: that, in words.
        open: loads it.
        why: why that, in a clause that follows the title; empty where that goes without saying.
        on_cpu: whether a CPU runs it.
        reuses_features: whether a denoiser can take deep features of an earlier row (`--deep-cache`).
    """

    title: str
    open: Callable[[], Session]
    why: str = ""
    on_cpu: bool = False
    reuses_features: bool = False

    @property
    def words(self) -> str:
        """What runs it, and why."""
        return f"{self.title}{self.why}"


class Sessions:
    """Opens each submodule of a bundle where it runs best. Call it with a submodule's name.

    Attributes:
        choices: submodule → what runs it and why, in words.
        on_cpu: whether a CPU runs all of them, so that loading one never disturbs what another has recorded on a GPU.
        denoiser: what runs the denoiser, in words; None where that is not known.
    """

    def __init__(self, choices: dict[str, Choice]) -> None:
        self._choices = choices
        self.choices = MappingProxyType({name: choice.words for name, choice in choices.items()})
        self.on_cpu = bool(choices) and all(choice.on_cpu for choice in choices.values())
        self.denoiser = choices["unet"].title if "unet" in choices else None

    def __call__(self, component: str) -> Session:
        if component not in self._choices:
            raise BackendError(f"found the component {component!r}, this bundle has {', '.join(self._choices)}")
        return self._choices[component].open()

    def wrapped(self, wrap: Callable[[str, Session], Session]) -> Sessions:
        """The same, each wrapped when it is opened; `wrap` is told its name."""

        def opens(name: str, choice: Choice) -> Callable[[], Session]:
            return lambda: wrap(name, choice.open())

        return Sessions({name: replace(choice, open=opens(name, choice)) for name, choice in self._choices.items()})

    def check(self, order: Order) -> None:
        """Refuse, before any work, what these cannot do.

        Raises:
            RequestError: deep features are to be reused, and the denoiser is run whole.
        """
        interval = order.approximation.deep_cache
        if interval > 1 and self.denoiser is not None and not self._choices["unet"].reuses_features:
            raise RequestError(
                f"found deep_cache {interval} with a denoiser on {self.denoiser}, which runs it whole; --device cpu "
                "and --device openvino run it in parts"
            )
