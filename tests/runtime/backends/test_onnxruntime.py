"""Graphs on ONNX Runtime: which graph is taken, what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from latentrt import Bundle
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import run
from latentrt.bundle.digests import file_record
from latentrt.bundle.weights import map_weights
from latentrt.errors import BackendError, BundleError, FeedError, MissingExtraError
from tests.exported import Exported
from tests.runtime import small_bundle


def test_a_half_bundle_computes_in_float32_on_a_cpu(sd2: Exported) -> None:
    bundle = Bundle.open(sd2.bundle)
    opened: list[str] = []
    read = bundle.read
    bundle.read = lambda name: opened.append(name) or read(name)  # type: ignore[method-assign, func-returns-value]
    session = open_session(bundle, "text_encoder", threads=1)
    assert opened == ["text_encoder/model.float32.onnx"]
    outputs = run(session, input_ids=np.zeros((2, 77), np.int64), clip_skip=np.zeros(2, np.int64))
    assert outputs["hidden_states"].dtype == np.float32
    assert outputs["hidden_states"].shape == (2, 77, 32)


def test_feeds_are_checked_before_the_graph_runs(sd1: Exported) -> None:
    session = open_session(Bundle.open(sd1.bundle), "vae_decoder", threads=1)
    with pytest.raises(FeedError, match="found float64, expected float32"):
        run(session, latents=np.zeros((1, 4, 8, 8)))


def test_what_the_backend_refuses_is_an_error_of_ours(sd1: Exported) -> None:
    session = open_session(Bundle.open(sd1.bundle), "text_encoder", threads=1)
    ids = np.full((1, 77), 10**9, np.int64)  # a token that the vocabulary does not have
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        run(session, input_ids=ids, clip_skip=np.zeros(1, np.int64))


def test_a_missing_backend_names_its_extra(sd1: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[cpu\]'"):
        open_session(Bundle.open(sd1.bundle), "unet")


def pin(bundle: Path, path: Path) -> None:
    """Write a file's true hash into the manifest, as whoever makes a bundle can."""
    name, record = path.relative_to(bundle).as_posix(), file_record(path)
    small_bundle.edit_manifest(bundle, lambda tree: tree["files"][name].update(sha256=record.sha256, size=record.size))


def link(path: Path) -> None:
    """Put a link in a file's place, as in a hub cache."""
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")


def test_linked_weights_are_the_same_weights(sd1: Exported, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sd1.bundle, tmp_path / "bundle"))
    link(bundle / "vae_decoder" / "model.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    plain, linked = (open_session(Bundle.open(path), "vae_decoder", threads=1) for path in (sd1.bundle, bundle))
    np.testing.assert_array_equal(run(plain, latents=latents)["pixels"], run(linked, latents=latents)["pixels"])


def test_weights_that_are_missing_are_not_looked_for_elsewhere(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph names its weights by file, and ONNX Runtime would take one of that name from where the process is.

    Only where the weights are links: elsewhere it is their own folder that it looks in.
    """
    bundle = Path(shutil.copytree(sd1.bundle, tmp_path / "bundle"))
    weights = bundle / "unet" / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "model.safetensors")
    kept = {name: array.copy() for name, array in map_weights(weights).items() if name != "conv_in.bias"}
    save_file(kept, weights)
    pin(bundle, weights)
    link(weights)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="refuses the graph"):
        open_session(Bundle.open(bundle), "unet")


def test_a_graph_cannot_reach_for_files_of_its_own(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(sd1.bundle, tmp_path / "bundle"))
    graph = bundle / "vae_decoder" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    weight = next(weight for weight in model.graph.initializer if weight.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = "../secret.bin"
    graph.write_bytes(model.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    pin(bundle, graph)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BackendError, match="refuses the graph"):
        open_session(Bundle.open(bundle), "vae_decoder")


def test_a_component_that_is_not_there(sd1: Exported) -> None:
    with pytest.raises(BundleError, match="no float32 graph of controlnet"):
        open_session(Bundle.open(sd1.bundle), "controlnet")
