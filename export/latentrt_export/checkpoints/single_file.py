"""Unpacks a single-file checkpoint into a diffusers folder, which is then exported like any other.

The original (CompVis, Stability) layout has only the text encoder, the UNet and the autoencoder, in one `.safetensors`
file. The family is detected from the names in its header, the task from the input channels of the UNet's first
convolution. The configurations ship with this package, so no hub is queried.

diffusers' own converters rename the weights. The result is compared with the architecture that the configuration
describes, because the converters ignore a missing weight.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.checkpoint_files import check_folders
from latentrt_export.checkpoints.file_content import PICKLE_SUFFIXES, explain_content, find_content, make_pickle_error
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.tokenizer import read_merges, write_vocabulary
from latentrt_export.checkpoints.weights import check_dtypes, limit_parameters, read_header_of, warn_about_unexpected

__all__ = [
    "COMPONENTS",
    "ComponentLayout",
    "PredictionType",
    "SingleFile",
    "convert",
    "detect",
    "reject_foreign",
    "unpack",
]

PredictionType = Literal["epsilon", "v_prediction"]
Weights = dict[str, Tensor]
Config = dict[str, Any]

CONFIGS = Path(__file__).parent / "configs"
SUPPORTED = "expected a whole Stable Diffusion 1.x or 2.x checkpoint with 4, 8 or 9 input channels"

# The UNet's first convolution, and the pipeline class of each number of its input channels.
_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_PIPELINES = {
    4: "StableDiffusionPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}
_DEPTH_CHANNELS = 5
# What trainers put before every name.
_WRAPPER = re.compile(r"((state_dict|module|model|_orig_mod)\.)+")

# Substrings of tensor names that identify other kinds of files; the first match counts.
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
    "model.diffusion_model.label_emb.": "a class-conditioned model (unCLIP, or an upscaler)",
    "down_blocks.": "a component in diffusers' layout, for which the folder of its checkpoint is needed",
}

# Settings of the official 768-pixel checkpoints of 2.x, which predict v, that differ from the base model's.
V_PREDICTION_768: dict[str, dict[str, Any]] = {
    "unet/config.json": {"sample_size": 96, "upcast_attention": True},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "model_index.json": {"scheduler": ["diffusers", "DDIMScheduler"]},
}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """The contents of a checkpoint's header.

    Attributes:
        path: the file.
        family: the model's family.
        in_channels: the input channels of the UNet: 4 for text-to-image, 8 for InstructPix2Pix, 9 for inpainting.
        prediction_type, licence: from the metadata; None where it has none.
        wrapper: the prefix of every name that a trainer added, such as `state_dict.`; may be empty.
    """

    path: Path
    family: str
    in_channels: int = 4
    prediction_type: PredictionType | None
    licence: str | None
    wrapper: str = ""

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that runs the model."""
        return _PIPELINES[self.in_channels]


@dataclass(frozen=True, kw_only=True)
class ComponentLayout:
    """The place of a component in a single file and in a diffusers folder.

    Attributes:
        prefix: the prefix of its tensors' names in the single file.
        file: the name of its weights file in the folder.
        build: builds the architecture that a configuration describes.
        rename: converts the weights, given the configuration and the architecture.
    """

    prefix: str
    file: str
    build: Callable[[Config], torch.nn.Module]
    rename: Callable[[Weights, Config, torch.nn.Module], Weights]


def detect(path: Path, *, with_vae: bool = True) -> SingleFile:
    """Detect a checkpoint's family and task from its header; no weights are read.

    Args:
        path: the `.safetensors` file.
        with_vae: whether its autoencoder is needed.

    Raises:
        CheckpointError: the file is not a safetensors file, is damaged, has weights of a dtype that cannot be read, or
            is not a supported checkpoint of Stable Diffusion 1.x or 2.x.
    """
    reject_foreign(path)
    header = read_header_of(path)
    wrapper = _find_wrapper(header.tensors)
    shapes = {name.removeprefix(wrapper): place.shape for name, place in header.tensors.items()}
    if (problem := _find_problem(shapes, with_vae)) is not None:
        raise CheckpointError(f"{path.name} {problem}; {SUPPORTED}")
    check_dtypes(path.name, {name: place.dtype for name, place in header.tensors.items()})
    return SingleFile(
        path=path,
        family="stable-diffusion-1" if _any(shapes, "cond_stage_model.transformer.") else "stable-diffusion-2",
        in_channels=shapes[_FIRST_CONVOLUTION][1],
        prediction_type=_read_prediction_type(header.metadata),
        licence=header.metadata.get("modelspec.license"),
        wrapper=wrapper,
    )


def unpack(
    path: Path,
    into: Path,
    *,
    prediction_type: PredictionType | None = None,
    config: Path | None = None,
    with_vae: bool = True,
) -> None:
    """Write a single-file checkpoint as a diffusers folder, component by component, in the precision of the file.

    Args:
        path: the `.safetensors` file.
        into: the folder to write; created if missing. After an error, the caller removes its contents.
        prediction_type: the prediction type of the UNet. Required for 2.x unless the metadata has it, because the
            weights do not determine it.
        config: a diffusers folder of the same architecture, for models that the shipped configurations do not fit. Its
            tokenizer and scheduler are copied; its weights are not read. The input channels and the pipeline class
            are still those of the file.
        with_vae: whether the autoencoder's weights are written; its configuration is either way.

    Raises:
        CheckpointError: as `detect`; or the prediction type is unknown, or weights are missing or of another shape.
        ExportError: the folder cannot be written.
    """
    checkpoint = detect(path, with_vae=with_vae)
    settings = _read_settings(config or CONFIGS / checkpoint.family)
    predicts = prediction_type or (_configured_prediction(settings) if config else _default_prediction(checkpoint))
    if config is None and checkpoint.family == "stable-diffusion-2" and predicts == "v_prediction":
        for name, changes in V_PREDICTION_768.items():
            settings[name] |= changes
    settings["scheduler/scheduler_config.json"]["prediction_type"] = predicts
    settings["unet/config.json"]["in_channels"] = checkpoint.in_channels
    settings["model_index.json"] |= {
        "_class_name": checkpoint.pipeline_class,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    try:
        _write_settings(settings, into)
        _write_tokenizer(into / "tokenizer", config, checkpoint.family)
        for component, layout in COMPONENTS.items():
            if component == "vae" and not with_vae:
                continue
            stored = _read(path, checkpoint.wrapper, layout.prefix)
            weights = convert(component, stored, settings[f"{component}/config.json"])
            save_file(weights, into / component / layout.file, metadata={"format": "pt"})
            del stored, weights  # before the next component is read
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path.name} cannot be unpacked into {into}: {error}") from error


def reject_foreign(path: Path) -> None:
    """Reject a file that is not safetensors by its content; its name does not matter.

    Raises:
        CheckpointError: the file is a pickle, or another kind of file, or cannot be read.
    """
    try:
        content, pickled = find_content(path), path.suffix.lower() in PICKLE_SUFFIXES
        problem = explain_content(path)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read: {error.strerror}") from None
    if content == "pickle" or (content == "unknown" and pickled):
        safe = path.with_suffix(".safetensors") if pickled else path.with_stem(f"{path.stem}-converted")
        if safe.is_file():
            raise CheckpointError(f"{path.name} is a pickle, which is never opened; pass {safe} instead")
        raise make_pickle_error([path], safe)
    if problem is not None:
        raise CheckpointError(f"{path.name} {problem}")


def _find_wrapper(names: Iterable[str]) -> str:
    """Return the prefix that a trainer put before every name; empty if there is none."""
    found = {name.removesuffix(_FIRST_CONVOLUTION) for name in names if name.endswith(_FIRST_CONVOLUTION)}
    return "" if "" in found else next((prefix for prefix in sorted(found) if _WRAPPER.fullmatch(prefix)), "")


def _find_problem(shapes: Mapping[str, tuple[int, ...]], with_vae: bool) -> str | None:
    """Return the reason why a file cannot be unpacked, as the end of a sentence; None if it can be."""
    for part, kind in FOREIGN.items():
        if any(part in name for name in shapes):
            return f"looks like {kind}"
    if _FIRST_CONVOLUTION not in shapes:
        if _any(shapes, "first_stage_model.") or _any(shapes, "encoder.down."):
            return "looks like an autoencoder alone"
        return f"looks like something else (its first tensor is {quote(next(iter(shapes), None))})"
    convolution = shapes[_FIRST_CONVOLUTION]
    if len(convolution) != 4:
        return f"has the shape {quote(list(convolution))} of its first convolution, expected four sides"
    channels = convolution[1]
    if channels == _DEPTH_CHANNELS:
        estimator = "is stored in MiDaS' layout" if _any(shapes, "depth_model.") else "is not in the file"
        return (
            f"is a depth-to-image model with {channels} input channels, whose depth estimator {estimator}. "
            "Export its diffusers folder (StableDiffusionDepth2ImgPipeline) instead"
        )
    if channels not in _PIPELINES:
        return f"has {channels} input channels"
    if not _any(shapes, "cond_stage_model.transformer.") and not _any(shapes, "cond_stage_model.model."):
        return "looks like a UNet without its text encoder"
    if with_vae and not _any(shapes, "first_stage_model."):
        return "looks like a checkpoint without its autoencoder, which can be passed as `vae`"
    return None


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _read_prediction_type(metadata: Mapping[str, str]) -> PredictionType | None:
    """Return the prediction type in the metadata (Stability's modelspec): its own key, or the architecture's name."""
    stated = metadata.get("modelspec.prediction_type", "")
    architecture = metadata.get("modelspec.architecture", "")
    if stated in {"v", "v_prediction"} or (not stated and architecture == "stable-diffusion-v2-768-v"):
        return "v_prediction"
    if stated == "epsilon" or (not stated and architecture == "stable-diffusion-v2-512"):
        return "epsilon"
    return None


def _default_prediction(checkpoint: SingleFile) -> PredictionType:
    if checkpoint.prediction_type:
        return checkpoint.prediction_type
    if checkpoint.family == "stable-diffusion-1":
        return "epsilon"
    raise CheckpointError(
        f"{checkpoint.path.name} is Stable Diffusion 2.x and does not state its prediction type; pass "
        "`prediction_type='epsilon'` (the base models, of 512 pixels) or `'v_prediction'` (those of 768 pixels)"
    )


def _configured_prediction(settings: Mapping[str, Mapping[str, Any]]) -> PredictionType:
    predicts = settings["scheduler/scheduler_config.json"].get("prediction_type", "epsilon")  # diffusers' default
    if predicts not in get_args(PredictionType):
        raise CheckpointError(f"got the scheduler's prediction_type {predicts}, expected epsilon or v_prediction")
    return predicts  # type: ignore[no-any-return]


def _read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    names = ["model_index.json", "scheduler/scheduler_config.json", *(f"{one}/config.json" for one in COMPONENTS)]
    check_folders(folder, "model_index.json", "scheduler", "tokenizer", *COMPONENTS)
    try:
        return {name: read_object(folder / name) for name in names}
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} does not describe a checkpoint; expected {', '.join(names)}: {error}"
        ) from None


def _write_settings(settings: Mapping[str, Mapping[str, Any]], into: Path) -> None:
    for name, values in settings.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, config: Path | None, family: str) -> None:
    shutil.copytree((config or CONFIGS / family) / "tokenizer", folder, dirs_exist_ok=True)
    if config is None:
        write_vocabulary(folder, read_merges())


def _read(path: Path, wrapper: str, prefix: str) -> Weights:
    with safe_open(path, framework="pt") as file:
        names = {name.removeprefix(wrapper): name for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
        return {name: file.get_tensor(full) for name, full in names.items() if name.startswith(prefix)}


# Conversion


def convert(component: str, weights: Weights, config: Config) -> Weights:
    """Convert one component's weights to the names and shapes of a published diffusers checkpoint.

    Args:
        component: a key of `COMPONENTS`.
        weights: the file's tensors with the component's prefix, by their full names.
        config: the contents of the component's `config.json`.

    Raises:
        CheckpointError: a weight is missing, or has another shape than the configuration describes.

    Warns:
        ExportWarning: there are weights that the configuration does not describe; they are left out.
    """
    layout = COMPONENTS[component]
    with torch.device("meta"), limit_parameters(component, len(weights)):
        model = layout.build(config)
    try:
        renamed = layout.rename(weights, config, model)
    except (KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{component}: its weights do not have the layout that config.json describes: {error}"
        ) from error
    found = {name: tuple(weight.shape) for name, weight in renamed.items() if weight is not None}
    expected = {_published_name(component, name): tuple(weight.shape) for name, weight in model.named_parameters()}
    _compare_shapes(component, found, expected)
    warn_about_unexpected(component, sorted(found.keys() - expected.keys()))
    return {name: renamed[name].contiguous() for name in found if name in expected}


def _compare_shapes(component: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    hint = "the file is damaged, or needs a configuration of its own (`config`)"
    missing = expected.keys() - found.keys()
    if missing:
        raise CheckpointError(f"{component}: {len(missing)} weights are missing, the first is {min(missing)}; {hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{component}: {name} has shape {found[name]}, expected {shape}; {hint}")


def _published_name(component: str, name: str) -> str:
    # transformers 5 removed the inner module that earlier versions, and every checkpoint, call text_model
    return f"text_model.{name.removeprefix('text_model.')}" if component == "text_encoder" else name


def _rename_text_encoder(weights: Weights, config: Config, model: torch.nn.Module) -> Weights:
    if any(name.startswith("cond_stage_model.model.") for name in weights):
        renamed = convert_open_clip_checkpoint(model, weights)
    else:
        renamed = convert_ldm_clip_checkpoint(weights)
    published = {_published_name("text_encoder", name): weight for name, weight in renamed.items()}
    # Older files store position ids. OpenCLIP has a projection and a last layer, both unused by 2.x.
    last = f"text_model.encoder.layers.{config['num_hidden_layers']}."
    unused = ("text_model.embeddings.position_ids", "text_model.text_projection.", last)
    return {name: weight for name, weight in published.items() if not name.startswith(unused)}


COMPONENTS = {
    "text_encoder": ComponentLayout(
        prefix="cond_stage_model.",
        file="model.safetensors",
        build=lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
        rename=_rename_text_encoder,
    ),
    "unet": ComponentLayout(
        prefix="model.diffusion_model.",
        file="diffusion_pytorch_model.safetensors",
        build=lambda config: UNet2DConditionModel.from_config(config),
        rename=lambda weights, config, _: convert_ldm_unet_checkpoint(weights, config),
    ),
    "vae": ComponentLayout(
        prefix="first_stage_model.",
        file="diffusion_pytorch_model.safetensors",
        build=lambda config: AutoencoderKL.from_config(config),
        rename=lambda weights, config, _: convert_ldm_vae_checkpoint(weights, config),
    ),
}
