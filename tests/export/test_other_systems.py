"""The exporter where Linux's modules, functions and folders are missing (`tests.pretend_windows`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exported import Exported
from tests.pretend_windows import run_script

OTHERS = ("latentrt_export", "filelock", "transformers.models.clip", "safetensors.torch")

IMPORT_ALL = """
import importlib, pkgutil
import latentrt_export
names = [module.name for module in pkgutil.walk_packages(latentrt_export.__path__, "latentrt_export.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    assert int(run_script(IMPORT_ALL, tmp_path / "home", others=OTHERS).splitlines()[-1]) > 50


EXPORT = """
import shutil
from pathlib import Path
from latentrt import Bundle
from latentrt_export.export import export_checkpoint
from tests.exported import Silent, exporting_in_process

shutil.copytree(BUNDLE, "bundle")
before = Bundle.open("bundle").digest
with exporting_in_process():
    export_checkpoint(CHECKPOINT, Path("bundle"), parts=False, overwrite=True, progress=Silent())
bundle = Bundle.open("bundle")
bundle.verify()
assert bundle.digest != before
print(sorted(path.name for path in Path(".").iterdir()))
"""


@pytest.mark.slow
def test_an_export_replaces_a_bundle(sd1: Exported, tmp_path: Path) -> None:
    """No file is removed or renamed while it is open or mapped."""
    script = EXPORT.replace("CHECKPOINT", f"Path({str(sd1.checkpoint)!r})").replace("BUNDLE", repr(str(sd1.bundle)))
    output = run_script(script, tmp_path / "home", others=OTHERS)
    assert output.splitlines()[-1] == "['AppData', 'bundle', 'script.py']"
