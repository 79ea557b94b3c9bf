"""The check of an engine before it is accepted, with ONNX Runtime in the engine's place: its results and
its refusals. On a GPU, `make test-gpu` checks real engines with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Arrays, Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import NOT_COMPARED
from latentrt.bundle.manifest import Precision
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import check_feeds
from latentrt.engines.record import EngineIdentity, EngineOptions
from latentrt.errors import BuildError
from latentrt_engines.profiles import component_profile, image_profile
from latentrt_engines.self_check import GateInputs, check_engine
from tests.engines import made_up
from tests.exported import Exported

COMPONENTS = ["safety_checker", "text_encoder", "unet", "vae_decoder", "vae_encoder"]


class Reference:
    """Opens graphs on ONNX Runtime's CPU, each once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._opened: dict[tuple[str, Precision], Session] = {}

    def __call__(self, component: str, precision: Precision) -> Session:
        key = (component, precision)
        if key not in self._opened:
            self._opened[key] = open_session(self._bundle, component, threads=1, precision=precision)
        return self._opened[key]


class Wrong(Session):
    """An engine whose outputs are changed, or missing where the change is None."""

    def __init__(self, session: Session, **changes: Any) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._session, self._changes = session, changes

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        outputs = dict(self._session.run(feeds))
        for name, change in self._changes.items():
            array = outputs.pop(name)
            if change is not None:
                outputs[name] = change(array)
        return outputs


def identity(bundle: Bundle, component: str, options: EngineOptions | None = None) -> EngineIdentity:
    manifest = bundle.manifest
    factor = manifest.latent_spaces["unet"].downscale
    images = image_profile(manifest, size=f"{8 * factor}..{16 * factor}", batch="1..2")
    profile = component_profile(component, manifest.components[component], images, manifest)
    return made_up.identity(bundle, component, profile=profile, options=options or EngineOptions())


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["sd2", "sample"])
def test_the_half_graph_meets_its_bounds(request: pytest.FixtureRequest, name: str, component: str) -> None:
    """On a CPU half graphs compute in float32 between casts, so this is the least that an engine differs by."""
    folder = bundle_path() if name == "sample" else request.getfixturevalue(name).bundle
    bundle = Bundle.open(folder)
    reference, wanted = Reference(bundle), identity(bundle, component)
    results = check_engine(reference(component, "float16"), wanted, bundle, reference)
    outputs = [spec.name for spec in bundle.manifest.components[component].outputs if spec.name not in NOT_COMPARED]
    cases = {str([getattr(shapes, which) for shapes in wanted.profile.values()]) for which in ("min", "opt", "max")}
    assert [result.output for result in results] == outputs * len(cases)
    assert all(result.value <= result.bound for result in results)
    assert any(result.value > 0 for result in results) or component in ("vae_decoder", "safety_checker")


def test_an_engine_equal_to_the_graph_has_no_error(sd1: Exported) -> None:
    bundle = Bundle.open(sd1.bundle)
    reference = Reference(bundle)
    results = check_engine(reference("unet", "float32"), identity(bundle, "unet"), bundle, reference)
    assert [result.value for result in results] == [0.0, 0.0]
    # The optimum is the minimum here, and is run once.
    assert [result.shapes["sample"] for result in results] == [(2, 4, 8, 8), (4, 4, 16, 16)]


def nan_in_one(array: NDArray[Any]) -> NDArray[Any]:
    array = array.copy()
    array.flat[0] = np.nan
    return array


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("unet", {"noise_pred": lambda array: array * 1.05}, r"noise_pred is 0\.0.* \(relative\) from ONNX Runtime's"),
        ("unet", {"noise_pred": nan_in_one}, "noise_pred has values that are not finite"),
        ("unet", {"noise_pred": lambda array: array[..., 1:]}, "noise_pred has the shape"),
        ("vae_decoder", {"pixels": lambda array: array ^ 8}, r"pixels is 8 \(levels\)"),
        ("safety_checker", {"concept_cosines": lambda array: array + 0.01}, r"concept_cosines is .* \(absolute\)"),
    ],
)
def test_an_engine_beyond_its_bound_is_refused(component: str, changes: dict[str, Any], message: str) -> None:
    bundle = Bundle.open(bundle_path())
    reference = Reference(bundle)
    engine = Wrong(reference(component, "float32"), **changes)
    with pytest.raises(BuildError, match=rf"{component}: the engine's {message}.*The engine was not kept"):
        check_engine(engine, identity(bundle, component), bundle, reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flagged": None}, "flagged is missing"),
        ({"flagged": lambda array: array.astype(np.int64)}, "flagged has the dtype int64"),
        ({"concept_scores": None}, "concept_scores is missing"),
        ({"concept_scores": lambda array: array.astype(np.float64)}, "concept_scores has the dtype float64"),
    ],
)
def test_an_output_of_another_form_is_refused(change: dict[str, Any], message: str) -> None:
    bundle = Bundle.open(bundle_path())
    reference = Reference(bundle)
    engine = Wrong(reference("safety_checker", "float32"), **change)
    with pytest.raises(BuildError, match=f"safety_checker: the engine's {message}.*The engine was not kept"):
        check_engine(engine, identity(bundle, "safety_checker"), bundle, reference)


def test_tf32_has_the_bound_of_its_ten_bits(sd1: Exported) -> None:
    bundle = Bundle.open(sd1.bundle)
    reference = Reference(bundle)
    engine = Wrong(reference("unet", "float32"), noise_pred=lambda array: array * (1 + 2**-10))
    with pytest.raises(BuildError, match=r"the bound is 0\.0001"):
        check_engine(engine, identity(bundle, "unet"), bundle, reference)
    assert check_engine(engine, identity(bundle, "unet", EngineOptions(tf32=True)), bundle, reference)


def test_an_output_without_a_bound_cannot_be_judged() -> None:
    bundle = Bundle.open(bundle_path())
    component = bundle.manifest.components["vae_decoder"]
    graphs = {name: msgspec.structs.replace(graph, gate=()) for name, graph in component.graphs.items()}
    bundle.manifest.components["vae_decoder"] = msgspec.structs.replace(component, graphs=graphs)
    reference = Reference(bundle)
    with pytest.raises(BuildError, match=r"vae_decoder: .* no gate result for pixels"):
        check_engine(reference("vae_decoder", "float32"), identity(bundle, "vae_decoder"), bundle, reference)


@pytest.mark.parametrize("component", COMPONENTS)
def test_inputs_are_real_fit_any_shape_and_are_the_same_every_time(component: str) -> None:
    bundle = Bundle.open(bundle_path())
    profile = identity(bundle, component).profile
    shapes = {name: shape.max for name, shape in profile.items()}
    first, second = (GateInputs(bundle, Reference(bundle)).feeds(component, shapes) for _ in range(2))
    check_feeds(bundle.manifest.components[component].inputs, first)
    for name, array in first.items():
        assert array.shape == shapes[name]
        np.testing.assert_array_equal(array, second[name])
        if array.dtype.kind == "f":
            assert np.isfinite(array).all()
            assert array.std() > 0.1
