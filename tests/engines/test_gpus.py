from __future__ import annotations

import re

import pytest

from latentrt.errors import RequestError
from latentrt_engines.gpus import GPUS, find_gpu_model, parse_capabilities, parse_gpus
from latentrt_engines.library import load_library


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx4070ti"),
        ("geforce-rtx-2080-ti", "rtx2080ti"),
        ("NVIDIA H100", "h100"),
        ("Tesla T4", "t4"),
        ("jetson_orin", "orin"),
        ("NVIDIA RTX 6000 Ada", "rtx6000ada"),
        (" l4 ", "l4"),
    ],
)
def test_a_name_in_any_spelling(name: str, label: str) -> None:
    assert find_gpu_model(name).label == label


@pytest.mark.parametrize("label", GPUS)
def test_every_gpu_is_found_by_its_label_and_by_its_drivers_name(label: str) -> None:
    gpu = GPUS[label]
    assert gpu.label == label
    assert find_gpu_model(label) is gpu
    assert find_gpu_model(gpu.driver_name) is gpu
    assert re.fullmatch(r"\d+\.\d", gpu.compute_capability)


def test_tensorrt_rtx_supports_the_capability_of_every_gpu_it_builds_for() -> None:
    needed = {gpu.compute_capability for gpu in GPUS.values() if gpu.library == "tensorrt_rtx"}
    assert needed <= set(load_library("tensorrt_rtx").capabilities())


def test_no_two_gpus_share_a_drivers_name() -> None:
    names = [gpu.driver_name for gpu in GPUS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("rtx9999", "rtx4090, rtx3060, rtxa6000, l4, a100, h100, orin"),
        ("", "rtx4090, rtx3060, rtxa6000, l4, a100, h100, orin"),
        ("nvidia", "rtx4090, rtx3060, rtxa6000, l4, a100, h100, orin"),
        ("8.90", "rtx4090, rtx3060, rtxa6000, l4, a100, h100, orin"),
        ("4090", "did you mean rtx4090?"),
        ("RTX 4091", "did you mean rtx4090 or rtx5090 or rtx4080?"),
        ("h100x", "did you mean h100 or h200 or a100?"),
    ],
)
def test_an_unknown_gpu(name: str, suggestions: str) -> None:
    with pytest.raises(RequestError) as refused:
        find_gpu_model(name)
    assert repr(name) in str(refused.value)
    assert suggestions in str(refused.value)
    assert "compute capability" in str(refused.value)


@pytest.mark.parametrize("text", ["8.9", " 8.9 "])
def test_a_card_without_a_name_by_its_capability(text: str) -> None:
    gpu = find_gpu_model(text)
    assert (gpu.label, gpu.compute_capability, gpu.library) == ("8.9", "8.9", "tensorrt_rtx")


def test_a_fleet() -> None:
    assert [gpu.label for gpu in parse_gpus("rtx4090, L4,h100,,RTX 4090")] == ["rtx4090", "l4", "h100"]
    assert [gpu.label for gpu in parse_gpus("12.1,l4, 8.9,12.1")] == ["12.1", "l4", "8.9"]


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_fleet_of_none(text: str) -> None:
    with pytest.raises(RequestError, match="at least one"):
        parse_gpus(text)


def test_capabilities() -> None:
    assert parse_capabilities("8.6, 8.9,12.0") == ("8.6", "8.9", "12.0")


@pytest.mark.parametrize("text", ["", "8", "89", "8.9,", "8.9;8.6", "sm_89", "8.90", "a.b"])
def test_capabilities_of_another_form(text: str) -> None:
    with pytest.raises(RequestError, match=r"compute capabilities '.*'"):
        parse_capabilities(text)
