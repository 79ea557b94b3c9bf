"""Unpacks a single-file checkpoint into a diffusers folder, which is then exported like any other.

The original (CompVis, Stability) layout has only the text encoders, the UNet and the autoencoder, in one
`.safetensors` file. The family is detected from the names in its header, the task from the input channels of the
UNet's first convolution. The configurations ship with this package, so no hub is queried.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from latentrt.bundle.printable import quote
from latentrt.bundle.safetensors_header import TensorPlace
from latentrt.errors import CheckpointError, ExportError
from latentrt_export.checkpoints.checkpoint_files import check_folders
from latentrt_export.checkpoints.conversion import (
    OPEN_CLIP_FIRST,
    OPEN_CLIP_SECOND,
    TEXT_ENCODER,
    TEXT_ENCODER_XL,
    UNET,
    VAE,
    ComponentLayout,
    convert,
    copy_tensors,
)
from latentrt_export.checkpoints.file_content import PICKLE_SUFFIXES, explain_content, find_content, make_pickle_error
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.tokenizer import read_merges, write_vocabulary
from latentrt_export.checkpoints.unet_structure import derive_structure
from latentrt_export.checkpoints.weights import check_dtypes, read_header_of

__all__ = [
    "CONFIGS",
    "FAMILIES",
    "Family",
    "PredictionType",
    "SingleFile",
    "detect",
    "reject_foreign",
    "unpack",
]

PredictionType = Literal["epsilon", "v_prediction"]
Settings = dict[str, dict[str, Any]]

CONFIGS = Path(__file__).parent / "configs"
SUPPORTED = "expected a whole Stable Diffusion 1.x, 2.x or XL checkpoint with 4, 8 or 9 input channels"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of single files.

    Attributes:
        pipelines: the input channels of the UNet → the diffusers pipeline that runs the model.
        components: the components that a file has, by their folders.
        tokenizers: the folders of the tokenizers, which a file does not have.
    """

    pipelines: Mapping[int, str]
    components: Mapping[str, ComponentLayout]
    tokenizers: tuple[str, ...]


_STABLE_DIFFUSION = Family(
    pipelines={
        4: "StableDiffusionPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        9: "StableDiffusionInpaintPipeline",
    },
    components={"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE},
    tokenizers=("tokenizer",),
)
FAMILIES: Mapping[str, Family] = {
    "stable-diffusion-1": _STABLE_DIFFUSION,
    "stable-diffusion-2": _STABLE_DIFFUSION,
    "stable-diffusion-xl": Family(
        pipelines={
            4: "StableDiffusionXLPipeline",
            8: "StableDiffusionXLInstructPix2PixPipeline",
            9: "StableDiffusionXLInpaintPipeline",
        },
        components={"text_encoder": TEXT_ENCODER_XL, "text_encoder_2": OPEN_CLIP_SECOND, "unet": UNET, "vae": VAE},
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
    "stable-diffusion-xl-refiner": Family(
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        components={"text_encoder_2": OPEN_CLIP_FIRST, "unet": UNET, "vae": VAE},
        tokenizers=("tokenizer_2",),
    ),
}
"""The families by their names, which are those of the folders of their configurations."""
# Prefixes of the text encoders that identify a family; the first match counts.
_TEXT_ENCODERS = {
    "conditioner.embedders.1.": "stable-diffusion-xl",
    "conditioner.embedders.0.transformer.": "stable-diffusion-xl",
    "conditioner.embedders.0.model.": "stable-diffusion-xl-refiner",
    "cond_stage_model.transformer.": "stable-diffusion-1",
    "cond_stage_model.model.": "stable-diffusion-2",
}

_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_CHANNELS = (4, 8, 9)
_DEPTH_CHANNELS = 5
# The embedding of pooled text and sizes in Stable Diffusion XL, which other models have for classes; and its inputs.
_LABEL_EMBEDDING = "model.diffusion_model.label_emb."
_XL_EMBEDDING_WIDTHS = (2560, 2816)
# What trainers put before every name.
_WRAPPER = re.compile(r"((state_dict|module|model|_orig_mod)\.)+")

# Substrings of tensor names that identify other kinds of files; the first match counts.
FOREIGN = {
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "emb_params": "a textual inversion",
    ".time_stack.": "Stable Video Diffusion",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "down_blocks.": "a component in diffusers' layout, for which the folder of its checkpoint is needed",
}

# Tensors beside the weights that state how a model was trained; those for v-prediction are empty.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
_EDM_SIGMA_MIN, _EDM_SIGMA_MAX = "edm_vpred.sigma_min", "edm_vpred.sigma_max"  # CosXL
_EDM_MEAN = "edm_mean"  # Playground v2.5, as diffusers recognises it
_MARKERS = (_V_PREDICTION, _ZERO_SNR, _EDM_SIGMA_MIN, _EDM_SIGMA_MAX, _EDM_MEAN)
_DEFAULT_SIGMA_MIN = 0.002
_NUMBERS = ("F64", "F32", "F16", "BF16")  # the dtypes of the range of noise

# Settings of the official 768-pixel checkpoints of 2.x, which predict v, that differ from the base model's.
V_PREDICTION_768: Settings = {
    "unet/config.json": {"sample_size": 96, "upcast_attention": True},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "model_index.json": {"scheduler": ["diffusers", "DDIMScheduler"]},
}
# A model that was trained from pure noise on has to start there (https://arxiv.org/abs/2305.08891, section 3.3).
ZERO_SNR: Settings = {
    "scheduler/scheduler_config.json": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
# Settings of Playground v2.5 that differ from Stable Diffusion XL's.
PLAYGROUND: Settings = {
    "vae/config.json": {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "scaling_factor": 0.5,
    },
    "model_index.json": {"scheduler": ["diffusers", "EDMDPMSolverMultistepScheduler"]},
}
PLAYGROUND_SCHEDULER = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """The contents of a checkpoint's header.

    Attributes:
        path: the file.
        family: the model's family, a key of `FAMILIES`.
        in_channels: the input channels of the UNet: 4 for text-to-image, 8 for InstructPix2Pix, 9 for inpainting.
        prediction_type, licence: from the metadata, or a tensor that states it; None where there is none.
        wrapper: the prefix of every name that a trainer added, such as `state_dict.`; may be empty.
        markers: the tensors beside the weights that state how the model was trained.
    """

    path: Path
    family: str
    in_channels: int = 4
    prediction_type: PredictionType | None
    licence: str | None
    wrapper: str = ""
    markers: frozenset[str] = frozenset()

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that runs the model."""
        return FAMILIES[self.family].pipelines[self.in_channels]


def detect(path: Path, *, with_vae: bool = True) -> SingleFile:
    """Detect a checkpoint's family and task from its header; no weights are read.

    Args:
        path: the `.safetensors` file.
        with_vae: whether its autoencoder is needed.

    Raises:
        CheckpointError: the file is not a safetensors file, is damaged, has weights of a dtype that cannot be read, or
            is not a supported checkpoint of Stable Diffusion 1.x, 2.x or XL.
    """
    checkpoint, _ = _inspect(path, with_vae)
    return checkpoint


def unpack(
    path: Path,
    into: Path,
    *,
    prediction_type: PredictionType | None = None,
    config: Path | None = None,
    with_vae: bool = True,
) -> None:
    """Write a single-file checkpoint as a diffusers folder, tensor by tensor, in the precision of the file.

    Args:
        path: the `.safetensors` file.
        into: the folder to write; created if missing. After an error, the caller removes its contents.
        prediction_type: the prediction type of the UNet. Required for 2.x unless the metadata or a tensor states it,
            because the weights do not determine it.
        config: a diffusers folder of the same architecture, for models that the shipped configurations do not fit. Its
            tokenizers and scheduler are copied; its weights are not read. The input channels and the pipeline class
            are still those of the file.
        with_vae: whether the autoencoder's weights are written; its configuration is either way.

    Raises:
        CheckpointError: as `detect`; or the prediction type is unknown, or weights are missing or of another shape.
        ExportError: the folder cannot be written.
    """
    checkpoint, places = _inspect(path, with_vae)
    family = FAMILIES[checkpoint.family]
    settings = _read_settings(config or CONFIGS / checkpoint.family, family)
    predicts = prediction_type or (_configured_prediction(settings) if config else _default_prediction(checkpoint))
    if config is None:
        _adapt(settings, checkpoint, places, predicts)
    settings["scheduler/scheduler_config.json"]["prediction_type"] = predicts
    settings["unet/config.json"]["in_channels"] = checkpoint.in_channels
    index = settings["model_index.json"]
    index["_class_name"] = checkpoint.pipeline_class
    index |= {name: [None, None] for name in ("safety_checker", "feature_extractor") if name in index}
    try:
        _write_settings(settings, into)
        for tokenizer in family.tokenizers:
            _write_tokenizer(into / tokenizer, config or CONFIGS / checkpoint.family, shipped=config is None)
        for component, layout in family.components.items():
            if component == "vae" and not with_vae:
                continue
            stored = {name: place for name, place in places.items() if name.startswith(layout.prefix)}
            tensors = convert(component, layout, stored, settings[f"{component}/config.json"])
            copy_tensors(path, tensors, into / component / layout.file)
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


def _inspect(path: Path, with_vae: bool) -> tuple[SingleFile, dict[str, TensorPlace]]:
    """Return the description of a file, and its tensors by their names without the wrapper."""
    reject_foreign(path)
    header = read_header_of(path)
    wrapper = _find_wrapper(header.tensors)
    places = {name.removeprefix(wrapper): place for name, place in header.tensors.items()}
    shapes = {name: place.shape for name, place in places.items()}
    family = _find_family(shapes)
    if (problem := _find_problem(shapes, family, with_vae)) is not None:
        raise CheckpointError(f"{path.name} {problem}; {SUPPORTED}")
    assert family is not None  # else it is a problem
    check_dtypes(path.name, {name: place.dtype for name, place in header.tensors.items()})
    markers = frozenset(name for name in _MARKERS if name in places)
    stated: PredictionType | None = "v_prediction" if markers & {_V_PREDICTION, _EDM_SIGMA_MAX} else None
    checkpoint = SingleFile(
        path=path,
        family=family,
        in_channels=shapes[_FIRST_CONVOLUTION][1],
        prediction_type=stated or _read_prediction_type(header.metadata),
        licence=header.metadata.get("modelspec.license"),
        wrapper=wrapper,
        markers=markers,
    )
    return checkpoint, places


def _find_family(names: Iterable[str]) -> str | None:
    """Return the family of a file by its text encoders; None if it has none that is known."""
    found = set(names)
    return next((family for prefix, family in _TEXT_ENCODERS.items() if _any(found, prefix)), None)


def _find_wrapper(names: Iterable[str]) -> str:
    """Return the prefix that a trainer put before every name; empty if there is none."""
    found = {name.removesuffix(_FIRST_CONVOLUTION) for name in names if name.endswith(_FIRST_CONVOLUTION)}
    return "" if "" in found else next((prefix for prefix in sorted(found) if _WRAPPER.fullmatch(prefix)), "")


def _find_problem(shapes: Mapping[str, tuple[int, ...]], family: str | None, with_vae: bool) -> str | None:
    """Return the reason why a file cannot be unpacked, as the end of a sentence; None if it can be."""
    for part, kind in FOREIGN.items():
        if any(part in name for name in shapes):
            return f"looks like {kind}"
    if _any(shapes, _LABEL_EMBEDDING) and (family is None or not _is_xl(family)):
        width = shapes.get(f"{_LABEL_EMBEDDING}0.0.weight", ())[-1:]
        if family is None and width and width[0] in _XL_EMBEDDING_WIDTHS:
            return "looks like a UNet of Stable Diffusion XL without its text encoders"
        return "looks like a class-conditioned model (unCLIP, or an upscaler)"
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
    if channels not in (_CHANNELS if family is None else FAMILIES[family].pipelines):
        return f"has {channels} input channels{' and is a refiner, which has 4' if channels in _CHANNELS else ''}"
    if family is None:
        return "looks like a UNet without its text encoder"
    if with_vae and not _any(shapes, VAE.prefix):
        return "looks like a checkpoint without its autoencoder, which can be passed as `vae`"
    for component, layout in FAMILIES[family].components.items():
        if component != "vae" and not _any(shapes, layout.prefix):
            return f"looks like a checkpoint without its {component}"
    return None


def _is_xl(family: str) -> bool:
    return family.startswith("stable-diffusion-xl")


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _read_prediction_type(metadata: Mapping[str, str]) -> PredictionType | None:
    """Return the prediction type in the metadata (Stability's modelspec): its own key, or the architecture's name.

    ComfyUI writes the key as `predict_key`.
    """
    stated = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key", "")
    architecture = metadata.get("modelspec.architecture", "")
    if stated in {"v", "v_prediction"} or (not stated and architecture == "stable-diffusion-v2-768-v"):
        return "v_prediction"
    if stated == "epsilon" or (not stated and architecture == "stable-diffusion-v2-512"):
        return "epsilon"
    return None


def _default_prediction(checkpoint: SingleFile) -> PredictionType:
    if checkpoint.prediction_type:
        return checkpoint.prediction_type
    if checkpoint.family != "stable-diffusion-2":
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


def _read_settings(folder: Path, family: Family) -> Settings:
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{one}/config.json" for one in family.components),
    ]
    check_folders(folder, "model_index.json", "scheduler", *family.tokenizers, *family.components)
    try:
        return {name: read_object(folder / name) for name in names}
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} does not describe a checkpoint; expected {', '.join(names)}: {error}"
        ) from None


def _adapt(
    settings: Settings, checkpoint: SingleFile, places: Mapping[str, TensorPlace], predicts: PredictionType
) -> None:
    """Change the shipped settings of a family to those of a file."""
    changes: Settings = {}
    if checkpoint.family == "stable-diffusion-2" and predicts == "v_prediction":
        changes = V_PREDICTION_768
    elif checkpoint.family == "stable-diffusion-xl":
        names = (name.removeprefix(UNET.prefix) for name in places if name.startswith(UNET.prefix))
        settings["unet/config.json"] |= derive_structure(names, settings["unet/config.json"])
        if _EDM_MEAN in checkpoint.markers:
            settings["scheduler/scheduler_config.json"] = dict(PLAYGROUND_SCHEDULER)
            changes = PLAYGROUND
        elif _EDM_SIGMA_MAX in checkpoint.markers:
            settings["scheduler/scheduler_config.json"] = _read_edm_scheduler(checkpoint, places)
            changes = {"model_index.json": {"scheduler": ["diffusers", "EDMEulerScheduler"], **_mark_edit(checkpoint)}}
        elif _ZERO_SNR in checkpoint.markers and predicts == "v_prediction":
            changes = ZERO_SNR
    for name, values in changes.items():
        settings[name] |= values


def _mark_edit(checkpoint: SingleFile) -> dict[str, Any]:
    """Return the setting by which diffusers scales the latents of the image that CosXL edits."""
    return {"is_cosxl_edit": True} if checkpoint.pipeline_class == "StableDiffusionXLInstructPix2PixPipeline" else {}


def _read_edm_scheduler(checkpoint: SingleFile, places: Mapping[str, TensorPlace]) -> dict[str, Any]:
    """Return the scheduler of CosXL, whose range of noise is stored in the file."""
    sigmas = {_EDM_SIGMA_MIN: _DEFAULT_SIGMA_MIN}
    for name in sorted(checkpoint.markers & {_EDM_SIGMA_MIN, _EDM_SIGMA_MAX}):
        place = places[name]
        if math.prod(place.shape) != 1 or place.dtype not in _NUMBERS:
            raise CheckpointError(
                f"{checkpoint.path.name} stores {name} as {place.dtype} with the shape {quote(list(place.shape))}, "
                f"expected one number of {', '.join(_NUMBERS)}; the file is damaged, download it again"
            )
        try:
            with safe_open(checkpoint.path, framework="pt") as file:
                sigmas[name] = float(file.get_tensor(f"{checkpoint.wrapper}{name}"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.path} cannot be read: {error}") from error
    low, high = sigmas[_EDM_SIGMA_MIN], sigmas[_EDM_SIGMA_MAX]
    if not 0 < low < high < math.inf:
        raise CheckpointError(
            f"{checkpoint.path.name} stores the range of noise {low:g} to {high:g}, expected finite numbers above 0, "
            "the larger one last; the file is damaged, download it again"
        )
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "rho": 7.0,
        "sigma_data": 1.0,
        "sigma_max": high,
        "sigma_min": low,
        "sigma_schedule": "exponential",
    }


def _write_settings(settings: Mapping[str, Mapping[str, Any]], into: Path) -> None:
    for name, values in settings.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, config: Path, *, shipped: bool) -> None:
    shutil.copytree(config / folder.name, folder, dirs_exist_ok=True)
    if shipped:
        write_vocabulary(folder, read_merges())
