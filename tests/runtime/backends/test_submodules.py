"""When a submodule is loaded, and when it is let go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from latentrt.backends.submodules import Submodules
from numpy.typing import NDArray

from latentrt import Bundle, Pipeline, Request
from latentrt.backends import openvino as ov
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.openvino import OpenVinoSession
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.tensors import TensorSpec, sized
from latentrt.errors import BackendError
from tests.exported import Exported

SIZES = {"batch": 2, "height": 8, "width": 8}


class _Session:
    inputs = ()

    def __init__(self) -> None:
        self.prepared: list[Mapping[str, int]] = []

    def prepare(self, sizes: Mapping[str, int]) -> None:
        self.prepared.append(sizes)

    def run(self, feeds: Mapping[str, Any]) -> Arrays:
        return {}


class _Loader:
    """Opens sessions; `opened` are those it was asked for. `fails` of them cannot be had."""

    def __init__(self, fails: int = 0) -> None:
        self.opened, self.fails = list[str](), fails
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, name: str) -> _Session:
        self.go_on.wait(10)
        self.opened.append(name)
        if len(self.opened) <= self.fails:
            raise BackendError(f"{name} cannot be had")
        return _Session()


def threads_are_done() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("latentrt-load"):
            thread.join(10)


def test_each_is_loaded_once_whoever_asks() -> None:
    loader = _Loader()
    submodules = Submodules(loader, low_memory=False)
    loader.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(submodules, "unet") for _ in range(4)]
        loader.go_on.set()
        assert len({id(each.result(10)) for each in asked}) == 1
    assert loader.opened == ["unet"]


def test_different_ones_are_loaded_side_by_side() -> None:
    """A submodule that takes long does not keep another waiting."""
    loader, slow = _Loader(), threading.Event()

    def open_session(name: str) -> _Session:
        if name == "unet":
            assert slow.wait(10)
        return loader(name)

    submodules = Submodules(open_session, low_memory=False)
    submodules.load_ahead("unet", SIZES)
    submodules("text_encoder")
    assert loader.opened == ["text_encoder"]
    slow.set()
    submodules("unet")
    assert loader.opened == ["text_encoder", "unet"]


def test_what_is_loaded_ahead_is_prepared() -> None:
    loader = _Loader()
    submodules = Submodules(loader, low_memory=False)
    submodules.load_ahead("unet", SIZES)
    threads_are_done()
    session = submodules("unet")
    assert isinstance(session, _Session)
    assert session.prepared == [SIZES]
    submodules.load_ahead("unet", SIZES)
    threads_are_done()
    assert (loader.opened, session.prepared) == (["unet"], [SIZES])


def test_a_failure_is_told_to_whoever_needs_it_each_time() -> None:
    loader = _Loader(fails=3)
    submodules = Submodules(loader, low_memory=False)
    submodules.load_ahead("unet", SIZES)
    threads_are_done()
    for _ in range(2):
        with pytest.raises(BackendError, match="unet cannot be had"):
            submodules("unet")
    assert isinstance(submodules("unet"), _Session)


def test_where_memory_is_short_nothing_is_there_before_or_after() -> None:
    loader = _Loader()
    submodules = Submodules(loader, low_memory=True)
    submodules.load_ahead("unet", SIZES)
    threads_are_done()
    assert loader.opened == []
    first = submodules("unet")
    assert submodules("unet") is first
    submodules.done_with("unet")
    assert submodules("unet") is not first


def test_otherwise_what_is_done_with_is_kept() -> None:
    submodules = Submodules(_Loader(), low_memory=False)
    first = submodules("unet")
    submodules.done_with("unet")
    assert submodules("unet") is first


def test_where_memory_is_short_each_is_there_for_its_work_alone(sd1: Exported) -> None:
    bundle, events = Bundle.open(sd1.bundle), list[str]()

    def open_one(component: str) -> Session:
        events.append(f"open {component}")
        session = open_session(bundle, component)
        weakref.finalize(session, events.append, f"let go {component}")
        return session

    quick: dict[str, Any] = {"seed": 7, "num_inference_steps": 2, "output_type": "np"}
    plain = Pipeline(bundle, lambda component: open_session(bundle, component))
    short = Pipeline(bundle, open_one, low_memory=True)
    expected = plain("a star", **quick).images
    np.testing.assert_array_equal(short("a star", **quick).images, expected)
    order = ["text_encoder", "unet", "vae_decoder", "safety_checker"]
    assert events == [f"{what} {name}" for name in order for what in ("open", "let go")]


def test_what_is_left_early_is_let_go_too(sd1: Exported) -> None:
    bundle, gone = Bundle.open(sd1.bundle), list[str]()

    def open_one(component: str) -> Session:
        session = open_session(bundle, component)
        weakref.finalize(session, gone.append, component)
        return session

    steps = Pipeline(bundle, open_one, low_memory=True).steps(
        Request.of(prompt="a star", seed=7, num_inference_steps=3)
    )
    next(steps)
    assert gone == ["text_encoder"]
    steps.close()
    assert gone == ["text_encoder", "unet"]


class _Recording:
    """A session that tells which shapes it was prepared for, and which it was fed."""

    def __init__(self, real: OpenVinoSession, told: _Shapes, name: str) -> None:
        self._real, self._told, self._name = real, told, name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._real.inputs

    def prepare(self, sizes: Mapping[str, int]) -> None:
        self._told.prepared[self._name] = [sized(spec, sizes) for spec in self.inputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self._told.fed.setdefault(self._name, []).append([feeds[spec.name].shape for spec in self.inputs])
        return self._real.run(feeds)


@dataclass
class _Shapes:
    prepared: dict[str, list[tuple[int, ...]]]
    fed: dict[str, list[list[tuple[int, ...]]]]


@pytest.mark.parametrize(
    ("call", "decodes"),
    [
        ({}, (1, 4, 8, 8)),
        ({"guidance_scale": 1.0, "num_images_per_prompt": 2, "height": 80}, (1, 4, 10, 8)),
        ({"height": 80, "width": 128, "decoder": "tiled"}, (1, 4, 6, 7)),
    ],
)
def test_a_cpu_prepares_what_will_be_fed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, sd1: Exported, call: dict[str, Any], decodes: tuple[int, ...]
) -> None:
    """A shape that is not fed would have been compiled for nothing."""
    shapes = _Shapes({}, {})

    def recording(bundle: Bundle, component: str, *given: Any, part: str | None = None, **named: Any) -> _Recording:
        real = openvino_session(bundle, component, *given, part=part, **named)
        return _Recording(real, shapes, part or component)

    openvino_session = ov.open_session
    monkeypatch.setattr(ov, "open_session", recording)
    pipeline = Pipeline.load(sd1.bundle, device="openvino")
    pipeline("a star", seed=7, num_inference_steps=3, output_type="np", **call)
    threads_are_done()
    assert {*shapes.prepared} == {"body", "cross_attention_kv", "time_embedding", "vae_decoder", "safety_checker"}
    assert shapes.prepared == {name: shapes.fed[name][0] for name in shapes.prepared}
    assert shapes.prepared["vae_decoder"] == [decodes]
    assert all(each == found[0] for found in shapes.fed.values() for each in found)
