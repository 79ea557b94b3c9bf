"""Fake engines: valid records of a bundle's components, with arbitrary bytes in place of a plan."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record, hash_bytes
from latentrt.bundle.manifest import FileRecord, encode_manifest
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.weights import map_weights
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import (
    ENGINE_FORMAT,
    BuildStats,
    EngineIdentity,
    EngineOptions,
    EngineRecord,
    SelfCheck,
    this_platform,
)
from latentrt.engines.store import StoredEngine
from latentrt_engines.cache import EngineCache, digest_arrays
from latentrt_engines.library import Library
from latentrt_engines.options import BuildOptions
from latentrt_engines.profiles import component_profile, image_profile
from latentrt_engines.targets import EngineTarget

RTX = Library(name="tensorrt_rtx", module=None, version="1.2.3.4+cu13")
TENSORRT = Library(name="tensorrt", module=None, version="11.0.0.1+cu13")
H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=80 << 30, cuda="13.0")
RTX4090 = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_bytes=24 << 30, cuda="13.0")
NO_GPU = NoGpu(reason="there is no NVIDIA driver", mend="buy one")
PLAN = b"not really kernels..."


def identity(bundle: Bundle, component: str, **changes: Any) -> EngineIdentity:
    """Return the identity of an engine for one image of the default size and compute capability 8.9, with changes."""
    manifest = bundle.manifest
    precision = changes.get("precision", manifest.precision)
    graph, weights = bundle.component_files(component, precision)
    default = EngineIdentity(
        component=component,
        precision=precision,
        graph=manifest.files[graph].sha256,
        weights=manifest.files[weights].sha256,
        profile=component_profile(component, manifest.components[component], image_profile(manifest), manifest),
        options=EngineOptions(),
        library=RTX.name,
        library_version=RTX.version,
        platform=this_platform(),
        compute_capabilities=("8.9",),
    )
    return msgspec.structs.replace(default, **changes)


def make_target(bundle: Bundle, component: str, **changes: Any) -> EngineTarget:
    """Return a target with the identity of `identity`."""
    return EngineTarget(identity=identity(bundle, component, **changes), profile=image_profile(bundle.manifest))


def record(bundle: Bundle, of: EngineIdentity, plan: bytes = PLAN) -> EngineRecord:
    """Return the record of an engine that was not run."""
    component = bundle.manifest.components[of.component]
    return EngineRecord(
        format_version=ENGINE_FORMAT,
        identity=of,
        plan=FileRecord(sha256=hash_bytes(plan), size=len(plan)),
        inputs=tuple(spec.tensor for spec in component.inputs),
        outputs=component.outputs,
        build=BuildStats(
            seconds=1.5,
            peak_bytes=1 << 30,
            workspace_bytes=1 << 28,
            built_at="2026-01-02T03:04:05+00:00",
            created_by="latentrt 0.1.0",
        ),
        check=SelfCheck(ran_on=None, skip_reason="it is fake"),
    )


def publish(cache: EngineCache, bundle: Bundle, of: EngineIdentity, plan: bytes = PLAN) -> StoredEngine:
    """Publish an engine in the cache as a build does, with the digests of the bundle's own arrays."""
    _, weights = bundle.component_files(of.component, of.precision)
    made = record(bundle, of, plan)
    with cache.lock(made.key) as draft:
        draft.write_bytes(plan)
        return cache.publish(made, draft, digest_arrays(map_weights(bundle.path(weights))))


def publish_targets(
    cache: EngineCache, bundle: Bundle, *components: str, gpus: str = "rtx4090", **given: Any
) -> list[StoredEngine]:
    """Publish in the cache the engines that `latentrt build --gpu GPUS` with these options would build.

    The library's version is the installed one's, so that commands find the engines.
    """
    options = BuildOptions(component=components, **given)
    return [
        publish(cache, bundle, target.identity, f"{PLAN!r} of {target.key}".encode())
        for target in options.resolve(bundle, gpus, None, NO_GPU).targets
    ]


def retrained(folder: Path, *names: str) -> Bundle:
    """Copy the sample bundle, with other values in the named arrays of its denoiser, or in all of them."""
    from safetensors.numpy import load_file, save_file  # here, as tests of the runtime do without

    shutil.copytree(bundle_path(), folder)
    manifest = Bundle.open(folder).manifest
    weights = manifest.components["unet"].weights.file
    arrays = load_file(folder / weights)
    for name in names or arrays:
        arrays[name] = arrays[name] + 1
    save_file(arrays, folder / weights, metadata={"format": "pt"})  # as the exporter does: the graphs have its offsets
    files = {**manifest.files, weights: file_record(folder / weights)}
    (folder / "bundle.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    return Bundle.open(folder)


def broken(folder: Path, component: str) -> Bundle:
    """Copy the sample bundle, with bytes inside the graph, which TensorRT has at inputs and outputs alone, and a
    correct hash of the graph."""
    import onnx  # here, as tests of the runtime do without
    from onnx import TensorProto, helper

    shutil.copytree(bundle_path(), folder)
    manifest = Bundle.open(folder).manifest
    graph = manifest.components[component].graphs[manifest.precision].file
    model = onnx.load(folder / graph, load_external_data=False)
    index, convolution = next(item for item in enumerate(model.graph.node) if item[1].op_type == "Conv")
    (made,) = convolution.output
    convolution.output[0] = "before"
    (kind,) = {each.data_type for each in model.graph.initializer if each.name in convolution.input}
    model.graph.node.insert(index + 1, helper.make_node("Cast", ["before"], ["small"], "small", to=TensorProto.UINT8))
    model.graph.node.insert(index + 2, helper.make_node("Cast", ["small"], [made], "large", to=kind))
    (folder / graph).write_bytes(model.SerializeToString())
    files = {**manifest.files, graph: file_record(folder / graph)}
    (folder / "bundle.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    return Bundle.open(folder)


@dataclass(frozen=True)
class FakeTensorRT:
    """A stand-in for the module `tensorrt`."""

    __version__: str = "11.0.0.1"
