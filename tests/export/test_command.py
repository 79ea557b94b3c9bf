"""`latentrt export`: exit codes, messages instead of tracebacks, and the files left after an interrupt."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.cli import main as cli
from latentrt.errors import ExportError, GateError
from latentrt_export.worker import SplitOptions
from tests.documents import validated
from tests.export.fake_worker import FakeWorker, install, write_described
from tests.export.skeleton import write_skeleton
from tests.export.test_worker import without
from tests.exported import Exported

LATENTRT = [sys.executable, "-c", "from latentrt.cli.main import main; main()"]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return install(monkeypatch, FakeWorker())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_described(tmp_path / "model")


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_success(model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, tmp_path / "bundle") == 0
    output = capsys.readouterr()
    assert "component" in output.out
    assert f"{tmp_path / 'bundle'}: float32, exported in " in output.out
    assert output.out.endswith(f'next: latentrt run {tmp_path / "bundle"} "a prompt"\n')
    assert [line.split()[:2] for line in output.err.splitlines()] == [
        [job.component.name, "done"] for job in worker.jobs
    ]


def test_a_document(model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, tmp_path / "bundle", "--json", "-q") == 0
    output = capsys.readouterr()
    document = validated("export", output.out)
    opened = Bundle.open(tmp_path / "bundle")
    assert (document["digest"], document["precision"]) == (opened.digest, "float32")
    assert document["components"].keys() == opened.manifest.components.keys()
    assert output.err == ""


def test_options_reach_the_exporter(model: Path, tmp_path: Path, worker: FakeWorker) -> None:
    other = write_skeleton(tmp_path / "other")
    write_skeleton(model, variant="fp16")
    options = ["--precision", "float16", "--variant", "fp16", "--safety-checker", str(other), "--vae", str(other)]
    assert call(model, tmp_path / "bundle", *options) == 0
    assert {job.checkpoint for job in worker.jobs if job.component.weights == "vae"} == {str(other)}
    worker.jobs = [job for job in worker.jobs if job.component.weights != "vae"]
    assert {(job.precision, job.variant) for job in worker.jobs[:-1]} == {("float16", "fp16")}
    assert worker.jobs[-1].checkpoint == str(other)


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ([], SplitOptions(deep_cache=None)),
        (["--deep-cache", "0"], SplitOptions(deep_cache=0)),
        (["--deep-cache", "11"], SplitOptions(deep_cache=11)),
        (["--no-parts"], None),
    ],
)
def test_how_the_denoiser_is_divided(
    model: Path, tmp_path: Path, worker: FakeWorker, options: list[str], split: SplitOptions | None
) -> None:
    assert call(model, tmp_path / "bundle", *options) == 0
    assert {job.component.name: job.split for job in worker.jobs}["unet"] == split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--deep-cache", "0", "--no-parts"], "--deep-cache with --no-parts"),
        (
            ["--deep-cache", "12"],
            "got the DeepCache branch 12, expected one of this denoiser's: 0 (the shallowest) to 11",
        ),
        (["--deep-cache", "-1"], "got the DeepCache branch -1"),
        (["--deep-cache", "deep"], "got 'deep', expected a whole number"),
    ],
)
def test_an_invalid_split_is_refused_before_any_work(
    model: Path,
    tmp_path: Path,
    worker: FakeWorker,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert call(model, tmp_path / "bundle", *options) == 2
    assert message in capsys.readouterr().err
    assert worker.jobs == []
    assert not (tmp_path / "bundle").exists()


def test_the_ratio_of_merged_tokens_reaches_the_exporter(model: Path, tmp_path: Path, worker: FakeWorker) -> None:
    assert call(model, tmp_path / "bundle", "--token-merging", "0.5", "--no-parts") == 0
    assert {job.component.name: job.token_merging for job in worker.jobs}["unet"] == 0.5


@pytest.mark.parametrize("ratio", ["0", "0.75", "nan"])
def test_an_invalid_token_merging_ratio_is_refused_before_any_work(
    model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str], ratio: str
) -> None:
    assert call(model, tmp_path / "bundle", "--token-merging", ratio) == 2
    assert f"got the token merging ratio {ratio}, expected at least 0.05 and below 0.75" in capsys.readouterr().err
    assert worker.jobs == []


def test_warnings_are_shown(tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_described(tmp_path / "model", safety=False)
    assert call(model, tmp_path / "bundle") == 0
    assert "warning: the checkpoint has no safety checker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(GateError("unet: too far"), 5), (ExportError("killed"), 5), (OSError(28, "No space"), 8)]
)
def test_a_failure_is_a_sentence_and_an_exit_code(
    model: Path,
    tmp_path: Path,
    worker: FakeWorker,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    worker.fail["unet"] = error
    assert call(model, tmp_path / "bundle") == code
    output = capsys.readouterr()
    assert "\nerror: " in output.err
    assert "Traceback" not in output.err
    assert "component" not in output.out, "there is no table of what there is not"


def test_debug_shows_the_traceback(
    model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.fail["unet"] = GateError("unet: too far")
    with pytest.raises(SystemExit) as end:
        cli.main(["--debug", "export", str(model), str(tmp_path / "bundle")])
    assert end.value.code == 5
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: unet: too far\n")


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "nothing", tmp_path / "bundle") == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_an_existing_bundle_requires_overwrite(
    model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(model, tmp_path / "bundle") == 0
    assert call(model, tmp_path / "bundle") == 8
    assert "--overwrite" in capsys.readouterr().err
    assert call(model, tmp_path / "bundle", "--overwrite") == 0


def test_defaults_of_requests(
    model: Path, tmp_path: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(model, tmp_path / "plain") == 0
    assert call(model, tmp_path / "fast", "--default-steps", "4", "--default-guidance-scale", "0") == 0
    found = [Bundle.open(tmp_path / name).manifest.defaults for name in ("plain", "fast")]
    assert [(one.num_inference_steps, one.guidance_scale) for one in found] == [(50, 7.5), (4, 0.0)]
    for option, value in (("--default-steps", "0"), ("--default-steps", "1001"), ("--default-guidance-scale", "nan")):
        capsys.readouterr()
        assert call(model, tmp_path / "impossible", option, value) == 2
        assert f"{option}: got {value}, expected" in capsys.readouterr().err
    assert not (tmp_path / "impossible").exists()


def test_a_place_below_a_file(model: Path, tmp_path: Path, worker: FakeWorker) -> None:
    (tmp_path / "file").write_text("x")
    assert call(model, tmp_path / "file" / "bundle") == 8


@pytest.mark.parametrize("option", [["--precision", "int3"], ["--prediction-type", "sample"], ["--unheard-of"]])
def test_a_wrong_call(model: Path, tmp_path: Path, option: list[str]) -> None:
    assert call(model, tmp_path / "bundle", *option) == 2


# Real processes


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*LATENTRT, "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("absent", "extra"), [(("onnxruntime",), "cpu"), (("torch",), "export"), (("diffusers", "transformers"), "export")]
)
def test_a_missing_dependency_is_named_with_its_extra(
    model: Path, tmp_path: Path, absent: tuple[str, ...], extra: str
) -> None:
    (tmp_path / "site").mkdir()
    environment = {**os.environ, "PYTHONPATH": without(tmp_path / "site", *absent)}
    ended = run(model, tmp_path / "bundle", env=environment)
    assert ended.returncode == 7
    assert f"pip install 'latentrt[{extra}]'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk(sd1: Exported, tmp_path: Path) -> None:
    """A limit on the size of a file stands for a disk that is full: the weights of the text encoder are larger."""
    limit = (100_000, 100_000)
    ended = run(
        sd1.checkpoint,
        tmp_path / "out" / "bundle",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert ended.returncode == 8, ended.stderr
    assert "error: text_encoder: its files cannot be written: no space left in" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def earlier(sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that is there already."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, FakeWorker(content=b"earlier"))
        assert call(sd1.checkpoint, tmp_path / "out" / "bundle") == 0
    return tmp_path / "out" / "bundle"


def start(checkpoint: Path, bundle: Path) -> subprocess.Popen[str]:
    command = [*LATENTRT, "export", str(checkpoint), str(bundle), "--overwrite"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        # `tests/runtime/cli/test_main.py` and `bundle/test_interrupts.py` have these two in CI.
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
    ids=["INT", "TERM", "KILL"],
)
def test_interrupted_in_the_middle(sd1: Exported, earlier: Path, number: int, code: int) -> None:
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    process = start(sd1.checkpoint, earlier)
    try:
        # The worker has made its folder: it is at work, and so is the parent that waits for it.
        wait_for(lambda: list(earlier.parent.glob(".bundle.export-*/bundle/text_encoder")))
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before
    left = sorted(path.name for path in earlier.parent.iterdir() if path.name != "bundle")
    if number == signal.SIGKILL:
        assert len(left) == 1
        assert left[0].startswith(".bundle.export-")
    else:
        assert left == []
    assert len(workers) == 1
    wait_for(lambda: not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE, seconds=30)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, FakeWorker(content=b"next"))
        assert call(sd1.checkpoint, earlier.with_name("next")) == 0
    assert sorted(path.name for path in earlier.parent.iterdir()) == ["bundle", "next"]
