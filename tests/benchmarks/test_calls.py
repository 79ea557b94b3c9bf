"""The count of calls, on a short request."""

from __future__ import annotations

from benchmarks.calls import count_calls


def test_calls_grow_with_the_steps_and_frames_do_not() -> None:
    short, long = count_calls(2), count_calls(4)
    assert short.by_file["pipeline.py"] >= 5
    assert short.by_file["sampling/loop.py"] < long.by_file["sampling/loop.py"]
    assert {*short.by_file} == {*long.by_file}
    assert short.frames == long.frames
    assert (short.frames[0], short.frames[-1]) == ("Pipeline.__call__", "OnnxRuntimeSession.run")
    assert "step" in short.frames
