"""GPU models by name: their compute capabilities, and the library that builds for each.

Compute capabilities: NVIDIA's lists, developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus. TensorRT-RTX supports
GeForce and RTX cards (its support matrix: 7.5, 8.6, 8.9, 12.0, 12.1). Engines for data-centre cards and Jetson boards
are built with TensorRT, on the GPU itself.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from latentrt.bundle.printable import quote
from latentrt.engines.record import LibraryName
from latentrt.errors import RequestError

__all__ = [
    "GPUS",
    "UNNAMED",
    "GpuModel",
    "find_by_driver_name",
    "find_gpu_model",
    "parse_capabilities",
    "parse_gpus",
]


@dataclass(frozen=True, kw_only=True)
class GpuModel:
    """A GPU model.

    Attributes:
        label: its common name, as in `rtx4090`.
        driver_name: the beginning of the driver's name of the GPU.
        compute_capability: its compute capability, as in `8.9`.
        library: the library that builds engines for it.
    """

    label: str
    driver_name: str
    compute_capability: str
    library: LibraryName


def _rtx(capability: str, **names: str) -> dict[str, GpuModel]:
    return {
        label: GpuModel(label=label, driver_name=name, compute_capability=capability, library="tensorrt_rtx")
        for label, name in names.items()
    }


def _tensorrt(capability: str, **names: str) -> dict[str, GpuModel]:
    return {
        label: GpuModel(label=label, driver_name=name, compute_capability=capability, library="tensorrt")
        for label, name in names.items()
    }


def _geforce(capability: str, *models: str) -> dict[str, GpuModel]:
    """Make models of GeForce cards: `4070 Ti` → label rtx4070ti, driver's name NVIDIA GeForce RTX 4070 Ti."""
    names = {f"rtx{model.replace(' ', '').lower()}": f"NVIDIA GeForce RTX {model}" for model in models}
    return _rtx(capability, **names)


UNNAMED = "any GPU"  # driver's name of a model given by its compute capability only
_EXAMPLES = ("rtx4090", "rtx3060", "rtxa6000", "l4", "a100", "h100", "orin")
GPUS: dict[str, GpuModel] = {
    **_geforce("7.5", "2060", "2070", "2080", "2080 Ti"),
    **_geforce("8.6", "3050", "3060", "3060 Ti", "3070", "3070 Ti", "3080", "3080 Ti", "3090", "3090 Ti"),
    **_geforce("8.9", "4060", "4060 Ti", "4070", "4070 SUPER", "4070 Ti", "4070 Ti SUPER"),
    **_geforce("8.9", "4080", "4080 SUPER", "4090"),
    **_geforce("12.0", "5060", "5060 Ti", "5070", "5070 Ti", "5080", "5090"),
    **_rtx("8.6", rtxa2000="NVIDIA RTX A2000", rtxa4000="NVIDIA RTX A4000", rtxa5000="NVIDIA RTX A5000"),
    **_rtx("8.6", rtxa6000="NVIDIA RTX A6000"),
    **_rtx("8.9", rtx2000ada="NVIDIA RTX 2000 Ada", rtx4000ada="NVIDIA RTX 4000 Ada"),
    **_rtx("8.9", rtx4500ada="NVIDIA RTX 4500 Ada", rtx5000ada="NVIDIA RTX 5000 Ada", rtx6000ada="NVIDIA RTX 6000 Ada"),
    **_rtx("12.0", rtxpro6000="NVIDIA RTX PRO 6000 Blackwell"),
    **_rtx("12.1", gb10="NVIDIA GB10"),
    **_tensorrt("7.5", t4="Tesla T4"),
    **_tensorrt("8.0", a30="NVIDIA A30", a100="NVIDIA A100"),
    **_tensorrt("8.6", a2="NVIDIA A2", a10="NVIDIA A10", a10g="NVIDIA A10G", a16="NVIDIA A16", a40="NVIDIA A40"),
    **_tensorrt("8.7", orin="Orin"),
    **_tensorrt("8.9", l4="NVIDIA L4", l40="NVIDIA L40", l40s="NVIDIA L40S"),
    **_tensorrt("9.0", h100="NVIDIA H100", h200="NVIDIA H200", gh200="NVIDIA GH200"),
    **_tensorrt("10.0", b200="NVIDIA B200"),
    **_tensorrt("10.3", b300="NVIDIA B300"),
    **_tensorrt("11.0", thor="NVIDIA Thor"),
}


def find_gpu_model(name: str) -> GpuModel:
    """Find a GPU model by a label, a driver's name or a compute capability.

    Args:
        name: a name in any spelling, as in `rtx4090`, `RTX 4090`, `NVIDIA GeForce RTX 4090`, or `8.9`.

    Raises:
        RequestError: no model has the name.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    label = re.sub("^(nvidia|geforce|tesla|jetson)+", "", plain)
    found = GPUS.get(label) or find_by_driver_name(name)
    if found is not None:
        return found
    if re.fullmatch(r"\d+\.\d", name.strip()):
        capability = name.strip()
        return GpuModel(label=capability, driver_name=UNNAMED, compute_capability=capability, library="tensorrt_rtx")
    near = difflib.get_close_matches(label, GPUS, n=3)
    expected = f"did you mean {' or '.join(near)}?" if near else f"expected a GPU such as {', '.join(_EXAMPLES)}."
    raise RequestError(f"got the GPU {quote(name)}, {expected} For other GPUs give the compute capability, as in 8.9")


def find_by_driver_name(name: str) -> GpuModel | None:
    """Find the GPU model for a driver's name; the longest match wins, so `NVIDIA L40S` is an l40s and not an l4."""
    matching = [gpu for gpu in GPUS.values() if name.startswith(gpu.driver_name)]
    return max(matching, key=lambda gpu: len(gpu.driver_name), default=None)


def parse_gpus(text: str) -> tuple[GpuModel, ...]:
    """Parse a list of GPUs, as in `rtx4090,l4,h100`; drop duplicates.

    Raises:
        RequestError: the list is empty, or no model has one of the names.
    """
    names = [name for name in text.split(",") if name.strip()]
    if not names:
        raise RequestError(f"got the GPUs {quote(text)}, expected at least one, as in rtx4090,l4")
    return tuple({gpu.label: gpu for gpu in map(find_gpu_model, names)}.values())


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Parse a list of compute capabilities, as in `8.6,8.9`.

    Raises:
        RequestError: one of them is not a number with one decimal.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+\.\d", part) for part in parts):
        raise RequestError(f"got the compute capabilities {quote(text)}, expected a list such as 8.9 or 8.6,8.9,12.0")
    return tuple(parts)
