from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from latentrt.backends.tensorrt.library import find_libraries, import_library
from latentrt.engines.record import LibraryName
from latentrt.errors import BackendError, MissingExtraError
from tests.engines.made_up import FakeTensorRT


@pytest.mark.extras
def test_a_library_and_its_version() -> None:
    """The wheel is called tensorrt_rtx_cu13 or so, and plans belong to it."""
    found = import_library("tensorrt_rtx", "test")
    assert found.version.partition("+cu")[0] == found.module.__version__
    assert int(found.version.partition("+cu")[2]) >= 12
    assert str(found) == f"TensorRT-RTX {found.version}"
    assert find_libraries()["tensorrt_rtx"] == found


def test_a_version_without_a_wheel_has_no_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nothing)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    assert import_library("tensorrt", "test").version == "11.0.0.1"


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
def test_a_library_that_is_not_installed(name: LibraryName, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"^{name} is needed to see and is not installed; pip") as absence:
        import_library(name, "see")
    assert (absence.value.package, absence.value.extra) == (name, extra)
    assert f"{name} is needed to run engines" in str(find_libraries()[name])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of an empty module that is imported as `tensorrt`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    return tmp_path / "tensorrt.py"


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_library_that_is_broken(installed: Path, error: str) -> None:
    installed.write_text(f"raise {error}('libnvinfer.so.11: cannot open shared object file')")
    message = r"^tensorrt is installed and cannot be loaded: libnvinfer\.so\.11: cannot open"
    with pytest.raises(BackendError, match=message) as broken:
        import_library("tensorrt", "test")
    assert not isinstance(broken.value, MissingExtraError)
    assert find_libraries()["tensorrt"] == str(broken.value)


def test_a_library_without_one_of_its_own_packages_is_broken(installed: Path) -> None:
    """Installing the extra, which is installed already, would not help."""
    installed.write_text("import tensorrt_bindings_that_are_gone")
    with pytest.raises(BackendError, match=r"is installed and cannot be loaded.*tensorrt_bindings_that_are_gone"):
        import_library("tensorrt", "test")
