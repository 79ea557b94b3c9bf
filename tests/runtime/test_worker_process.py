"""Worker processes: messages, endings and their errors, signals (of the exporter: tests/export/test_workers.py)."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from latentrt.errors import (
    BuildError,
    CheckpointError,
    EngineError,
    ExportError,
    LatentRTError,
    MissingExtraError,
    RequestError,
)
from latentrt.worker_process import Ending, Failed, WorkerProcess, peak_bytes
from tests.killed import start_child

# A worker's module.
ECHO = """
import msgspec
from latentrt.worker_process import take_job
line, report = take_job()
job = msgspec.json.decode(line)
print("noise on standard output")
for number in range(job["count"]):
    report(msgspec.convert({"number": number}, msgspec.defstruct("Said", [("number", int)])))
"""


class Job(msgspec.Struct):
    count: int


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    return tmp_path / "made_up_worker.py"


def test_messages_come_through_and_prints_do_not(module: Path) -> None:
    module.write_text(ECHO)
    with WorkerProcess("made_up_worker", Job(3)) as worker:
        assert [msgspec.json.decode(line) for line in worker.messages()] == [{"number": n} for n in range(3)]
        assert worker.ending() == Ending(0, "noise on standard output")


def test_a_worker_that_does_not_read_its_job(module: Path) -> None:
    module.write_text("raise SystemExit('not today')")
    with WorkerProcess("made_up_worker", Job(0)) as worker:
        assert list(worker.messages()) == []
        assert worker.ending() == Ending(1, "not today")


def test_leaving_the_block_ends_the_worker(module: Path) -> None:
    module.write_text("import time; print('here', flush=True); time.sleep(600)")
    with WorkerProcess("made_up_worker", Job(0)) as worker:
        assert next(worker.messages()) == b"here\n"
        process = worker._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("ending", "no_room", "no_memory"),
    [
        (Ending(1, "OSError: [Errno 28] No space left on device"), True, False),
        (Ending(1, "Disk quota exceeded"), True, False),
        (Ending(1, "MemoryError"), False, True),
        (Ending(-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'"), False, True),
        (Ending(-signal.SIGKILL, ""), False, True),
        (Ending(-signal.SIGSEGV, ""), False, False),
        (Ending(0, ""), False, False),
    ],
)
def test_the_cause_of_an_ending(ending: Ending, no_room: bool, no_memory: bool) -> None:
    assert (ending.no_room, ending.no_memory) == (no_room, no_memory)


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        (Ending(3, "one\ntwo"), "unet: its process ended with status 3; last output: two"),
        (Ending(0, ""), "unet: its process ended with status 0; last output: nothing"),
        (Ending(-signal.SIGSEGV, ""), "unet: its process was ended by SIGSEGV; last output: nothing"),
        (Ending(0xC0000005, ""), "unet: its process ended with status 0xc0000005; last output: nothing"),
        (Ending(-int(signal.SIGRTMIN) - 3, "x"), "unet: its process was ended by signal 37; last output: x"),
    ],
)
def test_an_ending_as_an_error(ending: Ending, sentence: str) -> None:
    """Of whichever class the parent's command has; a real-time signal has no name of its own."""
    error = ending.error("unet", BuildError)
    assert isinstance(error, BuildError)
    assert str(error) == sentence
    assert error.__notes__ == [ending.said]


def test_only_the_end_of_a_workers_output_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may repeat a warning for each of a million layers."""
    with WorkerProcess("no_such_module", Failed(kind="", message="")) as worker:
        list(worker.messages())
        os.truncate(worker._log.fileno(), 1 << 40)
        worker._log.seek(0, os.SEEK_END)
        worker._log.write("é".encode() * 3000)
        ending = worker.ending()
    assert ending.said == "é" * 2000


@pytest.mark.parametrize(
    "error", [BuildError("no"), EngineError("no"), CheckpointError("no"), MissingExtraError("a", "b", "do c")]
)
def test_an_error_crosses_the_border(error: LatentRTError) -> None:
    raised = msgspec.json.decode(msgspec.json.encode(Failed.of(error)), type=Failed).as_raised(ExportError)
    assert (type(raised), str(raised)) == (type(error), str(error))
    assert raised.__reduce__() == error.__reduce__()


def test_an_error_whose_class_is_not_known_here() -> None:
    raised = Failed(kind="ErrorOfTomorrow", message="no").as_raised(BuildError)
    assert (type(raised), str(raised)) == (BuildError, "no")


def test_a_workers_standard_input_is_empty(module: Path) -> None:
    """On Windows, libraries that ask for its kind would wait for whoever reads from it."""
    module.write_text(ECHO.replace("print(", "import sys; print(sys.stdin.read() + ", 1))
    with WorkerProcess("made_up_worker", Job(1)) as worker:
        assert len(list(worker.messages())) == 1
        assert worker.ending() == Ending(0, "noise on standard output")


def test_a_worker_ends_when_its_pipe_is_closed(module: Path) -> None:
    """Also where the system does not kill it with its parent."""
    module.write_text(ECHO + "import time; time.sleep(600)")
    with WorkerProcess("made_up_worker", Job(1)) as worker:
        messages = worker.messages()
        next(messages)
        pipe, worker._process.stdin = worker._process.stdin, None
        assert pipe is not None
        pipe.close()
        assert list(messages) == []
        assert worker.ending().status == 1


# A worker that is in one long call of a library, which holds Python's lock: no thread of its own can end it.
STUCK = """
import ctypes
import os
from latentrt.worker_process import take_job
line, report = take_job()
print(os.getpid(), file=open(FILE, "w"), flush=True)
ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems cannot do this; there the worker ends after the call"
)
def test_a_worker_that_is_stuck_in_a_library_ends_with_its_parent(module: Path, tmp_path: Path) -> None:
    module.write_text(STUCK.replace("FILE", repr(str(tmp_path / "id"))))

    def start() -> None:
        with WorkerProcess("made_up_worker", Job(1)) as worker:
            list(worker.messages())

    parent = start_child(start)
    wait_until(lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text().endswith("\n"))
    worker = int((tmp_path / "id").read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not is_running(worker))


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_in_the_current_folder_is_not_a_package(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "made_up_worker.py").write_text("raise SystemExit('the wrong one')")
    module.write_text(ECHO)
    monkeypatch.chdir(elsewhere)
    with WorkerProcess("made_up_worker", Job(1)) as worker:
        assert len(list(worker.messages())) == 1
    assert sys.flags.safe_path is False, "else this says nothing of -P"


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    def fail(path: Path) -> bytes:
        raise FileNotFoundError(path)

    assert peak_bytes() > 1 << 20
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert peak_bytes() == 5 * unit


class Named(msgspec.Struct):
    folder: str


def test_half_a_surrogate_pair_crosses_no_border() -> None:
    """A file name that is no UTF-8 has some, and JSON none."""
    name = os.fsdecode(b"\xff")
    with pytest.raises(RequestError, match="not valid Unicode"):
        WorkerProcess("made_up_worker", Named(name))
    message = Failed.of(CheckpointError(f"{name} is missing"))
    assert msgspec.json.decode(msgspec.json.encode(message), type=Failed).message == "\\udcff is missing"
