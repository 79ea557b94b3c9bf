"""A component's worker process: its reports, and every way in which it can end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.graph_check import find_ranges
from latentrt.bundle.manifest import LatentSpace
from latentrt.bundle.sample import bundle_path
from latentrt.errors import CheckpointError, ExportError, GateError, LatentRTError, MissingExtraError, OutputError
from latentrt.worker_process import Failed
from latentrt_export import worker
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.worker import Done, Job, Jobs, Message, Phase, Warned, run_jobs
from tests.export.fake_worker import COST, fake_component
from tests.export.skeleton import write_json

JOB = Job(
    component=ComponentPlan(
        name="text_encoder",
        role="text-encoder",
        module="text_encoder:TextEncoder",
        weights="text_encoder",
        sources={"input_ids": "tokens", "clip_skip": "option:clip_skip"},
    ),
    checkpoint="/nowhere",
    variant=None,
    precision="float32",
    folder="/nowhere/bundle",
    gate_inputs="/nowhere/gate-inputs.npz",
    latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
    ranges={},
)


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a shell script that runs instead of the interpreter; a test writes the worker's behaviour into it."""
    script = tmp_path / "python"
    script.touch()
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def run_one(job: Job) -> Done:
    (done,) = run_jobs([job], lambda name, text: None, lambda text: None)
    return done


def catch_error(interpreter: Path, shell: str) -> LatentRTError:
    interpreter.write_text(f"#!/bin/sh\n{shell}\n")
    with pytest.raises(LatentRTError) as caught:
        run_one(JOB)
    return caught.value


def echo(*messages: Message) -> str:
    return "\n".join(f"echo '{msgspec.json.encode(message).decode()}'" for message in messages)


def test_phases_warnings_and_the_result_are_handed_on(interpreter: Path) -> None:
    done = Done(cost=COST, component=fake_component(JOB))
    messages = echo(Phase("loading"), Warned("whole"), Phase("tracing"), done)
    interpreter.write_text(f"#!/bin/sh\nread job\n{messages}\n")
    phases: list[tuple[str, str]] = []
    warnings: list[str] = []
    assert [*run_jobs([JOB], lambda *phase: phases.append(phase), warnings.append)] == [done]
    assert (phases, warnings) == ([("text_encoder", "loading"), ("text_encoder", "tracing")], ["whole"])


def test_one_process_runs_all_jobs(interpreter: Path) -> None:
    """A phase belongs to the component whose result is still to come, and so does a crash."""
    second = msgspec.structs.replace(JOB, component=msgspec.structs.replace(JOB.component, name="text_encoder_2"))
    done = Done(cost=COST, component=fake_component(JOB))
    interpreter.write_text(f"#!/bin/sh\nread jobs\n{echo(Phase('one'), done, Phase('two'))}\nkill -KILL $$\n")
    phases: list[tuple[str, str]] = []
    results = run_jobs([JOB, second], lambda *phase: phases.append(phase), lambda text: None)
    assert next(results) == done
    with pytest.raises(ExportError, match=r"^text_encoder_2: its process was killed"):
        next(results)
    assert phases == [("text_encoder", "one"), ("text_encoder_2", "two")]


def test_killed(interpreter: Path) -> None:
    caught = catch_error(interpreter, "read job; kill -KILL $$")
    assert isinstance(caught, ExportError)
    assert "text_encoder: its process was killed, most likely for lack of memory" in str(caught)


@pytest.mark.parametrize("message", ["MemoryError", "RuntimeError: [enforce fail] can't allocate memory: 1 bytes"])
def test_out_of_memory_by_its_message(interpreter: Path, message: str) -> None:
    assert "lack of memory" in str(catch_error(interpreter, f'read job; echo "{message}" >&2; exit 1'))


def test_crashed(interpreter: Path) -> None:
    caught = str(
        catch_error(interpreter, "read job; echo 'Traceback …' >&2; echo 'ZeroDivisionError: by zero' >&2; exit 1")
    )
    assert "text_encoder: its process ended with status 1; last output:" in caught
    assert caught.endswith("ZeroDivisionError: by zero")


def test_only_the_end_of_a_long_log_is_shown(interpreter: Path) -> None:
    caught = str(catch_error(interpreter, "read job; yes noise | head -10000 >&2; echo 'the end' >&2; exit 1"))
    assert caught.endswith("the end")
    assert len(caught) < 2200


def test_a_signal_has_its_name(interpreter: Path) -> None:
    assert "was ended by SIGSEGV" in str(catch_error(interpreter, "read job; kill -SEGV $$"))


def test_an_exit_before_the_job_is_read(interpreter: Path) -> None:
    assert "ended with status 3; last output: no such thing" in str(
        catch_error(interpreter, "echo no such thing >&2; exit 3")
    )


def test_a_user_sees_the_last_line_and_debug_the_rest(interpreter: Path) -> None:
    caught = catch_error(interpreter, "read job; echo Traceback >&2; echo ZeroDivisionError: by zero >&2; exit 1")
    assert str(caught).endswith("last output: ZeroDivisionError: by zero")
    assert caught.__notes__ == ["Traceback\nZeroDivisionError: by zero"]


@pytest.mark.parametrize(
    "message",
    [
        "OSError: [Errno 28] No space left on device",
        "SafetensorError: I/O error: File too large (os error 27)",
        "OSError: [Errno 122] Disk quota exceeded",
    ],
)
def test_a_full_disk(interpreter: Path, message: str) -> None:
    caught = catch_error(interpreter, f"read job; echo '{message}' >&2; exit 1")
    assert isinstance(caught, OutputError)
    assert "no space left" in str(caught)


@pytest.mark.parametrize("error", [GateError("unet: too far"), CheckpointError("torn"), OutputError("full")])
def test_its_errors_are_raised_as_they_were(interpreter: Path, error: LatentRTError) -> None:
    caught = catch_error(interpreter, "read job\n" + echo(Failed(kind=type(error).__name__, message=str(error))))
    assert type(caught) is type(error)
    assert str(caught) == str(error)


def test_a_real_workers_error(tmp_path: Path) -> None:
    job = msgspec.structs.replace(JOB, checkpoint=str(tmp_path))
    write_json(tmp_path / "text_encoder" / "config.json", {})
    with pytest.raises(CheckpointError, match=r"text_encoder has no weights"):
        run_one(job)


def without(folder: Path, *packages: str) -> str:
    """A PYTHONPATH with which an interpreter finds all packages but these."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name.split('.')[0] in {packages!r} else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_missing_extra_crosses_the_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", without(tmp_path, "diffusers"))
    unet = msgspec.structs.replace(JOB.component, name="unet", module="unet:UNet")
    job = msgspec.structs.replace(JOB, component=unet)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[export\]'") as absence:
        run_one(job)
    assert (absence.value.package, absence.value.extra) == ("diffusers", "export")


def test_a_file_in_the_current_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        run_one(msgspec.structs.replace(JOB, checkpoint=str(tmp_path)))


def test_a_worker_ends_with_its_parent() -> None:
    code = "import time; from latentrt_export import worker; worker.run_job = lambda *a: time.sleep(60); worker.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(Jobs((JOB,))) + b"\n")
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.stdin.close()
    assert process.wait(timeout=10) == 1
    process.stdout.close()


def test_the_peak_is_the_workers_own(tmp_path: Path) -> None:
    """`ru_maxrss` of a small process depends on its parent process."""
    from latentrt.worker_process import peak_bytes

    here = peak_bytes()
    assert psutil.Process(os.getpid()).memory_info().rss <= here * 1.01
    code = "from latentrt.worker_process import peak_bytes; print(peak_bytes())"
    ballast = b"\1" * 300_000_000
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert small < len(ballast)


def test_a_graph_that_the_runtime_would_refuse_is_not_exported() -> None:
    """The clip skip and the ids choose rows: without their ranges no index is certain to be one."""
    bundle = Bundle.open(bundle_path())
    component, tokenizer = bundle.manifest.components["text_encoder"], bundle.manifest.tokenizers["text_encoder"]
    folder = bundle.folder / "text_encoder"
    worker._check_graphs(component, folder, find_ranges(bundle.manifest.limits, tokenizer))
    with pytest.raises(ExportError, match=r"would refuse .* No bundle was written"):
        worker._check_graphs(component, folder, {})
