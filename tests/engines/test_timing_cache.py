"""Times of kernels, kept from build to build, at the seam of the library: TensorRT times only on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.errors import BuildError
from latentrt_engines.timing_cache import use_timing_cache


class FakeCache:
    """Times, as `kernel=ms` separated by spaces; those of another GPU begin with `other`."""

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


def build(path: Path, *measured: bytes, meanwhile: bytes = b"") -> list[str]:
    """A build that measures some kernels, while another one may write the file; the warnings."""
    config, warnings = FakeConfig(), list[str]()
    save = use_timing_cache(config, path, warnings.append)
    config.cache.times.update(measured)
    if meanwhile:
        path.write_bytes(meanwhile)
    save()
    return warnings


def test_times_are_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "times"
    assert build(path, b"gemm=1") == []
    assert build(path, b"conv=2") == []
    assert path.read_bytes() == b"conv=2 gemm=1"


def test_what_another_build_wrote_meanwhile_stays(tmp_path: Path) -> None:
    build(tmp_path / "times", b"gemm=1", meanwhile=b"conv=2")
    assert (tmp_path / "times").read_bytes() == b"conv=2 gemm=1"


def test_times_of_another_gpu_are_begun_anew_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_bytes(b"other gemm=9")
    assert build(path, b"gemm=1") == [f"{path} holds the times of another GPU or version, and is begun anew"]
    assert path.read_bytes() == b"gemm=1"


def test_a_file_that_cannot_be_used_is_an_error_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read: Is a directory"):
        use_timing_cache(FakeConfig(), tmp_path, lambda text: None)
    with pytest.raises(BuildError, match="cannot be written: No such file or directory"):
        build(tmp_path / "nowhere" / "times")
