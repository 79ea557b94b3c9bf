"""Calls of the command line in this process, with checks of its output."""

from __future__ import annotations

import contextlib
import io

from latentrt.cli.main import main
from latentrt.errors import LatentRTError

__all__ = ["call", "find_error"]

_MAX_PRINTED = 5_000
"""Most characters of an error with the lines that follow it."""


def call(*arguments: object) -> tuple[int, str]:
    """Run a command; return its exit code and its output.

    Raises:
        AssertionError: the command ended with a defect, or its output could control a terminal.
    """
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # which, as a terminal does, takes no surrogates
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    printed.seek(0)
    text = printed.read()
    bad = {sign for sign in text if not sign.isprintable() and sign not in "\n\u200c\u200d"}
    assert not bad, (arguments, bad, text)
    assert "defect" not in text, (arguments, text)
    assert not any(line.startswith("error: forged") for line in text.splitlines()), (arguments, text)
    assert isinstance(code, int)
    return code, text


def find_error(*arguments: object) -> LatentRTError | None:
    """Run a command; return its error, None where it succeeded.

    Raises:
        AssertionError: as for `call`, or the error is longer than `_MAX_PRINTED`.
    """
    code, printed = call(*arguments)
    if not code:
        return None
    assert len(printed) <= _MAX_PRINTED, f"a long error: {printed[:200]}"
    return LatentRTError(printed)
