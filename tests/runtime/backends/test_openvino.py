"""Graphs on OpenVINO, compared with ONNX Runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Bundle
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.session import Arrays, run
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BackendError, GraphError, IntegrityError, MissingExtraError
from tests.runtime import tiny_graph
from tests.runtime.backends.test_onnxruntime import pin, point_elsewhere
from tests.runtime.onnx_writer import DTYPES, constant, encode, graph, model, node

pytestmark = [pytest.mark.openvino, pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(bundle_path())


def feeds(component: str, batch: int = 2, side: int = 16) -> Arrays:
    """Inputs of one component of the sample bundle."""
    rng = np.random.default_rng(batch)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    made: dict[str, Arrays] = {
        "text_encoder": {
            "input_ids": rng.integers(0, 100, (batch, 77)),
            "clip_skip": np.arange(batch, dtype=np.int64) % 2,
        },
        "unet": {
            "sample": normal(batch, 4, side, side + 8),
            "timestep": np.linspace(1, 981, batch, dtype=np.float32),
            "encoder_hidden_states": normal(batch, 77, 128),
        },
        "vae_encoder": {"pixels": np.clip(normal(batch, 3, 8 * side, 8 * side), -1, 1)},
        "vae_decoder": {"latents": normal(batch, 4, side, side)},
        "safety_checker": {"pixels": rng.integers(0, 256, (batch, 8 * side, 8 * side + 16, 3), dtype=np.uint8)},
    }
    return made[component]


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_encoder", "vae_decoder", "safety_checker"])
def test_every_component_computes_the_same_as_on_onnxruntime(bundle: Bundle, component: str) -> None:
    given = feeds(component)
    expected = run(ort.open_session(bundle, component, threads=1), **given)
    found = run(ov.open_session(bundle, component, threads=1), **given)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].dtype == reference.dtype
        if reference.dtype == np.uint8:
            # A level where a value lies on the edge between two.
            assert np.abs(found[name].astype(int) - reference.astype(int)).max() <= 1
        else:
            # Sums in another order: 2e-6 of the largest value was seen. Scores are rounded to three places, and one may
            # fall to the other side.
            bound = 1.1e-3 if name.endswith("scores") else 2e-5 * max(np.abs(reference).max(), 1)
            np.testing.assert_allclose(found[name], reference, rtol=0, atol=bound)


def test_bfloat16_has_eight_bits_or_is_refused(bundle: Bundle) -> None:
    if not ov.computes_in_bfloat16():
        with pytest.raises(BackendError, match="bfloat16"):
            ov.open_session(bundle, "unet", threads=1, arithmetic="bfloat16")
        return
    given = feeds("unet")
    exact = run(ov.open_session(bundle, "unet", threads=1), **given)["noise_pred"]
    found = run(ov.open_session(bundle, "unet", threads=1, arithmetic="bfloat16"), **given)["noise_pred"]
    error = np.abs(found - exact).max() / np.abs(exact).max()
    # 2⁻⁹ for each rounding, over a hundred layers: 1.5e-2 was seen; below 1e-4 nothing would have been rounded.
    assert 1e-4 < error < 5e-2


def test_bfloat16_is_refused_where_the_cpu_has_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "computes_in_bfloat16", lambda: False)
    with pytest.raises(BackendError, match="bfloat16"):
        ov.open_session(bundle, "unet", arithmetic="bfloat16")


def test_a_missing_backend_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    ov._library.cache_clear()
    with pytest.raises(MissingExtraError, match=r"latentrt\[openvino\]"):
        ov.open_session(bundle, "unet")
    ov._library.cache_clear()


def test_shapes_come_and_go(bundle: Bundle) -> None:
    """More than are kept, the first again at the end."""
    session = ov.open_session(bundle, "vae_decoder", threads=1)
    sides = [8, 9, 10, 11, 12, 8]
    images = [run(session, **feeds("vae_decoder", batch=1, side=side))["pixels"] for side in sides]
    factor = bundle.manifest.latent_spaces["unet"].downscale
    assert [image.shape for image in images] == [(1, factor * side, factor * side, 3) for side in sides]
    np.testing.assert_array_equal(images[0], images[-1])
    assert [shapes[0][2] for shapes in session._compiled] == [10, 11, 12, 8], "the last that were used"
    short = ov.open_session(bundle, "vae_decoder", threads=1, low_memory=True)
    for side in sides[:3]:
        run(short, **feeds("vae_decoder", batch=1, side=side))
    assert len(short._compiled) == 1


def test_preparing_compiles_for_the_shapes_of_the_next_run(bundle: Bundle) -> None:
    session = ov.open_session(bundle, "vae_decoder", threads=1)
    session.prepare({"latents": (1, 4, 8, 8)})
    (prepared,) = session._compiled.values()
    run(session, **feeds("vae_decoder", batch=1, side=8))
    assert [*session._compiled.values()] == [prepared]
    with pytest.raises(BackendError, match="OpenVINO failed"):
        session.prepare({"latents": (1, 3, 8, 8)})
    session.close()
    assert session._compiled == {}


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_threads_may_share_a_session(bundle: Bundle, hint: ov.PerformanceHint) -> None:
    session = ov.open_session(bundle, "unet", performance_hint=hint, threads=2)
    given = [feeds("unet") | {"timestep": np.full(2, t, np.float32)} for t in (1, 200, 500, 900)]
    alone = [run(session, **each)["noise_pred"] for each in given]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: run(session, **each)["noise_pred"], given * 3))
    for reference, found in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(found, reference)


def test_a_graph_that_is_none_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    graph = folder / "unet" / "model.float32.onnx"
    graph.write_bytes(b"no graph at all")
    pin(folder, graph)
    session = ov.open_session(Bundle.open(folder), "unet")
    with pytest.raises(GraphError):
        run(session, **feeds("unet"))


def test_damage_is_found_before_anything_is_parsed(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    weights = folder / "unet" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"unet/model\.safetensors"):
        ov.open_session(Bundle.open(folder), "unet")


def test_a_graph_cannot_reach_out_of_its_folder(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    graph = folder / "vae_decoder" / "model.float32.onnx"
    point_elsewhere(graph, b"../../secret.file")
    (tmp_path / "secret.file").write_bytes(bytes(4 << 20))
    pin(folder, graph)
    with pytest.raises(GraphError, match=r"secret\.file"):
        run(ov.open_session(Bundle.open(folder), "vae_decoder"), **feeds("vae_decoder"))


def linked(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle as a hub cache holds it."""
    for path in bundle.folder.rglob("*"):
        if path.is_file():
            place = folder / "snapshots" / "0123abcd" / path.relative_to(bundle.folder)
            blob = folder / "blobs" / f"{len(list(folder.rglob('*')))}"
            for each in (place, blob):
                each.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            place.symlink_to(blob)
    return Bundle.open(folder / "snapshots" / "0123abcd")


def test_links_of_a_hub_cache_are_the_same_files(bundle: Bundle, tmp_path: Path) -> None:
    given = feeds("vae_decoder")
    plain, hub = (
        run(ov.open_session(each, "vae_decoder", threads=1), **given)["pixels"]
        for each in (bundle, linked(bundle, tmp_path / "models--owner--name"))
    )
    np.testing.assert_array_equal(hub, plain)


def test_a_graph_is_compiled_at_no_sizes_that_it_does_not_fit(tmp_path: Path) -> None:
    """OpenVINO reads at any index without a check: the process's memory would be in the image."""
    tiny_graph.write_bundle(tmp_path)
    nodes = [
        node("Shape", ["input_ids"], ["count"], start=0, end=1),
        node("Gather", ["table", "count"], ["row"]),
        node("Gather", ["wide", "input_ids"], ["embedding"]),
        node("Add", ["embedding", "row"], ["hidden_states"]),
    ]
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    constants = [
        constant("table", DTYPES["float32"], [3, 4], table.tobytes()),
        constant("wide", DTYPES["float32"], [49408, 4], bytes(16 * 49408)),
    ]
    data = encode(model(graph(nodes, constants, tiny_graph.INPUTS, tiny_graph.OUTPUTS)))
    (tmp_path / tiny_graph.GRAPH).write_bytes(data)
    pin(tmp_path, tmp_path / tiny_graph.GRAPH)
    session = ov.open_session(Bundle.open(tmp_path), tiny_graph.COMPONENT, threads=1)
    (found,) = run(session, input_ids=np.zeros((2, 77), np.int64)).values()
    assert np.array_equal(found[0, 0], table[2])
    with pytest.raises(GraphError, match="index 3 is out of bounds"):
        run(session, input_ids=np.zeros((3, 77), np.int64))


def test_a_signal_waits_until_the_library_is_imported(tmp_path: Path) -> None:
    """Half an import leaves types registered, so that the next fails in the library's words, with another exit code."""
    (tmp_path / "openvino").mkdir()
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nprint('imported')\n"
    (tmp_path / "openvino" / "__init__.py").write_text(source)
    code = (
        "from latentrt.backends import openvino\nfrom latentrt.bundle.interrupts import ending_on_signals\n"
        "with ending_on_signals():\n    openvino._library()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "imported\n")
