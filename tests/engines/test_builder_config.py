from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.bundle.weights import map_weights
from latentrt.errors import BuildError
from latentrt_engines import builder_config
from latentrt_engines.builder_config import PhaseTree, make_monitor, use_timing_cache
from latentrt_engines.library import load_library
from latentrt_engines.network import make_log, parse_network

# Progress


class Reports(list[tuple[float, str]]):
    """The reports of a tree."""

    def __call__(self, fraction: float, name: str) -> None:
        self.append((fraction, name))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Record the reports of a tree that does not wait between them."""
    monkeypatch.setattr(builder_config, "_SECONDS_BETWEEN_REPORTS", 0.0)
    return Reports()


def test_a_phase_is_a_fraction_of_one_step_of_its_parent(reports: Reports) -> None:
    tree = PhaseTree(reports)
    tree.start("build", None, 2)
    tree.start("graph", "build", 4)
    for step in range(4):
        tree.step("graph", step)
    tree.finish("graph")
    tree.step("build", 0)
    tree.start("kernels", "build", 1)
    tree.step("kernels", 0)
    tree.finish("kernels")
    tree.step("build", 1)
    assert reports == [
        (0.0, "build"),
        (0.0, "graph"),
        (0.125, "graph"),
        (0.25, "graph"),
        (0.375, "graph"),
        (0.5, "graph"),
        (0.5, "build"),
        (0.5, "kernels"),
        (1.0, "kernels"),
        (1.0, "build"),
    ]


def test_three_nested_phases(reports: Reports) -> None:
    tree = PhaseTree(reports)
    tree.start("a", None, 2)
    tree.step("a", 0)
    tree.start("b", "a", 2)
    tree.step("b", 0)
    tree.start("c", "b", 2)
    tree.step("c", 0)
    # Half of a, half of b's half, half of c's quarter.
    assert reports[-1] == (0.5 + 0.25 + 0.125, "c")


def test_more_steps_than_announced(reports: Reports) -> None:
    tree = PhaseTree(reports)
    tree.start("a", None, 0)
    for step in range(3):
        tree.step("a", step)
    assert [fraction for fraction, _ in reports] == [0.0, 1.0, 1.0, 1.0]


def test_unknown_phases_and_parents(reports: Reports) -> None:
    tree = PhaseTree(reports)
    tree.step("unknown", 0)
    tree.finish("unknown")
    assert reports == []
    tree.start("orphan", "gone", 2)
    tree.step("orphan", 0)
    assert reports[-1] == (0.5, "orphan")


_NAMES = st.sampled_from("abcde")
_CALLS = st.one_of(
    st.tuples(st.just("start"), _NAMES, st.integers(0, 5)),
    st.tuples(st.just("step"), _NAMES, st.integers(0, 9)),
    st.tuples(st.just("finish"), _NAMES, st.just(0)),
)


@given(st.lists(_CALLS))
def test_the_fraction_never_decreases_and_is_between_0_and_1(calls: list[tuple[str, str, int]]) -> None:
    """For any calls that the library can make: a name is used once at a time, and parents start before children."""
    reports = Reports()
    tree = PhaseTree(reports)
    running: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_config, "_SECONDS_BETWEEN_REPORTS", 0.0)
        for call, name, number in calls:
            if call == "start" and name not in running:
                tree.start(name, running[-1] if running else None, number)
                running.append(name)
            elif call == "step":
                tree.step(name, number)
            elif call == "finish" and running[-1:] == [name]:
                tree.finish(name)
                running.pop()
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)


def test_reports_come_one_at_a_time_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_config, "_SECONDS_BETWEEN_REPORTS", 0.0)
    inside, together = [0], []
    reports = Reports()

    def report(fraction: float, name: str) -> None:
        inside[0] += 1
        time.sleep(1e-4)
        together.append(inside[0])
        reports(fraction, name)
        inside[0] -= 1

    tree = PhaseTree(report)
    tree.start("build", None, 8)

    def work(number: int) -> None:
        tree.start(f"phase {number}", "build", 10)
        for step in range(10):
            tree.step(f"phase {number}", step)
        tree.finish(f"phase {number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert set(together) == {1}
    fractions = [fraction for fraction, _ in reports]
    assert len(fractions) == 1 + 8 * 11
    assert fractions == sorted(fractions)


def test_reports_are_rare() -> None:
    """A build has thousands of steps, and each report is a line through a pipe."""
    reports = Reports()
    tree = PhaseTree(reports)
    began = time.monotonic()
    tree.start("build", None, 100_000)
    for step in range(100_000):
        tree.step("build", step)
    most = 1 + (time.monotonic() - began) / builder_config._SECONDS_BETWEEN_REPORTS
    assert 1 <= len(reports) <= most + 1


def test_a_real_build_reports_its_phases(sample: Bundle, reports: Reports) -> None:
    library = load_library("tensorrt_rtx")
    trt: Any = library.module
    graph, weights = sample.component_files("vae_decoder", "float16")
    arrays = map_weights(sample.path(weights))
    _, logger = make_log(library)
    builder = trt.Builder(logger)
    network, parser = parse_network(
        library, logger, builder, "vae_decoder", sample.read(graph, MAX_GRAPH_BYTES), arrays
    )
    config, profile, shape = builder.create_builder_config(), builder.create_optimization_profile(), (1, 4, 16, 16)
    config.num_compute_capabilities = 2
    for index, capability in enumerate(("8.9", "12.0")):
        config.set_compute_capability(library.capabilities()[capability], index)
    profile.set_shape("latents", shape, shape, shape)
    config.add_optimization_profile(profile)
    config.progress_monitor = make_monitor(library, PhaseTree(reports))
    assert builder.build_serialized_network(network, config) is not None
    del parser
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert len({name for _, name in reports}) > 1
    assert fractions[-1] > 0.5, "it ends near the end"


# Timing cache: TensorRT times kernels only on a GPU, so the library is faked


HEADER = builder_config._TIMINGS_HEADER


class FakeCache:
    """Timings, as `kernel=ms` separated by spaces; `other` marks timings of another GPU."""

    def __init__(self, data: bytes) -> None:
        self.times = set(data.split())

    def combine(self, other: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if b"other" in other.times:
            return False
        self.times |= other.times
        return True

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.times))


class FakeConfig:
    cache: FakeCache

    def create_timing_cache(self, data: bytes) -> FakeCache:
        return FakeCache(data)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        if b"other" in cache.times:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> FakeCache:
        return self.cache


def measure(path: Path, *measured: bytes, meanwhile: bytes = b"") -> list[str]:
    """Measure some kernels, while another build may write the file; return the warnings."""
    config, warnings = FakeConfig(), list[str]()
    save = use_timing_cache(config, path, warnings.append)
    config.cache.times.update(measured)
    if meanwhile:
        path.write_bytes(HEADER + meanwhile)
    save()
    return warnings


def test_timings_are_read_and_extended(tmp_path: Path) -> None:
    path = tmp_path / "times"
    assert measure(path, b"gemm=1") == []
    assert measure(path, b"conv=2") == []
    assert path.read_bytes() == HEADER + b"conv=2 gemm=1"


def test_timings_that_another_build_wrote_meanwhile_are_kept(tmp_path: Path) -> None:
    measure(tmp_path / "times", b"gemm=1", meanwhile=b"conv=2")
    assert (tmp_path / "times").read_bytes() == HEADER + b"conv=2 gemm=1"


def test_timings_of_another_gpu_are_replaced_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_bytes(HEADER + b"other gemm=9")
    (warning,) = measure(path, b"gemm=1")
    assert str(path) in warning
    assert path.read_bytes() == HEADER + b"gemm=1"


def test_timings_that_the_library_cannot_read_are_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "times"
    path.write_bytes(HEADER + b"damaged")
    create = FakeConfig.create_timing_cache
    monkeypatch.setattr(
        FakeConfig, "create_timing_cache", lambda self, data: None if data == b"damaged" else create(self, data)
    )
    (warning,) = measure(path, b"gemm=1")
    assert str(path) in warning
    assert path.read_bytes() == HEADER + b"gemm=1"


@pytest.mark.parametrize("content", [b"my notes", b"my notes, and others", b"\0" * 100, HEADER[:-1], b" " + HEADER])
def test_a_file_that_is_no_timing_cache_is_kept(tmp_path: Path, content: bytes) -> None:
    """Also where the library would accept its content."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=r"notes\.txt is not a timing cache"):
        use_timing_cache(FakeConfig(), path, lambda text: None)
    assert path.read_bytes() == content
    warnings = list[str]()
    save = use_timing_cache(FakeConfig(), tmp_path / "times", warnings.append)
    path.rename(tmp_path / "times")  # somebody's, while the engine was built
    save()
    assert ["times is not a timing cache" in each for each in warnings] == [True]
    assert (tmp_path / "times").read_bytes() == content


def test_an_empty_file_becomes_a_timing_cache(tmp_path: Path) -> None:
    (tmp_path / "times").touch()
    assert measure(tmp_path / "times", b"gemm=1") == []
    assert measure(tmp_path / "times", b"conv=2") == []
    assert (tmp_path / "times").read_bytes() == HEADER + b"conv=2 gemm=1"


def test_a_file_too_large_to_be_a_timing_cache_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_bytes(HEADER)
    os.truncate(path, 1 << 40)
    with pytest.raises(BuildError, match=r"more than 268,435,456 bytes of timings"):
        use_timing_cache(FakeConfig(), path, lambda text: None)


def test_an_unusable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read: Is a directory"):
        use_timing_cache(FakeConfig(), tmp_path, lambda text: None)
    with pytest.raises(BuildError, match="nowhere is not a folder"):
        measure(tmp_path / "nowhere" / "times")


def test_timings_that_cannot_be_saved_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is built by then, and is kept."""
    path = tmp_path / "times"
    monkeypatch.setattr(builder_config, "_MAX_TIMINGS_BYTES", 10)
    assert measure(path, b"gemm=1") == []
    (warning,) = measure(path, b"conv=2")
    assert "were not saved" in warning
    assert "13 bytes, expected at most 10" in warning
    assert path.read_bytes() == HEADER + b"gemm=1"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builder_config, "write_atomically", fail)
    (warning,) = measure(path, b"gemm=1")
    assert "cannot be written: No space left on device" in warning


def test_a_pipe_of_timings_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BuildError, match="not a regular file"):
        use_timing_cache(FakeConfig(), tmp_path / "pipe", lambda text: None)
