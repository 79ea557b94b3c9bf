"""Stopwatches: phases that exclude each other, and code that is marked without knowing of one."""

from __future__ import annotations

import threading

import pytest

from latentrt import timings
from latentrt.timings import Stopwatch, Timings, measured


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of one number of seconds, which the test moves."""
    seconds = [100.0]
    monkeypatch.setattr(timings, "perf_counter", lambda: seconds[0])
    return seconds


def test_an_inner_phase_interrupts_the_outer(clock: list[float]) -> None:
    @measured("text_encoding")
    def encode() -> str:
        clock[0] += 4
        with measured("loading"):
            clock[0] += 8
        clock[0] += 16
        return "encoded"

    stopwatch = Stopwatch()
    clock[0] += 1
    with stopwatch.measure("sampling"):
        clock[0] += 2
        assert encode() == "encoded"
        clock[0] += 32
    clock[0] += 64
    expected = Timings(sampling_s=2 + 32, text_encoding_s=4 + 16, loading_s=8, total_s=127)
    assert stopwatch.timings() == expected


def test_a_phase_ends_with_an_error(clock: list[float]) -> None:
    @measured("loading")
    def fail() -> None:
        clock[0] += 1
        raise ValueError("broken")

    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="broken"), stopwatch.measure("decoding"):
        fail()
    clock[0] += 2
    assert stopwatch.timings() == Timings(loading_s=1, total_s=3)
    with measured("loading"):
        clock[0] += 4
    assert stopwatch.timings() == Timings(loading_s=1, total_s=7), "it does not measure what comes later"


def test_requests_that_alternate_in_one_thread_are_measured_apart(clock: list[float]) -> None:
    first, second = Stopwatch(), Stopwatch()
    for stopwatch, seconds in ((first, 1), (second, 2), (first, 4)):
        with stopwatch.measure("sampling"), measured("loading"):
            clock[0] += seconds
    assert (first.timings().loading_s, second.timings().loading_s) == (5, 2)


def test_another_thread_is_not_measured(clock: list[float]) -> None:
    def load() -> None:
        with measured("loading"):
            clock[0] += 5

    stopwatch = Stopwatch()
    with stopwatch.measure("sampling"):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert stopwatch.timings() == Timings(sampling_s=5, total_s=5)


def test_a_phase_under_way_counts_until_now(clock: list[float]) -> None:
    """A result is made within the phase of decoding, after which nothing may follow."""
    stopwatch = Stopwatch()
    with stopwatch.measure("decoding"):
        clock[0] += 3
        assert stopwatch.timings() == Timings(decoding_s=3, total_s=3)
        clock[0] += 1
    assert stopwatch.timings() == Timings(decoding_s=4, total_s=4)


def test_timings_show_what_took_time() -> None:
    assert repr(Timings(sampling_s=1.23456, total_s=2.0)) == "Timings(sampling_s=1.235, total_s=2.000)"
