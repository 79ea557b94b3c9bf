"""Does a manifest make sense?

What its types cannot say: that every file it names is pinned, that paths stay inside the bundle, that what a
picture needs is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentrt.bundle.manifest import Component, Manifest, Part, PartName
from latentrt.errors import ManifestError

__all__ = ["MANIFEST_NAME", "NEEDED_COMPONENTS", "check_manifest", "named_files"]

MANIFEST_NAME = "bundle.json"
NEEDED_COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that cannot be true.

    Raises:
        ManifestError: naming the first impossible thing, what was expected, and what to do.
    """
    for problem in _problems(manifest):
        raise ManifestError(f"bundle.json: {problem}. Write the bundle anew: latentrt export CHECKPOINT BUNDLE")


def named_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Each file that the manifest gives a role, and the role in words."""
    for name, component in manifest.components.items():
        yield component.weights.file, f"the weights of {name}"
        for precision, graph in component.graphs.items():
            yield graph.file, f"the {precision} graph of {name}"
        for part_name, part in component.parts.items():
            for precision, graph in part.graphs.items():
                yield graph.file, f"the {precision} graph of {name}'s {part_name} part"
    for key, engine in manifest.engines.items():
        yield engine.record, f"the record of the engine {key[:12]}"
        yield engine.plan, f"the plan of the engine {key[:12]}"
    yield manifest.tokenizer.file, "the tokenizer"
    if manifest.licence.file is not None:
        yield manifest.licence.file, "the licence"


def _problems(manifest: Manifest) -> Iterator[str]:
    for name in manifest.files:
        yield from _path_problems(name)
    for name, role in named_files(manifest):
        if name not in manifest.files:
            yield f"{name!r} is {role} but is not pinned in files, expected its SHA-256 and size there"
    for name in NEEDED_COMPONENTS:
        if name not in manifest.components:
            yield f"found the components {sorted(manifest.components)}, expected {name} among them"
    for name, component in manifest.components.items():
        yield from _component_problems(name, component, manifest.precision)
    yield from _default_problems(manifest)


def _path_problems(name: str) -> Iterator[str]:
    if problem := _path_problem(name):
        yield f"the path {name!r} {problem}, expected a relative path inside the bundle, such as unet/model.onnx"


def _path_problem(name: str) -> str | None:
    if "\\" in name or ":" in name:
        return "has a backslash or a colon (a drive)"
    if not name.isprintable():
        return "has a character that cannot be printed"
    if name.startswith("/"):
        return "is absolute"
    # An empty part is a doubled or a closing slash: one file would have two names.
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "has an empty part, '.' or '..'"
    if name.casefold() == MANIFEST_NAME:
        return "is the manifest itself"
    return None


def _component_problems(name: str, component: Component, precision: str) -> Iterator[str]:
    # In a bundle of int8 some submodules stay in float32.
    wanted = {"int8", "float32"} if precision == "int8" else {precision}
    if wanted.isdisjoint(component.graphs):
        yield f"{name} has graphs for {sorted(component.graphs)}, expected one for the bundle's precision, {precision}"
    yield from _signature_problems(name, component)
    for part_name, part in component.parts.items():
        whose = f"{name}'s {part_name} part"
        yield from _signature_problems(whose, part)
        if not part.graphs:
            yield f"{whose} has no graph, expected at least one"
    yield from _stage_problems(name, component.parts)


def _stage_problems(name: str, parts: Mapping[PartName, Part]) -> Iterator[str]:
    """What decodes in slices is run from the first stage to the last, each on what the one before made."""
    found = [part for part in parts if part.startswith("stage.")]
    wanted = [f"stage.{number}" for number in range(len(found))]
    if {*found} != {*wanted}:
        yield f"{name} has the stages {sorted(found)}, expected {wanted}"
    if found and ("head" not in parts or ("attention" in parts) != ("neck" in parts)):
        before = sorted(part for part in parts if part in ("head", "attention", "neck"))
        yield f"{name} has stages behind {before}, expected head alone, or head, attention and neck"
    for part in found:
        if len(parts[part].outputs) != 1 or "features" not in [spec.name for spec in parts[part].inputs]:
            yield f"{name}'s {part} part is no stage, expected features among its inputs and one output"


def _signature_problems(whose: str, graphs: Component | Part) -> Iterator[str]:
    for kind, specs in (("input", graphs.inputs), ("output", graphs.outputs)):
        names = [spec.name for spec in specs]
        if not names or len(set(names)) != len(names):
            yield f"{whose} has the {kind}s {names}, expected at least one and each name once"
    for graph in graphs.graphs.values():
        for gate in graph.gate:
            if gate.figure > gate.bound:
                yield f"{graph.file!r} missed its gate, {gate.figure:g} for {gate.output!r}, expected ≤ {gate.bound:g}"


def _default_problems(manifest: Manifest) -> Iterator[str]:
    limits, defaults, factor = manifest.limits, manifest.defaults, manifest.latents.factor
    for side, pixels in (("height", defaults.height), ("width", defaults.width)):
        if not limits.min_side <= pixels <= limits.max_side:
            yield f"the default {side} is {pixels}, expected it within the limits {limits.min_side} … {limits.max_side}"
        if pixels % factor:
            yield f"the default {side} is {pixels}, expected a multiple of the autoencoder's factor, {factor}"
    if defaults.num_inference_steps > limits.max_steps:
        yield f"the default is {defaults.num_inference_steps} steps, expected {limits.max_steps} at most, the limit"
