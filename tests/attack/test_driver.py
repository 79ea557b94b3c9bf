"""The driver tells cases that end well from those that do not, and goes on after each."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from latentrt.errors import LatentRTError
from tests.attack import __main__ as driver
from tests.attack import judge

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def refuse() -> LatentRTError:
    return LatentRTError("no")


def end_well() -> None:
    os.write(1, b"a table that nobody wants to see")


def raise_another_error() -> None:
    raise KeyError("a defect")


def take_much_memory() -> None:
    bytes(3 << 30)


def work_for_long() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def end_the_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_quietly() -> None:
    sys.exit(0)


def wait_for_ever() -> None:
    time.sleep(60)


def install(patch: pytest.MonkeyPatch, name: str, cases: list[object]) -> None:
    """Let a kind have these cases: functions that take nothing."""
    made_up = ModuleType(f"tests.attack.{name}")
    made_up.cases = lambda: ((getattr(case, "__name__", "?"), case) for case in cases)  # type: ignore[attr-defined]

    def run(case: object, folder: Path) -> object:
        assert folder.is_dir()
        assert not list(folder.iterdir())
        return case()  # type: ignore[operator]

    made_up.run = run  # type: ignore[attr-defined]
    patch.setitem(sys.modules, f"tests.attack.{name}", made_up)
    patch.setattr(driver, "KINDS", {**driver.KINDS, name: None})


def test_each_case_is_counted_as_it_ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(judge, "MAX_CPU_SECONDS", 0.2)
    monkeypatch.setattr(driver, "_MAX_SECONDS", 1)
    failing = [raise_another_error, take_much_memory, work_for_long, end_the_process, exit_quietly, wait_for_ever]
    install(monkeypatch, "good", [refuse, end_well, end_well])
    install(monkeypatch, "bad", [refuse, *failing, end_well])
    assert driver.main(["--kind", "good"]) == 0
    assert driver.main(["--kind", "good", "--kind", "bad"]) == 1
    shown = capfd.readouterr().out
    lines = {words[0]: words[1:5] for line in shown.splitlines() if (words := line.split()) and len(words) > 5}
    assert lines["good"] == ["3", "1", "2", "0"]
    assert lines["bad"] == ["8", "1", "1", "6"]
    for case in failing:
        assert f"bad: {case.__name__}" in shown
    assert "KeyError: 'a defect'" in shown
    assert "nobody wants to see" not in shown


def test_a_kind_without_cases_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, "broken", [])
    monkeypatch.delattr(sys.modules["tests.attack.broken"], "cases")
    assert driver.main(["--kind", "broken"]) == 1
    assert "AttributeError" in capfd.readouterr().out


@pytest.mark.parametrize("count", ["kills", "values=3", "kills=many", "kills=-1"])
def test_only_kinds_without_an_end_have_a_count(count: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        driver.main(["--count", count])
    assert refused.value.code == 2
    assert count in capfd.readouterr().err


def test_a_test_judges_a_case_by_the_same_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(judge, "MAX_CPU_SECONDS", 0.05)
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    install(monkeypatch, "good", [])
    module = sys.modules["tests.attack.good"]
    assert judge.attack_in_test(module, end_well, tmp_path) is None
    assert isinstance(judge.attack_in_test(module, refuse, tmp_path), LatentRTError)
    for case, error in (
        (raise_another_error, KeyError),
        (take_much_memory, MemoryError),
        (work_for_long, AssertionError),
    ):
        with pytest.raises(error):
            judge.attack_in_test(module, case, tmp_path)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
