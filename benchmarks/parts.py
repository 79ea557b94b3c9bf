"""Measures the split denoiser on a CPU: the work that is not in the loop, and the time of each part.

    .venv/bin/python -m benchmarks.parts scratch/full/float16/unet --graph float32 --times

Prints each part's share of the whole graph's operations (products, at 512 × 512 by default) and of its weights; with
`--times`, the median seconds of the whole graph and of each part on ONNX Runtime and on OpenVINO, in alternation, and
in parentheses the CPU time, which is more reliable on a shared machine. Needs the extra `openvino`, which also infers
the shapes inside the graphs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.command import FOLDER, PATH, REPORT, benchmark, command_line, write_report
from benchmarks.full_size import machine
from latentrt.backends.onnxruntime import require
from latentrt.telemetry import hide_openvino_telemetry

with hide_openvino_telemetry():
    import openvino

ORDER = [
    "time_embedding",
    "cross_attention_kv",
    "model",
    "body",
    "shallow_body",
]
TOKENS = 77
Feeds = Mapping[str, NDArray[np.float32]]
Run = Callable[[Feeds], dict[str, NDArray[np.float32]]]


def graph_files(folder: Path, precision: str) -> dict[str, Path]:
    """Return the files of the whole graph and of those of its parts that exist."""
    suffix = f".{precision}.onnx" if (folder / f"model.{precision}.onnx").exists() else ".onnx"
    files = {name: folder / f"{name}{suffix}" for name in ORDER}
    return {name: file for name, file in files.items() if file.exists()}


def shares(graphs: Mapping[str, Path], batch: int, side: int) -> dict[str, dict[str, int]]:
    """Return each graph's floating-point operations in products, and the bytes of its weights."""
    return {
        name: {"operations": operations(read(file, batch, side)), "weight_bytes": weight_bytes(file)}
        for name, file in graphs.items()
    }


def table(found: Mapping[str, Mapping[str, int]]) -> str:
    """Return the shares as lines: absolute, and relative to the whole graph."""
    whole = found["model"]
    lines = [f"{'':<20}{'operations':>22}{'weights':>22}"]
    for name, each in found.items():
        operation, weight = (each[key] / whole[key] for key in ("operations", "weight_bytes"))
        work, size = each["operations"] / 1e9, each["weight_bytes"] / 1e6
        lines.append(f"{name:<20}{work:>11.2f} G {operation:>8.2%}{size:>11.1f} MB{weight:>8.2%}")
    return "\n".join(lines)


def read(file: Path, batch: int, side: int) -> Any:
    """Read a graph and fix every size."""
    model = openvino.Core().read_model(file)
    latents = {"height": side, "width": side, "deep_height": side, "deep_width": side}
    sizes = {"evaluations": batch, "timesteps": batch, "tokens": TOKENS, **latents}
    described = onnx.load(file, load_external_data=False).graph.input
    model.reshape(
        {
            value.name: [axis.dim_value or sizes[axis.dim_param] for axis in value.type.tensor_type.shape.dim]
            for value in described
        }
    )
    return model


def operations(model: Any) -> int:
    """Count two operations for each multiply-add of a product or a convolution."""
    count = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "MatMul":
            transposed = node.get_attributes()["transpose_a"]
            count += 2 * math.prod(node.output(0).shape) * node.input_value(0).shape[-2 if transposed else -1]
        elif kind == "Convolution":
            count += 2 * math.prod(node.output(0).shape) * math.prod([*node.input_value(1).shape][1:])
    return count


def weight_bytes(file: Path) -> int:
    """Return the bytes of the stored weights that a graph refers to."""
    return sum(
        int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    )


def on_onnxruntime(file: Path, arguments: SimpleNamespace) -> Run:
    onnxruntime = require()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = arguments.threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    return lambda feeds: dict(zip(outputs, session.run(outputs, {name: feeds[name] for name in inputs}), strict=True))


def on_openvino(precision: str) -> Callable[[Path, SimpleNamespace], Run]:
    def open_graph(file: Path, arguments: SimpleNamespace) -> Run:
        hints = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": arguments.threads,
        }
        compiled = openvino.Core().compile_model(read(file, arguments.batch, arguments.side), "CPU", hints)
        request = compiled.create_infer_request()
        inputs = [value.any_name for value in compiled.inputs]
        outputs = [value.any_name for value in compiled.outputs]

        def run(feeds: Feeds) -> dict[str, NDArray[np.float32]]:
            request.infer({name: feeds[name] for name in inputs}, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in outputs}

        return run

    return open_graph


BACKENDS = {"onnxruntime": on_onnxruntime, "openvino-f32": on_openvino("f32"), "openvino-bf16": on_openvino("bf16")}


def measure(
    graphs: Mapping[str, Path], open_graph: Callable[[Path, SimpleNamespace], Run], arguments: SimpleNamespace
) -> dict[str, tuple[float, float]]:
    """Return the median wall and CPU seconds of each graph, over rounds through all graphs.

    One graph is open at a time, to save memory.
    """
    values = inputs_of(graphs["model"], arguments)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in graphs}
    for _ in range(arguments.rounds):
        for name, seconds in taken.items():
            run = open_graph(graphs[name], arguments)
            values.update(run(values))
            seconds += [timed(run, values) for _ in range(arguments.repeats)]
            del run
    return {name: (median(wall for wall, _ in each), median(cpu for _, cpu in each)) for name, each in taken.items()}


def inputs_of(file: Path, arguments: SimpleNamespace) -> dict[str, NDArray[np.float32]]:
    """Return inputs of normal noise, float32; the time of a graph does not depend on the values."""
    rng = np.random.default_rng(0)
    model = read(file, arguments.batch, arguments.side)
    return {value.any_name: rng.standard_normal([*value.shape]).astype(np.float32) for value in model.inputs}


def timed(run: Run, values: Feeds) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run(values)
    return time.perf_counter() - wall, time.process_time() - cpu


@benchmark("benchmarks.parts", __doc__)
@click.argument("folder", type=FOLDER)
@click.option("--graph", default="float32", help="precision of the graphs")
@click.option("--side", type=int, default=64, help="side of the latents")
@click.option("--batch", type=int, default=2)
@click.option("--times", is_flag=True, help="also measure times")
@click.option("--threads", type=int, default=2)
@click.option("--rounds", type=int, default=3, help="number of times each graph is opened")
@click.option("--repeats", type=int, default=3, help="number of runs each time")
@click.option("--on", multiple=True, type=click.Choice([*BACKENDS]), default=[*BACKENDS], help="may be repeated")
@click.option("--output", type=PATH, help=REPORT)
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    graphs = graph_files(arguments.folder, arguments.graph)
    report: dict[str, Any] = {
        "command": command_line("benchmarks.parts"),
        "machine": machine(),
        "shares": shares(graphs, arguments.batch, arguments.side),
    }
    print(table(report["shares"]), flush=True)
    for name in arguments.on if arguments.times else ():
        seconds = measure(graphs, BACKENDS[name], arguments)
        report.setdefault("seconds", {})[name] = seconds
        print(name + "".join(f", {part} {wall:.3f} s ({cpu:.3f})" for part, (wall, cpu) in seconds.items()), flush=True)
    if arguments.output:
        write_report(arguments.output, report)


if __name__ == "__main__":
    main()
