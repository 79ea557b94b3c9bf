"""The batch job: an image for each line, lines that fail, and a second run that generates only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import batch
from latentrt import Pipeline


def test_a_second_run_makes_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"prompt": "a red circle", "num_inference_steps": 2}),
        "",
        "no json",
        json.dumps({"prompt": "a", "num_steps": 2}),
        json.dumps({"prompt": "a blue star", "num_inference_steps": 2, "seed": 5}),
    ]
    requests, folder = tmp_path / "requests.jsonl", tmp_path / "images"
    requests.write_text("\n".join(lines))
    pipeline = Pipeline.load()
    assert batch.run(pipeline, requests, folder) == 2
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000003.png"]
    out, errors = capsys.readouterr()
    assert [line.rsplit(": ", 1)[1] for line in out.splitlines()] == ["seed 0", "seed 5"]
    assert "line 1: Expecting value" in errors
    assert "num_inference_steps" in errors
    first = (folder / "000000.png").read_bytes()
    (folder / "000000.png").unlink()
    batch.run(pipeline, requests, folder)
    assert (folder / "000000.png").read_bytes() == first
    assert "000003" not in capsys.readouterr().out
