"""The notebooks run from their first cell to their last, and are stored without outputs.

One exports `sample/checkpoint`, for a minute and a half of one CPU: no other test of `make test` exports it. (One of
`make test-slow` does in int8, and `make demo` in float16, beside this one.) As other bundles of the tests,
LATENTRT_TEST_BUNDLES keeps it from run to run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.blocks import ROOT

EXPORTED = "exported-sample"  # the bundle that a notebook writes beside itself
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_it_is_stored_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # bars, which are text on stderr without ipywidgets
    notebook = nbformat.read(path, as_version=4)
    # In a folder of that place in an otherwise empty clone, so that what it writes is removed.
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    os.symlink(ROOT / "sample", tmp_path / "sample")
    kept = Path(os.environ.get("LATENTRT_TEST_BUNDLES", tmp_path)) / EXPORTED
    if kept.exists():
        shutil.copytree(kept, folder / EXPORTED)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output["text"] for output in shown if output.get("name") == "stderr"]
    if (folder / EXPORTED).exists() and not kept.exists():
        shutil.copytree(folder / EXPORTED, kept)
