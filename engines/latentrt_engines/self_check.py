"""Compares an engine with ONNX Runtime on the CPU before it is accepted.

The inputs are those of the exporter's gates (`latentrt.bundle.gate_inputs`), in the minimum, optimum and maximum shapes
of the engine's profile. The metrics and bounds are those of the graph's gate results in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, run
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import NOT_COMPARED, difference, find_mismatch, message
from latentrt.bundle.gate_inputs import collect_outputs, make_gate_inputs, reference_shapes, tokenize_prompts
from latentrt.bundle.manifest import GateResult, Precision
from latentrt.engines.record import EngineIdentity, ShapeRange
from latentrt.errors import BuildError
from latentrt.sampling.training_noise import training_alphas
from latentrt.text.tokenizer import open_tokenizer

__all__ = ["GateInputs", "check_engine"]

# The factor of float32 bounds for TF32, which has ten bits of fraction like half: the ratio of half's bound to
# float32's (`latentrt_export.gates.verify`).
_TF32_FACTOR = 100.0

OpenReference = Callable[[str, Precision], Session]


class GateInputs:
    """The gate inputs of each component of a bundle, in any shape.

    Args:
        bundle: the bundle; outputs of some components are inputs of others.
        reference: opens a component's graph on ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, reference: OpenReference) -> None:
        self._bundle, self._arrays = bundle, _SourceArrays(bundle, reference)

    def feeds(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Return a component's inputs of these shapes by name; the same arrays in every call."""
        return make_gate_inputs(component, self._bundle.manifest.components[component].inputs, shapes, self._arrays)


class _SourceArrays(dict[str, NDArray[Any]]):
    """The arrays behind the sources of inputs, computed on first access."""

    def __init__(self, bundle: Bundle, reference: OpenReference) -> None:
        super().__init__()
        self._bundle, self._reference = bundle, reference

    def __missing__(self, key: str) -> NDArray[Any]:
        manifest = self._bundle.manifest
        kind, _, name = key.partition(":")
        match kind:
            case "tokens":
                self[key] = tokenize_prompts(open_tokenizer(self._bundle, name).chunks)
            case "option":
                self[key] = np.array(getattr(manifest.limits, f"max_{name}"))
            case "alphas_cumprod":
                self[key] = training_alphas(manifest.schedulers[name].config)
            case "latents":
                self._run(manifest.by_role("encoder")[0])
            case _:
                self._run(key.partition(".")[0])
        return self[key]

    def _run(self, name: str) -> None:
        manifest = self._bundle.manifest
        component = manifest.components[name]
        feeds = make_gate_inputs(name, component.inputs, reference_shapes(component.inputs), self)
        found = run(self._reference(name, "float32"), **feeds)
        outputs = {spec.name: found[spec.name] for spec in component.outputs}
        self.update(collect_outputs(name, component.role, outputs, next(iter(manifest.latent_spaces.values()))))


def check_engine(
    engine: Session, identity: EngineIdentity, bundle: Bundle, reference: OpenReference
) -> tuple[GateResult, ...]:
    """Compare an engine with ONNX Runtime.

    Args:
        engine: the loaded engine, on the GPU.
        identity: the engine's identity.
        bundle: the bundle from which it was built.
        reference: opens a component's graph on ONNX Runtime.

    Returns:
        A result for each output and shape.

    Raises:
        BuildError: a difference exceeds its bound, or an output cannot be compared, so the engine must be rejected.
    """
    name = identity.component
    inputs, graph = GateInputs(bundle, reference), reference(name, "float32")
    results = []
    for shapes in _list_profile_shapes(identity.profile):
        feeds = inputs.feeds(name, shapes)
        expected, found = run(graph, **feeds), run(engine, **feeds)
        for output, wanted in expected.items():
            if output not in NOT_COMPARED:
                results.append(_compare(identity, bundle, output, shapes, wanted, found.get(output)))
            elif (mismatch := find_mismatch(wanted, found.get(output), "ONNX Runtime's")) is not None:
                raise BuildError(f"{name}: the engine's {output} {mismatch} expected the same. The engine was not kept")
    if not results:
        raise BuildError(f"{name}: no output of its engine can be compared, expected one. The engine was not kept")
    return tuple(results)


def _list_profile_shapes(profile: Mapping[str, ShapeRange]) -> list[dict[str, tuple[int, ...]]]:
    """Return the minimum, optimum and maximum shapes of a profile by input, without duplicates."""
    found: list[dict[str, tuple[int, ...]]] = []
    for which in ("min", "opt", "max"):
        shapes = {name: getattr(ranges, which) for name, ranges in profile.items()}
        if shapes not in found:
            found.append(shapes)
    return found


def _compare(
    identity: EngineIdentity,
    bundle: Bundle,
    output: str,
    shapes: dict[str, tuple[int, ...]],
    expected: NDArray[Any],
    found: NDArray[Any] | None,
) -> GateResult:
    gates = bundle.manifest.components[identity.component].graphs[identity.precision].gate
    gate = next((gate for gate in gates if gate.output == output), None)
    if gate is None:
        raise BuildError(
            f"{identity.component}: the manifest has no gate result for {output}, so its engine cannot be compared; "
            "export the bundle again"
        )
    bound = gate.bound * _TF32_FACTOR if identity.options.tf32 and gate.metric != "levels" else gate.bound
    value = difference(expected, found, gate.metric)
    if not value <= bound:
        wrong = message(expected, found, value, gate.metric, "ONNX Runtime's")
        raise BuildError(
            f"{identity.component}: the engine's {output} {wrong} for inputs of shape {shapes}; the bound is "
            f"{bound:g}. The engine was not kept"
        )
    return GateResult(output=output, shapes=shapes, metric=gate.metric, value=value, bound=bound)
