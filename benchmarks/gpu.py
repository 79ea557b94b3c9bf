"""Measures a full-size Stable Diffusion 1.5 on a GPU: engines, ONNX Runtime and diffusers, in one run.

    python -m benchmarks.full_size_checkpoint scratch/full/checkpoint
    latentrt export scratch/full/checkpoint scratch/full/float16 --precision float16
    latentrt build scratch/full/float16 --size 512x512
    python -m benchmarks.gpu scratch/full/checkpoint scratch/full/float16 --output benchmarks/results/gpu.json

Each route runs in a process of its own, in turn, for `--rounds` rounds, so that other load affects all of them; the
report has medians of the rounds' medians, and each route's share of the roofline: the rate of large half products and
the bandwidth of copies on this GPU in the same run. The UNet at batch 2 and 64 × 64 latents takes 1.607 TFLOP, the
decoder of 512 × 512 pixels 2.51 TFLOP.

`--route` runs one torch route in this process and prints its measurements.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.engines.gpu import NoGpu, describe_driver, find_gpu

UNET_TFLOP, DECODER_TFLOP = 1.607, 2.51
PROMPT = "a photograph of an astronaut riding a horse"
TORCH_ROUTES = ("diffusers eager", "diffusers compiled")
LATENTRT_ROUTES = {"latentrt engines": "tensorrt", "latentrt ONNX Runtime": "cuda"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, help="the JSON report")
    parser.add_argument("--size", type=int, default=512, help="side of an image in pixels; by default 512")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5, help="images after the first, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    routes = (*LATENTRT_ROUTES, *TORCH_ROUTES)
    parser.add_argument(
        "--routes", nargs="+", choices=routes, default=list(routes), help="routes to compare; by default all"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="time limit of one process, in seconds")
    parser.add_argument("--device", default="cuda", help="torch's device; `cpu` only tests the script")
    parser.add_argument("--route", choices=[*TORCH_ROUTES, "roofline"], help="run this route in this process")
    arguments = parser.parse_args()
    if arguments.route is not None:
        print(json.dumps(_here(arguments)))
        return
    report = compare(arguments)
    print(json.dumps(report, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every route, round by round."""
    roofline = _process(arguments, "roofline")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.routes}
    failures: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for name in rounds:
            try:
                rounds[name].append(_process(arguments, name) if name in TORCH_ROUTES else _latentrt(arguments, name))
            except subprocess.CalledProcessError as error:
                failures[name] = error.stderr[-500:]
            except subprocess.TimeoutExpired as error:
                failures[name] = f"took more than {error.timeout:.0f} s"
    return {
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "gpu": _describe_gpu(),
        "roofline": roofline,
        "routes": {name: _summary(found, roofline) for name, found in rounds.items() if found},
        "failures": failures,
    }


def _describe_gpu() -> str:
    """Return the GPU and its driver, without which a measurement cannot be repeated."""
    gpu = find_gpu()
    return f"none: {gpu.reason}" if isinstance(gpu, NoGpu) else f"{gpu}, {describe_driver(gpu)}"


def _summary(rounds: list[dict[str, Any]], roofline: dict[str, Any]) -> dict[str, Any]:
    medians: dict[str, Any] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    if roofline["device"] == "cpu":
        return medians
    peak = roofline["matmul_tflops"]
    medians["unet_share_of_matmul"] = round(UNET_TFLOP / (medians["unet_ms"] / 1e3) / peak, 3)
    medians["decoder_share_of_matmul"] = round(DECODER_TFLOP / (medians["decoder_ms"] / 1e3) / peak, 3)
    return medians


def _process(arguments: argparse.Namespace, route: str) -> dict[str, Any]:
    options = [str(arguments.checkpoint), str(arguments.bundle), "--route", route, "--device", arguments.device]
    for name in ("size", "steps", "runs"):
        options += [f"--{name}", str(getattr(arguments, name))]
    return _output([sys.executable, "-m", "benchmarks.gpu", *options], arguments.timeout)


def _latentrt(arguments: argparse.Namespace, route: str) -> dict[str, Any]:
    """Run `latentrt bench` on one device."""
    device = "cpu" if arguments.device == "cpu" else LATENTRT_ROUTES[route]
    options = ["--device", device, "--size", str(arguments.size), "--steps", str(arguments.steps)]
    options += ["--runs", str(arguments.runs), "--json"]
    command = [sys.executable, "-m", "latentrt", "bench", str(arguments.bundle), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=arguments.timeout)
    measured = json.loads(done.stdout)["measured"][device]
    return {
        "picture_ms": measured["image"]["p50_ms"],
        "unet_ms": measured["components"]["unet"]["p50_ms"],
        "decoder_ms": measured["components"]["vae_decoder"]["p50_ms"],
        "first_picture_ms": measured["load_ms"] + measured["first_ms"],
        "peak_gib": round(measured["peak_bytes"] / 2**30, 2),
    }


def _output(command: list[str], timeout_s: float) -> dict[str, Any]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _here(arguments: argparse.Namespace) -> dict[str, Any]:
    return _roofline(arguments.device) if arguments.route == "roofline" else _diffusers(arguments)


def _roofline(device: str) -> dict[str, Any]:
    """Measure the device's roofline: half products of 8192³, copies of a GiB."""
    import torch

    side = 512 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    source = torch.empty(2**20 if device == "cpu" else 2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _median_ms(lambda: torch.matmul(a, b), device)
    copy = _median_ms(lambda: target.copy_(source), device)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "matmul_tflops": round(2 * side**3 / (product / 1e3) / 1e12, 4),
        "copy_gbytes_per_s": round(2 * source.numel() / (copy / 1e3) / 1e9, 1),
    }


def _diffusers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure diffusers in half, eager or compiled; the classifier runs in every route."""
    import torch

    from latentrt.telemetry import opt_out

    opt_out()
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    began, device = time.perf_counter(), arguments.device
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.checkpoint, torch_dtype=dtype).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.route == "diffusers compiled":
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True)

    def generate() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        side, steps = arguments.size, arguments.steps
        pipeline(PROMPT, height=side, width=side, num_inference_steps=steps, generator=generator, output_type="np")

    generate()
    first_ms = (time.perf_counter() - began) * 1e3
    generate()  # CUDA graphs of compiled modules are recorded in the second run
    images = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        generate()
        images.append((time.perf_counter() - start) * 1e3)
    # In another run, as waiting for the device at each call slows images down.
    taken: dict[str, list[float]] = {"unet_ms": [], "decoder_ms": []}
    _time_calls(pipeline.unet, "forward", taken["unet_ms"], device)
    _time_calls(pipeline.vae, "decode", taken["decoder_ms"], device)
    generate()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    components = {name: statistics.median(durations) for name, durations in taken.items()}
    return {
        "picture_ms": statistics.median(images),
        **components,
        "first_picture_ms": first_ms,
        "peak_gib": round(peak, 2),
    }


def _time_calls(owner: Any, method: str, durations_ms: list[float], device: str) -> None:
    """Wrap a method to record its time, waiting for the device before and after."""
    call = getattr(owner, method)

    def timed(*given: Any, **named: Any) -> Any:
        _wait(device)
        began = time.perf_counter()
        result = call(*given, **named)
        _wait(device)
        durations_ms.append((time.perf_counter() - began) * 1e3)
        return result

    setattr(owner, method, timed)


def _median_ms(work: Callable[[], object], device: str, runs: int = 20) -> float:
    durations: list[float] = []
    for _ in range(runs + 3):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        durations.append((time.perf_counter() - began) * 1e3)
    return statistics.median(durations[3:])


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
