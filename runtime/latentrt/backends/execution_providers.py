"""ONNX Runtime's execution providers by short names: the package that has each, and the options that it needs.

A package of ONNX Runtime has some providers inside. Others are plug-ins: packages of their own beside ONNX Runtime,
which loads their library (https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PROVIDERS", "ExecutionProvider", "find_provider"]

_SUFFIX = "executionprovider"


@dataclass(frozen=True, kw_only=True)
class ExecutionProvider:
    """One of ONNX Runtime's execution providers.

    Attributes:
        name: ONNX Runtime's name.
        title: human-readable.
        remedy: how to get it, in a clause; empty where it is unknown.
        options: of the provider, by ONNX Runtime's names.
        plugin: the module of its package, if that is a plug-in; empty for a provider of ONNX Runtime's own.
        plans_memory: False if sessions must run their nodes in sequence and without planning memory ahead.
    """

    name: str
    title: str
    remedy: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    plugin: str = ""
    plans_memory: bool = True

    def is_named(self, name: str) -> bool:
        """Return whether this is a provider's name, in any case, with `ExecutionProvider` at its end or without."""
        return name.lower().removesuffix(_SUFFIX) == self.name.lower().removesuffix(_SUFFIX)


_MIGRAPHX = ExecutionProvider(
    name="MIGraphXExecutionProvider",
    title="MIGraphX",
    # ONNX Runtime has no other provider for AMD's GPUs since 1.23.
    remedy="pip install onnxruntime-migraphx in place of onnxruntime (Linux, with ROCm)",
)
PROVIDERS: Mapping[str, ExecutionProvider] = {
    "coreml": ExecutionProvider(
        name="CoreMLExecutionProvider",
        title="Core ML",
        remedy="ONNX Runtime has it on macOS: pip install 'latentrt[cpu]' there",
        options={"ModelFormat": "MLProgram"},  # the older format has fewer operators, and no float16 weights
    ),
    "cpu": ExecutionProvider(
        name="CPUExecutionProvider", title="its CPU provider", remedy="pip install 'latentrt[cpu]'"
    ),
    "cuda": ExecutionProvider(
        name="CUDAExecutionProvider",
        title="CUDA",
        remedy="pip install 'latentrt[gpu]' in place of [cpu]",
        # TF32 would round the inputs of float32 graphs. An exhaustive search for convolution algorithms would take
        # minutes at the first run.
        options={"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"},
    ),
    "directml": ExecutionProvider(
        name="DmlExecutionProvider",
        title="DirectML",
        remedy="pip install onnxruntime-directml in place of onnxruntime (Windows)",
        plans_memory=False,
    ),
    "migraphx": _MIGRAPHX,
    "openvino": ExecutionProvider(
        name="OpenVINOExecutionProvider",
        title="OpenVINO in ONNX Runtime",
        remedy="pip install onnxruntime-ep-openvino beside onnxruntime; `device` openvino needs no ONNX Runtime",
        plugin="onnxruntime_ep_openvino",
    ),
    "qnn": ExecutionProvider(
        name="QNNExecutionProvider",
        title="QNN",
        remedy="pip install onnxruntime-qnn beside onnxruntime (Windows and Linux on ARM)",
        plugin="onnxruntime_qnn",
    ),
    "rocm": _MIGRAPHX,
    "webgpu": ExecutionProvider(
        name="WebGpuExecutionProvider",
        title="WebGPU",
        remedy="pip install onnxruntime-ep-webgpu beside onnxruntime",
        plugin="onnxruntime_ep_webgpu",
    ),
}
"""Providers by short names; every other one of the installed ONNX Runtime has only its own name."""


def find_provider(name: str) -> ExecutionProvider:
    """Return the provider of a short name or of ONNX Runtime's name; one without a remedy for an unknown name."""
    if (known := PROVIDERS.get(name.lower().removesuffix(_SUFFIX))) is not None:
        return known
    return next((each for each in PROVIDERS.values() if each.is_named(name)), ExecutionProvider(name=name, title=name))
