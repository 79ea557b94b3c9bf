"""A run uses no network and writes nothing but its image and our cache, whatever its libraries would like to report.

The process runs under a seccomp filter that ends it when it makes a socket of the internet, also by native code and in
its children; looking up a name makes one. Allowed is a stream of IPv6, by which urllib3 tries whether there is any.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from latentrt import telemetry
from latentrt.backends import onnxruntime as ort

# A BPF program: it loads the number of the system call, and of `socket` the family and the type.
FILTER = """
import ctypes, platform, struct
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
is_socket, allow, end = (0x15, 0, 6, number), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x80000000)
is_ipv4, is_ipv6, is_datagram = (0x15, 5, 0, 2), (0x15, 0, 3, 10), (0x15, 1, 0, 2)
load = [(0x20, 0, 0, offset) for offset in (0, 16, 24)]
program = load[0], is_socket, load[1], is_ipv4, is_ipv6, load[2], (0x54, 0, 0, 15), is_datagram, allow, end
buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
loaded = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
library = ctypes.CDLL(None, use_errno=True)
assert library.prctl(38, 1, 0, 0, 0) == 0
assert library.prctl(22, 2, ctypes.create_string_buffer(loaded), 0, 0) == 0
"""
IMAGE = """
from latentrt import Pipeline
Pipeline.load(device={device!r})("a red circle", seed=7, num_inference_steps=1).images[0].save("image.png")
"""
LOOK_UP = "library.getaddrinfo(b'example.org', None, None, ctypes.byref(ctypes.c_void_p()))\n"
EXPORT = """
import sys
from latentrt.cli.main import main
main(["export", {checkpoint!r}, "bundle"])
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")


def run_watched(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process without a network, with a home, a cache and a temporary folder of its own."""
    for name in ("home", "cache", "temporary", "work"):
        (folder / name).mkdir(mode=0o700)
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(folder / "home"), "LATENTRT_CACHE": str(folder / "cache")}
    environment |= {"TMPDIR": str(folder / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FILTER + code]
    return subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True, check=False)


def files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


@linux
@pytest.mark.parametrize("device", ["cpu", pytest.param("openvino", marks=pytest.mark.openvino)])
def test_an_image_reports_nothing(tmp_path: Path, device: str) -> None:
    done = run_watched(IMAGE.format(device=device), tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "work") == ["image.png"]
    assert files(tmp_path / "home") == files(tmp_path / "temporary") == []


@linux
def test_a_look_up_by_native_code_would_be_seen(tmp_path: Path) -> None:
    """Without this check the tests above and below would pass under a filter that does nothing."""
    assert run_watched(LOOK_UP, tmp_path).returncode == -signal.SIGSYS


@linux
@pytest.mark.slow
@pytest.mark.extras
def test_an_export_reports_nothing(tmp_path: Path) -> None:
    from tests.tiny import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    done = run_watched(EXPORT.format(checkpoint=str(checkpoint)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "home") == []


@pytest.mark.parametrize("name", ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"])
@pytest.mark.parametrize(
    ("chosen", "expected"),
    # The libraries would report with the second and the third, and nobody has asked for that.
    [(None, "1"), ("", "1"), ("disabled", "1"), ("1", "1"), ("true", "1"), ("0", "0"), (" False", " False")],
)
def test_reports_are_off_unless_the_user_turns_them_on(
    monkeypatch: pytest.MonkeyPatch, name: str, chosen: str | None, expected: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    telemetry.opt_out()
    assert os.environ[name] == expected


@pytest.mark.parametrize(("chosen", "expected"), [(None, 1), ("", 1), ("true", 1), ("0", 0), ("off", 0)])
def test_telemetry_ends_where_the_application_imported_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: int
) -> None:
    ended: list[None] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: ended.append(None))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen)
    ort.require()
    assert len(ended) == expected


def test_openvino_finds_no_telemetry_unless_the_user_opted_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "openvino_telemetry"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with telemetry.hide_openvino_telemetry(), pytest.raises(ImportError):
        __import__(name)
    assert name not in sys.modules, "a program may import it later"
    loaded = ModuleType(name)  # by another program, in this process
    monkeypatch.setitem(sys.modules, name, loaded)
    with telemetry.hide_openvino_telemetry(), pytest.raises(ImportError):
        __import__(name)
    assert sys.modules.pop(name) is loaded
    (tmp_path / "intel").mkdir()
    for answer, hidden in (("0", True), ("1", False)):
        (tmp_path / "intel" / name).write_text(answer)
        with telemetry.hide_openvino_telemetry():
            assert (name in sys.modules) == hidden
