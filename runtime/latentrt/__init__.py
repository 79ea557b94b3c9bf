"""latentrt: pictures from a bundle of graphs, with numpy around them and no torch.

Names are loaded when they are first used, so that `import latentrt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrt.bundle import Bundle
    from latentrt.errors import BackendError, BundleError, EngineError, LatentRTError, RequestError, SafetyError
    from latentrt.mixed_batch import MixedBatch
    from latentrt.pipeline import Pipeline
    from latentrt.request import Order, Request
    from latentrt.result import Result
    from latentrt.safety import Verdict
    from latentrt.schedule import Schedule
    from latentrt.step import Step

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "EngineError",
    "LatentRTError",
    "MixedBatch",
    "Order",
    "Pipeline",
    "Request",
    "RequestError",
    "Result",
    "SafetyError",
    "Schedule",
    "Step",
    "Verdict",
    "__version__",
]

_HOMES = {
    "BackendError": "errors",
    "Bundle": "bundle",
    "BundleError": "errors",
    "EngineError": "errors",
    "LatentRTError": "errors",
    "MixedBatch": "mixed_batch",
    "Order": "request",
    "Pipeline": "pipeline",
    "Request": "request",
    "RequestError": "errors",
    "Result": "result",
    "SafetyError": "errors",
    "Schedule": "schedule",
    "Step": "step",
    "Verdict": "safety",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
