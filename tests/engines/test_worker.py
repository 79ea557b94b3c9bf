"""The builder's process, in this one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BuildError, GraphError
from latentrt_engines.worker import BuildJob, _Builder
from tests.engines.made_up import identity
from tests.runtime.backends.test_onnxruntime import pin


def read_graph(folder: Path) -> None:
    """Read the denoiser's graph as the builder does before it hands it to a parser."""
    bundle = Bundle.open(folder)
    job = BuildJob(
        bundle=str(folder),
        digest=bundle.digest,
        identity=identity(bundle, "unet"),
        workspace_bytes=None,
        timing_cache=None,
        draft=str(folder / "draft"),
    )
    with bundle.weights("unet") as weights:
        _Builder(job, lambda fraction, text: None)._read_graph(bundle, weights.arrays())


@pytest.mark.parametrize(
    ("own", "changed", "expected"),
    [
        (b"conv_in.weight", b"conv_in.weighs", BuildError),  # no array of that name
        (b"model.safetensors", b"other.safetensors", GraphError),
    ],
)
def test_a_parser_never_opens_a_file_of_the_current_folder(
    tmp_path: Path, own: bytes, changed: bytes, expected: type[Exception]
) -> None:
    """The libraries' parsers open the file that a weight names there, unless they are given an array for it."""
    folder = Path(shutil.copytree(bundle_path(), tmp_path / "bundle"))
    read_graph(folder)
    graph = folder / Bundle.open(folder).manifest.components["unet"].graphs["float16"].file
    graph.write_bytes(graph.read_bytes().replace(own, changed))
    pin(folder, graph)
    with pytest.raises(expected, match=changed.decode()):
        read_graph(folder)
