"""Replaces the weights of an engine by name.

Every weight of a refittable engine has the name of its initializer, which is the checkpoint's own. The set must be
complete and of the engine's sizes before anything is replaced, since a half-replaced engine is useless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from latentrt.backends.tensorrt.library import LoadedLibrary
from latentrt.errors import EngineError

__all__ = ["refit"]

_DTYPES = {"FLOAT": "float32", "HALF": "float16"}
_SHOWN = 3


def refit(
    library: LoadedLibrary,
    engine: Any,
    logger: Any,
    component: str,
    weights: Mapping[str, NDArray[Any]],
    on_begin: Callable[[], None] = lambda: None,
) -> None:
    """Replace all weights of an engine. It must not be running; its contexts stay valid.

    Args:
        engine: the library's engine object.
        component: its name, for messages.
        weights: contiguous arrays by name, of another checkpoint of the same architecture.
        on_begin: called when the set has been checked, right before anything is replaced.

    Raises:
        EngineError: the engine is not refittable, or a weight is missing, unknown, or of another size or dtype: nothing
            was replaced. Or the library failed half-way: the engine must not be used any more.
    """
    if not engine.refittable:
        raise EngineError(
            f"{component}: this engine was not built to be refitted; build one that is: latentrt build --refittable"
        )
    trt = library.module
    refitter = trt.Refitter(engine, logger)
    problems = list(_find_problems(refitter, weights))
    if problems:
        more = f" … {len(problems)} in all" if len(problems) > _SHOWN else ""
        raise EngineError(
            f"{component}: these are not the weights of the engine's architecture, nothing was replaced: "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )
    for name, array in weights.items():
        values = trt.Weights(refitter.get_weights_prototype(name).dtype, array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, values):
            raise EngineError(f"{component}: {library} rejects the weights of {name}; nothing was replaced")
    if missing := list(refitter.get_missing_weights()):
        raise EngineError(f"{component}: {library} also needs {', '.join(missing[:_SHOWN])}; nothing was replaced")
    on_begin()
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{component}: {library} failed to replace the weights; load the engine anew")


def _find_problems(refitter: Any, weights: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    known = set(refitter.get_all_weights())
    for name in sorted(known - weights.keys()):
        yield f"{name} is missing"
    for name, array in weights.items():
        if name not in known:
            yield f"{name} is unknown to the engine"
            continue
        prototype = refitter.get_weights_prototype(name)
        dtype = _DTYPES.get(prototype.dtype.name, prototype.dtype.name)
        if prototype.size not in (-1, array.size) or dtype != array.dtype.name:
            yield f"{name} has {array.size:,} {array.dtype.name}, the engine {prototype.size:,} {dtype}"
