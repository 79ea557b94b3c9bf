"""The progress bar: where it is shown, and where nothing is printed."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt import Pipeline
from latentrt.progress_bar import ProgressBar, is_watched

QUICK: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler", "seed": 3}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal in place of stderr; within the test, as pytest replaces it after fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_call_shows_its_steps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    pipeline = Pipeline.load("sample", device="cpu", threads=1)
    pipeline("a red circle", **QUICK)
    assert "0/2" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    terminal.truncate(0)
    pipeline("a red circle", progress=False, **QUICK)
    assert terminal.getvalue() == ""
    pipeline.progress = False
    pipeline("a red circle", **QUICK)
    assert terminal.getvalue() == ""
    pipeline("a red circle", progress=True, **QUICK)
    assert "2/2" in terminal.getvalue()
    assert not Pipeline.load("sample", device="cpu", threads=1, progress=False).progress


def test_nothing_is_printed_where_nobody_looks() -> None:
    """Nor is tqdm imported, which takes as long as some steps do."""
    code = (
        "import sys\nfrom latentrt import Pipeline\n"
        "Pipeline.load('sample', device='cpu', threads=1)('a star', num_inference_steps=2, progress=True)\n"
        "assert 'tqdm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_sees_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_watched(), "pytest has replaced stderr"
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    assert not is_watched()
    closed = io.StringIO()
    closed.close()
    for stream in (closed, SimpleNamespace(write=print)):  # the latter of a program that logs what is printed
        monkeypatch.setattr(sys, "stderr", stream)
        assert not is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    assert is_watched(), "a notebook"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not is_watched(), "IPython in a terminal whose stderr goes elsewhere"
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_watched()


def test_the_steps_of_a_second_stage_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with ProgressBar(2, enabled=True) as bar:
        for total in (2, 3):
            for index in range(total):
                bar.advance(SimpleNamespace(index=index, total=total))  # type: ignore[arg-type]
    assert "3/3" in terminal.getvalue()


def test_a_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), ProgressBar(2, enabled=True):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\n")
