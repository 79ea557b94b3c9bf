"""The command `latentrt bench`: times and memory of a bundle on each backend of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.cli.command import command
from latentrt.cli.output import echo
from latentrt.cli.request_options import SPELLING, given_options, request_options
from latentrt.errors import BackendError, EngineError, LatentRTError

if TYPE_CHECKING:
    from latentrt.cli.bench_worker import BenchJob, Measurement

__all__ = ["bench"]


@command(examples=())
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, help="cpu, openvino, cuda or tensorrt; may be repeated.")
@click.option("--provider", "providers", multiple=True, help="One of ONNX Runtime's execution providers, by its name.")
@click.option("--prompt", default="a red circle on a blue background", show_default=True)
@request_options("height", "width", "num_inference_steps")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per request.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Images after the first.")
@click.option("--threads", type=click.IntRange(min=1), help="On the CPU. One per core by default.")
@click.option("--precision", help="Arithmetic on a CPU: float32, bfloat16 (OpenVINO) or int8 (int8 bundles).")
@click.option(
    "--low-memory", is_flag=True, help="Release each component after its use; decode in slices where that saves memory."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the measurements to a file.")
@click.option("--digest", metavar="sha256:…", help="Expected digest of bundle.json.")
def bench(
    bundle: Path,
    devices: tuple[str, ...],
    providers: tuple[str, ...],
    prompt: str,
    batch: int,
    runs: int,
    threads: int | None,
    precision: str | None,
    low_memory: bool,
    json_path: Path | None,
    digest: str | None,
    **options: Any,
) -> None:
    """Measure BUNDLE: the first image, images after it, each component, memory; each backend in a process of its
    own. Without --device and --provider, every backend that this machine can run."""
    from latentrt.bundle.bundle import Bundle
    from latentrt.cli.bench_worker import BenchJob
    from latentrt.cli.report import check_report, write_report

    opened = Bundle.open(bundle, digest)
    job = BenchJob(
        bundle=str(opened.folder),
        digest=opened.digest,
        device="auto",
        provider=None,
        threads=threads,
        precision=precision,
        low_memory=low_memory,
        prompt=prompt,
        batch=batch,
        runs=runs,
        options=given_options(options),
    )
    check_report(json_path)
    measured, failure = _measure_all(_jobs(job, devices, providers))
    _print(measured)
    if json_path is not None:
        write_report(json_path, _report(job, measured))
    if failure is not None and (devices or providers or not measured):
        raise failure


def _measure_all(jobs: list[tuple[str, BenchJob]]) -> tuple[dict[str, Measurement], LatentRTError | None]:
    """Return the measurements by backend, and the error of the first backend that could not run."""
    measured: dict[str, Measurement] = {}
    first: LatentRTError | None = None
    for name, job in jobs:
        try:
            measured[name] = _measure(name, job)
        except (BackendError, EngineError) as error:
            echo(f"{name}: {error.describe(SPELLING)}", err=True)
            first = first or error
    return measured, first


def _jobs(job: BenchJob, devices: tuple[str, ...], providers: tuple[str, ...]) -> list[tuple[str, BenchJob]]:
    """Return a job for each backend, by its name."""
    import msgspec

    from latentrt.backends.placement import check_device

    for device in devices:
        check_device(device)
    if not devices and not providers:
        devices = _available_devices(cpu_only=job.precision is not None)
    jobs = [(device, msgspec.structs.replace(job, device=device)) for device in devices]
    return jobs + [(provider, msgspec.structs.replace(job, provider=provider)) for provider in providers]


def _available_devices(*, cpu_only: bool) -> tuple[str, ...]:
    """Return the devices to measure by default, those of a GPU where there is one.

    Args:
        cpu_only: omit the devices of a GPU, as with a precision for CPUs.
    """
    from latentrt.backends.onnxruntime import CUDA, available_providers
    from latentrt.backends.openvino import is_installed
    from latentrt.engines.gpu import Gpu, find_gpu

    devices: tuple[str, ...] = ("openvino", "cpu") if is_installed() else ("cpu",)
    if not cpu_only and isinstance(find_gpu(), Gpu):
        devices = (*(("cuda",) if CUDA in available_providers() else ()), "auto", *devices)
    return devices


def _measure(name: str, job: BenchJob) -> Measurement:
    from latentrt.cli.bench_worker import MESSAGES, Measurement
    from latentrt.worker_process import WorkerProcess

    echo(f"measuring {name} …", err=True)
    with WorkerProcess("latentrt.cli.bench_worker", job) as worker:
        for line in worker.messages():
            message = MESSAGES.decode(line)
            if isinstance(message, Measurement):
                return message
            raise message.as_raised(LatentRTError)
        raise worker.ending().error(name, BackendError)


def _print(measured: dict[str, Measurement]) -> None:
    for name, measurement in measured.items():
        echo()
        echo(name)
        for described in sorted(set(measurement.runs_on.values())):
            components = [component for component, each in measurement.runs_on.items() if each == described]
            echo(f"  {', '.join(components)}: {described}")
        gpu = "" if measurement.gpu_bytes is None else f", GPU memory in use {measurement.gpu_bytes / 2**30:.1f} GiB"
        echo(f"  first image {measurement.load_ms + measurement.first_ms:,.0f} ms, loading included")
        echo(f"  peak memory {measurement.peak_bytes / 2**30:.2f} GiB{gpu}")
        echo(f"  {'':<16}{'runs':>6}{'p50 ms':>12}{'p90 ms':>12}{'p99 ms':>12}")
        rows = {"image": measurement.image, **measurement.components}
        for row, each in rows.items():
            echo(f"  {row:<16}{each.count:>6}{each.p50_ms:>12,.1f}{each.p90_ms:>12,.1f}{each.p99_ms:>12,.1f}")

    if measured:
        echo()
        echo("percentiles are by nearest rank: of fewer than 100 runs the 99th is the longest")


def _report(job: BenchJob, measured: dict[str, Measurement]) -> dict[str, Any]:
    import msgspec

    settings: Any = msgspec.to_builtins(job)
    return {
        "settings": {key: value for key, value in settings.items() if key not in ("bundle", "device", "provider")},
        "measured": {name: msgspec.to_builtins(each) for name, each in measured.items()},
    }
