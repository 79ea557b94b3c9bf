"""The keys of a checkpoint's configurations: for each class of diffusers or transformers, the handling of every key.

A key is honoured, is rejected unless it has one of a few values, or has no effect in diffusers' pipelines. A key that a
class does not have is ignored, as in diffusers, with a warning.
Schedulers' keys are the fields of the samplers (`latentrt.sampling.samplers`), whose types are the supported values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from latentrt.bundle.printable import counted, quote
from latentrt.bundle.strict_json import AmbiguousJSONError, parse_json
from latentrt.errors import CheckpointError
from latentrt.sampling.samplers import SAMPLERS

__all__ = [
    "CONFIG_KEYS",
    "NESTED_CONFIGS",
    "Handling",
    "Honoured",
    "NoEffect",
    "Restricted",
    "check_keys",
    "check_kind",
    "check_scheduler_keys",
    "drop_keys_left_to_default",
]


@dataclass(frozen=True)
class Honoured:
    """A key whose value the export follows.

    Attributes:
        by: the code that reads the value, and rejects one that other code does not support.
    """

    by: str


@dataclass(frozen=True)
class Restricted:
    """A key that is rejected unless it is absent or has one of these values; the reason ends the message."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class NoEffect:
    """A key that changes no image in diffusers' pipelines."""

    reason: str


Handling = Honoured | Restricted | NoEffect


@dataclass(frozen=True)
class _Kind:
    """The values of a key that a plan calculates with: a predicate, and its description for messages."""

    fits: Callable[[Any], bool]
    description: str


_TRACED = Honoured("the module of diffusers or transformers that is traced")
_PLAN = Honoured("the family's module")
_XL = Honoured("families/stable_diffusion_xl.py; of no effect in other families")
_UNET = Honoured("modules/unet.py")
_VAE = Honoured("modules/vae.py, and the family's module")
_TRAINING = NoEffect("of training alone")
_RGB = Restricted((3,), "images are RGB")
_NO_SHIFT = Restricted((None, 0), "diffusers' Stable Diffusion pipelines pass over it")
_UPCAST = NoEffect("of half precision in diffusers; here each node's precision is that of its gate")
_TILES = NoEffect("of tiled decoding, which is off by default")

_UNET_KEYS: Mapping[str, Handling] = {
    "sample_size": _PLAN,
    "in_channels": _PLAN,
    "out_channels": _PLAN,
    "center_input_sample": _TRACED,
    "flip_sin_to_cos": _TRACED,
    "freq_shift": _TRACED,
    "down_block_types": _TRACED,
    "mid_block_type": _TRACED,
    "up_block_types": _TRACED,
    "only_cross_attention": _TRACED,
    "block_out_channels": _TRACED,
    "layers_per_block": _TRACED,
    "downsample_padding": _TRACED,
    "mid_block_scale_factor": _TRACED,
    "dropout": _TRAINING,
    "act_fn": _TRACED,
    "norm_num_groups": _TRACED,
    "norm_eps": _TRACED,
    "cross_attention_dim": _TRACED,
    "transformer_layers_per_block": _TRACED,
    "reverse_transformer_layers_per_block": _TRACED,
    "encoder_hid_dim": _TRACED,
    "encoder_hid_dim_type": Restricted((None, "text_proj"), "such a denoiser takes image embeddings too"),
    "attention_head_dim": _TRACED,
    "num_attention_heads": Restricted((None,), "diffusers refuses it too; the number of heads is `attention_head_dim`"),
    "dual_cross_attention": Restricted((False, None), "such a denoiser takes two kinds of embeddings"),
    "use_linear_projection": _TRACED,
    "class_embed_type": _UNET,
    "addition_embed_type": Restricted((None, "text_time"), "such a denoiser has inputs of other models"),
    "addition_time_embed_dim": _XL,
    "num_class_embeds": _UNET,
    "upcast_attention": _TRACED,
    "resnet_time_scale_shift": _TRACED,
    "resnet_skip_time_act": _TRACED,
    "resnet_out_scale_factor": _TRACED,
    "time_embedding_type": _TRACED,
    "time_embedding_dim": _TRACED,
    "time_embedding_act_fn": _TRACED,
    "timestep_post_act": _UNET,
    "time_cond_proj_dim": _UNET,
    "conv_in_kernel": _TRACED,
    "conv_out_kernel": _TRACED,
    "projection_class_embeddings_input_dim": _UNET,
    "attention_type": Restricted(("default",), "such a denoiser takes boxes or images (GLIGEN)"),
    "class_embeddings_concat": _TRACED,
    "mid_block_only_cross_attention": _TRACED,
    "cross_attention_norm": _TRACED,
    "addition_embed_type_num_heads": NoEffect("of another `addition_embed_type`"),
}
_DERIVED = NoEffect("written by diffusers from another key, and overwritten when the file is read")
_KL_KEYS: Mapping[str, Handling] = {
    "in_channels": _RGB,
    "out_channels": _RGB,
    "down_block_types": _TRACED,
    "up_block_types": _TRACED,
    "block_out_channels": _VAE,
    "layers_per_block": _TRACED,
    "act_fn": _TRACED,
    "latent_channels": _VAE,
    "norm_num_groups": _TRACED,
    "sample_size": _TILES,
    "scaling_factor": _VAE,
    "shift_factor": _NO_SHIFT,
    "latents_mean": _XL,
    "latents_std": _XL,
    "force_upcast": _UPCAST,
    "use_quant_conv": _VAE,
    "use_post_quant_conv": _VAE,
    "mid_block_add_attention": _TRACED,
}
_TINY_KEYS: Mapping[str, Handling] = {
    "in_channels": _RGB,
    "out_channels": _RGB,
    "encoder_block_out_channels": _VAE,
    "decoder_block_out_channels": _VAE,
    "act_fn": _TRACED,
    "upsample_fn": _TRACED,
    "latent_channels": _VAE,
    "upsampling_scaling_factor": _VAE,
    "num_encoder_blocks": _TRACED,
    "num_decoder_blocks": _TRACED,
    "latent_magnitude": NoEffect("of latents stored as images, which pipelines do not"),
    "latent_shift": NoEffect("of latents stored as images, which pipelines do not"),
    "force_upcast": _UPCAST,
    "scaling_factor": _VAE,
    "shift_factor": _NO_SHIFT,
    "block_out_channels": _DERIVED,
}
_ASYMMETRIC_KEYS: Mapping[str, Handling] = {
    "in_channels": _RGB,
    "out_channels": _RGB,
    "down_block_types": _TRACED,
    "down_block_out_channels": _VAE,
    "layers_per_down_block": _TRACED,
    "up_block_types": _TRACED,
    "up_block_out_channels": _VAE,
    "layers_per_up_block": _TRACED,
    "act_fn": _TRACED,
    "latent_channels": _VAE,
    "norm_num_groups": _TRACED,
    "sample_size": _TILES,
    "scaling_factor": _VAE,
    "block_out_channels": _DERIVED,
    "force_upcast": _DERIVED,
}

_OF_TOKENIZER = NoEffect("the tokenizer has its own")
_OF_OUTPUTS = NoEffect("the call says which outputs it wants")
_LOADED_IN_FLOAT32 = NoEffect("weights are loaded in float32, as diffusers' pipelines do by default")
_OF_OTHER_HEADS = NoEffect("of other models and of tasks other than encoding a text")
# Keys of every configuration of transformers.
_TRANSFORMERS_KEYS: Mapping[str, Handling] = {
    "model_type": Honoured("checkpoints/checkpoint.py"),
    "architectures": NoEffect("the class is that of `model_index.json`"),
    "transformers_version": NoEffect("of the file's origin"),
    "output_hidden_states": _OF_OUTPUTS,
    "output_attentions": _OF_OUTPUTS,
    "return_dict": _OF_OUTPUTS,
    "dtype": _LOADED_IN_FLOAT32,
    **dict.fromkeys(
        ("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "problem_type"), _OF_OTHER_HEADS
    ),
}
_TEXT_KEYS: Mapping[str, Handling] = {
    "vocab_size": _TRACED,
    "hidden_size": _TRACED,
    "intermediate_size": _TRACED,
    "projection_dim": NoEffect("of CLIPTextModelWithProjection's second output"),
    "num_hidden_layers": Honoured("modules/text_encoder.py, and the family's module"),
    "num_attention_heads": _TRACED,
    "max_position_embeddings": Honoured("modules/text_encoder.py"),
    "hidden_act": Honoured("the traced module, and families/stable_diffusion.py"),
    "layer_norm_eps": _TRACED,
    "attention_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "initializer_factor": _TRAINING,
    "pad_token_id": _OF_TOKENIZER,
    "bos_token_id": _OF_TOKENIZER,
    "eos_token_id": Honoured("the traced module, in its pooled output"),
    **_TRANSFORMERS_KEYS,
}
# Keys of earlier releases of transformers, which the current one no longer has.
_FORMER_KEYS: Mapping[str, Handling] = {
    "torch_dtype": _LOADED_IN_FLOAT32,
    **dict.fromkeys(("dropout", "gradient_checkpointing"), _TRAINING),
    **dict.fromkeys(
        (
            "add_cross_attention",
            "bad_words_ids",
            "begin_suppress_tokens",
            "cross_attention_hidden_size",
            "decoder_start_token_id",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "finetuning_task",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "is_decoder",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "prefix",
            "pruned_heads",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "sep_token_id",
            "suppress_tokens",
            "task_specific_params",
            "temperature",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "tie_word_embeddings",
            "tokenizer_class",
            "top_k",
            "top_p",
            "torchscript",
            "typical_p",
            "use_bfloat16",
            "use_cache",
        ),
        _OF_OTHER_HEADS,
    ),
}
_FORMER_TEXT_KEYS: Mapping[str, Handling] = {
    **_FORMER_KEYS,
    "use_attention_mask": Restricted(
        (False, None), "padding takes part in attention, as in Stable Diffusion 1.x and 2.x"
    ),
}
_NAMED_OUTPUTS = Restricted((True,), "outputs are read by their names, in diffusers too")
_PROJECTED_TEXT_KEYS: Mapping[str, Handling] = {
    **_TEXT_KEYS,
    "projection_dim": Honoured("modules/text_encoder.py, and families/stable_diffusion_xl.py"),
    "return_dict": _NAMED_OUTPUTS,
}
_VISION_KEYS: Mapping[str, Handling] = {
    "hidden_size": _TRACED,
    "intermediate_size": _TRACED,
    "projection_dim": Honoured("modules/image_encoder.py, and families/stable_diffusion.py"),
    "num_hidden_layers": _TRACED,
    "num_attention_heads": _TRACED,
    "num_channels": _RGB,
    "image_size": Honoured("the traced module, and families/stable_diffusion.py"),
    "patch_size": _TRACED,
    "hidden_act": _TRACED,
    "layer_norm_eps": _TRACED,
    **dict.fromkeys(("attention_dropout", "initializer_range", "initializer_factor"), _TRAINING),
    **_TRANSFORMERS_KEYS,
    "return_dict": _NAMED_OUTPUTS,
}
# Keys of texts that earlier releases also wrote into the vision configuration of a whole CLIP.
_FORMER_VISION_KEYS: Mapping[str, Handling] = {
    **_FORMER_KEYS,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _OF_OTHER_HEADS),
}
_OF_TEXT = NoEffect("of the text encoder, which a safety checker does not have")
_SAFETY_KEYS: Mapping[str, Handling] = {
    "vision_config": _TRACED,
    "projection_dim": _TRACED,
    "text_config": _OF_TEXT,
    "logit_scale_init_value": _OF_TEXT,
    "initializer_factor": _TRAINING,
    **_TRANSFORMERS_KEYS,
}
_FORMER_SAFETY_KEYS: Mapping[str, Handling] = {
    **_FORMER_VISION_KEYS,
    "vision_config_dict": _TRACED,
    "text_config_dict": _OF_TEXT,
}
_OF_SEGMENTATION = NoEffect("of segmentation")
_OF_POOLING = NoEffect("of a pooled output, which a depth estimator does not have")
_DEPTH_KEYS: Mapping[str, Handling] = {
    "image_size": Honoured("modules/depth_estimator.py, and families/stable_diffusion.py"),
    "num_channels": _RGB,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), _TRACED),
    **dict.fromkeys(("patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "is_hybrid", "readout_type"), _TRACED),
    **dict.fromkeys(("backbone_config", "backbone_featmap_shape", "backbone_out_indices"), _TRACED),
    **dict.fromkeys(("reassemble_factors", "neck_hidden_sizes", "neck_ignore_stages"), _TRACED),
    **dict.fromkeys(("fusion_hidden_size", "head_in_index", "add_projection"), _TRACED),
    **dict.fromkeys(("use_batch_norm_in_fusion_residual", "use_bias_in_fusion_residual"), _TRACED),
    **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range"), _TRAINING),
    **dict.fromkeys(("auxiliary_loss_weight", "use_auxiliary_head"), _OF_SEGMENTATION),
    **dict.fromkeys(("semantic_loss_ignore_index", "semantic_classifier_dropout"), _OF_SEGMENTATION),
    **dict.fromkeys(("pooler_act", "pooler_output_size"), _OF_POOLING),
    **_TRANSFORMERS_KEYS,
    "return_dict": _NAMED_OUTPUTS,
}
_OTHER_BACKBONE = Restricted((None, False, {}), "a backbone is described by backbone_config, and not downloaded")
_FORMER_DEPTH_KEYS: Mapping[str, Handling] = {
    **_FORMER_VISION_KEYS,
    **dict.fromkeys(("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"), _OTHER_BACKBONE),
}
# The convolutions of a hybrid depth estimator.
_BACKBONE_KEYS: Mapping[str, Handling] = {
    "num_channels": _RGB,
    **dict.fromkeys(("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act"), _TRACED),
    **dict.fromkeys(("global_padding", "num_groups", "embedding_dynamic_padding", "output_stride"), _TRACED),
    **dict.fromkeys(("width_factor", "out_features", "out_indices", "stage_names"), _TRACED),
    "drop_path_rate": _TRAINING,
    **_TRANSFORMERS_KEYS,
    "model_type": Restricted(("bit",), "hybrid depth estimators of Stable Diffusion have this backbone (BiT)"),
    "return_dict": _NAMED_OUTPUTS,
}

_TOKENIZER = Honoured("checkpoints/tokenizer.py")
_TOKENS = Honoured("checkpoints/tokenizer_settings.py")
_OF_DECODING = NoEffect("of decoding ids, which pipelines do not")
_OF_CALLS = NoEffect("pipelines pass it with every call, or need no such output")
_OF_OTHER_TOKENIZERS = NoEffect("of other tokenizers")
_OF_CHATS = NoEffect("of chats")
_OTHER_FILES = "a checkpoint's tokenizer is that of its files"
_TOKENIZER_KEYS: Mapping[str, Handling] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), _TOKENS
    ),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"), _TOKENS),
    **dict.fromkeys(("model_max_length", "max_len", "tokenizer_class"), _TOKENIZER),
    **dict.fromkeys(("padding_side", "truncation_side"), Restricted(("right",), "a prompt is padded and cut there")),
    "split_special_tokens": Restricted((False,), "a special token in a prompt has its own id"),
    "fast_tokenizer_files": Restricted(([], ["tokenizer.json"]), _OTHER_FILES),
    "fix_mistral_regex": Restricted((None, False), _OTHER_FILES),
    "init_inputs": Restricted(([],), _OTHER_FILES),
    "model_specific_special_tokens": Restricted((None, {}), "special tokens have their own keys"),
    "trust_remote_code": Restricted((None, False), "a checkpoint's own code is not run"),
    **dict.fromkeys(
        ("vocab", "merges", "tokenizer_object", "post_processor", "gguf_file", "_json_padding", "_json_truncation"),
        Restricted((None,), _OTHER_FILES),
    ),
    **dict.fromkeys(("tokenizer_padding", "tokenizer_truncation"), Restricted((None,), _OTHER_FILES)),
    **dict.fromkeys(("clean_up_tokenization_spaces", "errors"), _OF_DECODING),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": _OF_DECODING,
    **dict.fromkeys(("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"), _OF_CALLS),
    **dict.fromkeys(("pad_token_type_id", "model_input_names", "verbose"), _OF_CALLS),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "from_slow", "legacy", "use_fast"),
        _OF_OTHER_TOKENIZERS,
    ),
    **dict.fromkeys(("chat_template", "chat_control_tokens", "response_schema", "response_template"), _OF_CHATS),
    **dict.fromkeys(
        ("auto_map", "backend", "files_loaded", "is_local", "local_files_only", "name_or_path", "processor_class"),
        NoEffect("of the files' origin"),
    ),
    **dict.fromkeys(
        ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "full_tokenizer_file"),
        NoEffect("the files are those of the folder"),
    ),
}

CONFIG_KEYS: Mapping[str, Mapping[str, Handling]] = {
    "UNet2DConditionModel": _UNET_KEYS,
    "AutoencoderKL": _KL_KEYS,
    "AutoencoderTiny": _TINY_KEYS,
    "AsymmetricAutoencoderKL": _ASYMMETRIC_KEYS,
    "CLIPTextModel": {**_TEXT_KEYS, **_FORMER_TEXT_KEYS},
    "CLIPTextModelWithProjection": {**_PROJECTED_TEXT_KEYS, **_FORMER_TEXT_KEYS},
    "CLIPTokenizer": _TOKENIZER_KEYS,
    "CLIPVisionModelWithProjection": {**_VISION_KEYS, **_FORMER_VISION_KEYS},
    "StableDiffusionSafetyChecker": {**_FORMER_SAFETY_KEYS, **_SAFETY_KEYS},
    "StableUnCLIPImageNormalizer": {"embedding_dim": Honoured("the module, and families/compatibility.py")},
    "DPTForDepthEstimation": {**_FORMER_DEPTH_KEYS, **_DEPTH_KEYS},
    "BitBackbone": {**_FORMER_VISION_KEYS, **_BACKBONE_KEYS},
}
# Keys whose values are configurations: (class, key) → the class of the nested configuration.
NESTED_CONFIGS: Mapping[tuple[str, str], str] = {
    ("StableDiffusionSafetyChecker", "vision_config"): "CLIPVisionModelWithProjection",
    ("StableDiffusionSafetyChecker", "vision_config_dict"): "CLIPVisionModelWithProjection",  # an older name
    ("DPTForDepthEstimation", "backbone_config"): "BitBackbone",
}


def _is_whole(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _are_whole(value: Any, largest: int) -> bool:
    """Return whether a value is a list of whole numbers, one for each level."""
    return isinstance(value, list) and 0 < len(value) <= _MAX_LEVELS and all(_is_whole(each, largest) for each in value)


def _are_layers(value: Any, largest: int) -> bool:
    """Return whether a value is a list of numbers of layers, one for each level or a list of one for each block."""
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MAX_LEVELS
        and all(_is_whole(each, largest) or _are_whole(each, largest) for each in value)
    )


def _are_numbers(value: Any, low: float, high: float) -> bool:
    """Return whether a value is a list of numbers, one for each channel of a latent."""
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MAX_CHANNELS
        and all(isinstance(each, int | float) and not isinstance(each, bool) and low <= each <= high for each in value)
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MAX_LEVELS and all(map(_is_name, value))


def _make_number(largest: int) -> _Kind:
    return _Kind(lambda value: _is_whole(value, largest), f"a whole number of 1 to {largest}")


def _make_list(largest: int) -> _Kind:
    return _Kind(
        lambda value: _are_whole(value, largest),
        f"a list of 1 to {_MAX_LEVELS} whole numbers of 1 to {largest}",
    )


def _make_nested_list(largest: int) -> _Kind:
    return _Kind(
        lambda value: _are_layers(value, largest),
        f"a list of 1 to {_MAX_LEVELS} whole numbers of 1 to {largest}, or of lists of such numbers",
    )


def _make_either(one: _Kind, other: _Kind) -> _Kind:
    return _Kind(lambda value: one.fits(value) or other.fits(value), f"{one.description}, or {other.description}")


# Each far above that of the largest model: the tokens of a vocabulary (or class labels), the channels of a layer, the
# layers of a level or of an encoder, the levels, and the pixels of an encoder's side.
_MAX_SIZE = 1 << 24
_MAX_WIDTH = 1 << 16
_MAX_LAYERS = 128
_MAX_LEVELS = 16
_MAX_SIDE = 1024
# The channels of a latent in a manifest, and its statistics there.
_MAX_CHANNELS = 1024
_MAX_MEAN, _MIN_STD, _MAX_STD = 1e6, 1e-6, 1e6
_NONE = _Kind(lambda value: value is None, "null")
_SIZE = _make_number(_MAX_SIZE)
_WIDTH, _WIDTHS = _make_number(_MAX_WIDTH), _make_list(_MAX_WIDTH)
_COUNT, _COUNTS = _make_number(_MAX_LAYERS), _make_list(_MAX_LAYERS)
_NESTED_COUNTS = _make_nested_list(_MAX_LAYERS)
_BLOCKS = _Kind(_are_names, f"a list of 1 to {_MAX_LEVELS} classes' names")
_NAME = _Kind(_is_name, "a name")
_SCALE = _Kind(
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf,
    "a number above 0",
)
_MEANS = _Kind(
    lambda value: _are_numbers(value, -_MAX_MEAN, _MAX_MEAN), f"a list of numbers of {-_MAX_MEAN:g} to {_MAX_MEAN:g}"
)
_DEVIATIONS = _Kind(
    lambda value: _are_numbers(value, _MIN_STD, _MAX_STD), f"a list of numbers of {_MIN_STD:g} to {_MAX_STD:g}"
)
# A key has the same kind of value in every class that has it.
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "hidden_size", "intermediate_size"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings", "projection_dim", "embedding_dim"), _WIDTH),
    "fusion_hidden_size": _WIDTH,
    "vocab_size": _SIZE,
    "num_class_embeds": _make_either(_SIZE, _NONE),
    **dict.fromkeys(("encoder_hid_dim", "time_cond_proj_dim", "time_embedding_dim"), _make_either(_WIDTH, _NONE)),
    **dict.fromkeys(("projection_class_embeddings_input_dim", "addition_time_embed_dim"), _make_either(_WIDTH, _NONE)),
    "latents_mean": _make_either(_MEANS, _NONE),
    "latents_std": _make_either(_DEVIATIONS, _NONE),
    **dict.fromkeys(("block_out_channels", "down_block_out_channels", "up_block_out_channels"), _WIDTHS),
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels", "neck_hidden_sizes"), _WIDTHS),
    "hidden_sizes": _WIDTHS,
    **dict.fromkeys(("embedding_size", "num_groups", "output_stride", "width_factor"), _WIDTH),
    "cross_attention_dim": _make_either(_WIDTH, _WIDTHS),
    "num_hidden_layers": _COUNT,
    **dict.fromkeys(("layers_per_down_block", "layers_per_up_block"), _COUNT),
    "layers_per_block": _make_either(_COUNT, _COUNTS),
    "transformer_layers_per_block": _make_either(_COUNT, _NESTED_COUNTS),
    "reverse_transformer_layers_per_block": _make_either(_NESTED_COUNTS, _NONE),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks", "depths"), _COUNTS),
    **dict.fromkeys(("down_block_types", "up_block_types"), _BLOCKS),
    "image_size": _make_either(_make_number(_MAX_SIDE), _make_list(_MAX_SIDE)),
    "hidden_act": _NAME,
    "scaling_factor": _SCALE,
}
# Keys that diffusers and transformers follow in any configuration.
_OF_ALL_CLASSES: Mapping[str, Handling] = {
    "quantization_config": Restricted(
        (None,), "its weights are quantised already; export the original ones, with --precision int8"
    ),
    "transformers_weights": Restricted((None,), "it names another file of weights; rename the file, and delete it"),
    "configuration_files": Restricted((None,), "it names other configurations; delete it"),
}
_MAX_NAMED = 5  # unknown keys in one warning
# Keys of schedulers before diffusers 0.3, which no class has any more.
_OLD_SCHEDULER_KEYS = {"tensor_format", "timestep_values"}


def check_keys(component: str, class_name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Check every key of a component's configuration; yield a warning if its class does not have some.

    Args:
        component: the component's name, for messages.
        class_name: its class, a key of `CONFIG_KEYS`.
        config: the content of its `config.json`. Keys that begin with an underscore are the libraries' own, and pass.
            A nested configuration (`NESTED_CONFIGS`) is checked by the keys of its own class.

    Raises:
        CheckpointError: a key has a value that is not supported.
    """
    keys = {**CONFIG_KEYS[class_name], **_OF_ALL_CLASSES}
    unknown = []
    for key, value in config.items():
        handling = keys.get(key)
        if isinstance(handling, Honoured):
            check_kind(component, key, value)
        if isinstance(handling, Restricted) and not any(value == each for each in handling.values):
            raise CheckpointError(
                f"{component}: its configuration has {key} {quote(value)}, expected "
                f"{' or '.join(map(repr, handling.values))}: {handling.reason}"
            )
        if handling is None and not key.startswith("_"):
            unknown.append(key)
        nested = NESTED_CONFIGS.get((class_name, key))
        if nested and value is not None:
            if not isinstance(value, dict):
                raise CheckpointError(
                    f"{component}: its configuration has {key} {quote(value)}, expected an object; correct its "
                    "config.json"
                )
            yield from check_keys(component, nested, value)
    yield from _warn_about_unknown(component, unknown, f"{class_name} does not have")


def _warn_about_unknown(component: str, keys: Sequence[str], reason: str) -> Iterator[str]:
    """Yield one warning for all keys that have no handling, if there are any."""
    if keys:
        named = [*map(quote, keys[:_MAX_NAMED])]
        if len(keys) > _MAX_NAMED:
            named.append(f"and {counted(len(keys) - _MAX_NAMED, 'other')}")
        ignored = "it is ignored" if len(keys) == 1 else "they are ignored"
        yield f"{component}: its configuration has {', '.join(named)}, which {reason}; {ignored}, as in diffusers"


def check_kind(component: str, key: str, value: Any) -> None:
    """Check that a key's value is of the kind that plans calculate with; keys that they do not read may have any.

    Raises:
        CheckpointError: it is of another.
    """
    kind = _KINDS.get(key)
    if kind is not None and not kind.fits(value):
        raise CheckpointError(
            f"{component}: its configuration has {key} {quote(value)}, expected {kind.description}; correct its "
            "config.json"
        )


def check_scheduler_keys(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Check a scheduler's configuration; yield a warning if no scheduler class has some of its keys.

    A key of another scheduler class gets no warning, as it takes effect when that sampler is chosen.

    Raises:
        CheckpointError: a value cannot be stored in a manifest.
    """
    known = {key for sampler in SAMPLERS.values() for key in sampler.__dataclass_fields__} | _OLD_SCHEDULER_KEYS
    drop_keys_left_to_default(name, config)
    if _find_json_problem(config) is not None:
        problems = ((key, _find_json_problem({key: value})) for key, value in config.items())
        key, problem = next((key, problem) for key, problem in problems if problem is not None)
        raise CheckpointError(
            f"{name}: its configuration has a value of {quote(key)} that JSON cannot hold ({problem}); correct it"
        )
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    yield from _warn_about_unknown(name, unknown, "no scheduler has")


def drop_keys_left_to_default(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of a diffusers class without the keys that `_use_default_values` leaves to its defaults.

    diffusers adds that list to the configuration of an object, and follows it in a file (`extract_init_dict`).

    Raises:
        CheckpointError: it is not a list of keys.
    """
    dropped = config.get("_use_default_values") or []
    if not isinstance(dropped, list) or not all(map(_is_name, dropped)):
        raise CheckpointError(
            f"{component}: its configuration has _use_default_values {quote(dropped)}, expected a list of keys; "
            "delete it"
        )
    return {key: value for key, value in config.items() if key not in dropped}


def _find_json_problem(config: Mapping[str, Any]) -> str | None:
    """Return the reason why JSON cannot hold a configuration; None if it can."""
    try:
        parse_json(msgspec.json.encode(dict(config)))
    except (AmbiguousJSONError, OverflowError, UnicodeError) as error:
        return str(error)
    return None
