"""The errors that latentrt raises, as a tree.

Every deliberate error is of one of these classes; its message names the value found, the value expected and the
remedy::

    LatentRTError                      exit code 1
    ├── RequestError                   2   the request is impossible (click's own code for wrong usage)
    │   └── MissingAttributeError      2   an object lacks an attribute; an AttributeError too
    ├── CheckpointError                3   the input of an export is not a checkpoint that can be exported
    ├── BundleError                    4   the folder does not contain a bundle that can be run
    │   ├── ManifestError              4   bundle.json cannot be read, or describes an impossible bundle
    │   ├── IntegrityError             4   a file is missing, or differs from the one that the manifest pins
    │   └── GraphError                 4   a graph is not one that the exporter writes, or not the manifest's
    ├── ExportError                    5   an export failed
    │   └── GateError                  5   a graph differs too much from the torch module it was exported from
    ├── SafetyError                    6   the safety check cannot be done, so no image is returned
    ├── BackendError                   7   a graph cannot be run here
    │   ├── MissingExtraError          7   an optional dependency is not installed
    │   └── FeedError                  7   the inputs of a graph do not match its signature
    ├── OutputError                    8   a result cannot be written
    ├── EngineError                    9   an engine is missing or cannot be used
    │   ├── BuildError                 9   an engine cannot be built from a graph here
    │   └── EngineDamagedError         9   an engine's plan or record is damaged
    └── HubError                      10   the Hugging Face hub cannot be reached, or refuses a request
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
    "GraphError",
    "HubError",
    "IntegrityError",
    "LatentRTError",
    "ManifestError",
    "MissingAttributeError",
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
    """The request is impossible: a size, a seed, a step count or a name is invalid or unsupported.

    Attributes:
        place: of the request among several, with which the message begins, such as `prompts.txt, line 3`; empty for
            one request.
    """

    exit_code = 2
    place = ""


class MissingAttributeError(RequestError, AttributeError):
    """An object lacks an attribute that a caller may expect; the message has the way to do the same."""


class CheckpointError(LatentRTError):
    """The checkpoint is missing, damaged, of an unsupported kind, or in an unsafe format (pickle)."""

    exit_code = 3


class BundleError(LatentRTError):
    """The folder does not contain a bundle that can be run."""

    exit_code = 4


class ManifestError(BundleError):
    """`bundle.json` cannot be read: not JSON, a newer format, unknown or duplicate keys, impossible paths."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, or its SHA-256 differs from the one that the manifest (or the caller) pins."""


class GraphError(BundleError):
    """A graph holds something that the exporter never writes, names other data than its weights, or does not agree with
    the manifest. No backend has parsed it."""


class ExportError(LatentRTError):
    """An export failed; nothing was written to the destination."""

    exit_code = 5


class GateError(ExportError):
    """A graph differs from the torch module it was exported from by more than its bound."""


class SafetyError(LatentRTError):
    """The safety check cannot be done, as the bundle has no classifier or it failed; no image is returned."""

    exit_code = 6


class BackendError(LatentRTError):
    """A graph cannot be run here."""

    exit_code = 7


class MissingExtraError(BackendError):
    """An optional dependency is not installed.

    Args:
        package: its import name.
        extra: the extra of latentrt that installs it.
        purpose: the end of the sentence "… is needed to …".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed to {purpose} and is not installed; pip install 'latentrt[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)


class FeedError(BackendError):
    """The inputs of a graph do not match its signature."""


class OutputError(LatentRTError):
    """A result cannot be written: the disk is full, the folder is read-only, the format is unknown."""

    exit_code = 8


class EngineError(LatentRTError):
    """An engine is missing, does not run on this machine, or cannot be stored."""

    exit_code = 9


class BuildError(EngineError):
    """An engine cannot be built from a graph here; a former engine is unchanged."""


class EngineDamagedError(EngineError):
    """An engine's plan or record is damaged: truncated, changed, or not written by latentrt."""


class HubError(LatentRTError):
    """The Hugging Face hub cannot be reached, or has no such repository, revision or file, or refuses access."""

    exit_code = 10
