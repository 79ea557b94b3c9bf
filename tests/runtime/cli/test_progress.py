"""Progress on stderr: bars on a terminal, lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.cli.command import command
from latentrt.cli.progress import LINE_SECONDS, Progress, latents_with_progress


def call_quietly(work: object) -> None:
    """Call a function as the command `latentrt … --quiet` would."""

    @command("made-up", examples=())
    def made_up() -> None:
        work()  # type: ignore[operator]

    made_up.main(["--quiet"], standalone_mode=False)


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stderr a terminal; not in a fixture, as pytest replaces the streams for each phase of a test."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr("latentrt.cli.progress.time.monotonic", lambda: now[0])
    return now


def test_the_latents_are_the_last_step_s(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline.load(device="cpu", threads=1)
    request = pipeline.resolve(Request.of(prompt="a star", num_inference_steps=3, seed=1))
    *_, last = pipeline.steps(request)
    np.testing.assert_array_equal(latents_with_progress(pipeline, request), last.latents)
    call_quietly(lambda: np.testing.assert_array_equal(latents_with_progress(pipeline, request), last.latents))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", ""), "a short run prints no line"


def test_a_terminal_shows_a_bar_with_the_amounts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_terminal(monkeypatch)
    with Progress() as progress:
        task = progress.task("sampling", 20)
        task.update(3.7)  # no image is done in part
        hashing = progress.task("hashing", 4_000_000, unit="bytes")
        hashing.advance(1_000_000)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("sampling", "3 of 20", "hashing", "1.0 MB of 4.0 MB"))


def test_quiet_shows_warnings_alone_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_terminal(monkeypatch)

    def work() -> None:
        with Progress() as progress:
            progress.task("sampling", 2).finish("done")
            progress.warn("hot")

    call_quietly(work)
    assert capsys.readouterr().err == "warning: hot\n"


def test_a_log_has_at_most_a_line_in_ten_seconds(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress() as progress:
        task = progress.task("sampling", 100)
        for _ in range(100):
            clock[0] += LINE_SECONDS / 4
            task.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 25
    assert lines[0] == "sampling        4 of 100, 0:10 so far, about 4:00 left"


def test_the_end_of_a_task_is_a_line_if_it_has_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(keep=True) as progress:
        progress.task("unet").finish("done in 3 s")
        progress.task("vae").finish()
        progress.warn("hot")
    assert capsys.readouterr().err == "unet            done in 3 s\nwarning: hot\n"
