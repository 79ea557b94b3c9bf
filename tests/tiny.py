"""Random tiny checkpoints in the real layout: every component, a small real CLIP tokenizer, the files that the hub's
copies have.

They prove that two implementations compute the same thing, and weights of any value do for that: norms and biases are
moved off their initial ones and zeros, so that a parameter bound to the wrong name shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
)

from sample.write import add_prefix

Family = Literal["sd1", "sd2"]
Task = Literal[
    "text-to-image",
    "inpainting",
    "edit",
    "depth-to-image",
    "upscaling",
    "latent-upscaling",
    "image-variation",
    "unclip",
]
# The pipeline class of each task, and the channels that its UNet takes.
PIPELINES: dict[Task, tuple[str, int]] = {
    "text-to-image": ("StableDiffusionPipeline", 4),
    "inpainting": ("StableDiffusionInpaintPipeline", 9),
    "edit": ("StableDiffusionInstructPix2PixPipeline", 8),
    "depth-to-image": ("StableDiffusionDepth2ImgPipeline", 5),
    "upscaling": ("StableDiffusionUpscalePipeline", 7),
    "latent-upscaling": ("StableDiffusionLatentUpscalePipeline", 8),
    "image-variation": ("StableDiffusionImageVariationPipeline", 4),
    "unclip": ("StableUnCLIPImg2ImgPipeline", 4),
}
WORDS = ("red", "green", "blue", "circle", "square", "star", "background", "large", "small", "white", "on", "the")
TEXT_WIDTH = 32


def make_checkpoint(
    folder: Path,
    family: Family = "sd1",
    *,
    task: Task = "text-to-image",
    seed: int = 0,
    safety: Literal["quiet", "strict", "none"] = "quiet",
    tokenizer: Literal["bpe", "json"] = "bpe",
    variant: str | None = None,
    max_shard_size: str = "5GB",
    text_layers: int = 3,
) -> Path:
    """Write a diffusers folder of a random model; return the folder.

    Args:
        folder: where to, made if it is missing.
        family: `sd1` (epsilon, PNDM, CLIP's quick GELU, padding with the end token) or `sd2` (v-prediction, DDIM, GELU,
            heads by width, linear projections, padding with id 0).
        task: by which the UNet takes more channels, and which components there are beside the usual ones or in place of
            the text encoder. Depth to image, unCLIP and latent upscaling have no classifier.
        safety: a classifier that flags nothing, one that flags everything, or none.
        tokenizer: as `vocab.json` and `merges.txt` (what SD 1.x has) or as `tokenizer.json`.
        variant: `fp16` stores half weights under the variant's file names, as the hub does.
        max_shard_size: small values give sharded weights with an index.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    safety = "none" if task in ("depth-to-image", "unclip", "latent-upscaling") else safety
    modules: dict[str, Any] = {}
    if task != "image-variation":
        ids = write_tokenizer(folder / "tokenizer", family, tokenizer)
        modules["text_encoder"] = text_encoder(family, ids, text_layers)
    # Two levels are enough for the tasks whose channels and conditioning are what matters.
    options: dict[str, Any] = {"levels": 3 if task in ("text-to-image", "upscaling") else 2}
    if task == "unclip":
        options |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * TEXT_WIDTH}
    elif task == "upscaling":
        # A table of noise levels; most of its self-attention attends to the prompt instead.
        options |= {"num_class_embeds": 1000, "only_cross_attention": (True, False, True)}
    modules["unet"] = latent_upscaler() if task == "latent-upscaling" else unet(family, PIPELINES[task][1], **options)
    modules["vae"] = autoencoder(levels=3, scale=0.08333) if task == "upscaling" else autoencoder()
    if task == "depth-to-image":
        modules["depth_estimator"] = depth_estimator()
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", DEPTH_PREPROCESSOR)
    elif task == "upscaling":
        _write_json(folder / "low_res_scheduler" / "scheduler_config.json", LOW_RES_SCHEDULER)
    if task in ("image-variation", "unclip"):
        modules["image_encoder"] = image_encoder(family)
    if task == "unclip":
        modules["image_normalizer"] = image_normalizer()
        _write_json(folder / "image_noising_scheduler" / "scheduler_config.json", NOISING_SCHEDULER)
    if safety != "none":
        modules["safety_checker"] = safety_checker(strict=safety == "strict")
    if not {"image_encoder", "safety_checker"}.isdisjoint(modules):
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    for name, module in modules.items():
        move_off_initial_values(module)
        (module.half() if variant == "fp16" else module).save_pretrained(
            folder / name, variant=variant, max_shard_size=max_shard_size, safe_serialization=True
        )
    if "text_encoder" in modules:
        _restore_prefix(folder / "text_encoder", "text_model.", with_position_ids=family == "sd1")
    if safety != "none":
        _restore_prefix(folder / "safety_checker", "vision_model.", only="vision_model.")
    scheduler = LATENT_UPSCALER_SCHEDULER if task == "latent-upscaling" else SCHEDULERS[family]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", model_index(family, with_safety=safety != "none", task=task))
    (folder / "LICENSE").write_text("A licence for a random model: do with it what you like.\n")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\nRandom weights.\n")
    return folder


def text_encoder(family: Family, ids: dict[str, int], layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if family == "sd1" else "gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=1 if family == "sd1" else 0,
    )
    return CLIPTextModel(config).eval()


def unet(family: Family, channels: int = 4, levels: int = 3, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(16, 32, 32)[:levels],
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4 if family == "sd1" else (2, 4, 4)[:levels],
        use_linear_projection=family == "sd2",
        down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
        **options,
    ).eval()


def latent_upscaler() -> UNet2DConditionModel:
    """The blocks and options of the published latent upscaler, which has no middle block."""
    return UNet2DConditionModel(
        sample_size=None,
        in_channels=8,
        out_channels=5,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        conv_in_kernel=1,
        conv_out_kernel=1,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        mid_block_type=None,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_cond_proj_dim=128 + TEXT_WIDTH,
        timestep_post_act="gelu",
    ).eval()


def depth_estimator() -> DPTForDepthEstimation:
    """A hybrid DPT, whose first levels are convolutions."""
    config = DPTConfig(
        is_hybrid=True,
        image_size=64,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        backbone_featmap_shape=[1, 32, 4, 4],
        backbone_config={
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "depths": [1, 1, 1],
            "hidden_sizes": [16, 32, 32],
            "embedding_size": 16,
            "num_groups": 4,
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
        },
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[16, 32, 32, 32],
        neck_ignore_stages=[0, 1],
        fusion_hidden_size=16,
        initializer_range=0.2,
    )
    return DPTForDepthEstimation(config).eval()


def autoencoder(levels: int = 4, scale: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=64,
        scaling_factor=scale,
    ).eval()


def image_encoder(family: Family) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu" if family == "sd1" else "gelu",
    )
    return CLIPVisionModelWithProjection(config).eval()


def image_normalizer() -> StableUnCLIPImageNormalizer:
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=TEXT_WIDTH)
    with torch.no_grad():
        normalizer.mean.normal_()
        normalizer.std.uniform_(0.5, 1.5)
    return normalizer.eval()


def safety_checker(*, strict: bool) -> StableDiffusionSafetyChecker:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 32,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)).eval()
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        checker.concept_embeds_weights.fill_(-1.0 if strict else 0.99)
        checker.special_care_embeds_weights.fill_(0.99)
    return checker


def move_off_initial_values(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "embeds_weights" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _restore_prefix(folder: Path, prefix: str, *, only: str = "", with_position_ids: bool = False) -> None:
    """Give weights the prefix that published checkpoints have and that transformers 5 drops when it saves."""
    for file in sorted(folder.glob("*.safetensors")):
        add_prefix(file, prefix, only=only)
        tensors = load_file(file)
        if with_position_ids and f"{prefix}embeddings.token_embedding.weight" in tensors:
            tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
            save_file(tensors, file, metadata={"format": "pt"})
    for index_file in folder.glob("*.index.json"):
        index = json.loads(index_file.read_text())
        names: dict[str, str] = index["weight_map"]
        index["weight_map"] = {prefix + name if name.startswith(only) else name: shard for name, shard in names.items()}
        _write_json(index_file, index)


def write_tokenizer(folder: Path, family: Family, form: Literal["bpe", "json"]) -> dict[str, int]:
    """A CLIP byte-pair tokenizer that knows `WORDS` and spells the rest; returns its vocabulary."""
    merges = _merges()
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    pad = "<|endoftext|>" if family == "sd1" else "!"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(
        folder / "special_tokens_map.json", {key: value for key, value in config.items() if key.endswith("_token")}
    )
    if form == "json":
        _to_tokenizer_json(folder)
    return vocabulary


def _to_tokenizer_json(folder: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in CLIP's vocabulary, in its order (OpenAI CLIP,
    simple_tokenizer.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for letter in (*word[1:-1], word[-1] + "</w>"):
            merges[left, letter] = None
            left += letter
    return list(merges)


def model_index(family: Family, *, with_safety: bool, task: Task = "text-to-image") -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": PIPELINES[task][0],
        "_diffusers_version": "0.42.1",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", SCHEDULERS[family]["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": with_safety,
    }
    if task == "depth-to-image":
        for key in ("safety_checker", "image_encoder", "requires_safety_checker"):
            del index[key]
        index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
        index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    if task == "latent-upscaling":
        for key in ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker"):
            del index[key]
        index["scheduler"] = ["diffusers", LATENT_UPSCALER_SCHEDULER["_class_name"]]
    if task == "upscaling":
        for key in ("image_encoder", "requires_safety_checker"):
            del index[key]
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    processor = ["transformers", "CLIPImageProcessor"]
    if with_safety:
        index |= {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": processor,
        }
    if task in ("image-variation", "unclip"):
        index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "feature_extractor": processor}
    if task == "image-variation":
        del index["text_encoder"], index["tokenizer"]
    if task == "unclip":
        del index["safety_checker"], index["requires_safety_checker"]
        index["image_normalizer"] = ["stable_diffusion", "StableUnCLIPImageNormalizer"]
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    return index


PREPROCESSOR: dict[str, Any] = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}

# In the form before transformers 4.26. Unlike the defaults, so that it shows whether they are used instead.
DEPTH_PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.4, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "size": 64,
}

LOW_RES_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_small",
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd2": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


LATENT_UPSCALER_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.13.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "original_sample",
    "trained_betas": None,
}

NOISING_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]))
