"""The progress bar of a generation."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.cli.progress import latents_with_progress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("quiet", [False, True])
def test_the_latents_are_the_last_step_s_and_only_a_terminal_sees_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, quiet: bool
) -> None:
    pipeline = Pipeline.load(device="cpu", threads=1)
    request = pipeline.resolve(Request.of(prompt="a star", num_inference_steps=3, seed=1))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    latents = latents_with_progress(pipeline, request, quiet=quiet)
    *_, last = pipeline.steps(request)
    np.testing.assert_array_equal(latents, last.latents)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("sampling" in captured.err) == (terminal and not quiet)
