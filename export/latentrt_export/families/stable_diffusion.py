"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from latentrt.bundle.manifest import (
    LOW_RES_SCHEDULER,
    ConfigChange,
    Defaults,
    LatentSpace,
    Limits,
    Preprocessing,
)
from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError, RequestError
from latentrt.sampling.samplers import SAMPLERS
from latentrt.sampling.training_noise import training_alphas
from latentrt_export.checkpoints.checkpoint import Checkpoint, PipelineClass
from latentrt_export.checkpoints.config_keys import (
    check_kind,
    drop_keys_left_to_default,
)
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import (
    DEPTH_PROCESSORS,
    PROCESSORS,
    check_crop,
    read_depth_preprocessing,
    read_preprocessor_config,
)
from latentrt_export.families.compatibility import Vae, check_components, read_vae
from latentrt_export.families.latent_diffusion import (
    CLASS_LABEL_KEYS,
    MAX_BATCH,
    MAX_STEPS,
    TEXT_TO_IMAGE,
    check_all_keys,
    check_unset,
    find_tasks,
    plan_decoder,
    plan_encoder,
    plan_last_components,
    read_config,
    read_preview,
    read_size,
    refuse_extension,
)
from latentrt_export.families.plan import ComponentPlan, ExportPlan
from latentrt_export.graphs.deep_cache import count_branches

__all__ = ["NOISE_LEVEL_WIDTH", "PIPELINES", "REFUSALS", "plan_export"]

UPSCALER_SCALE = 0.08333  # the autoencoder's scaling factor
# Side of the latents of a latent upscaler without `sample_size`, for 1024 × 1024 pixels.
_LATENT_UPSCALER_SIDE = 128
# The cosines and sines of a latent upscaler's noise level, which precede the pooled text.
NOISE_LEVEL_WIDTH = 128

_LATENT_CONSISTENCY_CLASSES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
# The tasks of each pipeline class, by the number of channels that the UNet takes: 4 of latents, then those of the
# conditioning.
_TASKS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {4: TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionImg2ImgPipeline": {4: TEXT_TO_IMAGE},
    "StableDiffusionInpaintPipeline": {4: TEXT_TO_IMAGE, 9: ("inpainting",)},
    "StableDiffusionInpaintPipelineLegacy": {4: TEXT_TO_IMAGE},
    # Their image-to-image counts steps in another way.
    **{name: {4: ("text-to-image",)} for name in _LATENT_CONSISTENCY_CLASSES},
    "StableDiffusionInstructPix2PixPipeline": {8: ("edit",)},
    "StableDiffusionDepth2ImgPipeline": {5: ("depth-to-image",)},
    "StableDiffusionUpscalePipeline": {7: ("upscaling",)},
    "StableDiffusionLatentUpscalePipeline": {8: ("latent-upscaling",)},
    "StableDiffusionImageVariationPipeline": {4: ("image-variation",)},
    "StableUnCLIPImg2ImgPipeline": {4: ("unclip",)},
}
# The pipelines that give the guidance scale to a denoiser with `time_cond_proj_dim`.
_EMBED_GUIDANCE = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    *_LATENT_CONSISTENCY_CLASSES,
}
# The sources of the UNet's further inputs, where it has them.
_SOURCES = {
    "StableDiffusionUpscalePipeline": {"class_labels": "noise-level"},
    "StableDiffusionLatentUpscalePipeline": {"timestep": "c-noise", "pooled": "text_encoder.pooled"},
    "StableUnCLIPImg2ImgPipeline": {"class_labels": "image_encoder.class_labels"},
}
_TOKENIZER = "tokenizer"  # the folder of the tokenizer
# The default number of steps and guidance scale of diffusers' pipelines, where they are not these two.
_DEFAULT_STEPS, _DEFAULT_GUIDANCE_SCALE = 50, 7.5
_DEFAULTS = {
    **dict.fromkeys(_LATENT_CONSISTENCY_CLASSES, (4, 8.5)),
    "StableDiffusionInstructPix2PixPipeline": (100, _DEFAULT_GUIDANCE_SCALE),
    "StableDiffusionUpscalePipeline": (75, 9.0),
    "StableDiffusionLatentUpscalePipeline": (75, 9.0),
    "StableUnCLIPImg2ImgPipeline": (20, 10.0),
}


class _Change(NamedTuple):
    """A change that the constructor of a diffusers pipeline makes to its scheduler's configuration.

    `applies` decides by the value of the checkpoint or, where it has none, the default of the scheduler's class; a
    scheduler without the key is not changed.
    """

    key: str
    used: bool | int
    applies: Callable[[Any], bool]


_STEPS_OFFSET = _Change("steps_offset", 1, lambda found: found != 1)
_CLIP_SAMPLE = _Change("clip_sample", False, lambda found: found is True)
_SKIP_PRK_STEPS = _Change("skip_prk_steps", True, lambda found: found is False)
# The changes of diffusers' pipeline for each task: StableDiffusionPipeline, -Img2ImgPipeline and -InpaintPipeline. The
# pipelines of other tasks and of latent consistency models make none.
_SCHEDULER_CHANGES: Mapping[str, tuple[_Change, ...]] = {
    "text-to-image": (_STEPS_OFFSET, _CLIP_SAMPLE),
    "image-to-image": (_STEPS_OFFSET, _CLIP_SAMPLE),
    "inpainting": (_STEPS_OFFSET, _SKIP_PRK_STEPS),
}
# The tasks whose pipelines generate at 64 × 64 latents with a UNet of diffusers before 0.9 that states fewer.
_OLD_SIZE_TASKS = (*TEXT_TO_IMAGE, "depth-to-image", "image-variation")
_OLD_SIZE, _OLD_SIZE_USED, _OLD_SIZE_BEFORE = "sample_size", 64, (0, 9)

_FOLDERS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_CLASSES: Mapping[str, Collection[str]] = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
}
_IMAGE_ENCODER_CLASSES: Mapping[str, Collection[str]] = {
    **_CLASSES,
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
    "feature_extractor": PROCESSORS,
}
_MODEL_TYPES: Mapping[str, Collection[str]] = {
    "text_encoder": ("clip", "clip_text_model"),
    "image_encoder": ("clip", "clip_vision_model"),
    "safety_checker": ("clip",),
    "depth_estimator": ("dpt",),
}


def _make_pipeline_class(
    components: Mapping[str, str] = _FOLDERS,
    schedulers: tuple[str, ...] = ("scheduler",),
    classes: Mapping[str, Collection[str]] = _CLASSES,
    model_types: Mapping[str, Collection[str]] = _MODEL_TYPES,
) -> PipelineClass:
    return PipelineClass(components=components, schedulers=schedulers, classes=classes, model_types=model_types)


REFUSALS: Mapping[str, str] = {
    **dict.fromkeys(
        ("StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline"),
        refuse_extension("guides by perturbed attention, which is not supported"),
    ),
    "StableDiffusionSAGPipeline": refuse_extension("guides by self-attention, which is not supported"),
    "StableDiffusionPipelineSafe": refuse_extension("guides away from unsafe concepts, which is not supported"),
    "SemanticStableDiffusionPipeline": refuse_extension("guides by edits of concepts, which is not supported"),
    "StableDiffusionAttendAndExcitePipeline": refuse_extension("guides by attention maps, which is not supported"),
    "StableDiffusionPanoramaPipeline": refuse_extension("denoises views of a panorama, which is not supported"),
    "StableDiffusionKDiffusionPipeline": refuse_extension(
        "samples by functions of k-diffusion that the folder does not name"
    ),
    "StableDiffusionDiffEditPipeline": refuse_extension("edits an image by DiffEdit, which is not supported"),
    "StableDiffusionPix2PixZeroPipeline": refuse_extension("edits an image by Pix2Pix Zero, which is not supported"),
    "StableDiffusionModelEditingPipeline": refuse_extension("edits the model's weights, which is not supported"),
    "StableDiffusionParadigmsPipeline": refuse_extension("denoises all steps at once, which is not supported"),
    "CycleDiffusionPipeline": refuse_extension("edits an image by CycleDiffusion, which is not supported"),
    "LEditsPPPipelineStableDiffusion": refuse_extension("edits an image by LEDITS++, which is not supported"),
    **dict.fromkeys(
        (
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionControlNetXSPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
        ),
        refuse_extension("needs a ControlNet, which is not supported"),
    ),
    "StableDiffusionAdapterPipeline": refuse_extension("needs a T2I-Adapter, which is not supported"),
    "AnimateDiffPipeline": "which needs a motion adapter; videos are not supported",
    **dict.fromkeys(
        ("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline"),
        "whose UNet takes boxes (GLIGEN), which is not supported",
    ),
    "StableDiffusionLDM3DPipeline": "whose autoencoder decodes a depth map beside the image, which is not supported",
    "StableUnCLIPPipeline": "which needs a prior of image embeddings, which is not supported; as a "
    "StableUnCLIPImg2ImgPipeline it makes them from an image",
    **dict.fromkeys(
        ("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline"),
        "whose text encoder is XLM-RoBERTa (RobertaSeriesModelWithTransformation), which is not supported",
    ),
    "LDMTextToImagePipeline": "whose text encoder is BERT (LDMBertModel), which is not supported",
    **dict.fromkeys(
        (
            "OnnxStableDiffusionPipeline",
            "OnnxStableDiffusionImg2ImgPipeline",
            "OnnxStableDiffusionInpaintPipeline",
            "OnnxStableDiffusionUpscalePipeline",
            "StableDiffusionOnnxPipeline",
        ),
        "whose parts are ONNX graphs already; export the checkpoint that they were made from",
    ),
    "FlaxStableDiffusionPipeline": "whose weights are Flax's; export the checkpoint in safetensors",
}
PIPELINES: Mapping[str, PipelineClass] = {
    **{name: _make_pipeline_class() for name in _TASKS},
    "StableDiffusionDepth2ImgPipeline": _make_pipeline_class(
        {**_FOLDERS, "depth_estimator": "model"},
        classes={
            **_CLASSES,
            "depth_estimator": ("DPTForDepthEstimation",),
            "feature_extractor": DEPTH_PROCESSORS,
        },
    ),
    "StableDiffusionUpscalePipeline": _make_pipeline_class(schedulers=("scheduler", LOW_RES_SCHEDULER)),
    "StableDiffusionImageVariationPipeline": _make_pipeline_class(
        {
            "image_encoder": "model",
            **{folder: stem for folder, stem in _FOLDERS.items() if folder != "text_encoder"},
        },
        classes=_IMAGE_ENCODER_CLASSES,
    ),
    "StableUnCLIPImg2ImgPipeline": _make_pipeline_class(
        {"image_encoder": "model", "image_normalizer": "diffusion_pytorch_model", **_FOLDERS},
        schedulers=("scheduler", "image_noising_scheduler"),
        classes=_IMAGE_ENCODER_CLASSES,
    ),
}


def plan_export(checkpoint: Checkpoint) -> ExportPlan:
    """Plan the export of a Stable Diffusion checkpoint from its configurations.

    Raises:
        CheckpointError: the model is not one of the supported variants, or its configurations contradict one another.
    """
    text = read_config(checkpoint, "text_encoder") if "text_encoder" in checkpoint.weights else None
    unet = read_config(checkpoint, "unet")
    vae_config, vae_class = read_config(checkpoint, "vae"), checkpoint.classes.get("vae", "AutoencoderKL")
    key_warnings = tuple(check_all_keys(checkpoint, vae_class, tokenizers=(_TOKENIZER,) if text is not None else ()))
    vae = read_vae(vae_config, vae_class)
    # diffusers' pipelines of this family apply no `shift_factor`.
    space = LatentSpace(channels=vae.channels, downscale=vae.downscale, scale=vae.scale)
    tasks, warnings = find_tasks(checkpoint.pipeline_class, _TASKS[checkpoint.pipeline_class], unet, vae)
    warnings = (*key_warnings, *_find_differences(checkpoint.pipeline_class), *warnings)
    latent_upscaling = "latent-upscaling" in tasks
    _check_configurations(checkpoint, unet, vae, text, tasks)
    if latent_upscaling:
        _check_latent_upscaler(checkpoint, unet, text)
        space = msgspec.structs.replace(
            space, multiple=2 ** (len(unet.get("block_out_channels", (320, 640, 1280, 1280))) - 1)
        )
    size_changes = _find_size_changes(unet, tasks)
    height, width = read_size(
        {**unet, **{change.key: change.used for change in size_changes}},
        _LATENT_UPSCALER_SIDE if latent_upscaling else None,
    )
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
        tokenizers={} if text is None else {"text_encoder": _TOKENIZER},
        scheduler_config=_find_scheduler_config(checkpoint, tasks),
        scheduler_changes=_find_scheduler_changes(checkpoint, tasks),
        defaults=Defaults(
            height=height * space.downscale,
            width=width * space.downscale,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            changes=size_changes,
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
    image_encoder = read_config(checkpoint, "image_encoder") if "image_encoder" in checkpoint.weights else None
    if image_encoder is not None:
        _check_image_encoder(checkpoint, unet, image_encoder, noised=noised)
    check_components(
        unet,
        vae,
        texts={} if text is None else {"text_encoder": text},
        image_encoder=image_encoder,
        normalizer=read_config(checkpoint, "image_normalizer") if "image_normalizer" in checkpoint.weights else None,
        preview=read_preview(checkpoint),
        noised_image=noised,
        variances=1 if "latent-upscaling" in tasks else 0,  # which the pipeline drops
    )
    labels = () if "class_labels" in _SOURCES.get(checkpoint.pipeline_class, {}) else CLASS_LABEL_KEYS
    check_unset(checkpoint.pipeline_class, unet, *labels, "addition_embed_type")
    _check_guidance(checkpoint.pipeline_class, unet, distilled=_is_distilled(unet, tasks))


def _is_distilled(unet: Mapping[str, Any], tasks: tuple[str, ...]) -> bool:
    """Return whether the guidance scale is an input of the denoiser."""
    return unet.get("time_cond_proj_dim") is not None and "latent-upscaling" not in tasks


def _check_guidance(pipeline_class: str, unet: Mapping[str, Any], *, distilled: bool) -> None:
    """Check that a pipeline gives the guidance scale to a denoiser that takes it, and to no other."""
    if pipeline_class in _LATENT_CONSISTENCY_CLASSES and not distilled:
        raise CheckpointError(
            f"unet: its configuration has no time_cond_proj_dim, expected one for a {pipeline_class}, whose guidance "
            "scale is an input of the unet; for a unet without, set _class_name StableDiffusionPipeline in "
            "model_index.json"
        )
    if distilled and pipeline_class not in _EMBED_GUIDANCE:
        raise CheckpointError(
            f"unet: its configuration has time_cond_proj_dim {quote(unet['time_cond_proj_dim'])}, expected none for a "
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
    yield plan_encoder(vae)
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
    yield plan_decoder(vae, tasks)
    yield from plan_last_components()


def _name_unet(tasks: tuple[str, ...], *, distilled: bool) -> str:
    if "image-variation" in tasks:
        return "ImageVariationUNet"
    if "latent-upscaling" in tasks:
        return "LatentUpscalerUNet"
    return "GuidanceDistilledUNet" if distilled else "UNet"


def _find_differences(pipeline_class: str) -> Iterator[str]:
    if pipeline_class == "StableDiffusionInpaintPipelineLegacy":
        yield (
            "StableDiffusionInpaintPipelineLegacy inpaints by an algorithm of its own; the bundle inpaints as "
            "StableDiffusionInpaintPipeline does"
        )


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
            f"unet: its configuration has class_embed_type {quote(unet.get('class_embed_type'))}, expected "
            f"'projection' for a {checkpoint.pipeline_class}"
        )


def _find_noise_levels(checkpoint: Checkpoint) -> int:
    """Return the number of noise levels of a stable unCLIP checkpoint's image embeddings."""
    try:
        return len(training_alphas(checkpoint.other_schedulers["image_noising_scheduler"].config))
    except RequestError as error:
        raise CheckpointError(f"image_noising_scheduler: its noise schedule is not supported: {error}") from error


def _check_latent_upscaler(checkpoint: Checkpoint, unet: Mapping[str, Any], text: Mapping[str, Any] | None) -> None:
    """Check the assumptions of diffusers' pipeline for latent upscalers."""
    width = NOISE_LEVEL_WIDTH + (text or {}).get("hidden_size", 512)
    if unet.get("time_cond_proj_dim") != width:
        raise CheckpointError(
            f"unet: its configuration has time_cond_proj_dim {quote(unet.get('time_cond_proj_dim'))}, expected "
            f"{width}: {NOISE_LEVEL_WIDTH} for the noise level, the rest for the text encoder's pooled output"
        )
    predicts = checkpoint.scheduler_config.get("prediction_type", "epsilon")
    if predicts not in ("sample", "original_sample"):
        raise CheckpointError(
            f"scheduler: its configuration has prediction_type {quote(predicts)}, expected 'original_sample', which "
            "diffusers' pipeline computes from a latent upscaler's output; set it in scheduler/scheduler_config.json"
        )


def _find_scheduler_config(checkpoint: Checkpoint, tasks: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the scheduler's configuration with the prediction type of the graph, which is v for a latent upscaler."""
    config = checkpoint.scheduler_config
    return {**config, "prediction_type": "v_prediction"} if "latent-upscaling" in tasks else config


def _find_scheduler_changes(checkpoint: Checkpoint, tasks: tuple[str, ...]) -> tuple[ConfigChange, ...]:
    """Return the changes that diffusers' pipelines of these tasks make to the scheduler's configuration.

    diffusers reads a configuration with its class's defaults, and with keys of other classes as they are.
    """
    if checkpoint.pipeline_class in _LATENT_CONSISTENCY_CLASSES:
        return ()
    config = checkpoint.scheduler_config
    sampler = next((each for each in SAMPLERS.values() if each.class_name == checkpoint.scheduler_class), None)
    defaults = {} if sampler is None else {key: each.default for key, each in sampler.__dataclass_fields__.items()}
    values = {**defaults, **drop_keys_left_to_default("scheduler", config)}
    changes = []
    for change in (_STEPS_OFFSET, _CLIP_SAMPLE, _SKIP_PRK_STEPS):
        changed = tuple(task for task in tasks if change in _SCHEDULER_CHANGES.get(task, ()))
        if changed and change.key in values and change.applies(values[change.key]):
            changes.append(ConfigChange(key=change.key, found=values[change.key], used=change.used, tasks=changed))
    return tuple(changes)


def _find_size_changes(unet: Mapping[str, Any], tasks: tuple[str, ...]) -> tuple[ConfigChange, ...]:
    """Return the change that diffusers' pipelines of these tasks make to the size of a UNet before diffusers 0.9.

    Raises:
        CheckpointError: the UNet's version is not a version number.
    """
    found, version = unet.get(_OLD_SIZE), unet.get("_diffusers_version")
    changed = tuple(task for task in tasks if task in _OLD_SIZE_TASKS)
    if version is None or not changed or not isinstance(found, int) or found >= _OLD_SIZE_USED:
        return ()
    release = re.match(r"v?(\d+)(?:\.(\d+))?", version.strip()) if isinstance(version, str) else None
    if release is None:
        raise CheckpointError(
            f"unet: its configuration has _diffusers_version {quote(version)}, expected a version such as 0.42.1, as "
            "in diffusers"
        )
    if (int(release[1]), int(release[2] or 0)) >= _OLD_SIZE_BEFORE:
        return ()
    return (ConfigChange(key=_OLD_SIZE, found=found, used=_OLD_SIZE_USED, tasks=changed),)


def _read_depth_preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    """Read the preprocessing of the depth estimator.

    Raises:
        CheckpointError: it resizes to another size than the estimator's input has.
    """
    path = checkpoint.folder / "feature_extractor" / "preprocessor_config.json"
    preprocessing = read_depth_preprocessing(path)
    size = read_config(checkpoint, "depth_estimator").get("image_size", 384)
    check_kind("depth_estimator", "image_size", size)
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
            f"model_index.json has max_noise_level {quote(level)}, expected a number below {min(trained, labels)}: the "
            f"{LOW_RES_SCHEDULER} has {trained} timesteps and the unet {labels} class labels"
        )
    return level
