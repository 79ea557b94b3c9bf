"""JSON documents: what each command prints with --json, in place of text.

Each is a `msgspec.Struct` in the command's own module; `latentrt.cli.schemas` lists them.
"""

from __future__ import annotations

import math
import platform
from typing import Any, Self

import msgspec

from latentrt import __version__
from latentrt.cli.output import echo_json

__all__ = ["MachineDocument", "echo_document"]


class MachineDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A document that depends on the machine: the versions of latentrt and Python, and the machine.

    Attributes:
        machine: operating system and processor.
    """

    latentrt: str
    python: str
    machine: str

    @classmethod
    def here(cls, **fields: Any) -> Self:
        """Return a document of this machine."""
        machine = f"{platform.system()} {platform.machine()}"
        return cls(latentrt=__version__, python=platform.python_version(), machine=machine, **fields)


def echo_document(document: msgspec.Struct) -> None:
    """Print a document as JSON; a number that JSON lacks is null."""
    echo_json(_finite(msgspec.to_builtins(document)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
