"""Fresh installations with the extra `cpu` alone: their packages and size, and commands that name a missing extra.

One is with the constraints and one with the newest release of every dependency. That the first generates images is
tested by `make test-runtime`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BANNED = {"torch", "diffusers", "transformers", "tokenizers", "huggingface-hub", "onnx", "onnxscript", "safetensors"}
MAX_INSTALLED_BYTES = 200_000_000  # without byte code and without pip itself


def installed(folder: Path, *wanted: str) -> Path:
    """The interpreter of a fresh environment in `folder` with `wanted`."""
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    return interpreter


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment with the constraints."""
    return installed(tmp_path_factory.mktemp("fresh"), "-c", str(ROOT / "constraints.txt"), f"{ROOT}[cpu]")


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment with the newest releases."""
    return installed(tmp_path_factory.mktemp("newest"), "--upgrade", f"{ROOT}[cpu]")


def run(python: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["python", "newest"])
def either(request: pytest.FixtureRequest) -> Path:
    """The interpreter of each of the two environments."""
    interpreter: Path = request.getfixturevalue(request.param)
    return interpreter


def test_nothing_heavy_is_installed(either: Path) -> None:
    packages = {
        re.sub(r"[-_.]+", "-", package["name"]).lower()
        for package in json.loads(run(either, "-m", "pip", "list", "--format", "json"))
    }
    assert not packages & BANNED
    assert {"latentrt", "numpy", "onnxruntime", "pillow", "click", "msgspec", "rich"} <= packages


def installed_bytes(python: Path) -> int:
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    files = [path for path in packages.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    own = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    return sum(path.stat().st_size for path in files if path.relative_to(packages).parts[0].split("-")[0] not in own)


def test_the_runtime_is_light(either: Path) -> None:
    assert installed_bytes(either) <= MAX_INSTALLED_BYTES


def test_the_newest_releases_generate_an_image(newest: Path, tmp_path: Path) -> None:
    bundle, image_file = str(ROOT / "runtime/latentrt/sample_bundle"), str(tmp_path / "image.png")
    command = [str(newest.with_name("latentrt")), "run", bundle, "a red circle", "--steps", "4", "-o", image_file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(image_file) as image:
        assert image.size == (64, 64)
        assert len(image.getcolors(64 * 64) or ()) > 16, "not one plain surface"


def test_export_names_the_extra_that_it_needs(python: Path, tmp_path: Path) -> None:
    command = [
        str(part) for part in (python.with_name("latentrt"), "export", ROOT / "sample/checkpoint", tmp_path / "bundle")
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "pip install 'latentrt[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fleet_is_planned_without_a_library_and_a_build_names_its_extra(python: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LATENTRT_CACHE": str(tmp_path / "cache")}
    bundle = str(ROOT / "runtime/latentrt/sample_bundle")

    def latentrt(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name("latentrt")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    planned = latentrt("plan", bundle, "--gpus", "rtx4090,h100", "--component", "unet")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "1 on their own machines, 1 cannot be built here" in planned.stdout
    assert latentrt("engines", "list").returncode == latentrt("engines", "prune").returncode == 0
    assert latentrt("doctor", bundle).returncode == 0
    build = latentrt("build", bundle, "--gpu", "rtx4090")
    assert build.returncode == 7
    assert "pip install 'latentrt[rtx]'" in build.stderr


def test_the_versions_agree(python: Path) -> None:
    assert run(python, "-c", "import latentrt; print(latentrt.__version__)").strip() in run(
        python, "-m", "pip", "show", "latentrt"
    )
    assert sys.version_info >= (3, 11)
