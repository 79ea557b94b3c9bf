"""Graphs on ONNX Runtime: the graph that is opened, and refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt import Bundle, Pipeline
from latentrt.backends.onnxruntime import LOWEST_VERSION, available_providers, open_session, require
from latentrt.backends.session import run
from latentrt.bundle.digests import file_record
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BackendError, BundleError, FeedError, GraphError, MissingExtraError
from tests.runtime import small_bundle


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sample bundle, to be changed."""
    return Path(shutil.copytree(bundle_path(), tmp_path / "bundle"))


def test_a_half_bundle_computes_in_float32_on_a_cpu(bundle: Bundle) -> None:
    assert bundle.manifest.precision == "float16"
    opened: list[str] = []
    read = bundle.read_graph
    bundle.read_graph = lambda name: opened.append(name) or read(name)  # type: ignore[method-assign, func-returns-value]
    session = open_session(bundle, "text_encoder", threads=1)
    assert opened == ["text_encoder/model.float32.onnx"]
    outputs = run(session, input_ids=np.zeros((2, 77), np.int64), clip_skip=np.zeros(2, np.int64))
    assert outputs["hidden_states"].dtype == np.float32
    assert outputs["hidden_states"].shape == (2, 77, 128)


def test_a_session_has_the_signature_of_its_component_or_part(bundle: Bundle) -> None:
    record = bundle.manifest.components["unet"]
    session = open_session(bundle, "unet", threads=1)
    assert (session.inputs, session.outputs) == (record.inputs, record.outputs)
    part = open_session(bundle, "unet", part="time_embedding", threads=1)
    assert (part.inputs, part.outputs) == (
        record.parts["time_embedding"].inputs,
        record.parts["time_embedding"].outputs,
    )
    assert session.batch_sizes({}) is None
    assert session.device_context({}) is None


def test_feeds_are_checked_before_the_graph_runs(bundle: Bundle) -> None:
    session = open_session(bundle, "vae_decoder", threads=1)
    with pytest.raises(FeedError, match=r"latents.*float64.*float32"):
        run(session, latents=np.zeros((1, 4, 8, 8)))


def test_an_exception_of_the_library_becomes_a_backend_error(bundle: Bundle) -> None:
    session = open_session(bundle, "text_encoder", threads=1)
    ids = np.full((1, 77), 10**9, np.int64)  # a token that the vocabulary does not have
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        run(session, input_ids=ids, clip_skip=np.zeros(1, np.int64))


def test_a_closed_session_is_not_run(bundle: Bundle) -> None:
    session = open_session(bundle, "vae_decoder", threads=1)
    session.close()
    with pytest.raises(BackendError):
        session.run({"latents": np.zeros((1, 4, 8, 8), np.float32)})


def test_a_missing_backend_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"latentrt\[cpu\]"):
        open_session(bundle, "unet")


def test_the_lowest_version_is_the_floor_of_the_package() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for extra, package in (("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        assert f"{package}>={LOWEST_VERSION}" in extras["optional-dependencies"][extra]


@pytest.mark.parametrize("version", ["1.22.1", "1.24.0", "1.24", "0.9"])
def test_an_older_version_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(BackendError, match=rf"{version} is installed, expected {LOWEST_VERSION} or later"):
        open_session(bundle, "unet")
    assert available_providers() == []


def test_a_later_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (LOWEST_VERSION, "1.100.0", "2.0.0+cu13", "1.32.0.dev20261101"):
        monkeypatch.setattr("onnxruntime.__version__", version)
        require()


@pytest.mark.slow
def test_the_lowest_version_generates_an_image(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    python, root = tmp_path / "bin" / "python", Path(__file__).parents[3]
    wanted = (f"onnxruntime=={LOWEST_VERSION}", "numpy", "pillow", "click", "msgspec", "rich")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    code = (
        "import onnxruntime, latentrt\n"
        f"assert onnxruntime.__version__ == {LOWEST_VERSION!r}\n"
        "image = latentrt.Pipeline.load(device='cpu')('a red circle', seed=7, num_inference_steps=2).images[0]\n"
        "image.save('image.png')"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "runtime")}
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path, env=environment)
    expected = np.asarray(Pipeline.load(device="cpu")("a red circle", seed=7, num_inference_steps=2).images[0])
    found = np.asarray(Image.open(tmp_path / "image.png"))
    # Other kernels sum in another order.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def pin(bundle: Path, path: Path) -> None:
    """Write a file's true hash into the manifest, as whoever exports a bundle can."""
    name, record = path.relative_to(bundle).as_posix(), file_record(path)
    small_bundle.edit_manifest(bundle, lambda tree: tree["files"][name].update(sha256=record.sha256, size=record.size))


def link(path: Path) -> None:
    """Put a link in a file's place, as in a hub cache."""
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")


def test_linked_weights_are_the_same_weights(bundle: Bundle, copy: Path) -> None:
    link(copy / "vae_decoder" / "model.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    plain, linked = (open_session(each, "vae_decoder", threads=1) for each in (bundle, Bundle.open(copy)))
    np.testing.assert_array_equal(run(plain, latents=latents)["pixels"], run(linked, latents=latents)["pixels"])


def point_elsewhere(graph: Path, location: bytes) -> None:
    """Let the first weight of a graph lie in another file."""
    own = b"model.safetensors"
    assert len(location) == len(own)
    data = graph.read_bytes()
    assert own in data
    graph.write_bytes(data.replace(own, location, 1))


@pytest.mark.parametrize("linked", [False, True])
def test_a_graph_cannot_read_files_of_its_own_choice(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if linked:
        link(copy / "vae_decoder" / "model.safetensors")
    graph = copy / "vae_decoder" / "model.float32.onnx"
    point_elsewhere(graph, b"../secret.weights")
    for folder in (copy, tmp_path):
        (folder / "secret.weights").write_bytes(bytes(4 << 20))
    pin(copy, graph)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(GraphError, match=r"secret\.weights"):
        open_session(Bundle.open(copy), "vae_decoder")


def test_a_component_that_is_not_there(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="controlnet"):
        open_session(bundle, "controlnet")


def test_without_names_of_descriptors_the_weights_are_mapped(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    expected = run(open_session(bundle, "vae_decoder", threads=1), latents=latents)["pixels"]
    monkeypatch.setattr("latentrt.backends.onnxruntime._DESCRIPTORS", "proc/self/nowhere")
    np.testing.assert_array_equal(
        run(open_session(bundle, "vae_decoder", threads=1), latents=latents)["pixels"], expected
    )
