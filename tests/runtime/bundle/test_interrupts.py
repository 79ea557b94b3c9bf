"""A signal ends a command at any moment, and nothing of the command is left then."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.interrupts import TerminatedError, ending_on_signals, uninterrupted
from latentrt.bundle.staging import staged
from tests.killed import count_steps, in_child
from tests.runtime.small_bundle import write_bundle

BOTH = (KeyboardInterrupt, TerminatedError)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# What is left


def replace_bundle(folder: Path, manifest: bytes) -> None:
    with staged(folder / "bundle", overwrite=True) as stage:
        (stage.bundle / "bundle.json").write_bytes(manifest)


def make_first_bundle(folder: Path, manifest: bytes) -> None:
    with staged(folder / "new" / "bundle", overwrite=False) as stage:
        (stage.bundle / "bundle.json").write_bytes(manifest)


def replace_file(folder: Path, manifest: bytes) -> None:
    write_atomically(folder / "bundle" / "bundle.json", manifest)


@pytest.mark.parametrize("by", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT)])
@pytest.mark.parametrize("write", [replace_bundle, make_first_bundle, replace_file])
def test_nothing_is_left_wherever_a_signal_comes(
    tmp_path: Path, write: Callable[[Path, bytes], None], by: tuple[int, ...]
) -> None:
    """Also not by the signals of who presses Ctrl-C again and again: the first leads to the removal of all files."""
    manifest = (write_bundle(tmp_path / "source") / "bundle.json").read_bytes()
    folder = tmp_path / "work"
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "bundle.json").write_bytes(manifest)

    def work() -> None:
        with contextlib.suppress(*BOTH), ending_on_signals():
            write(folder, manifest)

    steps = count_steps(work)
    assert steps > 2
    for step in range(steps):
        shutil.rmtree(folder / "new", ignore_errors=True)
        assert in_child(work, kill_at=step, by=by) == 0
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        new = {"new", "new/bundle", "new/bundle/bundle.json"} if (folder / "new" / "bundle").exists() else set()
        assert files == {"bundle", "bundle/bundle.json", *new}, f"before step {step} of {steps}"
        assert (folder / "bundle" / "bundle.json").read_bytes() == manifest


# Which signals are raised, and when


def test_a_block_is_not_interrupted() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                send(signal.SIGTERM)
                send(signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(TerminatedError) as ended, ending_on_signals():
        work()
    assert done == ["inner", "outer"]
    assert ended.value.signal == signal.SIGTERM, "the first"
    with ending_on_signals(), uninterrupted():
        pass  # nothing waits any longer


def test_further_signals_do_not_interrupt_the_way_out() -> None:
    done: list[str] = []

    def work() -> None:
        try:
            send(signal.SIGINT)
        finally:
            try:
                raise ValueError
            except ValueError:
                send(signal.SIGTERM)
            with uninterrupted():
                send(signal.SIGINT)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), ending_on_signals():
        work()
    assert done == ["cleaned up"]


def test_a_signal_that_was_swallowed_is_not_the_last() -> None:
    """As Python does with an exception in a destructor; a service's second SIGTERM has to end it."""
    with ending_on_signals():
        with contextlib.suppress(TerminatedError):
            send(signal.SIGTERM)
        with pytest.raises(TerminatedError):
            send(signal.SIGTERM)


def test_handlers_of_an_application_stay() -> None:
    def handler(number: int, frame: object) -> None: ...

    former = signal.signal(signal.SIGTERM, handler)
    try:
        with ending_on_signals():
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, former)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_does_not_hold_signals_up() -> None:
    inside, over = threading.Event(), threading.Event()

    def wait() -> None:
        with ending_on_signals(), uninterrupted():
            inside.set()
            over.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(TerminatedError), ending_on_signals():
            send(signal.SIGTERM)
    finally:
        over.set()
        thread.join()
