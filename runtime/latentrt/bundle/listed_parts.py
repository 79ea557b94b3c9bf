"""How are a component's parts listed?

A denoiser's one by one, as each is of use for itself; what decodes in slices as one, from latents to pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentrt.bundle.manifest import GateFigure, Part, PartName, Precision
from latentrt.bundle.tensors import TensorSpec

__all__ = ["Listed", "listed_parts"]

_BEFORE_STAGES = ("head", "attention", "neck")


@dataclass(frozen=True)
class Listed:
    """A line of a list: one part, or several that are run one after the other."""

    title: str
    parts: tuple[Part, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the first."""
        return self.parts[0].inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Of the last."""
        return self.parts[-1].outputs

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that all have graphs in."""
        return tuple(name for name in self.parts[0].graphs if all(name in part.graphs for part in self.parts))

    def nodes(self, precision: Precision) -> int:
        """Of all together."""
        return sum(part.graphs[precision].nodes for part in self.parts)

    def float32_nodes(self, precision: Precision) -> int:
        """The same, of those that compute in float32 in a float16 graph."""
        return sum(len(part.graphs[precision].float32_nodes) for part in self.parts)

    def gate(self, precision: Precision) -> tuple[GateFigure, ...]:
        """The figures of all."""
        return tuple(figure for part in self.parts for figure in part.graphs[precision].gate)


def listed_parts(parts: Mapping[PartName, Part]) -> Iterator[Listed]:
    """The lines of a component."""
    for name, part in parts.items():
        if not _slice_number(name):
            yield Listed(name, (part,))
    slices = sorted(filter(_slice_number, parts), key=_slice_number)
    if slices:
        yield Listed(f"{len(slices)} slices", tuple(parts[name] for name in slices))


def _slice_number(name: PartName) -> int:
    """When a slice is run, counted from 1; 0 of another part."""
    if name in _BEFORE_STAGES:
        return _BEFORE_STAGES.index(name) + 1
    kind, _, number = name.partition(".")
    return int(number) + len(_BEFORE_STAGES) + 1 if kind == "stage" else 0
