"""The command `latentrt bench`: times and memory of a bundle on each backend of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from latentrt.cli.bench_messages import LEAST_RUNS, MESSAGES, BenchJob, Generated, Measurement
from latentrt.cli.command import command, option, settings, spelling
from latentrt.cli.document import MachineDocument, echo_document
from latentrt.cli.output import echo
from latentrt.cli.request_options import (
    devices,
    digest_option,
    given_options,
    precision_options,
    providers,
    request_options,
)
from latentrt.cli.values import BundlePath, Suggested
from latentrt.errors import BackendError, EngineError, LatentRTError

if TYPE_CHECKING:
    from latentrt.cli.progress import Task

__all__ = ["BenchDocument", "bench"]


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The request that was measured, and the settings of the backends.

    Attributes:
        options: of the request, by their Python keywords.
        batch: images per request. runs: requests after the first.
    """

    threads: int | None
    precision: str | None
    low_memory: bool
    prompt: str
    batch: int
    runs: int
    options: dict[str, int]


class BenchDocument(MachineDocument, frozen=True, kw_only=True):
    """The document of `latentrt bench --json`.

    Attributes:
        bundle: the folder. digest: of bundle.json.
        measured: by the name of the device or provider.
        refused: why a backend could not run, by its name.
    """

    bundle: str
    digest: str
    settings: BenchSettings
    measured: dict[str, Measurement]
    refused: dict[str, str]


@command(
    examples=(
        "latentrt bench sample",
        "latentrt bench my-bundle --device openvino --device cpu --steps 20 --runs 100",
        "latentrt bench my-bundle --size 768x512 --json > bench.json",
    )
)
@click.argument("bundle", type=BundlePath())
@option(
    "--device",
    "devices",
    multiple=True,
    type=Suggested(devices),
    group="Machine",
    help="cpu, openvino, cuda or tensorrt; may be repeated. Every one that this machine can run by default.",
)
@option(
    "--provider",
    "providers",
    multiple=True,
    type=Suggested(providers),
    group="Machine",
    help="One of ONNX Runtime's execution providers, by its name; may be repeated.",
)
@option("--threads", type=click.IntRange(min=1), group="Machine", help="On the CPU. One per core by default.")
@precision_options
@digest_option
@option("--prompt", default="a red circle on a blue background", group="Request", help="The image's description.")
@option("--batch", type=click.IntRange(min=1), default=1, group="Request", help="Images per request.")
@option(
    "--runs",
    type=click.IntRange(min=1),
    default=5,
    group="Request",
    help="Requests after the first; the 90th percentile needs 10, the 99th 100.",
)
@request_options("width", "height", "num_inference_steps")
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
    digest: str | None,
    **options: Any,
) -> None:
    """Measure BUNDLE: the first image, images after it, each component, memory; each backend in a process of its
    own. Without --device and --provider, every backend that this machine can run."""
    from latentrt.bundle.bundle import Bundle

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
    measured, failures = _measure_all(_jobs(job, devices, providers))
    refused = {name: error.describe(spelling()) for name, error in failures.items()}
    if settings().json and measured:
        echo_document(
            BenchDocument.here(
                bundle=job.bundle, digest=job.digest, settings=_settings_of(job), measured=measured, refused=refused
            )
        )
    else:
        _print(measured, batch)
    for name, reason in refused.items():
        echo(f"{name}: {reason}", err=True)
    if failures and (devices or providers or not measured):
        raise next(iter(failures.values()))


def _settings_of(job: BenchJob) -> BenchSettings:
    return BenchSettings(**{name: getattr(job, name) for name in BenchSettings.__struct_fields__})


def _measure_all(jobs: list[tuple[str, BenchJob]]) -> tuple[dict[str, Measurement], dict[str, LatentRTError]]:
    """Return the measurements, and the errors of the backends that could not run, by the backend's name."""
    from latentrt.cli.progress import Progress

    measured: dict[str, Measurement] = {}
    failures: dict[str, LatentRTError] = {}
    with Progress() as progress:
        for name, job in jobs:
            try:
                measured[name] = _measure(name, job, progress.task(f"measuring {name}", job.runs + 1))
            except (BackendError, EngineError) as error:
                failures[name] = error
    return measured, failures


def _jobs(job: BenchJob, devices: tuple[str, ...], providers: tuple[str, ...]) -> list[tuple[str, BenchJob]]:
    """Return a job for each backend, by its name."""
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


def _measure(name: str, job: BenchJob, task: Task) -> Measurement:
    from latentrt.worker_process import WorkerProcess

    with WorkerProcess("latentrt.cli.bench_worker", job) as worker:
        for line in worker.messages():
            message = MESSAGES.decode(line)
            if isinstance(message, Measurement):
                task.finish()
                return message
            if isinstance(message, Generated):
                task.update(message.count)
                continue
            raise message.as_raised(LatentRTError)
        raise worker.ending().error(name, BackendError)


_COLUMNS = {"p50 ms": "p50_ms", "p90 ms": "p90_ms", "p99 ms": "p99_ms", "longest ms": "max_ms"}


def _print(measured: dict[str, Measurement], batch: int) -> None:
    images = "image" if batch == 1 else f"{batch} images"
    absent = dict[str, int]()
    for name, measurement in measured.items():
        echo()
        echo(name)
        for described in sorted(set(measurement.runs_on.values())):
            components = [component for component, each in measurement.runs_on.items() if each == described]
            echo(f"  {', '.join(components)}: {described}")
        gpu = "" if measurement.gpu_bytes is None else f", GPU memory in use {measurement.gpu_bytes / 2**30:.1f} GiB"
        echo(f"  first {images} {measurement.load_ms + measurement.first_ms:,.0f} ms, loading included")
        echo(f"  peak memory {measurement.peak_bytes / 2**30:.2f} GiB{gpu}")
        echo(f"  {'':<16}{'runs':>6}{''.join(f'{heading:>12}' for heading in _COLUMNS)}")
        for row, each in {images: measurement.image, **measurement.components}.items():
            values = [getattr(each, field) for field in _COLUMNS.values()]
            shown = "".join(f"{'-' if value is None else format(value, ',.1f'):>12}" for value in values)
            echo(f"  {row:<16}{each.count:>6}{shown}")
        image = measurement.image
        absent |= {field: count for field, count in LEAST_RUNS.items() if getattr(image, field) is None}
    if absent:
        needs = ", ".join(f"{field.removesuffix('_ms')} needs {count}" for field, count in absent.items())
        echo()
        echo(f"-: too few runs for the percentile; {needs}: latentrt bench --runs {max(absent.values())}")
