"""The engines of one component: which of them runs a shape, and which session runs the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.backends.tensorrt.engine_set import EngineSet
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.choice import EngineSource
from latentrt.engines.record import EngineRecord, ShapeRange
from latentrt.errors import BackendError, EngineError
from tests.engines import made_up

INPUTS = (TensorSpec("x", "float32", ("batch", "width")), TensorSpec("text", "float32", ("batch", 3)))


class Recorder(Session):
    """A session that records its calls."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, list[str]()
        self.inputs, self.outputs = INPUTS, ()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self.calls.append("run")
        return {"ran on": np.array(self.name)}

    def prepare(self, shapes: Shapes) -> None:
        self.calls.append("prepare")

    def device_context(self, shapes: Shapes) -> str:
        return f"context of {self.name}"

    def close(self) -> None:
        self.calls.append("close")


class Fallback(Recorder):
    def device_context(self, shapes: Shapes) -> Any:
        return None

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return (1, 2, 4, 8)


@dataclass(frozen=True)
class Source:
    record: EngineRecord

    def plan(self) -> bytes:
        return b""


def source(bundle: Bundle, batch: tuple[int, int], width: tuple[int, int]) -> Source:
    profile = {
        "x": ShapeRange(min=(batch[0], width[0]), opt=(batch[1], width[1]), max=(batch[1], width[1])),
        "text": ShapeRange(min=(batch[0], 3), opt=(batch[1], 3), max=(batch[1], 3)),
    }
    record = made_up.record(bundle, made_up.identity(bundle, "unet", profile=profile))
    return Source(msgspec.structs.replace(record, inputs=INPUTS))


class Engines:
    """An engine set over recorders.

    Attributes:
        loaded: by key of the engine. opened: fallbacks.
    """

    def __init__(self, *sources: Source, fallback: bool = True, broken: tuple[Source, ...] = ()) -> None:
        self.sources, self._broken = sources, broken
        self.loaded, self.opened, self.attempts = dict[str, Recorder](), list[Recorder](), list[str]()
        self.set = EngineSet("the component", sources, self._load, self._open if fallback else None)

    def _load(self, source: EngineSource) -> Session:
        self.attempts.append(source.record.key)
        if any(source is each for each in self._broken):
            raise EngineError("this plan does not load")
        session = self.loaded[source.record.key] = Recorder(source.record.key)
        return session

    def _open(self) -> Session:
        self.opened.append(Fallback("fallback"))
        return self.opened[-1]

    def ran_on(self, batch: int, width: int) -> str:
        feeds = {"x": np.zeros((batch, width), np.float32), "text": np.zeros((batch, 3), np.float32)}
        return str(self.set.run(feeds)["ran on"])


def shapes(batch: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (batch, width), "text": (batch, 3)}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(bundle_path())


def test_the_first_engine_that_covers_a_shape_runs_it(bundle: Bundle) -> None:
    small, wide = source(bundle, (2, 2), (4, 4)), source(bundle, (1, 4), (4, 9))
    engines = Engines(small, wide)
    assert engines.ran_on(2, 4) == small.record.key
    assert engines.ran_on(3, 4) == wide.record.key
    assert engines.ran_on(2, 8) == wide.record.key
    assert engines.ran_on(2, 10) == "fallback"
    assert engines.attempts == [small.record.key, wide.record.key]
    assert len(engines.opened) == 1


def test_batch_sizes_are_those_of_every_engine_that_covers_the_other_axes(bundle: Bundle) -> None:
    engines = Engines(
        source(bundle, (8, 8), (4, 4)), source(bundle, (2, 4), (4, 9)), source(bundle, (1, 1), (5, 5)), fallback=False
    )
    assert engines.set.batch_sizes(shapes(1, 4)) == (2, 3, 4, 8)
    assert engines.set.batch_sizes(shapes(77, 5)) == (1, 2, 3, 4)
    assert engines.set.batch_sizes(shapes(1, 10)) == ()
    assert engines.loaded == {}


def test_batch_sizes_of_shapes_that_no_engine_covers_are_the_fallbacks(bundle: Bundle) -> None:
    engines = Engines(source(bundle, (2, 2), (4, 4)))
    assert engines.set.batch_sizes(shapes(1, 4)) == (2,)
    assert engines.opened == []
    assert engines.set.batch_sizes(shapes(1, 5)) == (1, 2, 4, 8)


def test_an_engine_that_does_not_load_is_tried_once_and_has_no_batch_sizes(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = source(bundle, (2, 2), (4, 4)), source(bundle, (2, 3), (4, 4))
    engines = Engines(broken, other, broken=(broken,))
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert [engines.ran_on(2, 4) for _ in range(2)] == [other.record.key] * 2
    assert engines.attempts == [broken.record.key, other.record.key]
    assert caplog.text.count("this plan does not load") == 1
    engines = Engines(broken, broken=(broken,))
    assert engines.ran_on(2, 4) == "fallback"
    assert engines.set.batch_sizes(shapes(1, 4)) == (1, 2, 4, 8)
    with pytest.raises(EngineError, match="this plan does not load"):
        Engines(broken, broken=(broken,), fallback=False).ran_on(2, 4)


def test_shapes_are_prepared_by_the_engine_or_the_fallback(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    engine = source(bundle, (2, 2), (4, 4))
    engines = Engines(engine)
    engines.set.prepare(shapes(2, 4))
    assert engines.loaded[engine.record.key].calls == ["prepare"]
    with caplog.at_level(logging.WARNING, "latentrt"):
        for _ in range(2):
            engines.set.prepare(shapes(2, 5))
    assert [fallback.calls for fallback in engines.opened] == [["prepare", "prepare"]]
    # Said once, with the shape, the shapes that engines run, and the command that builds one.
    assert len(caplog.messages) == 1
    assert all(part in caplog.messages[0] for part in ("the component", "2×5", "2×4", "latentrt build"))


def test_shapes_that_nothing_runs_are_an_error(bundle: Bundle) -> None:
    engines = Engines(source(bundle, (2, 2), (4, 4)), fallback=False)
    for use in (engines.set.prepare, engines.set.device_context):
        with pytest.raises(EngineError, match="2×5"):
            use(shapes(2, 5))
    with pytest.raises(EngineError, match="2×5"):
        engines.ran_on(2, 5)
    with pytest.raises(BackendError, match="inputs: got"):
        engines.set.prepare({"x": (2, 4)})


def test_the_device_context_is_the_engines(bundle: Bundle) -> None:
    engine = source(bundle, (2, 2), (4, 4))
    engines = Engines(engine)
    assert engines.set.device_context(shapes(2, 4)) == f"context of {engine.record.key}"
    assert engines.set.device_context(shapes(2, 5)) is None


def test_the_signature_is_the_engines(bundle: Bundle) -> None:
    engine = source(bundle, (2, 2), (4, 4))
    assert (Engines(engine).set.inputs, Engines(engine).set.outputs) == (INPUTS, engine.record.outputs)


def test_closing_closes_every_loaded_engine(bundle: Bundle) -> None:
    engine = source(bundle, (2, 2), (4, 4))
    engines = Engines(engine, source(bundle, (5, 5), (4, 4)))
    engines.ran_on(2, 4)
    engines.ran_on(2, 9)
    engines.set.close()
    assert [session.calls for session in (*engines.loaded.values(), *engines.opened)] == [["run", "close"]] * 2


def test_threads_load_an_engine_and_the_fallback_once(bundle: Bundle) -> None:
    engines = Engines(source(bundle, (2, 2), (4, 4)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda width: engines.ran_on(2, width), [4, 5] * 10))
    assert (len(engines.attempts), len(engines.opened)) == (1, 1)


class PanicError(BaseException):
    """As a library may raise it, which is no Exception."""


def test_whatever_a_library_raises_while_an_engine_is_loaded_is_a_backend_error(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    def panic(source: EngineSource) -> Session:
        raise PanicError("in the library")

    engine = source(bundle, (2, 2), (4, 4))
    shapes = {"x": (2, 4), "text": (2, 3)}
    with pytest.raises(BackendError, match="cannot be loaded: in the library"):
        EngineSet("the component", [engine], panic, None).prepare(shapes)
    opened = Fallback("fallback")
    EngineSet("the component", [engine], panic, lambda: opened).prepare(shapes)
    assert opened.calls == ["prepare"]
    assert "in the library" in caplog.text
