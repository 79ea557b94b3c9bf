"""Measures the time and memory of decoding whole, in slices, in tiles, and with the preview decoder.

    .venv/bin/python -m benchmarks.decoding scratch/full/float16 --output benchmarks/results/decoding.json

Each variant runs in a process of its own, which decodes one image's latents and reports the seconds (of the first
decode with loading, of later ones without; and CPU time, which is more reliable on a shared machine) and the peak of
its anonymous memory over the level before loading; weights that are mapped from their file are not in it. Weights of
full size are random, and so are the images; the cost of tiles in quality is measured on images of the sample model, at
twice its side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import click
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command import FOLDER, PATH, REPORT, benchmark, command_line, write_report
from benchmarks.full_size import machine
from benchmarks.peer_process import anonymous_bytes
from benchmarks.psnr import psnr_db
from latentrt import Bundle, Pipeline
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.placement import ComputePrecision, Device, Preferences, place_components
from latentrt.backends.session import Session
from latentrt.bundle.manifest import Precision
from latentrt.bundle.sample import bundle_path
from latentrt.decode.slices import SlicedDecoder
from latentrt.decode.tiles import decode_in_tiles
from sample.prompts import held_out_prompts
from sample.quality import PROMPT_SEED

CpuBackend = Literal["onnxruntime", "openvino"]
DEVICES: dict[str, Device] = {"onnxruntime": "cpu", "openvino": "openvino"}
Way = Literal["whole", "sliced", "tiled", "small tiles", "preview"]
Pixels = NDArray[np.uint8]
Decode = Callable[[NDArray[np.float32]], Pixels]

_SAMPLE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Found:
    """The measurements of one variant.

    `psnr` and `largest` (difference, in levels of 255) are against the whole decode; None if equal or not comparable.
    """

    seconds: list[float]
    processor_seconds: list[float]
    peak_anonymous_mib: int
    psnr: float | None = None
    largest: int | None = None


@benchmark("benchmarks.decoding", __doc__)
@click.argument("bundle", type=FOLDER)
@click.option(
    "--side", "sides", multiple=True, type=int, default=[512, 1024], help="of images in pixels; may be repeated"
)
@click.option("--on", multiple=True, type=click.Choice(get_args(CpuBackend)), default=get_args(CpuBackend))
@click.option(
    "--way", "ways", multiple=True, type=click.Choice(get_args(Way)), default=get_args(Way), help="with whole"
)
@click.option("--precision", type=click.Choice(get_args(ComputePrecision)), help="by default the bundle's")
@click.option("--threads", type=int, default=2)
@click.option("--repeats", type=int, default=1, help="decodes of 512 × 512 in each process; 1 for larger")
@click.option("--prompts", type=int, default=16, help="images of the sample model")
@click.option("--output", type=PATH, help=REPORT)
@click.option("--one", nargs=4, metavar="WAY BACKEND SIDE FILE", hidden=True)
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    if arguments.one:
        measure_one(arguments)
        return
    bundle = Bundle.open(arguments.bundle)
    report: dict[str, Any] = {
        "command": command_line("benchmarks.decoding"),
        "machine": machine(),
        "threads": arguments.threads,
        "full_size": {},
    }
    for side in arguments.sides:
        for backend in arguments.on:
            ways = [way for way in ways_of(bundle) if way in arguments.ways]
            found = measure(arguments, backend, side, ways)
            report["full_size"].setdefault(str(side), {})[backend] = {
                name: asdict(each) for name, each in found.items()
            }
            if arguments.output:
                write_report(arguments.output, report)
    if "tiled" in arguments.ways:
        report["sample"] = measure_tiles(arguments.prompts)
        if arguments.output:
            write_report(arguments.output, report)
    Console(width=110).print(as_table(report))


def ways_of(bundle: Bundle) -> list[Way]:
    """Return the variants for which a bundle has graphs."""
    components = bundle.manifest.components
    ways: list[Way] = ["whole", *(["sliced"] if "slice.0" in components["vae_decoder"].parts else [])]  # type: ignore[list-item]
    return [*ways, "tiled", "small tiles", *(["preview"] if "preview_decoder" in components else [])]  # type: ignore[list-item]


def measure(arguments: SimpleNamespace, backend: str, side: int, ways: Sequence[Way]) -> dict[str, Found]:
    """Measure every variant, each in a process of its own."""
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            file = Path(folder) / f"{way}.npy"
            repeats = arguments.repeats if side <= 512 else 1
            call = [sys.executable, "-m", "benchmarks.decoding", str(arguments.bundle), "--repeats", str(repeats)]
            call += ["--precision", arguments.precision] if arguments.precision else []
            call += ["--threads", str(arguments.threads), "--one", way, backend, str(side), str(file)]
            measured = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE).stdout)
            whole = Path(folder) / "whole.npy"
            difference = {} if way in ("whole", "preview") else compare(np.load(file), np.load(whole))
            found[way] = Found(**measured, **difference)
            print(f"{side} on {backend}, {way}: {found[way]}", flush=True)
    return found


def measure_one(arguments: SimpleNamespace) -> None:
    """Measure one variant in this process, and print the result."""
    way, backend, side, file = arguments.one
    bundle = Bundle.open(arguments.bundle)
    name = "preview_decoder" if way == "preview" else "vae_decoder"
    bundle.check(bundle.files_of([name]))
    latents = np.random.default_rng(7).standard_normal((1, 4, int(side) // 8, int(side) // 8), np.float32)
    preferences = Preferences(threads=arguments.threads, precision=arguments.precision)
    placements = place_components(bundle, DEVICES[backend], preferences=preferences)
    opens: Callable[[], Session] = partial(placements[name].open, None)
    if way == "sliced":
        opens = partial(open_sliced, bundle, backend, preferences)
    watch, seconds, processor_seconds = AnonymousMemory(), [], []
    session: Session | None = None
    for _ in range(arguments.repeats):
        began, worked = time.perf_counter(), time.process_time()
        session = session or opens()
        pixels = decode_with(session, way)(latents)
        seconds.append(round(time.perf_counter() - began, 2))
        processor_seconds.append(round(time.process_time() - worked, 2))
    np.save(file, pixels)
    measured = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_anonymous_mib": watch.peak_mib()}
    print(json.dumps(measured))


def open_sliced(bundle: Bundle, backend: CpuBackend, preferences: Preferences) -> SlicedDecoder:
    """Open a decoder in slices, even if `--low-memory` does not use them."""
    record = bundle.manifest.components["vae_decoder"]
    precision: Precision = "int8" if "int8" in record.graphs else "float32"
    narrow = preferences.precision == "bfloat16" or (precision == "int8" and ov.computes_in_bfloat16())
    arithmetic: ov.Arithmetic = "bfloat16" if narrow else "float32"

    def open_part(part: str) -> Session:
        options: dict[str, Any] = {"part": part, "threads": preferences.threads}
        if backend == "openvino":
            options |= {"arithmetic": arithmetic, "low_memory": True}
            return ov.open_session(bundle, "vae_decoder", precision, **options)
        return ort.open_session(bundle, "vae_decoder", precision=precision, **options)

    return SlicedDecoder(record.inputs, record.outputs, record.parts, open_part, lambda part: None)


def decode_with(session: Session, way: str) -> Decode:
    """Return the function from latents to pixels of one variant."""

    def whole(latents: NDArray[np.float32]) -> Pixels:
        pixels: Pixels = session.run({"latents": latents})["pixels"]
        return pixels

    most = {"tiled": 64, "small tiles": 32}.get(way)
    if most is None:
        return whole
    return lambda latents: decode_in_tiles(_decode_feeds(whole), {"latents": latents}, most=most, factor=8)


def _decode_feeds(decode: Decode) -> Callable[[Mapping[str, NDArray[np.float32]]], Pixels]:
    """Return a function of the feeds that hold the latents."""
    return lambda feeds: decode(feeds["latents"])


class AnonymousMemory:
    """The peak of this process's anonymous memory over its present level."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._most = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def peak_mib(self) -> int:
        """Return the peak so far in MiB."""
        return (self._most - self._before) >> 20

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, self._now())
            time.sleep(0.005)

    def _now(self) -> int:
        return anonymous_bytes(self._process)


def measure_tiles(prompts: int) -> dict[str, Any]:
    """Compare tiles with the whole decode on images of the sample model, at twice its side."""
    pipeline = Pipeline.load(bundle_path(), progress=False)
    manifest = pipeline.bundle.manifest
    most, side = manifest.defaults.height // manifest.latent_spaces["unet"].downscale, 2 * manifest.defaults.height
    call: dict[str, Any] = {"seed": 7, "num_inference_steps": _SAMPLE_STEPS, "height": side, "width": side}
    texts = [prompt.text for prompt in held_out_prompts(prompts, PROMPT_SEED)]
    latents = [pipeline(text, **call, safety="off", output_type="latent").images for text in texts]
    decode = decode_with(place_components(pipeline.bundle, "cpu")["vae_decoder"].open(None), "whole")
    whole = np.concatenate([decode(one) for one in latents])
    factor = manifest.latent_spaces["unet"].downscale
    tiled = [decode_in_tiles(_decode_feeds(decode), {"latents": one}, most=most, factor=factor) for one in latents]
    found = compare(np.concatenate(tiled), whole)
    return {"prompts": prompts, "side": side, "steps": _SAMPLE_STEPS, "tiled": found}


def compare(pixels: Pixels, whole: Pixels) -> dict[str, Any]:
    """Return the PSNR in decibels and the largest difference in levels."""
    off = np.abs(pixels.astype(np.int64) - whole)
    return {"psnr": psnr_db(pixels, whole, digits=1), "largest": int(off.max())}


def as_table(report: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="")
    for heading in (
        "side",
        "backend",
        "way",
        "first s",
        "again s",
        "processor s",
        "peak MiB",
        "PSNR dB",
        "largest of 255",
    ):
        table.add_column(heading, justify="left" if heading in ("backend", "way") else "right")
    for side, backends in report["full_size"].items():
        for backend, ways in backends.items():
            for way, found in ways.items():
                first, *again = found["seconds"]
                values = [found["peak_anonymous_mib"], found["psnr"], found["largest"]]
                shown = ["" if value is None else str(value) for value in values]
                worked = f"{min(found['processor_seconds']):.1f}"
                table.add_row(side, backend, way, f"{first:.1f}", f"{min(again):.1f}" if again else "", worked, *shown)
    if sample := report.get("sample"):
        tiled = sample["tiled"]
        table.add_row(
            str(sample["side"]), "", "sample, tiled", "", "", "", "", str(tiled["psnr"]), str(tiled["largest"])
        )
    return table


if __name__ == "__main__":
    main()
