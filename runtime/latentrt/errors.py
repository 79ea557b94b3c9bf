"""What can go wrong?

Every error that latentrt raises on purpose is one of these, and says what was found, what was expected and what to do::

    LatentRTError                      exit code 1
    ├── RequestError                   2   the request is impossible (the code click uses for a wrong call)
    ├── CheckpointError                3   the input of an export is not a checkpoint that can be exported
    ├── BundleError                    4   what is on disk is not a bundle that can be run
    │   ├── ManifestError              4   bundle.json cannot be read, or says something impossible
    │   └── IntegrityError             4   a file is missing, or is not the one that the manifest pins
    ├── ExportError                    5   an export failed on the way
    │   └── GateError                  5   a graph is too far from the torch module it was made of
    ├── SafetyError                    6   the safety policy does not let this run go on
    ├── BackendError                   7   a graph cannot be run here
    │   ├── MissingExtraError          7   an optional dependency is not installed
    │   └── FeedError                  7   a graph was fed something that its signature does not allow
    ├── OutputError                    8   a result cannot be written
    └── EngineError                    9   an engine cannot be had
        ├── BuildError                 9   a graph cannot be made into a plan here
        └── EngineDamagedError         9   a plan or its record is not what was written
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "BackendError",
    "BuildError",
    "BundleError",
    "CheckpointError",
    "EngineDamagedError",
    "EngineError",
    "ExportError",
    "FeedError",
    "GateError",
    "IntegrityError",
    "LatentRTError",
    "ManifestError",
    "MissingExtraError",
    "OutputError",
    "RequestError",
    "SafetyError",
]


class LatentRTError(Exception):
    """The root of the tree. A message names a caller's options in backticks, by their Python keywords.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 1

    def describe(self, spelling: Mapping[str, str]) -> str:
        """Return the message with each option spelled as the caller wrote it.

        Args:
            spelling: keyword → spelling, such as `num_inference_steps` → `--steps`, or keyword and value, such as
                `parts=False` → `--no-parts`.
        """

        def spell(found: re.Match[str]) -> str:
            whole, keyword, value = found[1], found[2], found[3]
            if whole in spelling:
                return spelling[whole]
            if keyword not in spelling or value == "None":
                return found[0]
            return f"{spelling[keyword]} {value.strip(chr(39))}"

        return re.sub(r"`((\w+)(?:=([^`]*))?)`", spell, str(self))


class RequestError(LatentRTError):
    """The request is impossible: a size, a seed, a step count or a name that cannot be honoured."""

    exit_code = 2


class CheckpointError(LatentRTError):
    """The checkpoint is missing, damaged, of an unsupported kind, or in a format that is never opened (pickle)."""

    exit_code = 3


class BundleError(LatentRTError):
    """What is on disk is not a bundle that can be run."""

    exit_code = 4


class ManifestError(BundleError):
    """`bundle.json` cannot be read: not JSON, a newer format, unknown or duplicate keys, impossible paths."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, or its SHA-256 is not the one that the manifest (or the caller) pins."""


class ExportError(LatentRTError):
    """An export failed on the way; nothing was written to the place the bundle should have gone."""

    exit_code = 5


class GateError(ExportError):
    """A graph differs from the torch module it was made of by more than its bound."""


class SafetyError(LatentRTError):
    """The safety policy does not let this run go on: there is no classifier, or it failed."""

    exit_code = 6


class BackendError(LatentRTError):
    """A graph cannot be run here."""

    exit_code = 7


class MissingExtraError(BackendError):
    """An optional dependency is not installed.

    Args:
        package: the import name that was looked for.
        extra: the extra of latentrt that brings it.
        purpose: what it is needed for, as the end of the sentence "… is needed to …".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed to {purpose} and is not installed; pip install 'latentrt[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)


class FeedError(BackendError):
    """A graph was fed something that its signature does not allow."""


class OutputError(LatentRTError):
    """A result cannot be written: the disk is full, the folder is read-only, the format is unknown."""

    exit_code = 8


class EngineError(LatentRTError):
    """An engine cannot be had: not built, not kept, not found, not fit for this machine."""

    exit_code = 9


class BuildError(EngineError):
    """A graph cannot be made into a plan here; whatever engine was there before is as it was."""


class EngineDamagedError(EngineError):
    """A plan or its record is not what was written: truncated, changed, or put there by something else."""
