"""The rules for the inputs and outputs of a bundle's components and their parts.

The loop, the decoder and the safety check address tensors by the component's role: a decoder takes `latents` and makes
`pixels`, a part takes outputs of others. A manifest that breaks such a rule is rejected when it is read, so that later
code can rely on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from latentrt.bundle.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from latentrt.bundle.manifest import Component, InputSpec, LatentSpace, Manifest, Part, Role

__all__ = ["find_signature_problems", "has_plain_axes"]

_AXIS = re.compile(r"(?:([1-9][0-9]{0,3})\*)?([a-z][a-z0-9_]{0,63})", re.ASCII)

# Source → name (None: any), dtypes and rank of the one input that a component of the role has from it.
_INPUTS: Mapping[Role, Mapping[str, tuple[str | None, tuple[DType, ...], int]]] = {
    "text-encoder": {"tokens": ("input_ids", ("int64",), 2)},
    "image-encoder": {"image": ("pixels", ("uint8", "float32"), 4)},
    "denoiser": {"latents": (None, ("float32",), 4)},
    "encoder": {"image": ("pixels", ("float32",), 4)},
    "decoder": {"latents": ("latents", ("float32",), 4)},
    "preview-decoder": {"latents": ("latents", ("float32",), 4)},
    "classifier": {"images": ("pixels", ("uint8",), 4)},
    "depth-estimator": {"image": ("pixels", ("float32",), 4)},
}
# Name → dtype and rank of the outputs that a component of the role has at least.
_OUTPUTS: Mapping[Role, Mapping[str, tuple[DType, int]]] = {
    "text-encoder": {"hidden_states": ("float32", 3)},
    "image-encoder": {},
    "denoiser": {},
    "encoder": {"mean": ("float32", 4)},  # and `logvar`, unless it encodes without noise
    "decoder": {"pixels": ("uint8", 4)},
    "preview-decoder": {"pixels": ("uint8", 4)},
    "classifier": {"concept_scores": ("float32", 2), "special_care_scores": ("float32", 2), "flagged": ("bool", 1)},
    "depth-estimator": {"predicted_depth": ("float32", 3)},
}
_TIMES = ("timestep", "c-noise")
# Sources of the time embedding; pooled outputs of other components, one vector for each evaluation, are further ones.
_TIME_EMBEDDING = (*_TIMES, "guidance-weight", "micro-conditioning")
_POOLED_RANK = 2
# Sizes and a crop, or an aesthetic score in place of the target size.
_MICRO_CONDITIONING_SIZES = (6, 5)
# The sources of a decoder's inputs in their order: the first one, or all.
_DECODER_SOURCES = ("latents", "image", "mask")
_DEEP_FEATURES = "deep_features"
_SLICE_INPUTS = ("features", "inside", "mean", "variance", "residual")


def find_signature_problems(manifest: Manifest) -> Iterator[str]:
    """Describe each input or output that breaks a rule, as a clause that continues `bundle.json: `.

    A check may assume that all earlier ones passed: the caller stops at the first description.
    """
    for name, component in manifest.components.items():
        yield from _check_specs(name, "input", component.inputs)
        yield from _check_specs(name, "output", component.outputs)
        for part_name, part in component.parts.items():
            owner = f"{name}'s {part_name} part"
            yield from _check_specs(owner, "input", part.inputs)
            yield from _check_specs(owner, "output", part.outputs)
    for name, component in manifest.components.items():
        yield from _check_role(name, component)
        yield from _check_sources(name, component, manifest.components)
        yield from _check_sizes(name, component, manifest)
        if component.role == "denoiser":
            yield from _check_split(name, component)
        if component.role == "decoder":
            yield from _check_slices(name, component)


def has_plain_axes(spec: TensorSpec) -> bool:
    """Return whether each axis is a size, a name or a multiple of one (`8*height`)."""
    return all(isinstance(axis, int) or _AXIS.fullmatch(axis) for axis in spec.shape)


def _check_specs(owner: str, kind: str, specs: tuple[TensorSpec, ...]) -> Iterator[str]:
    """Check the rules for every input and output: distinct names, and axes that are sizes, names or multiples."""
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        yield f"{owner} has the {kind}s {names}, expected at least one and each name once"
    for spec in specs:
        if not has_plain_axes(spec):
            yield f"{owner} has the {kind} {spec}, expected axes such as 4, height or 8*height"
        if not spec.shape or isinstance(spec.shape[0], int) or "*" in spec.shape[0]:
            yield f"{owner} has the {kind} {spec}, expected a name for its first axis, such as batch"


def _check_role(name: str, component: Component) -> Iterator[str]:
    """Check that a component has the inputs and outputs by which its role is run."""
    role = component.role
    for source, (wanted, dtypes, rank) in _INPUTS[role].items():
        found = [spec for spec in component.inputs if spec.source == source]
        called = f" named {wanted}" if wanted is not None else ""
        if len(found) != 1 or (found[0].name != (wanted or found[0].name)):
            yield (
                f"{name} has the inputs {_join(component.inputs)}, expected one{called} from {source}, as every {role} "
                "has"
            )
        elif found[0].dtype not in dtypes or len(found[0].shape) != rank:
            yield f"{name} has the input {found[0]}, expected {' or '.join(dtypes)} with {rank} axes"
    outputs = {spec.name: spec for spec in component.outputs}
    for wanted_output, (dtype, rank) in _OUTPUTS[role].items():
        spec = outputs.get(wanted_output)
        if spec is None or spec.dtype != dtype or len(spec.shape) != rank:
            yield (
                f"{name} has the outputs {_join(component.outputs)}, expected {wanted_output} among them, {dtype} with "
                f"{rank} axes, as every {role} has"
            )
    if role == "text-encoder" and (unknown := {spec.name for spec in component.inputs} - {"input_ids", "clip_skip"}):
        yield f"{name} has the inputs {sorted(unknown)}, expected none beside input_ids and clip_skip"
    if role == "denoiser":
        times = [spec for spec in component.inputs if spec.source in _TIMES]
        if len(times) != 1 or times[0].dtype != "float32" or len(times[0].shape) != 1:
            yield f"{name} has the inputs {_join(component.inputs)}, expected one float32 from {' or '.join(_TIMES)}"
        yield from _check_micro_conditioning(name, component)
    first = component.inputs[0].shape[0]
    if any(spec.shape[0] != first for spec in (*component.inputs, *component.outputs)):
        yield f"{name} has tensors whose first axis is not {first}, expected one name for all"
    made = {axis for spec in component.outputs for axis in _names(spec)}
    if unmade := made - {axis for spec in component.inputs for axis in _names(spec)}:
        yield f"{name} has outputs with the axes {sorted(unmade)}, expected axes of its inputs"


def _check_micro_conditioning(name: str, component: Component) -> Iterator[str]:
    found = [spec for spec in component.inputs if spec.source == "micro-conditioning"]
    sizes = _MICRO_CONDITIONING_SIZES
    if len(found) > 1 or any(
        spec.dtype != "float32" or spec.shape[1:] not in [(size,) for size in sizes] for spec in found
    ):
        yield (
            f"{name} has the inputs {_join(found)} from micro-conditioning, expected one float32 with "
            f"{' or '.join(map(str, sizes))} values for each evaluation"
        )


def _check_sources(name: str, component: Component, components: Mapping[str, Component]) -> Iterator[str]:
    for spec in component.inputs:
        made = []
        for maker, output in spec.made_by:
            outputs = components[maker].outputs if maker in components else ()
            found = next((each for each in outputs if each.name == output), None)
            if found is None:
                yield (
                    f"{name}'s input {spec.name} comes from {spec.source}, expected an output of one of the components"
                )
            elif found.dtype != spec.dtype:
                yield (
                    f"{name}'s input {spec} comes from {maker}.{output}, which is {found.dtype}, expected the same "
                    "dtype"
                )
            else:
                made.append(found)
        if len(spec.made_by) > 1:
            yield from _check_joined(name, spec, made)


def _check_joined(name: str, spec: InputSpec, made: Sequence[TensorSpec]) -> Iterator[str]:
    """Check that outputs can be joined along the last axis, and have the width of the input together."""
    inner = {each.shape[1:-1] for each in made}
    widths = [each.shape[-1] for each in made]
    whole = [width for width in widths if isinstance(width, int)]
    if len(inner) > 1 or len(whole) < len(widths) or {len(each.shape) for each in made} != {len(spec.shape)}:
        yield f"{name}'s input {spec} joins {_join(made)}, expected sizes that differ in the last axis alone"
    elif sum(whole) != spec.shape[-1]:
        yield f"{name}'s input {spec} joins {_join(made)}, expected {sum(whole)} values in its last axis"


def _check_sizes(name: str, component: Component, manifest: Manifest) -> Iterator[str]:
    """Check that latents and images have the latent space's channels and sides, and embeddings a row for each token."""
    spaces, role = manifest.latent_spaces, component.role
    space = spaces[name] if role == "denoiser" else next(iter(spaces.values()))
    latents, image, tokens = (component.input_from(source) for source in ("latents", "image", "tokens"))
    if tokens is not None:
        for spec in component.outputs:
            if spec.name == "hidden_states" and (spec.shape[1] != tokens.shape[1] or isinstance(spec.shape[2], str)):
                yield f"{name} has the output {spec}, expected {tokens.shape[1]} tokens and a width"
    if role == "denoiser" and latents is not None:
        batch, channels, *sides = latents.shape
        if not isinstance(channels, int) or channels < space.channels or any(isinstance(side, int) for side in sides):
            yield f"{name} has the input {latents}, expected at least {space.channels} channels and names of its sides"
        wanted = TensorSpec(component.outputs[0].name, "float32", (batch, space.channels, *sides))
        if component.outputs[0] != wanted:
            yield f"{name} has the output {component.outputs[0]}, expected {wanted}"
    elif role in ("decoder", "preview-decoder") and latents is not None:
        yield from _check_image(name, latents, component.outputs[0], space)
        expected: list[tuple[TensorSpec, ...]] = [(latents.tensor,)]
        if role == "decoder" and not component.parts:  # slices take latents alone
            expected.append((latents.tensor, *_list_inpainting_inputs(latents, space)))
        found = tuple(spec.tensor for spec in component.inputs)
        sources = tuple(spec.source for spec in component.inputs)
        if found not in expected or sources != _DECODER_SOURCES[: len(sources)] or len(component.outputs) != 1:
            yield (
                f"{name} has the inputs {_join(component.inputs)}, expected {' or '.join(map(_join, expected))}, and "
                "no output but pixels"
            )
    elif role == "encoder" and image is not None:
        (mean,) = (spec for spec in component.outputs if spec.name == "mean")
        made = [spec for spec in component.outputs if spec.name in ("mean", "logvar")]
        batch, _, *sides = mean.shape
        pixels = (batch, 3, *(_multiply(space.downscale, side) for side in sides))
        same = all(spec.dtype == "float32" and spec.shape == mean.shape for spec in made)
        if not same or mean.shape[1] != space.channels or image.shape != pixels:
            yield (
                f"{name} makes {_join(made)} of {image}, expected the same shape with {space.channels} channels, and "
                f"{space.downscale} × {space.downscale} pixels for each latent"
            )
    elif role in ("classifier", "image-encoder", "depth-estimator"):
        (pixels_spec,) = (spec for spec in component.inputs if spec.name == "pixels")
        channels_axis = 3 if pixels_spec.dtype == "uint8" else 1
        if pixels_spec.shape[channels_axis] != 3:
            yield f"{name} has the input {pixels_spec}, expected 3 channels on axis {channels_axis}"


def _list_inpainting_inputs(latents: TensorSpec, space: LatentSpace) -> Iterator[TensorSpec]:
    """Yield the inputs that a decoder may have after the latents: the image and the mask of inpainting."""
    batch, _, *sides = latents.shape
    for name, channels in (("image", 3), ("mask", 1)):
        yield TensorSpec(name, "float32", (batch, channels, *(_multiply(space.downscale, side) for side in sides)))


def _check_image(name: str, latents: TensorSpec, pixels: TensorSpec, space: LatentSpace) -> Iterator[str]:
    batch, channels, *sides = latents.shape
    wanted = (batch, *(_multiply(space.downscale, side) for side in sides), 3)
    if channels != space.channels or pixels.shape != wanted or any(isinstance(side, int) for side in sides):
        yield (
            f"{name} makes {pixels} of {latents}, expected {space.channels} channels, names for the sides, and "
            f"{TensorSpec('pixels', 'uint8', wanted)}"
        )


def _check_split(name: str, component: Component) -> Iterator[str]:
    """Check that each part of a denoiser takes inputs of the whole or outputs of the parts that run before it."""
    parts = component.parts
    whole = {spec.name: spec.tensor for spec in component.inputs}
    times = {
        spec.name
        for spec in component.inputs
        if spec.source in _TIME_EMBEDDING or (spec.made_by and len(spec.shape) == _POOLED_RANK)
    }
    (latents,) = (spec.name for spec in component.inputs if spec.source == "latents")
    available = dict(whole)
    for part_name, takes in (("time_embedding", times), ("cross_attention_kv", whole.keys() - {*times, latents})):
        if part_name not in parts:
            continue
        part, owner = parts[part_name], f"{name}'s {part_name} part"
        if not {spec.name for spec in part.inputs} <= takes:
            yield f"{owner} has the inputs {_join(part.inputs)}, expected them from {', '.join(sorted(takes))}"
        yield from _check_taken(owner, part, whole)
        if any(spec.shape[0] != part.inputs[0].shape[0] for spec in (*part.inputs, *part.outputs)):
            yield f"{owner} has tensors whose first axes differ, expected {part.inputs[0].shape[0]}"
        if again := {spec.name for spec in part.outputs} & available.keys():
            yield f"{owner} makes {min(again)}, which is an input or made by another part"
        available |= {spec.name: spec for spec in part.outputs}
    for part_name in ("body", "shallow_body"):
        if part_name not in parts:
            continue
        part, owner = parts[part_name], f"{name}'s {part_name} part"
        outputs = {spec.name: spec for spec in part.outputs}
        yield from _check_taken(owner, part, available)
        if component.outputs[0].name not in outputs or not _fit(
            outputs[component.outputs[0].name], component.outputs[0]
        ):
            yield f"{owner} has the outputs {_join(part.outputs)}, expected {component.outputs[0]} among them"
        prediction = outputs[component.outputs[0].name]
        own_latents = next((spec for spec in part.inputs if spec.name == latents), None)
        if own_latents is None or prediction.shape[2:] != own_latents.shape[2:]:
            yield f"{owner} makes {prediction} of {own_latents}, expected {latents} as an input, and its sides"
        if part_name == "body":
            if "shallow_body" in parts and _DEEP_FEATURES not in outputs:
                yield f"{owner} has the outputs {_join(part.outputs)}, expected {_DEEP_FEATURES} for shallow_body"
            available |= {key: spec for key, spec in outputs.items() if key == _DEEP_FEATURES}


def _check_taken(owner: str, part: Part, available: Mapping[str, TensorSpec]) -> Iterator[str]:
    for spec in part.inputs:
        made = available.get(spec.name)
        if made is None or not _fit(spec, made):
            expected = made or f"one of {', '.join(sorted(available))}"
            yield f"{owner} has the input {spec}, expected {expected}, as the parts before it make it"


def _check_slices(name: str, component: Component) -> Iterator[str]:
    """Check that slices are numbered without a gap, and that each can run on the output of the one before."""
    parts = component.parts
    found = [part for part in parts if part.startswith("slice.")]
    if {*found} != {f"slice.{number}" for number in range(len(found))}:
        yield f"{name} has the slices {sorted(found)}, expected {[f'slice.{number}' for number in range(len(found))]}"
    if found and ("head" not in parts or ("attention" in parts) != ("neck" in parts)):
        before = sorted(part for part in parts if part in ("head", "attention", "neck"))
        yield f"{name} has slices behind {before}, expected head alone, or head, attention and neck"
    if not found:
        return
    yield from _check_before_slices(name, component)
    made, residual = parts["neck" if "neck" in parts else "head"].outputs[0], None
    factor = _factor(made, "height")
    for number in range(len(found)):
        part, owner = parts[f"slice.{number}"], f"{name}'s slice.{number} part"
        yield from _check_slice(owner, part, made, residual, last=number + 1 == len(found))
        features = next(spec for spec in part.inputs if spec.name == "features")
        made, residual = part.outputs[0], features
        factor *= _factor(made, "rows")
    downscale = _factor(component.outputs[0], next(iter(_names(component.inputs[0], start=2)), ""))
    if factor != downscale:
        yield f"{name}'s parts enlarge latents {factor} times together, expected {downscale} times as the whole"


def _check_before_slices(name: str, component: Component) -> Iterator[str]:
    parts = component.parts
    features = {"features": 4, "queries": 3, "keys": 3, "values": 3}
    steps: list[tuple[str, dict[str, int], dict[str, int]]] = [("head", {"latents": 4}, {"result": 4})]
    if "attention" in parts:
        steps = [
            ("head", {"latents": 4}, features),
            ("attention", {"queries": 3, "keys": 3, "values": 3}, {"attended": 3}),
            ("neck", {"attended": 3, "features": 4}, {"result": 4}),
        ]
    made: dict[str, TensorSpec] = {spec.name: spec.tensor for spec in component.inputs}
    for part_name, takes, makes in steps:
        part, owner = parts[part_name], f"{name}'s {part_name} part"
        for kind, specs, expected in (("input", part.inputs, takes), ("output", part.outputs, makes)):
            if {spec.name: len(spec.shape) for spec in specs} != expected or any(
                spec.dtype != "float32" for spec in specs
            ):
                yield f"{owner} has the {kind}s {_join(specs)}, expected {', '.join(expected)} in float32"
        yield from _check_taken(owner, part, made)
        for spec in part.outputs:
            made[spec.name] = spec
        own = {spec.name: spec for spec in part.inputs}
        if part_name == "attention" and made["attended"].shape != own["queries"].shape:
            yield f"{owner} makes {made['attended']} of {own['queries']}, expected the same shape"
    if "attention" in parts and len({made[key].shape[2] for key in ("queries", "keys", "values")}) != 1:
        yield f"{name}'s head part has the outputs {_join(parts['head'].outputs)}, expected one width of all three"
    for spec in parts[steps[-1][0]].outputs:
        if _names(spec) != ["batch", "height", "width"] or not isinstance(spec.shape[1], int):
            yield f"{name}'s {steps[-1][0]} part makes {spec}, expected batch, a number of channels, height and width"


def _check_slice(
    owner: str, part: Part, before: TensorSpec, residual: TensorSpec | None, *, last: bool
) -> Iterator[str]:
    """Check one slice.

    Args:
        before: the output that it takes as `features`.
        residual: the `features` of the slice before it; None for the first.
    """
    inputs = {spec.name: spec for spec in part.inputs}
    features = inputs.get("features")
    if features is None or len(part.outputs) != 1 or not inputs.keys() <= {*_SLICE_INPUTS}:
        yield f"{owner} is not a slice, expected features among its inputs and one output"
        return
    channels = before.shape[1]
    groups = inputs["mean"].shape[-1] if "mean" in inputs else None
    wanted: dict[str, tuple[int | str | None, ...]] = {
        "features": ("batch", channels, "halo_rows", "width"),
        "inside": ("batch", 1, "halo_rows", 1),
        "mean": ("batch", groups),
        "variance": ("batch", groups),
        "residual": ("batch", residual.shape[1] if residual is not None else None, "rows", "width"),
    }
    for key, spec in inputs.items():
        if spec.shape != wanted[key] or spec.dtype != "float32":
            yield f"{owner} has the input {spec}, expected {key} float32{list(wanted[key])}"
    if ("mean" in inputs) != ("variance" in inputs):
        yield f"{owner} has the inputs {_join(part.inputs)}, expected mean and variance, or neither"
    if isinstance(groups, int) and (not isinstance(channels, int) or channels % groups):
        yield f"{owner} has {groups} groups for {channels} channels, expected a divisor"
    (made,) = part.outputs
    factor = _factor(made, "rows")
    rows, width = _multiply(factor, "rows"), _multiply(factor, "width")
    channels = next((axis for axis in made.shape[1:2] if isinstance(axis, int)), "channels")
    shape = ("batch", rows, width, 3) if last else ("batch", channels, rows, width)
    if made.shape != shape or made.dtype != ("uint8" if last else "float32") or "channels" in shape:
        yield f"{owner} makes {made}, expected {'uint8' if last else 'float32'}{list(shape)}"


def _fit(spec: TensorSpec, other: TensorSpec) -> bool:
    """Return whether two tensors have one dtype, one rank, and equal sizes on the axes that are numbers in either."""
    pairs = list(zip(spec.shape, other.shape, strict=False))[1:]
    return (
        spec.dtype == other.dtype
        and len(spec.shape) == len(other.shape)
        and all(left == right for left, right in pairs if isinstance(left, int) or isinstance(right, int))
    )


def _names(spec: TensorSpec, start: int = 0) -> list[str]:
    """Return the names of a tensor's free axes."""
    return [axis.rpartition("*")[2] for axis in spec.shape[start:] if isinstance(axis, str)]


def _multiply(factor: int, axis: int | str) -> int | str:
    """Return an axis of `factor` times the size, as a manifest writes it."""
    if isinstance(axis, int):
        return factor * axis
    own, _, name = axis.rpartition("*")
    factor *= int(own or 1)
    return name if factor == 1 else f"{factor}*{name}"


def _factor(spec: TensorSpec, name: str) -> int:
    """Return the multiple of a named axis that a tensor has; 1 where it has none."""
    factors = [
        int(found[1] or 1)
        for axis in spec.shape
        if (found := _AXIS.fullmatch(str(axis))) is not None and found[2] == name
    ]
    return math.prod(factors[:1])


def _join(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(map(str, specs))
