"""Warnings reach the user of an export once, and others are not touched."""

from __future__ import annotations

import warnings

import pytest

from latentrt_export.export_warning import ExportWarning, relay_warnings, warn


def test_each_text_is_relayed_once() -> None:
    texts: list[str] = []
    with relay_warnings(texts.append):
        for text in ("a", "a", "b", "a"):
            warn(text)
    assert texts == ["a", "b"]


def warn_of_both(texts: list[str]) -> None:
    with relay_warnings(texts.append):
        warn("a")
        warnings.warn("b", FutureWarning, stacklevel=1)


def test_other_warnings_are_as_usual() -> None:
    texts: list[str] = []
    with pytest.warns(FutureWarning, match="b"):
        warn_of_both(texts)
    with pytest.warns(ExportWarning, match="c"):
        warn("c")
    assert texts == ["a"]
