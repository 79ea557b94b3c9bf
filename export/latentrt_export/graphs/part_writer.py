"""The interface of the writers that split a component's graphs into parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from latentrt.bundle.manifest import GraphRecord, Part, PartName, Precision
from latentrt.errors import ExportError
from latentrt_export.export_warning import warn
from latentrt_export.gates.verify import Run

__all__ = ["PartWriter", "StructureError"]


class StructureError(ExportError):
    """A graph lacks the structure by which its parts are found."""


@dataclass(kw_only=True)
class PartWriter(ABC):
    """A writer that splits a component's graphs into parts, one graph after the other as they are finished.

    Attributes:
        drawback: the drawback of a bundle without the parts, for the warning.
        component: the component's name.
        folder: the component's folder, which holds its weights.
        notify: called with a description of each step that begins.
        required: whether the user asked for one of the parts: then a graph that cannot be split is an error.
        parts: the records of the parts that were written.
    """

    drawback: ClassVar[str]

    component: str
    folder: Path
    notify: Callable[[str], None]
    required: bool = False
    parts: dict[PartName, Part] = field(default_factory=dict)

    def write(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        """Split one graph, write its parts to its folder, compare them with the whole and add their records to `parts`.

        float16 graphs are not split: they are for GPUs, and parts are for CPUs.

        Args:
            model: the finished graph; not modified.
            whole: its record. A part's file has the part's name in place of `model`.
            precision: the precision in which the graph computes.
            runs: inputs, and the whole graph's outputs for them.

        Raises:
            GateError: a part differs from the whole by more than its bound.
            StructureError: the graph cannot be split, and a part is `required`.

        Warns:
            ExportWarning: the graph cannot be split, and gets no parts.
        """
        if precision == "float16":
            return
        try:
            self._write(model, whole, precision, runs)
        except StructureError as error:
            if self.required:
                raise
            warn(f"{self.component}: {error}, so its graph stays whole: {self.drawback}")

    @abstractmethod
    def _write(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        """Do the work of `write`.

        Raises:
            StructureError: the graph cannot be split; nothing was written.
        """

    def file_name(self, whole: GraphRecord, part: PartName) -> str:
        """Return the name of a part's file, without its folder."""
        return Path(whole.file).name.replace("model", part, 1)
