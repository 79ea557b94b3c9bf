"""The command `latentrt` itself: help, exit codes, and errors of all kinds."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import click
import pytest

from latentrt import errors
from latentrt.bundle.interrupts import TerminatedError
from latentrt.cli import main as cli
from latentrt.cli.command import command
from latentrt.cli.request_options import SPELLING, command_spelling
from latentrt.errors import LatentRTError, RequestError
from tests.runtime.cli.conftest import Caller


def error_classes(root: type[LatentRTError] = LatentRTError) -> list[type[LatentRTError]]:
    """Return the classes of the runtime, also where a test of the export has made more."""
    found = [root, *(each for child in root.__subclasses__() for each in error_classes(child))]
    return [each for each in found if each.__module__.startswith("latentrt.")]


def add_command(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> None:
    """Add a command `latentrt made-up` that calls `work`."""
    monkeypatch.setattr(cli, "made_up", command("made-up", examples=())(work), raising=False)
    monkeypatch.setitem(cli._COMMANDS, "made-up", ("latentrt.cli.main:made_up", "Call a function."))


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command `latentrt raise` that raises whatever a test puts here."""
    raised: list[BaseException] = []

    @command("raise", examples=())
    def fail() -> None:
        raise raised[0]

    monkeypatch.setattr(cli, "made_up", fail, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "raise", ("latentrt.cli.main:made_up", "Raise an error."))
    return raised


def test_without_arguments_it_prints_its_help(latentrt: Caller) -> None:
    done = latentrt()
    assert done == latentrt("--help")
    assert (done.code, done.err) == (0, "")
    for name in cli._COMMANDS:
        assert f"\n  {name} " in done.out


def test_an_unknown_command_is_one_sentence(latentrt: Caller) -> None:
    done = latentrt("rnu")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: got 'rnu', expected a command of latentrt; did you mean run?\n"
    assert "--help lists them" in latentrt("xyzzy").err


@pytest.mark.parametrize("error_class", error_classes(), ids=lambda each: each.__name__)
def test_each_branch_of_errors_has_its_exit_code(
    latentrt: Caller, raising: list[BaseException], error_class: type[LatentRTError]
) -> None:
    arguments = ("package", "extra", "run") if error_class is errors.MissingExtraError else ("no luck",)
    raising.append(error_class(*arguments))
    done = latentrt("raise")
    assert (done.code, done.out, done.err) == (error_class.exit_code, "", f"error: {raising[0]}\n")
    assert f"{error_class.__name__} " in (errors.__doc__ or ""), "listed in the tree"


def test_options_are_spelled_as_on_the_command_line(latentrt: Caller, raising: list[BaseException]) -> None:
    raising.append(RequestError("`num_inference_steps`: got 0 with `latents` and `device`; see `latentrt run`"))
    assert latentrt("raise").err == "error: --steps: got 0 with `latents` and --device; see `latentrt run`\n"
    # Python's own spelling stays in the message.
    assert str(raising[0]).startswith("`num_inference_steps`")


@pytest.mark.parametrize(
    ("keyword", "spelled"),
    [
        ("prompt", "PROMPT"),
        ("num_inference_steps", "--steps"),
        ("num_images_per_prompt", "--count"),
        ("mask_image", "--mask"),
        ("image", "--image"),
        ("strength", "--strength"),
        ("guidance_scale", "--guidance-scale"),
        ("seed", "--seed"),
        ("device", "--device"),
        ("precision", "--precision"),
        ("provider", "--provider"),
        ("digest", "--digest"),
    ],
)
def test_the_spelling_of_an_option(keyword: str, spelled: str) -> None:
    assert RequestError(f"`{keyword}`: got 0").describe(SPELLING) == f"{spelled}: got 0"


def test_options_are_spelled_as_the_called_command_spells_them() -> None:
    @click.command()
    @click.option("--no-parts", is_flag=True)
    @click.option("--format", "precision")
    def export(no_parts: bool, precision: str | None) -> None: ...

    spelling = command_spelling(export)
    error = RequestError("pass `parts=False` or `precision='float16'`, or `parts=True`, not `precision=None`")
    assert error.describe(spelling) == "pass --no-parts or --format float16, or `parts=True`, not `precision=None`"


def test_a_defect_is_called_one(latentrt: Caller, raising: list[BaseException]) -> None:
    raising.append(ZeroDivisionError("oh"))
    done = latentrt("raise")
    assert done.code == 1
    assert "ZeroDivisionError: oh" in done.err
    assert "defect" in done.err
    assert "Traceback" not in done.err
    assert all("Traceback" in latentrt(*line).err for line in (("--debug", "raise"), ("raise", "--debug")))


def test_an_interrupt_is_not_reported_as_a_defect(latentrt: Caller, raising: list[BaseException]) -> None:
    raising.append(KeyboardInterrupt())
    done = latentrt("raise")
    assert (done.code, done.err.strip()) == (130, "interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_the_command(
    latentrt: Caller, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Every command's files are removed as after Ctrl-C, and a second signal does not interrupt that."""
    unwound: list[str] = []
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:
            unwound.append("taken for a failure of the work")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            unwound.append("cleaned up")

    add_command(monkeypatch, work)
    done = latentrt("made-up")
    assert (done.code, done.err) == (128 + number, f"ended by {number.name}\n")
    assert unwound == ["cleaned up"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_further_signal_does_not_change_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, raising: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the process of the command, whose interpreter takes a moment to exit."""
    raising.append(TerminatedError(signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["latentrt", "raise"])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    usual = [signal.getsignal(number) for number in numbers]
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 128 + signal.SIGTERM
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, usual, strict=True):
            signal.signal(number, handler)
    with pytest.raises(SystemExit):
        cli.main(["raise"])
    assert [signal.getsignal(number) for number in numbers] == usual, "a program that calls a command goes on"


def test_who_ignores_a_signal_still_does(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    add_command(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert latentrt("made-up").code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_may_call_it_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no handler can be set."""
    codes: list[object] = []

    def call() -> None:
        try:
            cli.main(["made-up"])
        except SystemExit as end:
            codes.append(end.code)

    add_command(monkeypatch, lambda: None)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert codes == [0]
