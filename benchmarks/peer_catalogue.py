"""The programs and configurations in the comparison; another configuration is a line in `CONFIGURATIONS`.

Every program is set up as its own documentation advises for a CPU; `note` qualifies its results. Results are compared
among configurations of equal `bits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONFIGURATIONS", "REFERENCE", "Configuration", "select"]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One program in one configuration.

    Attributes:
        name: its name in the report.
        bits: the bits of the type of its products, or of its weights if those are smaller.
        adapter, options: the module of `peer_adapters` that runs it, and its options.
        environment: the environment that it runs in (`peer_environments`).
        model: the form of the checkpoint that it reads (`peer_models`).
        ours: whether it is latentrt.
        accelerated: whether it uses accelerations, which excludes it from comparisons.
        components_alone: whether its components can run alone.
        bfloat16: whether it needs a CPU with bfloat16: elsewhere torch emulates it, and OpenVINO silently computes in
            float32.
        variables: the environment variables of its process.
        note: a remark on its results.
    """

    name: str
    bits: int
    adapter: str
    environment: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    accelerated: bool = False
    components_alone: bool = True
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
        components_alone=False,
        note=note,
    )


def _ours(
    name: str, bits: int, environment: str, model: str, load: dict[str, Any], request: dict[str, Any] | None = None
) -> Configuration:
    """Return a configuration of latentrt: `load` for `Pipeline.load`, `request` (accelerations) for `Request.of`."""
    return Configuration(
        name=name,
        bits=bits,
        adapter="ours",
        environment=environment,
        model=model,
        options={"load": load, "request": request or {}},
        bfloat16=load.get("precision") == "bfloat16",
        ours=True,
        accelerated=request is not None,
    )


_COMPILED = "compiled graphs are not reused, as weights are packed into them"
_WEIGHTS_ONLY = "int8 weights alone; products in bfloat16 where the CPU has it, else in float32"
_OWN_LOG = "components by its own log, within images"

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
    _ggml("stable-diffusion.cpp f32", 32, "f32", "single-file", f"{_OWN_LOG}; its convolutions use half weights"),
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
    _ggml("stable-diffusion.cpp f16", 16, "default", "ggml-f16", _OWN_LOG),
    _ours(
        "latentrt OpenVINO bfloat16",
        16,
        "latentrt-openvino",
        "latentrt-float16",
        {"device": "openvino", "precision": "bfloat16"},
    ),
    _openvino("OpenVINO GenAI int8", 8, "genai", "bf16", "openvino-int8", _WEIGHTS_ONLY),
    _ours("latentrt ONNX Runtime int8", 8, "latentrt-cpu", "latentrt-int8", {"device": "cpu"}),
    _ours("latentrt OpenVINO int8", 8, "latentrt-openvino", "latentrt-int8", {"device": "openvino"}),
    _ggml("stable-diffusion.cpp q8_0", 8, "default", "ggml-q8_0", f"{_OWN_LOG}; its convolutions use half weights"),
)


def select(words: Sequence[str]) -> tuple[Configuration, ...]:
    """Return the configurations whose name contains one of the words; all of them if there are no words.

    Raises:
        SystemExit: no name contains a word.
    """
    for word in words:
        if not any(word in configuration.name for configuration in CONFIGURATIONS):
            names = ", ".join(configuration.name for configuration in CONFIGURATIONS)
            raise SystemExit(f"got --only {word!r}, expected a part of one of: {names}")
    return tuple(each for each in CONFIGURATIONS if not words or any(word in each.name for word in words))
