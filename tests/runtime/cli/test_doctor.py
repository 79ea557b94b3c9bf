"""`latentrt doctor` on machines without a GPU. Engines are in tests/engines/test_doctor.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from latentrt.backends import openvino, placement
from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.staging import staged
from latentrt.cli.doctor import Availability, suggest
from latentrt.engines import gpu
from latentrt.engines.gpu import NoGpu
from tests.killed import in_child
from tests.runtime.cli.conftest import Caller

NO_GPU = NoGpu(reason="there is no NVIDIA driver", mend="buy one")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (gpu, placement):
        monkeypatch.setattr(module, "find_gpu", lambda: NO_GPU)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


def lines(latentrt: Caller, *arguments: object) -> dict[str, str]:
    """Return the lines by their first word."""
    done = latentrt("doctor", *arguments)
    assert done.code == 0, done.err
    return {line[:16].strip(): line[17:] for line in done.out.splitlines()}


def test_each_line_gives_the_version_or_the_package_to_install(latentrt: Caller, tmp_path: Path) -> None:
    found = lines(latentrt)
    assert found["GPU"] == "no: there is no NVIDIA driver; buy one"
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")):
        assert found[name][0].isdigit() or found[name].endswith(f"pip install 'latentrt[{extra}]'")
    assert "CPUExecutionProvider" in found["onnxruntime"]
    assert found["engines"] == f"0 in {tmp_path / 'cache' / 'engines'}"


def test_without_openvino(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    assert "latentrt[openvino]" in lines(latentrt)["openvino"]


def test_a_cache_that_cannot_be_used_is_a_line_and_not_an_error(
    latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "open"))
    assert lines(latentrt)["engines"].startswith(f"no: {tmp_path / 'open'}")


def test_a_bundle_adds_a_line_for_each_component(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    found = lines(latentrt, bundle_path())
    for name in ("text_encoder", "unet", "vae_decoder", "safety_checker"):
        assert found[name] == "ONNX Runtime on the CPU: there is no NVIDIA driver"


def kill_export(place: Path) -> None:
    with staged(place, overwrite=False):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_write(path: Path) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write_atomically(path, b"")


def test_files_that_killed_commands_left(latentrt: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "leftovers" not in lines(latentrt)
    in_child(lambda: kill_export(tmp_path / "here" / "bundle"))
    in_child(lambda: kill_write(tmp_path / "here" / "cat.png"))
    in_child(lambda: kill_write(tmp_path / "cache" / "engines" / "record.json"))
    quarantined = tmp_path / "cache" / "engines" / "quarantine" / "0.x"
    quarantined.mkdir(parents=True)
    out = latentrt("doctor").out
    assert re.search(r"^leftovers +\S+/here/\.bundle\.export-\w{16}, of a killed export or seal to bundle;", out, re.M)
    assert f" 1 draft of killed commands in {tmp_path}/here, such as .cat.png." in out
    assert f" 1 draft of killed commands in {tmp_path}/cache, " in out
    assert " 1 damaged or unfinished engine in " in out
    assert len(list((tmp_path / "here").iterdir())) == 2, "it removes nothing itself"


def test_files_that_a_killed_command_left_beside_the_bundle(
    latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    bundle = tmp_path / "bundles" / "mine"
    shutil.copytree(bundle_path(), bundle)
    in_child(lambda: kill_export(tmp_path / "bundles" / "other"))
    assert "/bundles/.other.export-" in lines(latentrt, bundle)["leftovers"]


def test_no_bundle(latentrt: Caller, tmp_path: Path) -> None:
    done = latentrt("doctor", tmp_path / "none")
    assert (done.code, done.out) == (4, "")


# What to do next.


def next_steps(latentrt: Caller, *arguments: object) -> list[str]:
    return [step["command"] for step in json.loads(latentrt("doctor", "--json", *arguments).out)["next"]]


def test_the_end_says_what_to_do_next(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    monkeypatch.setattr(openvino, "computes_in_bfloat16", lambda: False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2026")
    printed = latentrt("doctor").out
    assert "\n\nWhat to do next:\n  latentrt demo " in printed
    assert next_steps(latentrt) == ["latentrt demo", 'latentrt run sample "a red circle on a blue background"']
    assert next_steps(latentrt, "sample")[0] == "latentrt run sample PROMPT"
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    assert next_steps(latentrt) == ["pip install 'latentrt[openvino]'", "latentrt demo"]


@pytest.mark.parametrize(
    ("available", "commands"),
    [
        (set(), ["pip install 'latentrt[cpu]'", "latentrt demo"]),
        ({"GPU"}, ["pip install 'latentrt[gpu]'", "latentrt demo"]),
        ({"GPU", "onnxruntime", "tensorrt"}, ["latentrt build BUNDLE", "latentrt demo"]),
        ({"onnxruntime"}, ["pip install 'latentrt[openvino]'", "latentrt demo"]),
    ],
)
def test_the_next_step_is_that_of_the_machine(available: set[str], commands: list[str]) -> None:
    names = ("GPU", "tensorrt", "tensorrt_rtx", "onnxruntime", "openvino")
    parts = {name: Availability(available=name in available, text="") for name in names}
    assert [step.command for step in suggest(parts, None)] == commands
