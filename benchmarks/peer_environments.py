"""The environment of each program: its packages, installed size and import time.

Each program has its own virtual environment, because the programs' requirements exclude each other. It is created once
and reused until its definition here (or, for ours, the source) changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.startup import installed_bytes, median

__all__ = [
    "ENVIRONMENTS",
    "QUIET",
    "Environment",
    "UnavailableError",
    "describe_environment",
    "last_line",
    "make_environment",
]

ROOT = Path(__file__).parent.parent
_TORCH = "torch==2.13.0"  # other versions can install gigabytes of CUDA
# Variables of every process that runs in an environment: no network access, no telemetry.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_CONSTRAINED = ("-c", str(ROOT / "constraints.txt"))


class UnavailableError(Exception):
    """An environment or a model is not available; the message has the reason."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The definition of an environment.

    Attributes:
        installs: the arguments of each call of `pip install`, in order.
        imports: the imports of a program that generates with it.
        variables: the environment variables of the installation.
        ours: whether it contains latentrt's source.
    """

    installs: tuple[tuple[str, ...], ...]
    imports: str
    variables: dict[str, str] = field(default_factory=dict)
    ours: bool = False


ENVIRONMENTS = {
    "torch": Environment(
        installs=((*_CONSTRAINED, _TORCH, "diffusers", "transformers", "accelerate"),),
        imports="import torch; from diffusers import StableDiffusionPipeline, EulerDiscreteScheduler",
    ),
    # transformers below 4.58 needs huggingface-hub below 1, and diffusers 0.39 is the last that allows it.
    "optimum-onnx": Environment(
        installs=((_TORCH, "optimum-onnx[onnxruntime]==0.1.0", "diffusers==0.39.0", "accelerate==1.15.0"),),
        imports="from optimum.onnxruntime import ORTStableDiffusionPipeline",
    ),
    # It requires torchvision, but works without.
    "optimum-intel": Environment(
        installs=(
            (
                *(_TORCH, "optimum==2.3.0", "transformers>=4.51,<5.6", "huggingface-hub<1.22", "nncf>=3.3"),
                *("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "requests>=2.33,<3", "setuptools"),
                *("diffusers==0.39.0", "accelerate==1.15.0"),
            ),
            ("--no-deps", "optimum-intel==2.2.0"),
        ),
        imports="from optimum.intel import OVStableDiffusionPipeline",
    ),
    "openvino-genai": Environment(
        installs=(("openvino-genai==2026.4.1.0", "numpy==2.4.6"),),
        imports="import openvino, openvino_genai",
    ),
    # Compiled for this machine, with llamafile's products, which are off by default and faster. With its cache, pip
    # would reuse a wheel compiled with other options.
    "stable-diffusion.cpp": Environment(
        installs=(("--no-cache-dir", "stable-diffusion-cpp-python==0.4.7"),),
        imports="from stable_diffusion_cpp import StableDiffusion",
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON"},
    ),
    "latentrt-cpu": Environment(
        installs=((*_CONSTRAINED, f"{ROOT}[cpu]"),),
        imports="import latentrt.pipeline, latentrt.backends.onnxruntime, onnxruntime",
        ours=True,
    ),
    "latentrt-openvino": Environment(
        installs=((*_CONSTRAINED, f"{ROOT}[openvino]"),),
        imports="import latentrt.pipeline, openvino",
        ours=True,
    ),
}


def make_environment(name: str, folder: Path) -> Path:
    """Create an environment if it does not exist; return the path of its Python.

    Args:
        folder: the folder of all environments.

    Raises:
        UnavailableError: pip failed, with the last line of its output.
    """
    environment, place = ENVIRONMENTS[name], folder / name
    ready, python, identity = place / ".ready", place / "bin/python", _identity(environment)
    if ready.exists() and ready.read_text() == identity:
        return python
    print(f"installing {name}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    for arguments in environment.installs:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(
            command, env={**os.environ, **environment.variables}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnavailableError(f"the environment {name} could not be installed: {last_line(done.stderr)}")
    # OpenVINO reports to its maker through this package, and works without it.
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "openvino-telemetry"], check=False)
    ready.write_text(identity)
    return python


def _identity(environment: Environment) -> str:
    """Return everything that an environment depends on, as JSON."""
    parts: list[Any] = [sys.version, environment.installs, environment.variables]
    if environment.ours:
        digest = hashlib.sha256()
        for path in sorted([ROOT / "pyproject.toml", *(ROOT / "runtime").rglob("*.py")]):
            digest.update(path.read_bytes())
        parts.append(digest.hexdigest())
    return json.dumps(parts)


def last_line(output: str, count: int = 300) -> str:
    """Return the last line of a program's output, without the paths of this machine."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output")[:count].replace(str(ROOT), ".")


def describe_environment(name: str, python: Path) -> dict[str, Any]:
    """Return an environment's size without byte code and pip, its packages, and the median time of its imports."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--disable-pip-version-check", "--format", "json"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = {each["name"]: each["version"] for each in json.loads(listed.stdout)}
    return {
        "installed_mb_without_byte_code": round(installed_bytes(python.parent.parent) / 1e6, 1),
        "import_s": median([python, "-P", "-c", ENVIRONMENTS[name].imports]),
        "packages": {each: version for each, version in packages.items() if each not in ("pip", "setuptools")},
    }
