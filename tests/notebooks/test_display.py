"""IPython shows results, completes public names, and sees progress in a notebook."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell

from latentrt import Pipeline
from latentrt.progress_bar import ProgressBar, is_watched

QUICK: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler", "seed": 3}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load("sample", device="cpu", threads=1)


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    made = InteractiveShell.instance()
    yield made
    made.history_manager.end_session()
    InteractiveShell.clear_instance()


def formats(value: object) -> dict[str, Any]:
    """Return what a notebook is given of a value, by type."""
    found, _ = DisplayFormatter().format(value)
    return dict(found)


@pytest.mark.parametrize("images", [1, 3])
def test_a_notebook_shows_the_images(pipeline: Pipeline, images: int) -> None:
    found = formats(pipeline("a <b>red</b> circle", num_images_per_prompt=images, **QUICK))
    assert {*found} == {"text/plain", "text/html", "image/png"}
    assert found["text/html"].count("<img") == images
    assert "a &lt;b&gt;red" in found["text/html"]
    png = found["image/png"]
    assert (png if isinstance(png, bytes) else base64.b64decode(png)).startswith(b"\x89PNG")


def test_a_notebook_shows_arrays_and_pipelines_in_a_line(pipeline: Pipeline) -> None:
    for value in (pipeline("a star", output_type="np", **QUICK), pipeline, pipeline.bundle):
        found = formats(value)
        assert {*found} == {"text/plain"}
        assert "\n" not in found["text/plain"]


def test_ipython_completes_names_and_options(shell: InteractiveShell, pipeline: Pipeline) -> None:
    shell.user_ns["pipeline"] = pipeline
    shell.run_cell("import latentrt")

    def complete(text: str) -> set[str]:
        with provisionalcompleter():
            return {each.text.lstrip(".").rstrip("=") for each in shell.Completer.completions(text, len(text))}

    assert {"Pipeline", "Request", "Result"} <= complete("latentrt.")
    assert {"resolve", "close", "runs_on"} <= complete("pipeline.")
    assert "from_pretrained" not in complete("pipeline.")
    assert "num_inference_steps" in complete("pipeline('a star', num_inf")


def test_a_notebook_sees_progress(shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_watched(), "a shell whose stderr is no terminal"
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    assert is_watched()
    with ProgressBar(2, enabled=True) as bar:
        bar.advance(SimpleNamespace(index=1, total=2))  # type: ignore[arg-type]
        assert "tqdm" in sys.modules
