"""The shapes that an engine's optimisation profile covers."""

from __future__ import annotations

from latentrt.backends.session import Shapes
from latentrt.bundle.manifest import MAX_BATCH
from latentrt.engines.record import EngineIdentity, ShapeRange
from latentrt.errors import BackendError

__all__ = ["batch_sizes", "covers"]

# Most batch sizes that are listed: the evaluations of the most images, which editing evaluates three times each.
_MAX_BATCH_SIZES = 3 * MAX_BATCH


def covers(identity: EngineIdentity, shapes: Shapes) -> bool:
    """Return whether an engine runs inputs of these shapes.

    Raises:
        BackendError: the names are not those of the engine's inputs.
    """
    return all(allowed.covers(shape) for allowed, shape in _pair_shapes(identity, shapes))


def batch_sizes(identity: EngineIdentity, shapes: Shapes) -> tuple[int, ...]:
    """Return the sizes of the first axis for which an engine runs inputs of these shapes, ascending; () for none.

    Of more than 3,072 sizes, the smallest are returned.

    Raises:
        BackendError: the names are not those of the engine's inputs.
    """
    pairs = [(allowed, shape) for allowed, shape in _pair_shapes(identity, shapes) if shape]
    if not all(allowed.min and allowed.covers((allowed.min[0], *shape[1:])) for allowed, shape in pairs):
        return ()
    smallest = max(allowed.min[0] for allowed, _ in pairs)
    largest = min(allowed.max[0] for allowed, _ in pairs)
    return tuple(range(smallest, largest + 1)[:_MAX_BATCH_SIZES])


def _pair_shapes(identity: EngineIdentity, shapes: Shapes) -> list[tuple[ShapeRange, tuple[int, ...]]]:
    profile = identity.profile
    if profile.keys() != shapes.keys():
        raise BackendError(f"inputs: got {sorted(shapes)}, expected {sorted(profile)}")
    return [(profile[name], shape) for name, shape in shapes.items()]
