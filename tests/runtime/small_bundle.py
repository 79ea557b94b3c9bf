"""A bundle of made-up files with a true manifest, and ways to make it untrue."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.manifest import (
    Component,
    Defaults,
    GateMetric,
    GateResult,
    GraphRecord,
    InputSpec,
    LatentSpace,
    Licence,
    Limits,
    Manifest,
    Role,
    SchedulerRecord,
    Source,
    TokenizerRecord,
    WeightsRecord,
    encode_manifest,
)
from latentrt.bundle.tensors import TensorSpec
from tests.runtime.onnx_writer import small_graph

# Role, inputs with their sources, and outputs of each component.
SIGNATURES: dict[str, tuple[Role, tuple[InputSpec, ...], tuple[TensorSpec, ...]]] = {
    "text_encoder": (
        "text-encoder",
        (InputSpec("input_ids", "int64", ("chunks", 77), "tokens"),),
        (TensorSpec("hidden_states", "float32", ("chunks", 77, 4)),),
    ),
    "unet": (
        "denoiser",
        (
            InputSpec("sample", "float32", ("evaluations", 4, "height", "width"), "latents"),
            InputSpec("timestep", "float32", ("evaluations",), "timestep"),
            InputSpec("encoder_hidden_states", "float32", ("evaluations", "tokens", 4), "text_encoder.hidden_states"),
        ),
        (TensorSpec("noise_pred", "float32", ("evaluations", 4, "height", "width")),),
    ),
    "vae_decoder": (
        "decoder",
        (InputSpec("latents", "float32", ("batch", 4, "height", "width"), "latents"),),
        (TensorSpec("pixels", "uint8", ("batch", "8*height", "8*width", 3)),),
    ),
    "safety_checker": (
        "classifier",
        (InputSpec("pixels", "uint8", ("images", "pixel_height", "pixel_width", 3), "images"),),
        (
            TensorSpec("concept_scores", "float32", ("images", 3)),
            TensorSpec("special_care_scores", "float32", ("images", 3)),
            TensorSpec("flagged", "bool", ("images",)),
        ),
    ),
}
COMPONENTS = tuple(SIGNATURES)
WEIGHTS = "unet/model.safetensors"
# Above the size from which digests are remembered.
WEIGHTS_BYTES = (1 << 20) + 7

FILES = {
    **{
        f"{name}/model.onnx": small_graph(inputs, outputs, f"{name}/model.safetensors")
        for name, (_, inputs, outputs) in SIGNATURES.items()
    },
    **{f"{name}/model.safetensors": f"the weights of {name}".encode() for name in COMPONENTS},
    WEIGHTS: b"w" * WEIGHTS_BYTES,
    "tokenizer/tokenizer.json": b'{"made": "up"}',
    "LICENSE": b"Do as you like.\n",
}


def write_bundle(folder: Path) -> Path:
    """Write the bundle, and return its folder."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "bundle.json").write_bytes(encode_manifest(manifest(folder)))
    return folder


def write_hub_snapshot(cache: Path) -> Path:
    """Write the bundle as a hub cache holds it, links to blobs, and return the snapshot's folder."""
    repository = cache / "models--owner--name"
    plain = write_bundle(cache / "plain")
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for name in [*FILES, "bundle.json"]:
        blob = repository / "blobs" / file_record(plain / name).sha256
        (plain / name).replace(blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        # As the hub's client does: relative, so that the cache can be moved.
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1)) / "blobs" / blob.name)
    return snapshot


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change `bundle.json` without any check, as with an editor."""
    place = folder / "bundle.json"
    tree = json.loads(place.read_bytes())
    edit(tree)
    place.write_text(json.dumps(tree))


def change_byte(place: Path) -> None:
    """Flip one bit in the middle of a file, in place."""
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    with place.open("r+b") as stream:
        stream.write(data)


def enlarge(folder: Path, name: str, size: int) -> None:
    """Give a file a hole at its end, which takes no room, and pin its new size; its pinned SHA-256 stays."""
    os.truncate(folder / name, size)
    edit_manifest(folder, lambda tree: tree["files"][name].update(size=size))


def everything(bundle: Bundle) -> None:
    """Check every file, as a run that reads them all does."""
    bundle.check(bundle.manifest.files)


def manifest(folder: Path) -> Manifest:
    """Return the manifest of the files in `folder`."""
    return Manifest(
        format_version=2,
        created_by="latentrt 0.1.0",
        family="stable-diffusion-1",
        tasks=("text-to-image", "inpainting"),
        source=Source(name="made-up", layout="diffusers", weights={"unet/model.safetensors": "0" * 64}),
        licence=Licence(name="openrail", file="LICENSE"),
        precision="float32",
        components={name: _component(name) for name in COMPONENTS},
        tokenizers={
            "text_encoder": TokenizerRecord(
                file="tokenizer/tokenizer.json", begin=49406, end=49407, pad=49407, length=77, rows=49408
            )
        },
        schedulers={"unet": SchedulerRecord(class_name="PNDMScheduler", config={"num_train_timesteps": 1000})},
        latent_spaces={"unet": LatentSpace(channels=4, downscale=8, scale=0.18215)},
        defaults=Defaults(height=64, width=64),
        limits=Limits(min_side=16, max_side=128, max_batch=4, max_steps=100),
        files={name: file_record(folder / name) for name in FILES},
    )


def natural_metric(role: Role, output: TensorSpec) -> GateMetric:
    """Return the metric by which the exporter compares an output."""
    if output.dtype == "uint8":
        return "levels"
    return "absolute" if role == "classifier" else "relative"


def _component(name: str) -> Component:
    role, inputs, outputs = SIGNATURES[name]
    shapes: dict[str, tuple[int, ...]] = {inputs[0].name: (1, 4, 8, 8)}
    gate = GateResult(
        output=outputs[0].name, shapes=shapes, metric=natural_metric(role, outputs[0]), value=2e-6, bound=1e-4
    )
    return Component(
        role=role,
        inputs=inputs,
        outputs=outputs,
        weights=WeightsRecord(file=f"{name}/model.safetensors", dtype="float32", tensors=2, parameters=12345),
        graphs={"float32": GraphRecord(file=f"{name}/model.onnx", opset=21, nodes=99, gate=(gate,))},
    )
