"""Stable Diffusion XL: the base, its refiner, and checkpoints of their architecture (Podell et al. 2023,
https://arxiv.org/abs/2307.01952)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentrt.bundle.manifest import Defaults, LatentSpace, Limits
from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import Checkpoint, PipelineClass
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.families.compatibility import DEFAULT_PROJECTION_DIM, Vae, check_components, read_vae
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

__all__ = ["PIPELINES", "REFUSALS", "plan_export"]

_BASE = "StableDiffusionXLPipeline"
_IMAGE_TO_IMAGE, _INPAINTING = "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"
_EDIT = "StableDiffusionXLInstructPix2PixPipeline"
# The tasks of each pipeline class, by the number of channels that the UNet takes: 4 of latents, then those of the
# conditioning.
_TASKS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    _BASE: {4: TEXT_TO_IMAGE, 9: ("inpainting",)},
    _IMAGE_TO_IMAGE: {4: TEXT_TO_IMAGE},
    _INPAINTING: {4: TEXT_TO_IMAGE, 9: ("inpainting",)},
    _EDIT: {8: ("edit",)},
}
# diffusers' pipelines for images from noise give sizes, which a refiner does not take.
_REFINER_TASKS = ("image-to-image", "inpainting")
# The pipelines that give aesthetic scores if the checkpoint says so.
_GIVE_SCORES = (_IMAGE_TO_IMAGE, _INPAINTING)
# The default number of steps and guidance scale of diffusers' pipelines.
_DEFAULTS = {
    _BASE: (50, 5.0),
    _IMAGE_TO_IMAGE: (50, 5.0),
    _INPAINTING: (50, 7.5),
    _EDIT: (100, 5.0),
}
# The values of micro-conditioning: sizes and a crop, or an aesthetic score in place of the target size.
_SIZES, _SIZES_WITH_SCORE = 6, 5
# Text encoder → the folder of its tokenizer and its module. A refiner has the second alone.
_TEXT_ENCODERS = {
    "text_encoder": ("tokenizer", "text_encoder:PenultimateTextEncoder"),
    "text_encoder_2": ("tokenizer_2", "text_encoder:ProjectedTextEncoder"),
}
_MODEL_TYPES = ("clip", "clip_text_model")
_FEWEST_LAYERS = 2  # the hidden states are those before the last

PIPELINES: Mapping[str, PipelineClass] = {
    name: PipelineClass(
        components={
            "text_encoder": "model",
            "text_encoder_2": "model",
            "unet": "diffusion_pytorch_model",
            "vae": "diffusion_pytorch_model",
        },
        optional=("text_encoder",),
        tokenizers=tuple(tokenizer for tokenizer, _ in _TEXT_ENCODERS.values()),
        classes={
            # With a projection in the first one, diffusers would take the pooled text from it.
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "unet": ("UNet2DConditionModel",),
        },
        model_types={**dict.fromkeys(_TEXT_ENCODERS, _MODEL_TYPES), "safety_checker": ("clip",)},
    )
    for name in _TASKS
}
REFUSALS: Mapping[str, str] = {
    **dict.fromkeys(
        ("StableDiffusionXLPAGPipeline", "StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
        refuse_extension("guides by perturbed attention, which is not supported", _BASE),
    ),
    **dict.fromkeys(
        (
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLControlNetXSPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        ),
        refuse_extension("needs a ControlNet, which is not supported", _BASE),
    ),
    "StableDiffusionXLAdapterPipeline": refuse_extension("needs a T2I-Adapter, which is not supported", _BASE),
    "StableDiffusionXLKDiffusionPipeline": refuse_extension(
        "samples by functions of k-diffusion that the folder does not name", _BASE
    ),
    "LEditsPPPipelineStableDiffusionXL": refuse_extension("edits an image by LEDITS++, which is not supported", _BASE),
    "TextToVideoZeroSDXLPipeline": refuse_extension("generates the frames of a video, which is not supported", _BASE),
    "AnimateDiffSDXLPipeline": "which needs a motion adapter; videos are not supported",
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"),
        "whose text encoder is ChatGLM (ChatGLMModel), which is not supported",
    ),
    "FlaxStableDiffusionXLPipeline": "whose weights are Flax's; export the checkpoint in safetensors",
}


def plan_export(checkpoint: Checkpoint) -> ExportPlan:
    """Plan the export of a Stable Diffusion XL checkpoint from its configurations.

    Raises:
        CheckpointError: the model is not one of the supported variants, or its configurations contradict one another.
    """
    pipeline_class = checkpoint.pipeline_class
    texts = {name: read_config(checkpoint, name) for name in _TEXT_ENCODERS if name in checkpoint.weights}
    tokenizers = {name: _TEXT_ENCODERS[name][0] for name in texts}
    unet, vae_class = read_config(checkpoint, "unet"), checkpoint.classes.get("vae", "AutoencoderKL")
    key_warnings = check_all_keys(checkpoint, vae_class, tokenizers.values())
    warnings = [*key_warnings]
    vae_config = read_config(checkpoint, "vae")
    vae = read_vae(vae_config, vae_class)
    mean, std = _read_statistics(vae_config, vae) if vae_class == "AutoencoderKL" else (None, None)
    index = read_object(checkpoint.folder / "model_index.json")
    scored = pipeline_class in _GIVE_SCORES and _read_flag(index, "requires_aesthetics_score", default=False)
    _check_edit(pipeline_class, index)
    _check_configurations(checkpoint, unet, vae, texts, _SIZES_WITH_SCORE if scored else _SIZES)
    tasks, task_warnings = find_tasks(pipeline_class, _find_tasks(pipeline_class, scored=scored), unet, vae)
    height, width = read_size(unet)
    steps, guidance_scale = _DEFAULTS[pipeline_class]
    return ExportPlan(
        family="stable-diffusion-xl",
        tasks=tasks,
        components=tuple(
            each
            for each in _list_components(texts, unet, tasks, vae, normalized=mean is not None)
            if each.weights in checkpoint.weights
        ),
        # diffusers' pipelines of this family apply no `shift_factor`.
        latent_spaces={
            "unet": LatentSpace(channels=vae.channels, downscale=vae.downscale, scale=vae.scale, mean=mean, std=std)
        },
        tokenizers=tokenizers,
        scheduler_config=checkpoint.scheduler_config,
        scheduler_changes=(),
        defaults=Defaults(
            height=height * vae.downscale,
            width=width * vae.downscale,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            force_zeros_for_empty_prompt=_read_flag(index, "force_zeros_for_empty_prompt", default=True),
        ),
        limits=Limits(
            min_side=8 * vae.downscale,
            max_side=256 * vae.downscale,
            max_batch=MAX_BATCH,
            max_steps=MAX_STEPS,
            max_clip_skip=min(_count_layers(text) for text in texts.values()) - 1,
        ),
        deep_cache_branches=count_branches(unet),
        warnings=(*warnings, *task_warnings),
        unclassified="checkpoints of Stable Diffusion XL come without a safety checker",
    )


def _count_layers(text: Mapping[str, Any]) -> int:
    layers: int = text.get("num_hidden_layers", 12)
    return layers


def _read_flag(index: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Read a flag of `model_index.json`.

    Raises:
        CheckpointError: it is neither true nor false.
    """
    found = index.get(key, default)
    if not isinstance(found, bool):
        raise CheckpointError(f"model_index.json has {key} {quote(found)}, expected true or false; correct it")
    return found


def _read_statistics(config: Mapping[str, Any], vae: Vae) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Read the mean and the standard deviation of each channel of the autoencoder's latents (Playground v2.5).

    Raises:
        CheckpointError: there is one of them, or not one number a channel.
    """
    found = {key: config.get(key) for key in ("latents_mean", "latents_std")}
    if all(values is None for values in found.values()):
        return None, None
    for key, values in found.items():
        if values is None or len(values) != vae.channels:
            raise CheckpointError(
                f"vae: its configuration has {key} {quote(values)}, expected {vae.channels} numbers, one for each "
                "channel of a latent, in both latents_mean and latents_std; correct or delete both"
            )
    return tuple(map(float, found["latents_mean"] or ())), tuple(map(float, found["latents_std"] or ()))


def _check_edit(pipeline_class: str, index: Mapping[str, Any]) -> None:
    """Reject an editing model whose image is scaled before it joins the latents (CosXL Edit)."""
    if pipeline_class == _EDIT and index.get("is_cosxl_edit"):
        raise CheckpointError(
            f"model_index.json has is_cosxl_edit {quote(index['is_cosxl_edit'])}, expected false: the scaling of the "
            "image's latents in CosXL Edit is not supported"
        )


def _find_tasks(pipeline_class: str, *, scored: bool) -> Mapping[int, tuple[str, ...]]:
    """Return the tasks of a pipeline class by the number of channels that the UNet takes."""
    tasks = _TASKS[pipeline_class]
    if not scored:
        return tasks
    return {channels: tuple(task for task in each if task in _REFINER_TASKS) for channels, each in tasks.items()}


def _check_configurations(
    checkpoint: Checkpoint,
    unet: Mapping[str, Any],
    vae: Vae,
    texts: Mapping[str, Mapping[str, Any]],
    micro_conditioning: int,
) -> None:
    """Check that all components belong together, and that the pipeline gives the denoiser the inputs that it takes."""
    pipeline_class = checkpoint.pipeline_class
    check_unset(pipeline_class, unet, *CLASS_LABEL_KEYS)
    if pipeline_class == _EDIT:
        check_unset(pipeline_class, unet, "time_cond_proj_dim")
    for key, expected in (("addition_embed_type", "'text_time'"), ("addition_time_embed_dim", "a number")):
        if unet.get(key) is None:
            raise CheckpointError(
                f"unet: its configuration has no {key}, expected {expected} for a {pipeline_class}, whose unet takes a "
                "pooled text and sizes; is model_index.json this unet's?"
            )
    for name, text in texts.items():
        if _count_layers(text) < _FEWEST_LAYERS:
            raise CheckpointError(
                f"{name}: its configuration has num_hidden_layers {_count_layers(text)}, expected at least "
                f"{_FEWEST_LAYERS}: the embeddings are the hidden states before the last layer"
            )
    _check_scores(pipeline_class, unet, texts["text_encoder_2"], micro_conditioning)
    check_components(unet, vae, texts=texts, preview=read_preview(checkpoint), micro_conditioning=micro_conditioning)


def _check_scores(
    pipeline_class: str, unet: Mapping[str, Any], text: Mapping[str, Any], micro_conditioning: int
) -> None:
    """Check that a refiner gets aesthetic scores, and no other model.

    Raises:
        CheckpointError: the UNet has the width of the other kind.
    """
    given, other = micro_conditioning, _SIZES + _SIZES_WITH_SCORE - micro_conditioning
    pooled = text.get("projection_dim", DEFAULT_PROJECTION_DIM)
    if unet.get("projection_class_embeddings_input_dim") != pooled + other * unet["addition_time_embed_dim"]:
        return
    if given == _SIZES:
        needed = f"requires_aesthetics_score to true and _class_name to {_IMAGE_TO_IMAGE} in model_index.json"
    else:
        needed = "requires_aesthetics_score to false in model_index.json"
    raise CheckpointError(
        f"unet: its configuration has the projection_class_embeddings_input_dim of a pooled text and {other} values, "
        f"and a {pipeline_class} whose requires_aesthetics_score is {str(given == _SIZES_WITH_SCORE).lower()} gives "
        f"{given}; set {needed}"
    )


def _list_components(
    texts: Mapping[str, Mapping[str, Any]],
    unet: Mapping[str, Any],
    tasks: tuple[str, ...],
    vae: Vae,
    *,
    normalized: bool,
) -> Iterator[ComponentPlan]:
    for name in texts:
        yield ComponentPlan(
            name=name,
            role="text-encoder",
            module=_TEXT_ENCODERS[name][1],
            weights=name,
            sources={"input_ids": "tokens", "clip_skip": "option:clip_skip"},
        )
    yield plan_encoder(vae)
    distilled = unet.get("time_cond_proj_dim") is not None
    yield ComponentPlan(
        name="unet",
        role="denoiser",
        module="unet:GuidanceDistilledXLUNet" if distilled else "unet:XLUNet",
        weights="unet",
        sources={
            "sample": "latents",
            "timestep": "timestep",
            "encoder_hidden_states": "+".join(f"{name}.hidden_states" for name in texts),
            "text_embeds": "text_encoder_2.pooled",
            "time_ids": "micro-conditioning",
            **({"guidance_weight": "guidance-weight"} if distilled else {}),
        },
    )
    yield plan_decoder(vae, tasks, normalized=normalized)
    yield from plan_last_components()
