"""latentrt: images from a bundle of graphs, with numpy around them and no torch.

Names are loaded when they are first used, so that `import latentrt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle
    from latentrt.decode.safety import Verdict
    from latentrt.errors import BackendError, BundleError, EngineError, LatentRTError, RequestError, SafetyError
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request
    from latentrt.resolve import ResolvedRequest
    from latentrt.result import Result
    from latentrt.sampling.loop import Sample, Step
    from latentrt.sampling.schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "EngineError",
    "LatentRTError",
    "Pipeline",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "Result",
    "SafetyError",
    "Sample",
    "Schedule",
    "Step",
    "Verdict",
    "__version__",
]

_HOMES = {
    "BackendError": "errors",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "EngineError": "errors",
    "LatentRTError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "RequestError": "errors",
    "ResolvedRequest": "resolve",
    "Result": "result",
    "SafetyError": "errors",
    "Sample": "sampling.loop",
    "Schedule": "sampling.schedule",
    "Step": "sampling.loop",
    "Verdict": "decode.safety",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
