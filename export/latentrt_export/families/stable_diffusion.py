"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentrt.bundle.manifest import LOW_RES_SCHEDULER, LatentSpace, Limits, Preprocessing
from latentrt.errors import CheckpointError, RequestError
from latentrt.sampling.training_noise import training_alphas
from latentrt_export.checkpoints.checkpoint import Checkpoint, PipelineClass
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import read_depth_preprocessing
from latentrt_export.families.plan import ComponentPlan, ExportPlan
from latentrt_export.graphs.deep_cache import count_branches

__all__ = ["PIPELINES", "plan_export"]

MAX_BATCH = 32
MAX_STEPS = 1000
UPSCALER_SCALE = 0.08333  # of the autoencoder

_TEXT_TO_IMAGE = ("text-to-image", "image-to-image", "inpainting")
# The tasks of each pipeline class, by the number of channels that the UNet takes: 4 of latents, then those of the
# conditioning. Not exported yet, each with a line here, its sources in `_components` and its components:
#   8 StableDiffusionLatentUpscalePipeline   latent-upscaling  no text-to-image autoencoder scale
#   4 StableDiffusionImageVariationPipeline  image-variation   encoder_hidden_states from an image-encoder
#   4 StableUnCLIPImg2ImgPipeline            unclip            class_labels from an image-encoder
_TASKS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {4: _TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionImg2ImgPipeline": {4: _TEXT_TO_IMAGE},
    "StableDiffusionInpaintPipeline": {4: _TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionInstructPix2PixPipeline": {8: ("edit",)},
    "StableDiffusionDepth2ImgPipeline": {5: ("depth-to-image",)},
    "StableDiffusionUpscalePipeline": {7: ("upscaling",)},
}
# The source of the UNet's class labels, where it has them.
_CLASS_LABELS = {"StableDiffusionUpscalePipeline": {"class_labels": "noise-level"}}
_FOLDERS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PIPELINES: Mapping[str, PipelineClass] = {
    **{name: PipelineClass(components=_FOLDERS) for name in _TASKS},
    "StableDiffusionDepth2ImgPipeline": PipelineClass(components={**_FOLDERS, "depth_estimator": "model"}),
    "StableDiffusionUpscalePipeline": PipelineClass(components=_FOLDERS, schedulers=("scheduler", LOW_RES_SCHEDULER)),
}


def plan_export(checkpoint: Checkpoint) -> ExportPlan:
    """Plan the export of a Stable Diffusion checkpoint from its configurations.

    Raises:
        CheckpointError: the model is not one of the supported variants, or its configurations contradict one another.
    """
    text = _read_config(checkpoint, "text_encoder")
    unet = _read_config(checkpoint, "unet")
    vae = _read_config(checkpoint, "vae")
    space = LatentSpace(
        channels=vae.get("latent_channels", 4),
        downscale=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
        scale=vae.get("scaling_factor", 0.18215),
        shift=vae.get("shift_factor") or 0.0,
    )
    height, width = _read_size(unet)
    tasks = _find_tasks(checkpoint.pipeline_class, unet, space)
    return ExportPlan(
        family="stable-diffusion-1" if text.get("hidden_act", "quick_gelu") == "quick_gelu" else "stable-diffusion-2",
        tasks=tasks,
        components=tuple(each for each in _components(checkpoint) if each.weights in checkpoint.weights),
        latent_spaces={"unet": space},
        tokenizers={"text_encoder": "tokenizer"},
        height=height * space.downscale,
        width=width * space.downscale,
        limits=Limits(
            min_side=8 * space.downscale,
            # An upscaler's latents have the size of its input image.
            max_side=(512 if "upscaling" in tasks else 256) * space.downscale,
            max_batch=MAX_BATCH,
            max_steps=MAX_STEPS,
            max_clip_skip=text.get("num_hidden_layers", 12),
            max_noise_level=_read_max_noise_level(checkpoint, unet, space) if "upscaling" in tasks else 0,
        ),
        deep_cache_branches=count_branches(unet),
    )


def _components(checkpoint: Checkpoint) -> Iterator[ComponentPlan]:
    yield ComponentPlan(
        name="text_encoder",
        role="text-encoder",
        module="text_encoder:TextEncoder",
        weights="text_encoder",
        sources={"input_ids": "tokens", "clip_skip": "option:clip_skip"},
    )
    yield ComponentPlan(
        name="vae_encoder", role="encoder", module="vae:VaeEncoder", weights="vae", sources={"pixels": "image"}
    )
    yield ComponentPlan(
        name="unet",
        role="denoiser",
        module="unet:UNet",
        weights="unet",
        sources={
            "sample": "latents",
            "timestep": "timestep",
            "encoder_hidden_states": "text_encoder.hidden_states",
            **_CLASS_LABELS.get(checkpoint.pipeline_class, {}),
        },
    )
    if "depth_estimator" in checkpoint.weights:
        yield ComponentPlan(
            name="depth_estimator",
            role="depth-estimator",
            module="depth_estimator:DepthEstimator",
            weights="depth_estimator",
            sources={"pixels": "image"},
            preprocessing=_read_depth_preprocessing(checkpoint),
        )
    yield ComponentPlan(
        name="vae_decoder", role="decoder", module="vae:VaeDecoder", weights="vae", sources={"latents": "latents"}
    )
    yield ComponentPlan(
        name="preview_decoder",
        role="preview-decoder",
        module="preview_decoder:PreviewDecoder",
        weights="preview_decoder",
        sources={"latents": "latents"},
    )
    yield ComponentPlan(
        name="safety_checker",
        role="classifier",
        module="safety_checker:SafetyChecker",
        weights="safety_checker",
        sources={"pixels": "images"},
    )


def _read_config(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """Read a component's configuration; absent keys have the defaults of diffusers and transformers."""
    root: Path = checkpoint.weights[folder].root
    return read_object(root / folder / "config.json")


def _find_tasks(pipeline_class: str, unet: Mapping[str, Any], space: LatentSpace) -> tuple[str, ...]:
    channels, made = unet.get("in_channels", 4), unet.get("out_channels", 4)
    tasks = _TASKS[pipeline_class]
    if channels not in tasks:
        raise CheckpointError(
            f"unet: its configuration has in_channels {channels!r}, expected {' or '.join(map(str, tasks))} for a "
            f"{pipeline_class}"
        )
    if made != space.channels:
        raise CheckpointError(
            f"unet: its configuration has out_channels {made!r}, expected {space.channels}, the latent channels of the "
            "autoencoder"
        )
    return tasks[channels]


def _read_size(unet: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of the latents that the UNet was trained at."""
    match unet.get("sample_size"):
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case found:
            raise CheckpointError(
                f"unet: its configuration has sample_size {found!r}, expected the side of the latents it was trained at"
            )


def _read_depth_preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    """Read the preprocessing of the depth estimator, whose size is that of the estimator's input."""
    path = checkpoint.folder / "feature_extractor" / "preprocessor_config.json"
    preprocessing = read_depth_preprocessing(path)
    size = _read_config(checkpoint, "depth_estimator").get("image_size", 384)
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if (preprocessing.height, preprocessing.width) != expected:
        raise CheckpointError(
            f"{path}: resizes to {preprocessing.height} × {preprocessing.width} pixels, expected "
            f"{' × '.join(map(str, expected))}, the input of the depth estimator; the two must belong together"
        )
    return preprocessing


def _read_max_noise_level(checkpoint: Checkpoint, unet: Mapping[str, Any], space: LatentSpace) -> int:
    """Read the highest noise level of an upscaler, and check what diffusers' pipeline assumes of the checkpoint."""
    index = read_object(checkpoint.folder / "model_index.json")
    if space.scale != UPSCALER_SCALE:
        raise CheckpointError(
            f"vae: its configuration has scaling_factor {space.scale:g}, expected {UPSCALER_SCALE}, which diffusers' "
            "pipeline uses for every upscaler; set it in vae/config.json"
        )
    if any(each is not None for each in index.get("watermarker") or ()):
        raise CheckpointError(
            "got a watermarker, expected none: latentrt applies no watermark; use a checkpoint without"
        )
    noise = checkpoint.other_schedulers[LOW_RES_SCHEDULER]
    try:
        trained = len(training_alphas(noise.config))
    except RequestError as error:
        raise CheckpointError(f"{LOW_RES_SCHEDULER}: it does not add Stable Diffusion's noise: {error}") from error
    level, labels = index.get("max_noise_level", 350), unet.get("num_class_embeds") or 0
    if not isinstance(level, int) or not 0 <= level < min(trained, labels):
        raise CheckpointError(
            f"model_index.json has max_noise_level {level!r}, expected a number below {min(trained, labels)}: the "
            f"{LOW_RES_SCHEDULER} has {trained} timesteps and the unet {labels} class labels"
        )
    return level
