"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from latentrt.bundle.manifest import LOW_RES_SCHEDULER, Defaults, LatentSpace, Limits, Preprocessing
from latentrt.errors import CheckpointError, RequestError
from latentrt.sampling.training_noise import training_alphas
from latentrt_export.checkpoints.checkpoint import Checkpoint, PipelineClass, find_own_folder
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import (
    check_crop,
    read_depth_preprocessing,
    read_preprocessor_config,
)
from latentrt_export.families.compatibility import Vae, check_components, read_vae
from latentrt_export.families.plan import ComponentPlan, ExportPlan
from latentrt_export.graphs.deep_cache import count_branches

__all__ = ["NOISE_LEVEL_WIDTH", "PIPELINES", "plan_export"]

MAX_BATCH = 32
MAX_STEPS = 1000
UPSCALER_SCALE = 0.08333  # the autoencoder's scaling factor
# Side of the latents of a latent upscaler without `sample_size`, for 1024 × 1024 pixels.
_LATENT_UPSCALER_SIDE = 128
# The cosines and sines of a latent upscaler's noise level, which precede the pooled text.
NOISE_LEVEL_WIDTH = 128

_TEXT_TO_IMAGE = ("text-to-image", "image-to-image", "inpainting")
# The tasks of each pipeline class, by the number of channels that the UNet takes: 4 of latents, then those of the
# conditioning.
_TASKS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {4: _TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionImg2ImgPipeline": {4: _TEXT_TO_IMAGE},
    "StableDiffusionInpaintPipeline": {4: _TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionInstructPix2PixPipeline": {8: ("edit",)},
    "StableDiffusionDepth2ImgPipeline": {5: ("depth-to-image",)},
    "StableDiffusionUpscalePipeline": {7: ("upscaling",)},
    "StableDiffusionLatentUpscalePipeline": {8: ("latent-upscaling",)},
    "StableDiffusionImageVariationPipeline": {4: ("image-variation",)},
    "StableUnCLIPImg2ImgPipeline": {4: ("unclip",)},
    # Its image-to-image (`LatentConsistencyModelImg2ImgPipeline`) counts steps otherwise.
    "LatentConsistencyModelPipeline": {4: ("text-to-image",)},
}
# The pipelines that give the guidance scale to a denoiser with `time_cond_proj_dim`.
_EMBED_GUIDANCE = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
}
# The modules of each class of autoencoder: encoder, decoder.
_VAE_MODULES = {
    "AutoencoderKL": ("vae:VaeEncoder", "vae:VaeDecoder"),
    "AutoencoderTiny": ("vae:TinyEncoder", "vae:TinyDecoder"),
    "AsymmetricAutoencoderKL": ("vae:AsymmetricVaeEncoder", "vae:AsymmetricVaeDecoder"),
}
# The sources of the UNet's further inputs, where it has them.
_SOURCES = {
    "StableDiffusionUpscalePipeline": {"class_labels": "noise-level"},
    "StableDiffusionLatentUpscalePipeline": {"timestep": "c-noise", "pooled": "text_encoder.pooled"},
    "StableUnCLIPImg2ImgPipeline": {"class_labels": "image_encoder.class_labels"},
}
# The default number of steps and guidance scale of diffusers' pipelines, where they are not these two.
_DEFAULT_STEPS, _DEFAULT_GUIDANCE_SCALE = 50, 7.5
_DEFAULTS = {
    "StableDiffusionInstructPix2PixPipeline": (100, _DEFAULT_GUIDANCE_SCALE),
    "StableDiffusionUpscalePipeline": (75, 9.0),
    "StableDiffusionLatentUpscalePipeline": (75, 9.0),
    "StableUnCLIPImg2ImgPipeline": (20, 10.0),
    "LatentConsistencyModelPipeline": (4, 8.5),
}
_FOLDERS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PIPELINES: Mapping[str, PipelineClass] = {
    **{name: PipelineClass(components=_FOLDERS) for name in _TASKS},
    "StableDiffusionDepth2ImgPipeline": PipelineClass(components={**_FOLDERS, "depth_estimator": "model"}),
    "StableDiffusionUpscalePipeline": PipelineClass(components=_FOLDERS, schedulers=("scheduler", LOW_RES_SCHEDULER)),
    "StableDiffusionImageVariationPipeline": PipelineClass(
        components={
            "image_encoder": "model",
            **{folder: stem for folder, stem in _FOLDERS.items() if folder != "text_encoder"},
        }
    ),
    "StableUnCLIPImg2ImgPipeline": PipelineClass(
        components={"image_encoder": "model", "image_normalizer": "diffusion_pytorch_model", **_FOLDERS},
        schedulers=("scheduler", "image_noising_scheduler"),
    ),
}


def plan_export(checkpoint: Checkpoint) -> ExportPlan:
    """Plan the export of a Stable Diffusion checkpoint from its configurations.

    Raises:
        CheckpointError: the model is not one of the supported variants, or its configurations contradict one another.
    """
    text = _read_config(checkpoint, "text_encoder") if "text_encoder" in checkpoint.weights else None
    unet = _read_config(checkpoint, "unet")
    vae = read_vae(_read_config(checkpoint, "vae"), checkpoint.classes.get("vae", "AutoencoderKL"))
    # diffusers' pipelines of this family apply no `shift_factor`.
    space = LatentSpace(channels=vae.channels, downscale=vae.downscale, scale=vae.scale)
    tasks, warnings = _find_tasks(checkpoint.pipeline_class, unet, vae)
    latent_upscaling = "latent-upscaling" in tasks
    _check_configurations(checkpoint, unet, vae, text, tasks)
    if latent_upscaling:
        _check_latent_upscaler(checkpoint, unet, text)
        space = msgspec.structs.replace(
            space, multiple=2 ** (len(unet.get("block_out_channels", (320, 640, 1280, 1280))) - 1)
        )
    height, width = _read_size(unet, _LATENT_UPSCALER_SIDE if latent_upscaling else None)
    steps, guidance_scale = _DEFAULTS.get(checkpoint.pipeline_class, (_DEFAULT_STEPS, _DEFAULT_GUIDANCE_SCALE))
    return ExportPlan(
        family=f"stable-diffusion-{_find_version(text, unet)}",
        tasks=tasks,
        components=tuple(
            each
            for each in _list_components(checkpoint, tasks, vae, distilled=_is_distilled(unet, tasks))
            if each.weights in checkpoint.weights
        ),
        latent_spaces={"unet": space},
        tokenizers={} if text is None else {"text_encoder": "tokenizer"},
        scheduler_config=_find_scheduler_config(checkpoint, tasks),
        defaults=Defaults(
            height=height * space.downscale,
            width=width * space.downscale,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        ),
        limits=Limits(
            # A latent upscaler pads by reflection, which needs at least 2 × 2 features at its lowest level.
            min_side=2 * space.side_multiple if latent_upscaling else 8 * space.downscale,
            # An upscaler's latents have the size of its input image.
            max_side=(512 if "upscaling" in tasks else 256) * space.downscale,
            max_batch=MAX_BATCH,
            max_steps=MAX_STEPS,
            max_clip_skip=0 if text is None or latent_upscaling else text.get("num_hidden_layers", 12),
            max_noise_level=_find_max_noise_level(checkpoint, unet, space, tasks),
        ),
        deep_cache_branches=0 if latent_upscaling else count_branches(unet),
        warnings=warnings,
    )


def _check_configurations(
    checkpoint: Checkpoint, unet: Mapping[str, Any], vae: Vae, text: Mapping[str, Any] | None, tasks: tuple[str, ...]
) -> None:
    """Check that all components belong together, and that the pipeline gives the denoiser the inputs that it takes."""
    noised = "unclip" in tasks
    image_encoder = _read_config(checkpoint, "image_encoder") if "image_encoder" in checkpoint.weights else None
    if image_encoder is not None:
        _check_image_encoder(checkpoint, unet, image_encoder, noised=noised)
    preview = None
    if "preview_decoder" in checkpoint.weights:
        config = _read_config(checkpoint, "preview_decoder")
        preview = read_vae(config, "AutoencoderTiny", "preview_decoder")
    check_components(
        unet,
        vae,
        text=text,
        image_encoder=image_encoder,
        preview=preview,
        noised_image=noised,
        variances=1 if "latent-upscaling" in tasks else 0,  # which the pipeline drops
    )
    if "class_labels" not in _SOURCES.get(checkpoint.pipeline_class, {}):
        for key in ("class_embed_type", "num_class_embeds"):
            if unet.get(key) is not None:
                raise CheckpointError(
                    f"unet: its configuration has {key} {unet[key]!r}, expected none for a "
                    f"{checkpoint.pipeline_class}, which gives no class labels; is model_index.json this unet's?"
                )
    _check_guidance(checkpoint.pipeline_class, unet, distilled=_is_distilled(unet, tasks))


def _is_distilled(unet: Mapping[str, Any], tasks: tuple[str, ...]) -> bool:
    """Return whether the guidance scale is an input of the denoiser."""
    return unet.get("time_cond_proj_dim") is not None and "latent-upscaling" not in tasks


def _check_guidance(pipeline_class: str, unet: Mapping[str, Any], *, distilled: bool) -> None:
    """Check that a pipeline gives the guidance scale to a denoiser that takes it, and to no other."""
    if pipeline_class == "LatentConsistencyModelPipeline" and not distilled:
        raise CheckpointError(
            f"unet: its configuration has no time_cond_proj_dim, expected one for a {pipeline_class}, whose guidance "
            "scale is an input of the unet; for a unet without, set _class_name StableDiffusionPipeline in "
            "model_index.json"
        )
    if distilled and pipeline_class not in _EMBED_GUIDANCE:
        raise CheckpointError(
            f"unet: its configuration has time_cond_proj_dim {unet['time_cond_proj_dim']!r}, expected none for a "
            f"{pipeline_class}, which does not give the guidance scale to the unet"
        )


def _find_max_noise_level(
    checkpoint: Checkpoint, unet: Mapping[str, Any], space: LatentSpace, tasks: tuple[str, ...]
) -> int:
    """Return the highest noise level of the input image (upscaling) or its embedding (unCLIP); 0 for other models."""
    if "upscaling" in tasks:
        return _read_max_noise_level(checkpoint, unet, space)
    return _find_noise_levels(checkpoint) - 1 if "unclip" in tasks else 0


def _list_components(
    checkpoint: Checkpoint, tasks: tuple[str, ...], vae: Vae, *, distilled: bool
) -> Iterator[ComponentPlan]:
    encoder, decoder = _VAE_MODULES[vae.class_name]
    variation, noised, pooled = "image-variation" in tasks, "unclip" in tasks, "latent-upscaling" in tasks
    if variation or noised:
        yield ComponentPlan(
            name="image_encoder",
            role="image-encoder",
            module="image_encoder:NoisedImageEncoder" if noised else "image_encoder:ImageEncoder",
            weights="image_encoder",
            sources={"pixels": "image"} | ({"noise_level": "noise-level"} if noised else {}),
        )
    yield ComponentPlan(
        name="text_encoder",
        role="text-encoder",
        module="text_encoder:PooledTextEncoder" if pooled else "text_encoder:TextEncoder",
        weights="text_encoder",
        sources={"input_ids": "tokens"} | ({} if pooled else {"clip_skip": "option:clip_skip"}),
    )
    yield ComponentPlan(name="vae_encoder", role="encoder", module=encoder, weights="vae", sources={"pixels": "image"})
    yield ComponentPlan(
        name="unet",
        role="denoiser",
        module=f"unet:{_name_unet(tasks, distilled=distilled)}",
        weights="unet",
        sources={
            "sample": "latents",
            "timestep": "timestep",
            "encoder_hidden_states": "image_encoder.image_embeds" if variation else "text_encoder.hidden_states",
            **_SOURCES.get(checkpoint.pipeline_class, {}),
            **({"guidance_weight": "guidance-weight"} if distilled else {}),
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
        name="vae_decoder", role="decoder", module=decoder, weights="vae", sources={"latents": "latents"}
    )
    yield ComponentPlan(
        name="preview_decoder",
        role="preview-decoder",
        module="vae:TinyDecoder",
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


def _name_unet(tasks: tuple[str, ...], *, distilled: bool) -> str:
    if "image-variation" in tasks:
        return "ImageVariationUNet"
    if "latent-upscaling" in tasks:
        return "LatentUpscalerUNet"
    return "GuidanceDistilledUNet" if distilled else "UNet"


def _read_config(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    """Read a component's configuration; absent keys have the defaults of diffusers and transformers."""
    return read_object(find_own_folder(checkpoint.weights[component].root, component) / "config.json")


def _find_version(text: Mapping[str, Any] | None, unet: Mapping[str, Any]) -> int:
    """Return 1 or 2: version 2 has OpenCLIP's text encoder, with plain GELU, and linear projections in the UNet."""
    if text is None:
        return 2 if unet.get("use_linear_projection", False) else 1
    return 1 if text.get("hidden_act", "quick_gelu") == "quick_gelu" else 2


def _check_image_encoder(
    checkpoint: Checkpoint, unet: Mapping[str, Any], encoder: Mapping[str, Any], *, noised: bool
) -> None:
    """Check that an image encoder suits its preprocessing, and the denoiser takes an embedding for class labels."""
    folder: Path = checkpoint.weights["image_encoder"].root / "feature_extractor"
    check_crop(read_preprocessor_config(folder / "preprocessor_config.json"), encoder.get("image_size", 224), folder)
    if noised and unet.get("class_embed_type") != "projection":
        raise CheckpointError(
            f"unet: its configuration has class_embed_type {unet.get('class_embed_type')!r}, expected 'projection' "
            f"for a {checkpoint.pipeline_class}"
        )


def _find_noise_levels(checkpoint: Checkpoint) -> int:
    """Return the number of noise levels of a stable unCLIP checkpoint's image embeddings."""
    try:
        return len(training_alphas(checkpoint.other_schedulers["image_noising_scheduler"].config))
    except RequestError as error:
        raise CheckpointError(f"image_noising_scheduler: its noise schedule is not supported: {error}") from error


def _find_tasks(pipeline_class: str, unet: Mapping[str, Any], vae: Vae) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks, and a warning for each that is left out."""
    in_channels = unet.get("in_channels", 4)
    tasks = _TASKS[pipeline_class]
    if in_channels not in tasks:
        raise CheckpointError(
            f"unet: its configuration has in_channels {in_channels!r}, expected {' or '.join(map(str, tasks))} for a "
            f"{pipeline_class}"
        )
    found = tasks[in_channels]
    if vae.class_name != "AsymmetricAutoencoderKL" or "inpainting" not in found:
        return found, ()
    lacks = "the decoder of an AsymmetricAutoencoderKL takes the image and the mask of inpainting, which is unsupported"
    rest = tuple(task for task in found if task != "inpainting")
    if not rest:
        raise CheckpointError(f"vae: {lacks}, and inpainting is all that this unet does; pass another one as `vae`")
    return rest, (f"{lacks}: the bundle does {' and '.join(rest)} only; pass another one with --vae for inpainting",)


def _check_latent_upscaler(checkpoint: Checkpoint, unet: Mapping[str, Any], text: Mapping[str, Any] | None) -> None:
    """Check the assumptions of diffusers' pipeline for latent upscalers."""
    width = NOISE_LEVEL_WIDTH + (text or {}).get("hidden_size", 512)
    if unet.get("time_cond_proj_dim") != width:
        raise CheckpointError(
            f"unet: its configuration has time_cond_proj_dim {unet.get('time_cond_proj_dim')!r}, expected {width}: "
            f"{NOISE_LEVEL_WIDTH} for the noise level, the rest for the text encoder's pooled output"
        )
    predicts = checkpoint.scheduler_config.get("prediction_type", "epsilon")
    if predicts not in ("sample", "original_sample"):
        raise CheckpointError(
            f"scheduler: its configuration has prediction_type {predicts!r}, expected 'original_sample', which "
            "diffusers' pipeline computes from a latent upscaler's output; set it in scheduler/scheduler_config.json"
        )


def _find_scheduler_config(checkpoint: Checkpoint, tasks: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the scheduler's configuration with the prediction type of the graph, which is v for a latent upscaler."""
    config = checkpoint.scheduler_config
    return {**config, "prediction_type": "v_prediction"} if "latent-upscaling" in tasks else config


def _read_size(unet: Mapping[str, Any], default: int | None) -> tuple[int, int]:
    """Read the height and width of the latents of the UNet's training."""
    match unet["sample_size"] if unet.get("sample_size") is not None else default:
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case found:
            raise CheckpointError(
                f"unet: its configuration has sample_size {found!r}, expected the side of the latents it was trained at"
            )


def _read_depth_preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    """Read the preprocessing of the depth estimator.

    Raises:
        CheckpointError: it resizes to another size than the estimator's input has.
    """
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
    """Read the highest noise level of an upscaler, and check the assumptions of diffusers' pipeline.

    Raises:
        CheckpointError: the checkpoint contradicts one of them, or has a watermarker.
    """
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
