"""`latentrt bench`: how fast is a bundle here, on each backend that this machine can run?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.errors import BackendError, EngineError, LatentRTError

if TYPE_CHECKING:
    from latentrt.bench import BenchJob, Measured

__all__ = ["bench"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, help="cpu, openvino, cuda or tensorrt; several stand side by side.")
@click.option("--provider", "providers", multiple=True, help="One of ONNX Runtime's execution providers, by its name.")
@click.option("--prompt", default="a red circle on a blue background", show_default=True)
@click.option("--width", type=int, help="In pixels. The bundle's default by default.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--steps", type=int, help="Denoising steps. The bundle's default by default.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures at once.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Pictures after the first.")
@click.option("--threads", type=click.IntRange(min=1), help="On the CPU. One per core by default.")
@click.option("--precision", help="What a CPU computes in: float32, bfloat16 (OpenVINO), int8 (a bundle of int8).")
@click.option(
    "--low-memory", is_flag=True, help="Let each submodule go when it is done; decode in slices where that helps."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures there, too.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
def bench(
    bundle: Path,
    devices: tuple[str, ...],
    providers: tuple[str, ...],
    prompt: str,
    width: int | None,
    height: int | None,
    steps: int | None,
    batch: int,
    runs: int,
    threads: int | None,
    precision: str | None,
    low_memory: bool,
    json_path: Path | None,
    digest: str | None,
) -> None:
    """Measure BUNDLE: the first picture, pictures after it, each submodule, memory; each backend in a process of its
    own. Without --device and --provider, every backend that this machine can run."""
    from latentrt.bench import BenchJob
    from latentrt.bundle.bundle import Bundle
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
        width=width,
        height=height,
        steps=steps,
        batch=batch,
        runs=runs,
    )
    check_report(json_path)
    measured, failure = _measure_all(_jobs(job, devices, providers))
    _print(measured)
    if json_path is not None:
        write_report(json_path, _figures(job, measured))
    if failure is not None and (devices or providers or not measured):
        raise failure


def _measure_all(jobs: list[tuple[str, BenchJob]]) -> tuple[dict[str, Measured], LatentRTError | None]:
    """What was measured, and why the first backend that could not be run could not."""
    measured: dict[str, Measured] = {}
    first: LatentRTError | None = None
    for name, job in jobs:
        try:
            measured[name] = _measure(name, job)
        except (BackendError, EngineError) as error:
            click.echo(f"{name}: {error}", err=True)
            first = first or error
    return measured, first


def _jobs(job: BenchJob, devices: tuple[str, ...], providers: tuple[str, ...]) -> list[tuple[str, BenchJob]]:
    import msgspec

    from latentrt.backends.placement import check_device

    for device in devices:
        check_device(device)
    if not devices and not providers:
        devices = _devices_here(cpu_alone=job.precision is not None)
    jobs = [(device, msgspec.structs.replace(job, device=device)) for device in devices]
    return jobs + [(provider, msgspec.structs.replace(job, provider=provider)) for provider in providers]


def _devices_here(*, cpu_alone: bool) -> tuple[str, ...]:
    """What is worth trying: a GPU's backends only where there is one, and not where it was said what a CPU is to
    compute in."""
    from latentrt.backends.onnxruntime import CUDA, available_providers
    from latentrt.backends.openvino import is_installed
    from latentrt.engines.gpu import Gpu, find_gpu

    here: tuple[str, ...] = ("openvino", "cpu") if is_installed() else ("cpu",)
    if not cpu_alone and isinstance(find_gpu(), Gpu):
        here = (*(("cuda",) if CUDA in available_providers() else ()), "auto", *here)
    return here


def _measure(name: str, job: BenchJob) -> Measured:
    import msgspec

    from latentrt.bench import Measured, Message
    from latentrt.worker_process import WorkerProcess

    click.echo(f"measuring {name} …", err=True)
    with WorkerProcess("latentrt.bench", job) as worker:
        for line in worker.messages():
            message: Message = msgspec.json.decode(line, type=Message)
            if isinstance(message, Measured):
                return message
            raise message.as_raised(LatentRTError)
        raise worker.ending().error(name, BackendError)


def _print(measured: dict[str, Measured]) -> None:
    for name, figures in measured.items():
        click.echo(f"\n{name}")
        for words in sorted(set(figures.runs_on.values())):
            components = [component for component, each in figures.runs_on.items() if each == words]
            click.echo(f"  {', '.join(components)}: {words}")
        gpu = "" if figures.gpu_bytes is None else f", GPU memory in use {figures.gpu_bytes / 2**30:.1f} GiB"
        click.echo(f"  first picture {figures.load_ms + figures.first_ms:,.0f} ms, loading included")
        click.echo(f"  peak memory {figures.peak_bytes / 2**30:.2f} GiB{gpu}")
        click.echo(f"  {'':<16}{'runs':>6}{'p50 ms':>12}{'p90 ms':>12}{'p99 ms':>12}")
        rows = {"picture": figures.picture, **figures.submodules}
        for row, one in rows.items():
            click.echo(f"  {row:<16}{one.count:>6}{one.p50_ms:>12,.1f}{one.p90_ms:>12,.1f}{one.p99_ms:>12,.1f}")

    if measured:
        click.echo("\npercentiles are by nearest rank: of fewer than 100 runs the 99th is the longest")


def _figures(job: BenchJob, measured: dict[str, Measured]) -> dict[str, Any]:
    import msgspec

    asked: Any = msgspec.to_builtins(job)
    return {
        "asked": {key: value for key, value in asked.items() if key not in ("bundle", "device", "provider")},
        "measured": {name: msgspec.to_builtins(figures) for name, figures in measured.items()},
    }
