"""The cache of compiled graphs: entries are found again while nothing they depend on has changed, and removed."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentrt import Bundle
from latentrt.backends import openvino as ov
from latentrt.backends.compiled_cache import CompiledCache
from latentrt.backends.session import run
from tests.runtime.backends.test_openvino import feeds

pytestmark = [pytest.mark.openvino, pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


class _Compiling:
    """OpenVINO's core; records its calls that compile or import."""

    def __init__(self, core: Any) -> None:
        self.core, self.done = core, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name in ("compile_model", "import_model"):
            self.done.append(name)
        return getattr(self.core, name)


def test_a_compiled_graph_is_not_compiled_again(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, core = ov._library()
    counting = _Compiling(core)
    monkeypatch.setattr(ov, "_library", lambda: (library, counting))
    given = feeds("vae_decoder")
    first, second = (run(ov.open_session(bundle, "vae_decoder", threads=1), **given)["pixels"] for _ in range(2))
    assert counting.done == ["compile_model", "import_model"]
    np.testing.assert_array_equal(first, second)
    # Everything that a compiled graph depends on is part of its key.
    run(ov.open_session(bundle, "vae_decoder", threads=2), **given)
    run(ov.open_session(bundle, "vae_decoder", threads=1), **feeds("vae_decoder", batch=1))
    assert counting.done[2:] == ["compile_model", "compile_model"]
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_is_compiled_anew(bundle: Bundle, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = feeds("vae_decoder")
    first = run(ov.open_session(bundle, "vae_decoder", threads=1), **given)["pixels"]
    (kept,) = cache.iterdir()
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    second = run(ov.open_session(bundle, "vae_decoder", threads=1), **given)["pixels"]
    assert "does not have the contents it was written with" in caplog.text
    np.testing.assert_array_equal(first, second)
    assert kept.read_bytes() != bytes(data)


def test_a_cached_file_that_the_library_rejects_is_compiled_anew(bundle: Bundle, cache: Path) -> None:
    given = feeds("vae_decoder")
    first = run(ov.open_session(bundle, "vae_decoder", threads=1), **given)["pixels"]
    shapes = {name: array.shape for name, array in given.items()}
    session = ov.open_session(bundle, "vae_decoder", threads=1)
    assert isinstance(session._cache, CompiledCache)
    session._cache.write(shapes, b"of another world")
    np.testing.assert_array_equal(run(session, **given)["pixels"], first)
    assert session._cache.read(shapes) != b"of another world"


def test_the_number_of_cached_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.backends.compiled_cache._MAX_FILES", 3)
    kept = CompiledCache(tmp_path, ["a graph"])
    for side in range(5):
        kept.write({"latents": [side]}, b"compiled")
    assert len(list(tmp_path.iterdir())) == 3
    assert kept.read({"latents": [4]}) == b"compiled"


def test_the_bytes_of_cached_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.backends.compiled_cache._MAX_BYTES", 300)
    kept = CompiledCache(tmp_path, ["a graph"])
    for side in range(4):
        kept.write({"latents": [side]}, b"c" * 100)
        os.utime(kept._path({"latents": [side]}), (side, side))
    assert [bool(kept.read({"latents": [side]})) for side in range(4)] == [False, False, True, True]
    kept.write({"latents": [9]}, b"c" * 1000)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [1032], "the one that was just made is kept"


def test_the_least_recently_used_file_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.backends.compiled_cache._MAX_FILES", 2)
    kept = CompiledCache(tmp_path, ["a graph"])
    for side in range(2):
        kept.write({"latents": [side]}, b"compiled")
        os.utime(kept._path({"latents": [side]}), (1 + side, 1 + side))
    assert kept.read({"latents": [0]}), "which uses it"
    kept.write({"latents": [2]}, b"compiled")
    assert [bool(kept.read({"latents": [side]})) for side in range(3)] == [True, False, True]


def test_reading_a_file_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    """A stream that is asked for 4 GiB allocates 4 GiB first."""
    kept = CompiledCache(tmp_path, ["a graph"])
    kept.write({"latents": [1]}, b"compiled")
    tracemalloc.start()
    try:
        assert kept.read({"latents": [1]}) == b"compiled"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_drafts_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / ".0123.draft", tmp_path / ".4567.draft"
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (1, 1))
    CompiledCache(tmp_path, ["a graph"]).write({"latents": [0]}, b"compiled")
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"


def test_a_file_under_another_name_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = CompiledCache(tmp_path, ["a graph"])
    kept.write({"latents": [1]}, b"compiled")
    kept._path({"latents": [2]}).write_bytes(kept._path({"latents": [1]}).read_bytes())
    assert kept.read({"latents": [2]}) == b""
    assert "does not have the contents it was written with" in caplog.text
    assert kept.read({"latents": [1]}) == b"compiled"


def test_a_link_is_neither_read_nor_written_through(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    kept, outside = CompiledCache(tmp_path / "cache", ["a graph"]), tmp_path / "outside"
    kept.write({"latents": [1]}, b"compiled")
    place = kept._path({"latents": [1]})
    place.rename(outside)
    place.symlink_to(outside)
    before = outside.read_bytes()
    assert kept.read({"latents": [1]}) == b""
    kept.write({"latents": [1]}, b"compiled anew")
    assert kept.read({"latents": [1]}) == b"compiled anew"
    assert outside.read_bytes() == before


class _Other:
    """OpenVINO's core on another CPU."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def get_property(self, device: str, name: str) -> Any:
        return "another CPU" if name == "FULL_DEVICE_NAME" else self.core.get_property(device, name)


def test_everything_that_a_compiled_graph_depends_on_is_in_its_key(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities: list[tuple[str, ...]] = []
    monkeypatch.setattr(CompiledCache, "open", lambda identity: identities.append(tuple(identity)))

    def key(**options: Any) -> tuple[str, ...]:
        ov.open_session(bundle, "vae_decoder", **{"threads": 1, **options})
        return identities[-1]

    usual = key()
    assert key() == usual
    library, core = ov._library()
    for options in ({"threads": 2}, {"performance_hint": "throughput"}, {"precision": "float16"}):
        assert key(**options) != usual
    with monkeypatch.context() as change:
        change.setattr(library, "__version__", "2030.1")
        assert key() != usual
    with monkeypatch.context() as change:
        change.setattr(ov, "_library", lambda: (library, _Other(core)))
        assert key() != usual
    with monkeypatch.context() as change:
        change.setattr(ov, "_MARKING", "nothing")
        assert key() != usual
    for file in ("vae_decoder/model.safetensors", "vae_decoder/model.float32.onnx"):
        files = bundle.manifest.files
        changed = {**files, file: msgspec.structs.replace(files[file], sha256="0" * 64)}
        with monkeypatch.context() as change:  # as of another model with the same layers
            change.setattr(bundle, "manifest", msgspec.structs.replace(bundle.manifest, files=changed))
            assert key() != usual
    assert key() == usual


def test_options_reach_the_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[Any] = []
    mark = ov._mark_decompression
    monkeypatch.setattr(ov, "_mark_decompression", lambda model: marked.append(mark(model)))
    monkeypatch.setattr(CompiledCache, "open", lambda identity: None)
    session = ov.open_session(bundle, "vae_decoder", threads=2, performance_hint="throughput")
    run(session, **feeds("vae_decoder"))
    (compiled,) = session._compiled.values()
    found = {
        name: compiled.model.get_property(name)
        for name in (
            "INFERENCE_NUM_THREADS",
            "PERFORMANCE_HINT",
            "INFERENCE_PRECISION_HINT",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        )
    }
    assert found["INFERENCE_NUM_THREADS"] == 2
    assert str(found["PERFORMANCE_HINT"]).endswith("THROUGHPUT")
    assert found["INFERENCE_PRECISION_HINT"].get_type_name() == "f32"
    assert found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0
    assert len(marked) == 1, "the graph was marked before it was compiled"


def test_large_models_are_not_kept(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "_MAX_CACHED_WEIGHTS", 1000)
    run(ov.open_session(bundle, "vae_decoder", threads=1), **feeds("vae_decoder"))
    assert not cache.exists()


def test_a_user_without_a_cache_compiles(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "cache").chmod(0o755)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    assert run(ov.open_session(bundle, "vae_decoder"), **feeds("vae_decoder"))["pixels"].any()
    assert not list((tmp_path / "cache").iterdir())
