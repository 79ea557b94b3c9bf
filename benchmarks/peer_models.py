"""The forms of the checkpoint that the programs read.

Each is made by the program's own converter, once, and kept under the work folder. A link to an existing folder works
too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_environments import QUIET, UnavailableError, last_line

__all__ = ["MODELS", "Model", "convert", "file_bytes", "plain_checkpoint", "warm"]

ROOT = Path(__file__).parent.parent
_GGML = "import sys, stable_diffusion_cpp as s; s.StableDiffusion().convert(sys.argv[1], '', sys.argv[2], sys.argv[3])"
_OPTIMUM = ("-P", "-m", "optimum.commands.optimum_cli")
_FROM = ("--model", "{source}", "--task", "text-to-image")
_SINGLE = "import sys, pathlib, tests.ldm as l; l.write_single_file(*map(pathlib.Path, sys.argv[1:3]), 'sd1')"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A form of the checkpoint.

    Attributes:
        source: the form that it is converted from.
        environment: the converter's environment; None for this one.
        command: the arguments of that environment's Python; `{source}` and `{target}` are paths.
    """

    source: str = "checkpoint"
    environment: str | None = None
    command: tuple[str, ...] = ()


def _openvino(weights: str) -> Model:
    command = (*_OPTIMUM, "export", "openvino", *_FROM, "--weight-format", weights, "{target}")
    return Model(environment="optimum-intel", command=command)


def _ggml(weights: str) -> Model:
    command = ("-P", "-c", _GGML, "{source}", "{target}", weights)
    return Model(source="single-file", environment="stable-diffusion.cpp", command=command)


def _ours(precision: str) -> Model:
    return Model(command=("-m", "latentrt", "export", "{source}", "{target}", "--precision", precision))


MODELS = {
    "checkpoint": Model(),
    "onnx": Model(environment="optimum-onnx", command=(*_OPTIMUM, "export", "onnx", *_FROM, "{target}")),
    "openvino-fp32": _openvino("fp32"),
    "openvino-fp16": _openvino("fp16"),
    "openvino-int8": _openvino("int8"),
    "single-file": Model(command=("-c", _SINGLE, "{source}", "{target}")),
    "ggml-f16": _ggml("f16"),
    "ggml-q8_0": _ggml("q8_0"),
    "latentrt-float32": _ours("float32"),
    "latentrt-float16": _ours("float16"),
    "latentrt-int8": _ours("int8"),
}
_SUFFIXES = {"single-file": ".safetensors", "ggml-f16": ".gguf", "ggml-q8_0": ".gguf"}


def convert(name: str, folder: Path, checkpoint: Path, python_of: Callable[[str], Path]) -> Path:
    """Convert the checkpoint to a form if that does not exist; return its path.

    Args:
        folder: the folder of all forms.
        checkpoint: the original, a diffusers folder.
        python_of: creates an environment and returns its Python.

    Raises:
        UnavailableError: the converter failed, or its environment could not be made.
    """
    target = folder / f"{name}{_SUFFIXES.get(name, '')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.unlink(missing_ok=True)
    print(f"converting {name}", file=sys.stderr, flush=True)
    if name == "checkpoint":
        plain_checkpoint(checkpoint, partial)
    else:
        _run_converter(name, convert(MODELS[name].source, folder, checkpoint, python_of), partial, python_of)
    partial.rename(target)
    return target


def _run_converter(name: str, source: Path, target: Path, python_of: Callable[[str], Path]) -> None:
    model = MODELS[name]
    python = Path(sys.executable) if model.environment is None else python_of(model.environment)
    filled = [part.format(source=source, target=target) for part in model.command]
    variables = {**os.environ, **QUIET}
    done = subprocess.run([python, *filled], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode or not target.exists():
        raise UnavailableError(f"{name} could not be converted: {last_line(done.stderr)}")


def plain_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write the checkpoint in the published layout of Stable Diffusion 1.5, without the safety checker.

    Not every program has a safety checker. The text encoder's weights get the prefix `text_model.`, which transformers
    5 omits when it writes them, and which older versions and stable-diffusion.cpp need.
    """
    from safetensors.numpy import load_file, save_file

    (target / "text_encoder").mkdir(parents=True)
    for name in ("unet", "vae", "tokenizer", "scheduler"):
        (target / name).symlink_to((checkpoint / name).resolve())
    shutil.copy(checkpoint / "text_encoder/config.json", target / "text_encoder")
    weights = load_file(checkpoint / "text_encoder/model.safetensors")
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}
    save_file(named, target / "text_encoder/model.safetensors", metadata={"format": "pt"})
    index = json.loads((checkpoint / "model_index.json").read_text())
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (target / "model_index.json").write_text(json.dumps(index, indent=2))


def _files(model: Path) -> list[Path]:
    """Return the files of a model, following links."""
    if model.is_file():
        return [model]
    return [Path(folder) / name for folder, _, names in os.walk(model, followlinks=True) for name in names]


def file_bytes(model: Path) -> int:
    """Return the size of a model's files."""
    return sum(path.stat().st_size for path in _files(model))


def warm(model: Path) -> None:
    """Read a model's files into the page cache, so that every process starts in the same state."""
    for path in _files(model):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
