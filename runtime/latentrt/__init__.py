"""latentrt: images from a bundle of graphs, with numpy around them and no torch.

    from latentrt import Pipeline

    pipeline = Pipeline.load("my-bundle")  # or Pipeline.load("sample"), the model that ships with the package
    result = pipeline("a red circle on a blue background", seed=7)
    result.save("out.png")

`help(Pipeline.__call__)` lists the options of a request. Names are loaded when they are first used, so that
`import latentrt` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrt.batch.generation import ImageResult, generate_many
    from latentrt.bundle.bundle import Bundle
    from latentrt.decode.safety import Verdict
    from latentrt.errors import (
        BackendError,
        BundleError,
        EngineError,
        LatentRTError,
        OutputError,
        RequestError,
        SafetyError,
    )
    from latentrt.images.metadata import ImageRecord, read_metadata
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request
    from latentrt.resolve import ResolvedRequest
    from latentrt.result import Result
    from latentrt.sampling.loop import Sample, Step
    from latentrt.sampling.schedule import Schedule
    from latentrt.timings import Timings

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "EngineError",
    "ImageRecord",
    "ImageResult",
    "LatentRTError",
    "OutputError",
    "Pipeline",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "Result",
    "SafetyError",
    "Sample",
    "Schedule",
    "Step",
    "Timings",
    "Verdict",
    "__version__",
    "generate_many",
    "read_metadata",
]

_HOMES = {
    "BackendError": "errors",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "EngineError": "errors",
    "ImageRecord": "images.metadata",
    "ImageResult": "batch.generation",
    "LatentRTError": "errors",
    "OutputError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "RequestError": "errors",
    "ResolvedRequest": "resolve",
    "Result": "result",
    "SafetyError": "errors",
    "Sample": "sampling.loop",
    "Schedule": "sampling.schedule",
    "Step": "sampling.loop",
    "Timings": "timings",
    "Verdict": "decode.safety",
    "generate_many": "batch.generation",
    "read_metadata": "images.metadata",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    from latentrt.migration import module_advice

    message = f"module {__name__!r} has no attribute {name!r}"
    advice = module_advice(name)
    if advice is None:
        raise AttributeError(message)
    # `from latentrt import …` replaces an AttributeError by an error of its own, without the advice.
    importing = sys._getframe(1).f_code.co_name == "_handle_fromlist"
    raise (ImportError if importing else AttributeError)(f"{message}; {advice}")
