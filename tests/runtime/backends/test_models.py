"""Sessions of the process: shared, reference counted, loaded when needed or ahead, released where memory is short."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Bundle, Pipeline, Request
from latentrt.backends.models import PROCESS, Components, Models
from latentrt.backends.placement import Placement, Preferences, place_components
from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import BackendError, RequestError

QUICK: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 2, "output_type": "np"}


class FakeSession(Session):
    """A session that records calls of `prepare` and `close`."""

    inputs = (TensorSpec("x", "float32", ("batch", 3, "2*height")),)
    outputs = ()

    def __init__(self) -> None:
        self.prepared, self.closed = list[Shapes](), 0

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return {}

    def prepare(self, shapes: Shapes) -> None:
        self.prepared.append(shapes)

    def close(self) -> None:
        self.closed += 1


class Loader:
    """Opens fake sessions.

    Attributes:
        opened: the sessions. calls: how often one was to be opened; the first `fails` of them fail.
        go: unset, it holds loading up.
    """

    def __init__(self, fails: int = 0) -> None:
        self.opened, self.calls, self.fails = list[FakeSession](), 0, fails
        self.go = threading.Event()
        self.go.set()

    def __call__(self, part: str | None = None) -> FakeSession:
        self.calls += 1
        assert self.go.wait(10)
        if self.calls <= self.fails:
            raise BackendError("out of memory")
        self.opened.append(FakeSession())
        return self.opened[-1]


def placement(load: Callable[[str | None], Session], *key: Any, **changes: Any) -> Placement:
    return Placement(backend="onnxruntime", device="cpu", title="fake", open=load, key=key or ("key",), **changes)


def components(models: Models, *, low_memory: bool = False, **loaders: Loader) -> Components:
    placements = {name: placement(load, name) for name, load in loaders.items()}
    return Components(placements, low_memory=low_memory, models=models)


def wait_for_prefetches() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("latentrt-load"):
            thread.join(10)


@pytest.fixture
def models() -> Models:
    return Models()


def test_a_key_is_loaded_once_and_closed_with_its_last_user(models: Models) -> None:
    loader = Loader()
    first, second = (models.acquire(("a",), loader) for _ in range(2))
    other = models.acquire(("b",), loader)
    assert first is second
    assert first is not other
    assert (loader.calls, len(models)) == (2, 2)
    models.release(("a",))
    assert loader.opened[0].closed == 0
    models.release(("a",))
    assert [each.closed for each in loader.opened] == [1, 0]
    models.release(("a",))
    assert loader.opened[0].closed == 1
    assert models.acquire(("a",), loader) is not first
    assert len(models) == 2


def test_concurrent_calls_share_one_load(models: Models) -> None:
    loader = Loader()
    loader.go.clear()
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(models.acquire, ("a",), loader) for _ in range(8)]
        loader.go.set()
        assert len({id(each.result(10)) for each in pending}) == 1
    assert loader.calls == 1
    for _ in range(8):
        assert loader.opened[0].closed == 0
        models.release(("a",))
    assert loader.opened[0].closed == 1


def test_a_slow_load_does_not_hold_up_another(models: Models) -> None:
    slow, fast = Loader(), Loader()
    slow.go.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(models.acquire, ("slow",), slow)
        models.acquire(("fast",), fast)
        assert not waiting.done()
        slow.go.set()
        assert waiting.result(10) is slow.opened[0]


def test_everyone_who_waits_sees_the_error_and_the_next_loads_again(models: Models) -> None:
    loader = Loader(fails=1)
    loader.go.clear()
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(models.acquire, ("a",), loader) for _ in range(4)]
        while models._entries.get(("a",)) is None or models._entries["a",].users < 4:
            pass
        loader.go.set()
        errors = [each.exception(10) for each in pending]
    assert all(isinstance(error, BackendError) for error in errors)
    assert (loader.calls, len(models)) == (1, 0)
    assert models.acquire(("a",), loader) is loader.opened[0]
    models.release(("a",))
    assert loader.opened[0].closed == 1, "those who got the error hold nothing"


def test_threads_that_come_and_go_never_use_a_closed_session(models: Models) -> None:
    loader, closed = Loader(), list[bool]()

    def use(_: int) -> None:
        session = models.acquire(("a",), loader)
        closed.append(bool(session.closed))  # type: ignore[attr-defined]
        models.release(("a",))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
    assert not any(closed)
    assert len(models) == 0
    assert all(session.closed == 1 for session in loader.opened)


def test_a_pipeline_holds_each_session_once(models: Models) -> None:
    load = Loader()
    own = components(models, unet=load)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: own.session("unet"), range(20)))) == 1
    assert load.calls == 1
    own.close()
    assert load.opened[0].closed == 1
    assert len(models) == 0


def test_parts_of_a_component_are_sessions_of_their_own(models: Models) -> None:
    load = Loader()
    own = components(models, decoder=load)
    assert len({own.session("decoder", part) for part in (None, "head", "slice.0")}) == 3
    own.release("decoder", "head")
    assert [session.closed for session in load.opened] == [0, 1, 0]
    own.release("decoder", "neck")


def test_two_pipelines_of_one_bundle_share_their_sessions(models: Models) -> None:
    placements = [place_components(Bundle.open(bundle_path()), "cpu") for _ in range(2)]
    first, second = (Components(each, models=models) for each in placements)
    assert first.session("unet") is second.session("unet")
    assert first.session("unet", "body") is second.session("unet", "body")
    assert len(models) == 2
    first.close()
    bundle = Bundle.open(bundle_path())
    images = Pipeline(bundle, second)(**QUICK).images
    third = place_components(bundle, "cpu", preferences=Preferences(threads=1))
    assert Components(third, models=models).session("unet") is not second.session("unet")
    assert images.std() > 0.1
    second.close()


def test_pipelines_share_by_default_and_give_back_when_they_are_gone() -> None:
    threads = 3  # as no other test has it
    first, second = (Pipeline.load(device="cpu", threads=threads) for _ in range(2))
    gc.collect()  # objects of other tests
    before = len(PROCESS)
    session = first.components.session("text_encoder")
    assert second.components.session("text_encoder") is session
    assert len(PROCESS) == before + 1
    del first
    gc.collect()
    assert len(PROCESS) == before + 1
    del second
    gc.collect()
    assert len(PROCESS) == before
    assert session._session is None, "closed"  # type: ignore[attr-defined]


def test_a_session_that_loads_after_closing_is_released_too(models: Models) -> None:
    """A prefetch may still be under way."""
    load = Loader()
    own = components(models, unet=load)
    own.close()
    with pytest.raises(RequestError, match="closed"):
        own.session("unet")
    assert load.opened[0].closed == 1


def test_closing_waits_for_the_runs_in_progress(models: Models) -> None:
    load = Loader()
    own = components(models, unet=load)
    with own.run():
        session = own.session("unet")
        own.close()
        assert own.session("unet") is session
        assert load.opened[0].closed == 0, "in use"
        with pytest.raises(RequestError, match="closed"), own.run():
            pass
    assert load.opened[0].closed == 1
    own.close()
    assert (len(models), load.calls) == (0, 1)


def test_a_component_that_the_bundle_does_not_have_is_refused(models: Models) -> None:
    with pytest.raises(BackendError, match=r"'nope'.*unet"):
        components(models, unet=Loader()).session("nope")


def test_on_cpu_says_whether_a_cpu_runs_everything() -> None:
    here, there = placement(Loader()), Placement(backend="tensorrt", device="gpu", title="", open=Loader(), key=())
    assert Components({"a": here, "b": here}).on_cpu
    assert not Components({"a": here, "b": there}).on_cpu
    assert not Components({}).on_cpu


# Prefetching.


def test_a_prefetched_session_is_prepared_for_its_shapes(models: Models) -> None:
    load = Loader()
    own = components(models, unet=load)
    for _ in range(2):  # once it is there, nothing is left to do
        own.prefetch("unet", {"batch": 2, "height": 8, "width": 1})
        wait_for_prefetches()
    assert own.session("unet") is load.opened[0]
    assert (load.calls, load.opened[0].prepared) == (1, [{"x": (2, 3, 16)}])


def test_the_first_parts_are_prefetched(models: Models) -> None:
    parts: list[str | None] = []

    def load(part: str | None) -> Session:
        parts.append(part)
        return FakeSession()

    own = Components(
        {"unet": placement(load, "unet", split=True), "decoder": placement(load, "decoder", sliced=True)}, models=models
    )
    for name in ("unet", "decoder", "encoder"):
        own.prefetch(name, {"batch": 1, "height": 1})
    wait_for_prefetches()
    assert parts == ["body", "cross_attention_kv", "time_embedding"], "nothing of a decoder that runs in slices"


def test_a_prefetch_that_fails_is_an_error_for_whoever_needs_it(models: Models) -> None:
    load = Loader(fails=2)
    own = components(models, unet=load)
    own.prefetch("unet", {"batch": 1, "height": 1})
    wait_for_prefetches()
    with pytest.raises(BackendError, match="out of memory"):
        own.session("unet")
    assert own.session("unet") is load.opened[0]


def test_prefetching_does_not_block_other_callers(models: Models) -> None:
    slow, fast = Loader(), Loader()
    own = components(models, unet=slow, encoder=fast)
    slow.go.clear()
    own.prefetch("unet", {"batch": 1, "height": 1})
    own.session("encoder")
    assert slow.opened == []
    slow.go.set()
    assert own.session("unet") is slow.opened[0]
    assert slow.calls == 1


class Recording(Session):
    """A session that records the shapes it is prepared for and fed."""

    def __init__(self, real: Session, prepared: list[Any], fed: list[Any]) -> None:
        self.inputs, self.outputs = real.inputs, real.outputs
        self._real, self._prepared, self._fed = real, prepared, fed

    def prepare(self, shapes: Shapes) -> None:
        self._prepared.append(dict(shapes))

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self._fed.append({spec.name: feeds[spec.name].shape for spec in self.inputs})
        return self._real.run(feeds)


@pytest.mark.parametrize(
    ("call", "decodes"),
    [
        ({}, (1, 4, 16, 16)),
        ({"guidance_scale": 1.0, "num_images_per_prompt": 2, "height": 80}, (1, 4, 20, 16)),
        ({"height": 80, "width": 128, "decoder": "tiled"}, (1, 4, 12, 13)),
        ({"guidance_end": 0.5, "sampler": "heun"}, (1, 4, 16, 16)),
        ({"guidance_start": 0.5}, (1, 4, 16, 16)),
    ],
    ids=str,
)
def test_a_cpu_prepares_the_shapes_of_the_first_row_and_nothing_else(
    models: Models, call: dict[str, Any], decodes: tuple[int, ...]
) -> None:
    """OpenVINO compiles for each set of shapes; others would be compiled in vain."""
    bundle = Bundle.open(bundle_path())
    prepared, fed = dict[str, list[Any]](), dict[str, list[Any]]()

    def recording(name: str, real: Placement) -> Placement:
        def load(part: str | None) -> Session:
            place = part or name
            return Recording(real.open(part), prepared.setdefault(place, []), fed.setdefault(place, []))

        return placement(load, name, split=real.split)

    placements = {name: recording(name, each) for name, each in place_components(bundle, "cpu").items()}
    Pipeline(bundle, Components(placements, models=models))(**QUICK | {"num_inference_steps": 4} | call)
    wait_for_prefetches()
    expected = ["body", "cross_attention_kv", "time_embedding", "safety_checker", "vae_decoder"]
    assert {name: shapes for name, shapes in prepared.items() if shapes} == {name: [fed[name][0]] for name in expected}
    assert prepared["vae_decoder"] == [{"latents": decodes}]


# Little memory.


def test_with_little_memory_no_session_stays_open(models: Models) -> None:
    load = Loader()
    own = components(models, low_memory=True, unet=load)
    own.prefetch("unet", {"batch": 1, "height": 1})
    wait_for_prefetches()
    assert load.calls == 0
    first, body = own.session("unet"), own.session("unet", "body")
    assert own.session("unet") is first
    own.done_with("unet")
    assert [session.closed for session in load.opened] == [1, 1]
    assert own.session("unet", "body") is not body


def test_with_enough_memory_every_session_is_kept(models: Models) -> None:
    load = Loader()
    own = components(models, unet=load)
    own.session("unet")
    own.done_with("unet")
    assert (load.opened[0].closed, len(models)) == (0, 1)


def recorded(models: Models, events: list[str]) -> Pipeline:
    """Return a pipeline with little memory that records when its components are opened and closed."""
    bundle = Bundle.open(bundle_path())

    def recording(name: str, real: Placement) -> Placement:
        def load(part: str | None) -> Session:
            events.append(f"open {name}")
            session = real.open(None)
            close = session.close

            def closing() -> None:
                events.append(f"close {name}")
                close()

            session.close = closing  # type: ignore[method-assign]
            return session

        return placement(load, name)

    placements = {name: recording(name, each) for name, each in place_components(bundle, "cpu").items()}
    return Pipeline(bundle, Components(placements, low_memory=True, models=models))


def test_with_little_memory_a_component_is_open_only_during_its_work(models: Models) -> None:
    events: list[str] = []
    images = recorded(models, events)(**QUICK).images
    order = ["text_encoder", "unet", "vae_decoder", "safety_checker"]
    assert events == [f"{event} {name}" for name in order for event in ("open", "close")]
    plain = Pipeline.load(device="cpu")(**QUICK).images
    # Whole and in parts: a level where a value lies on the edge between two.
    np.testing.assert_allclose(images, plain, rtol=0, atol=1.001 / 255)


def test_a_run_that_is_left_early_releases_its_denoiser(models: Models) -> None:
    events: list[str] = []
    steps = recorded(models, events).steps(Request.of(prompt="a star", seed=7, num_inference_steps=3))
    next(steps)
    assert events == ["open text_encoder", "close text_encoder", "open unet"]
    steps.close()
    assert events[-1] == "close unet"


def test_a_run_releases_nothing_that_another_one_uses(models: Models) -> None:
    events: list[str] = []
    pipeline = recorded(models, events)
    request = pipeline.resolve(Request.of(prompt="a star", seed=7, num_inference_steps=3))
    expected = [each.latents for each in pipeline.steps(request)][-1]
    events.clear()
    steps = pipeline.steps(request)
    next(steps)
    np.testing.assert_array_equal([each.latents for each in pipeline.steps(request)][-1], expected)
    assert "close unet" not in events
    np.testing.assert_array_equal(list(steps)[-1].latents, expected)
    assert events.count("open unet") == events.count("close unet") == 1
    assert len(models) == 0


def test_threads_share_a_pipeline_with_little_memory() -> None:
    pipeline = Pipeline.load(device="cpu", low_memory=True, threads=1)
    expected = pipeline(**QUICK).images
    with ThreadPoolExecutor(4) as pool:
        for images in pool.map(lambda _: pipeline(**QUICK).images, range(6)):
            np.testing.assert_array_equal(images, expected)
