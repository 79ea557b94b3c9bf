"""Which programs are compared, each in which of its configurations? A line here is all that another one takes.

Every program is set up as its own documentation advises for a CPU; `note` says what a reader of its figures has to
know. Figures are compared among configurations of equal `bits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONFIGURATIONS", "REFERENCE", "Configuration", "selected"]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One program in one configuration.

    Attributes:
        name: in the report.
        bits: of the type that it multiplies in, or of its weights where those are smaller.
        adapter: the module of `peer_adapters` that runs it, with `options`.
        environment: what it runs in (`peer_environments`). model: what it is given (`peer_models`).
        ours: whether it is latentrt. approximate: whether it leaves work out, and is compared with nobody.
        apart: whether its components can be run apart.
        bfloat16: whether it is of no use where the CPU does not multiply in bfloat16: torch would emulate it, and
            OpenVINO would take float32 without a word.
        variables: of its process.
    """

    name: str
    bits: int
    adapter: str
    environment: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    approximate: bool = False
    apart: bool = True
    bfloat16: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _torch(name: str, bits: int, dtype: str, mode: str = "", note: str = "") -> Configuration:
    # Weights that are constants can be packed while compiling: PyTorch's advice for inference on a CPU.
    variables = {"TORCHINDUCTOR_FREEZING": "1"} if mode else {}
    options = {"dtype": dtype, "compile": mode}
    return Configuration(
        name=name,
        bits=bits,
        adapter="diffusers_torch",
        environment="torch",
        model="checkpoint",
        options=options,
        bfloat16=dtype == "bfloat16",
        variables=variables,
        note=note,
    )


def _openvino(name: str, bits: int, adapter: str, hint: str, model: str, note: str = "") -> Configuration:
    environment = {"genai": "openvino-genai", "optimum_intel": "optimum-intel"}[adapter]
    return Configuration(
        name=name,
        bits=bits,
        adapter=adapter,
        environment=environment,
        model=model,
        options={"hint": hint},
        bfloat16=bits == 16,
        note=note,
    )


def _ggml(name: str, bits: int, wtype: str, model: str, note: str = "") -> Configuration:
    return Configuration(
        name=name,
        bits=bits,
        adapter="sdcpp",
        environment="stable-diffusion.cpp",
        model=model,
        options={"wtype": wtype},
        apart=False,
        note=note,
    )


def _ours(
    name: str, bits: int, environment: str, model: str, load: dict[str, Any], request: dict[str, Any] | None = None
) -> Configuration:
    """latentrt: `load` goes to `Pipeline.load`, `request` beside the image's own arguments to `Request`. A request
    leaves work out."""
    return Configuration(
        name=name,
        bits=bits,
        adapter="ours",
        environment=environment,
        model=model,
        options={"load": load, "request": request or {}},
        bfloat16=load.get("precision") == "bfloat16",
        ours=True,
        approximate=request is not None,
    )


_COMPILED = "graphs that were compiled before are not kept, as weights are packed into them"
_WEIGHTS_ALONE = "weights alone; it multiplies in bfloat16 where the CPU does, and else in float32"
_APART = "components by its own log, within images"

REFERENCE = "diffusers float32"
CONFIGURATIONS: tuple[Configuration, ...] = (
    _torch(REFERENCE, 32, "float32"),
    _torch("diffusers compiled float32", 32, "float32", "max-autotune", _COMPILED),
    Configuration(
        name="optimum-onnx float32",
        bits=32,
        adapter="optimum_onnx",
        environment="optimum-onnx",
        model="onnx",
    ),
    _openvino("OpenVINO GenAI float32", 32, "genai", "f32", "openvino-fp32"),
    _openvino("optimum-intel float32", 32, "optimum_intel", "f32", "openvino-fp32"),
    _ggml("stable-diffusion.cpp f32", 32, "f32", "single-file", f"{_APART}; its convolutions take half weights"),
    _ours("latentrt ONNX Runtime float32", 32, "latentrt-cpu", "latentrt-float32", {"device": "cpu"}),
    _ours(
        "latentrt OpenVINO float32",
        32,
        "latentrt-openvino",
        "latentrt-float32",
        {"device": "openvino", "precision": "float32"},
    ),
    _torch("diffusers bfloat16", 16, "bfloat16"),
    _torch("diffusers compiled bfloat16", 16, "bfloat16", "max-autotune", _COMPILED),
    _openvino("OpenVINO GenAI bfloat16", 16, "genai", "bf16", "openvino-fp16"),
    _openvino("optimum-intel bfloat16", 16, "optimum_intel", "bf16", "openvino-fp16"),
    _ggml("stable-diffusion.cpp f16", 16, "default", "ggml-f16", _APART),
    _ours(
        "latentrt OpenVINO bfloat16",
        16,
        "latentrt-openvino",
        "latentrt-float16",
        {"device": "openvino", "precision": "bfloat16"},
    ),
    _openvino("OpenVINO GenAI int8", 8, "genai", "bf16", "openvino-int8", _WEIGHTS_ALONE),
    _ours("latentrt ONNX Runtime int8", 8, "latentrt-cpu", "latentrt-int8", {"device": "cpu"}),
    _ours("latentrt OpenVINO int8", 8, "latentrt-openvino", "latentrt-int8", {"device": "openvino"}),
    _ggml("stable-diffusion.cpp q8_0", 8, "default", "ggml-q8_0", f"{_APART}; its convolutions take half weights"),
)


def selected(words: Sequence[str]) -> tuple[Configuration, ...]:
    """Those whose name holds one of the words; all without words.

    Raises:
        SystemExit: a word is in no name.
    """
    for word in words:
        if not any(word in configuration.name for configuration in CONFIGURATIONS):
            names = ", ".join(configuration.name for configuration in CONFIGURATIONS)
            raise SystemExit(f"found --only {word!r}, expected a part of one of: {names}")
    return tuple(each for each in CONFIGURATIONS if not words or any(word in each.name for word in words))
