"""The seam to libraries: whatever they raise is a BackendError, and the interpreter's own exceptions pass."""

from __future__ import annotations

import pytest

from latentrt.backends.session import translating_library_errors
from latentrt.errors import BackendError, IntegrityError


class PanicError(BaseException):
    """As a panic in Rust is raised."""


@pytest.mark.parametrize("error", [PanicError("index out of bounds"), RuntimeError("x"), MemoryError(), TypeError("t")])
def test_whatever_a_library_raises_is_a_backend_error(error: BaseException) -> None:
    with (
        pytest.raises(BackendError, match=str(error) or type(error).__name__) as caught,
        translating_library_errors("a library"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith("a library failed: ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), IntegrityError("ours")])
def test_the_interpreters_exceptions_and_ours_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, translating_library_errors("a library"):
        raise error
    assert caught.value is error


def test_the_problem_can_be_named() -> None:
    with (
        pytest.raises(BackendError, match=r"^the graph is rejected: no$"),
        translating_library_errors("a library", "the graph is rejected"),
    ):
        raise ValueError("no")
