"""How is a single-file checkpoint read? By unpacking it into a diffusers folder, which is then exported like any other.

The original (CompVis, Stability) layout holds text encoder, UNet and autoencoder in one `.safetensors` file and nothing
else. Its family is told from the header; the configurations ship with this package, so nothing is looked up on a hub.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.clip_vocabulary import merges, write_vocabulary
from latentrt_export.checkpoints.ldm_layout import SUBMODULES, convert

__all__ = ["PredictionType", "SingleFile", "detect", "unpack"]

PredictionType = Literal["epsilon", "v_prediction"]

CONFIGS = Path(__file__).parent / "configs"
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
FLOATS = {"F16", "BF16", "F32", "F64"}
SUPPORTED = "expected a whole Stable Diffusion 1.x or 2.x checkpoint with 4 input channels"

# A part of a tensor's name that only another kind of file has; the first that is found names the kind.
FOREIGN = {
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "emb_params": "a textual inversion",
    "conditioner.embedders.1.": "Stable Diffusion XL",
    "conditioner.embedders.0.": "the refiner of Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "model.diffusion_model.label_emb.": "a model conditioned on a class (unCLIP, or an upscaler)",
    "down_blocks.": "a submodule in diffusers' layout, which is given as its checkpoint's folder",
}
INPUT_CHANNELS = {5: "depth to image", 7: "upscaling", 8: "InstructPix2Pix", 9: "inpainting"}

# What the official 768-pixel checkpoints of 2.x, which predict v, have instead of the base model's.
V_PREDICTION_768: dict[str, dict[str, Any]] = {
    "unet/config.json": {"sample_size": 96, "upcast_attention": True},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "model_index.json": {"scheduler": ["diffusers", "DDIMScheduler"]},
}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """What a file's header says of the checkpoint; None where its metadata says nothing."""

    path: Path
    family: str
    prediction_type: PredictionType | None
    licence: str | None


def detect(path: Path) -> SingleFile:
    """Tell a checkpoint's family from its header; no weight is read.

    Raises:
        CheckpointError: not a safetensors file, a damaged one, or not a checkpoint of Stable Diffusion 1.x or 2.x.
    """
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = {name: str(one.get_dtype()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or no safetensors file: {error}") from None
    family = _family(path, shapes)
    for name, dtype in dtypes.items():
        if name.endswith(("weight", "bias")) and dtype not in FLOATS:
            raise CheckpointError(f"{path.name} stores {name} as {dtype}, expected one of {', '.join(sorted(FLOATS))}")
    licence = metadata.get("modelspec.license")
    return SingleFile(path=path, family=family, prediction_type=_stated_prediction(metadata), licence=licence)


def unpack(
    path: Path,
    into: Path,
    *,
    prediction_type: PredictionType | None = None,
    config: Path | None = None,
) -> None:
    """Write a single-file checkpoint as a diffusers folder, one submodule at a time, in the precision it is stored in.

    Args:
        path: the `.safetensors` file.
        into: the folder to write, made if it is missing. What an error leaves in it is the caller's to remove.
        prediction_type: what the UNet predicts; needed for 2.x, where weights do not tell, unless the metadata does.
        config: a diffusers folder of the same architecture, for models that the shipped configurations do not fit. Its
            tokenizer and scheduler are taken over; its weights, if there are any, are not looked at.

    Raises:
        CheckpointError: see `detect`; or the prediction type is not known, or weights are missing or of another shape.
        ExportError: the folder cannot be written.
    """
    checkpoint = detect(path)
    settings = _settings(config or CONFIGS / checkpoint.family)
    predicts = prediction_type or (_configured_prediction(settings) if config else _prediction(checkpoint))
    if config is None and checkpoint.family == "stable-diffusion-2" and predicts == "v_prediction":
        for name, changes in V_PREDICTION_768.items():
            settings[name] |= changes
    settings["scheduler/scheduler_config.json"]["prediction_type"] = predicts
    settings["model_index.json"] |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    try:
        _write_settings(settings, into)
        _write_tokenizer(into / "tokenizer", config, checkpoint.family)
        for submodule, layout in SUBMODULES.items():
            weights = convert(submodule, _read(path, layout.prefix), settings[f"{submodule}/config.json"])
            save_file(weights, into / submodule / layout.file, metadata={"format": "pt"})
            del weights  # before the next submodule is read
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path.name} cannot be unpacked into {into}: {error}") from error


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() not in PICKLES:
        return
    safe = str(path.with_suffix(".safetensors"))
    if Path(safe).is_file():
        raise CheckpointError(f"{path.name} is a pickle, which is never opened here; {safe} lies beside it, name that")
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        f"save_file({{k: v.contiguous().clone() for k, v in d.items() if isinstance(v, torch.Tensor)}}, {safe!r})"
    )
    raise CheckpointError(
        f"{path.name} is a pickle, which can run code when it is opened and is never opened here; "
        f"convert it first:\n  python -c {shlex.quote(code)}"
    )


def _family(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    what = _foreign_kind(shapes)
    if what:
        raise CheckpointError(f"{path.name} looks like {what}; {SUPPORTED}")
    if _any(shapes, "cond_stage_model.transformer."):
        return "stable-diffusion-1"
    return "stable-diffusion-2"


def _foreign_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is, if it is no checkpoint that can be unpacked."""
    for part, kind in FOREIGN.items():
        if any(part in name for name in shapes):
            return kind
    stem = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if stem is None:
        autoencoder = _any(shapes, "first_stage_model.") or _any(shapes, "encoder.down.")
        return (
            "an autoencoder alone"
            if autoencoder
            else f"something else (its first tensor is {next(iter(shapes), None)})"
        )
    if stem[1] != 4:
        return f"a model for {INPUT_CHANNELS.get(stem[1], 'another task')}, with {stem[1]} input channels"
    if not _any(shapes, "cond_stage_model.transformer.") and not _any(shapes, "cond_stage_model.model."):
        return "a UNet without its text encoder"
    if not _any(shapes, "first_stage_model."):
        return "a checkpoint without its autoencoder"
    return None


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _stated_prediction(metadata: Mapping[str, str]) -> PredictionType | None:
    """What the metadata says (Stability's modelspec), by its own key or by the name of the architecture."""
    stated = metadata.get("modelspec.prediction_type", "")
    architecture = metadata.get("modelspec.architecture", "")
    if stated in {"v", "v_prediction"} or (not stated and architecture == "stable-diffusion-v2-768-v"):
        return "v_prediction"
    if stated == "epsilon" or (not stated and architecture == "stable-diffusion-v2-512"):
        return "epsilon"
    return None


def _prediction(checkpoint: SingleFile) -> PredictionType:
    if checkpoint.prediction_type:
        return checkpoint.prediction_type
    if checkpoint.family == "stable-diffusion-1":
        return "epsilon"
    raise CheckpointError(
        f"{checkpoint.path.name} is Stable Diffusion 2.x and does not say what its UNet predicts; "
        "pass --prediction-type epsilon (the base models, of 512 pixels) or v_prediction (those of 768 pixels)"
    )


def _configured_prediction(settings: Mapping[str, Mapping[str, Any]]) -> PredictionType:
    predicts = settings["scheduler/scheduler_config.json"].get("prediction_type", "epsilon")  # diffusers' default
    if predicts not in get_args(PredictionType):
        raise CheckpointError(f"the scheduler's prediction_type is {predicts}, expected epsilon or v_prediction")
    return predicts  # type: ignore[no-any-return]


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    names = ["model_index.json", "scheduler/scheduler_config.json", *(f"{one}/config.json" for one in SUBMODULES)]
    try:
        return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} does not describe a checkpoint: {error}") from None


def _write_settings(settings: Mapping[str, Mapping[str, Any]], into: Path) -> None:
    for name, values in settings.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, config: Path | None, family: str) -> None:
    shutil.copytree((config or CONFIGS / family) / "tokenizer", folder, dirs_exist_ok=True)
    if config is None:
        write_vocabulary(folder, merges())


def _read(path: Path, prefix: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
