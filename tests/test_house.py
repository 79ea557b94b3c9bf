"""The rules of the house that a program can hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentrt

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "latentrt": ROOT / "runtime",
    "latentrt_export": ROOT / "export",
    "latentrt_engines": ROOT / "engines",
    "sample": ROOT,
}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "scipy"}
ALLOWED = {
    "latentrt": {"latentrt", "numpy", "tokenizers", "PIL", "click", "msgspec", "rich", "onnxruntime", "openvino"}
    | {"cuda", "matplotlib"},
    "latentrt_export": {"latentrt", "latentrt_export", "numpy", "click", "msgspec", "rich", "onnxruntime"}
    | HEAVY - {"scipy"},
    "latentrt_engines": {"latentrt", "latentrt_engines", "numpy", "click", "msgspec", "rich", "filelock"},
    "sample": {"latentrt", "latentrt_export", "sample", "numpy", "tokenizers", "PIL", "click", "rich"}
    | {"torch", "diffusers", "transformers", "safetensors"},
}


def imports_of(package: str) -> Iterator[tuple[Path, str]]:
    for path in (PACKAGES[package] / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way_and_bring_no_surprises(package: str) -> None:
    strays = {
        (path.name, name)
        for path, name in imports_of(package)
        if name not in ALLOWED[package] | sys.stdlib_module_names
    }
    assert strays == set()


def modules() -> list[str]:
    return [
        module.name
        for package, root in PACKAGES.items()
        for module in pkgutil.walk_packages([str(root / package)], f"{package}.")
    ]


@pytest.mark.parametrize("name", modules())
def test_what_is_listed_as_public_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ or name.count(".") == 1
    for key in getattr(module, "__all__", ()):
        value = getattr(module, key)
        if isinstance(value, type) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{key} has no docstring"


def test_every_name_of_the_package_can_be_had() -> None:
    assert sorted(latentrt.__all__) == sorted([*latentrt._HOMES, "__version__"])
    assert all(getattr(latentrt, name) is not None for name in latentrt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        latentrt.Pipelin  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["demo"], ["compare"], ["inspect"], ["verify"], ["export"], ["build"], ["plan"], ["engines"]],
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom latentrt.cli.main import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "print('loaded', sorted({'numpy', 'onnxruntime', 'PIL', 'tokenizers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: latentrt" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_no_file_is_named_for_nothing() -> None:
    names = {path.stem for package, root in PACKAGES.items() for path in (root / package).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc", "base"}
