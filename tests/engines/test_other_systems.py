"""The engine builder where Linux's modules, functions and folders are missing (`tests.pretend_windows`)."""

from __future__ import annotations

from pathlib import Path

from tests.pretend_windows import run_script

IMPORT_ALL = """
import importlib, pkgutil
import latentrt_engines
names = [module.name for module in pkgutil.walk_packages(latentrt_engines.__path__, "latentrt_engines.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    assert int(run_script(IMPORT_ALL, tmp_path / "home", others=("filelock",))) > 15
