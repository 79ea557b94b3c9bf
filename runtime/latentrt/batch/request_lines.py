"""Requests in a file, one on each line: a prompt as text, or a JSON object with any field of a request.

A line of JSON has the keywords of `latentrt.Pipeline`, and `output`, the name of its image::

    {"prompt": "a red circle", "seed": 7, "width": 128, "output": "circles/{seed}.png"}

Lines are read as they are needed, from a pipe without end too, and each is bounded before it is parsed.
"""

from __future__ import annotations

import codecs
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from latentrt.bundle.digests import open_regular
from latentrt.bundle.printable import quote
from latentrt.bundle.strict_json import AmbiguousJSONError, parse_json
from latentrt.errors import RequestError
from latentrt.request import OPTIONS, Request

__all__ = ["MAX_FILE_BYTES", "MAX_LINE_BYTES", "RequestFile", "RequestLine"]

MAX_LINE_BYTES = 1 << 20
"""Longest line: two prompts of the most characters, all written as escapes."""
MAX_FILE_BYTES = 4 << 30
"""Largest file; a pipe has no limit."""
_MAX_VALUES, _MAX_DEPTH = 10_000, 4
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class RequestLine:
    """A request of a file.

    Attributes:
        place: of the line, such as `prompts.txt, line 3`.
        values: by keyword of `latentrt.request`.
        output: name of its image, a relative path; None where it names none.
    """

    place: str
    values: dict[str, Any]
    output: str | None = None


class RequestFile:
    """A file of requests, or standard input; its lines can be read again if it is a regular file.

    Args:
        path: `-` is standard input.

    Attributes:
        seekable: whether `lines` can be called more than once.

    Raises:
        RequestError: it cannot be opened, or is too large.
    """

    def __init__(self, path: str) -> None:
        self.path = "standard input" if path == "-" else path
        try:
            self._stream: IO[bytes] = _open(path)
            self._is_own = path != "-"
            self.seekable = self._stream.seekable()
            # Another program may have read the first lines of standard input.
            self._start = self._stream.tell() if self.seekable else 0
            size = self._stream.seek(0, os.SEEK_END) - self._start if self.seekable else 0
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RequestError(
                f"`prompts`: got {quote(path)}, which cannot be read ({reason}); expected a file of prompts, or - for "
                "standard input"
            ) from None
        if size > MAX_FILE_BYTES:
            self.close()
            raise RequestError(
                f"`prompts`: got {quote(path)} of {size:,} bytes, expected at most {MAX_FILE_BYTES:,}; split it, or "
                "give it to standard input"
            )
        # A pipe, which rarely has an extension, and standard input are JSON if the first line is an object.
        is_named = Path(path).suffix.lower() in _JSON_SUFFIXES
        self._is_json = True if is_named else False if self._is_own and self.seekable else None

    def lines(self) -> Iterator[RequestLine]:
        """Yield the requests of the file from its beginning; empty lines, and comments of a text, are skipped.

        Raises:
            RequestError: a line is too long, is not UTF-8, or is not a request; the message begins with its place.
        """
        if self.seekable:
            self._stream.seek(self._start)
        is_json = self._is_json
        for number, line in enumerate(iter(lambda: self._stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            place = f"{self.path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise RequestError(f"{place} is longer than {MAX_LINE_BYTES:,} bytes, expected a request on each line")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not (line := line.strip()):
                continue
            is_json = line.startswith(b"{") if is_json is None else is_json
            if is_json:
                yield _parse_line(place, line)
            elif not line.startswith(b"#"):
                yield RequestLine(place, {"prompt": _decode(place, line)})

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._is_own:
            self._stream.close()


def _open(path: str) -> IO[bytes]:
    if path == "-":
        return _standard_input()
    # A named pipe is read like standard input; a device may never end, and a folder has no lines.
    if stat.S_ISFIFO(Path(path).stat().st_mode):
        return open(path, "rb")
    return open_regular(path)


def _standard_input() -> IO[bytes]:
    if sys.stdin is None:
        raise ValueError("it is closed")
    return sys.stdin.buffer


def _decode(place: str, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{place} is not UTF-8 (byte {error.start}), expected a text in UTF-8") from None


def _parse_line(place: str, line: bytes) -> RequestLine:
    try:
        tree = parse_json(line, infinity=True, max_bytes=MAX_LINE_BYTES, max_depth=_MAX_DEPTH, max_values=_MAX_VALUES)
    except AmbiguousJSONError as error:
        raise RequestError(f'{place} {error}; expected a JSON object, such as {{"prompt": "a star"}}') from None
    if not isinstance(tree, dict):
        raise RequestError(f'{place}: got {quote(tree)}, expected a JSON object, such as {{"prompt": "a star"}}')
    output = tree.pop("output", None)
    if not (output is None or _is_below(output)):
        raise RequestError(
            f"{place}: output: got {quote(output)}, expected a relative path of printable characters without .. in it"
        )
    for keyword, value in tree.items():
        kind = OPTIONS[keyword].check.kind if keyword in OPTIONS else ""
        if value is not None and (kind == "python" or keyword == "generator"):
            raise RequestError(f"{place}: {quote(keyword)} is an object that only Python can give; leave it out")
        if kind == "path" and not isinstance(value, str | None):
            raise RequestError(f"{place}: {keyword}: got {quote(value)}, expected the path of an image")
    try:
        Request.of(**tree)
    except TypeError as error:  # an unknown keyword
        raise RequestError(f"{place}: {error} (or 'output', the name of its file)") from None
    return RequestLine(place, tree, output)


def _is_below(output: Any) -> bool:
    """Return whether a value is a path below the current folder: a file of unknown origin chooses no other."""
    if not isinstance(output, str) or not output.strip() or not output.isprintable():
        return False
    paths = (PurePosixPath(output), PureWindowsPath(output))
    return not any(path.anchor or path.drive or ".." in path.parts for path in paths)
