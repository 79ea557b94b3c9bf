"""The handling of every key of the configuration classes of diffusers and transformers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import BitConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, DPTConfig

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import config_keys
from latentrt_export.checkpoints.checkpoint import GivenComponents, open_checkpoint
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, NoEffect, Restricted, check_keys, check_scheduler_keys
from latentrt_export.families import PIPELINES, plan_export
from latentrt_export.families.plan import ExportPlan
from tests.export.skeleton import change_json, write_json, write_skeleton
from tests.tiny import (
    SCHEDULERS,
    Task,
    autoencoder,
    depth_estimator,
    image_encoder,
    make_checkpoint,
    move_off_initial_values,
    safety_checker,
    text_encoder,
    unet,
)

DIFFUSERS = {name: getattr(diffusers, name) for name in CONFIG_KEYS if hasattr(diffusers, name)}
DIFFUSERS["StableUnCLIPImageNormalizer"] = StableUnCLIPImageNormalizer


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_keys_are_those_of_the_class_in_diffusers(name: str, tmp_path: Path) -> None:
    """Compare with the keys of its constructor and with those that it saves, which may be more."""
    parameters = inspect.signature(DIFFUSERS[name].__init__).parameters
    with torch.device("meta"):  # without its 10⁹ numbers
        DIFFUSERS[name]().save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {*CONFIG_KEYS[name]} == {key for key in {*parameters, *saved} - {"self"} if not key.startswith("_")}
    assert list(check_keys("part", name, saved)) == []
    for key, handling in CONFIG_KEYS[name].items():
        if isinstance(handling, Restricted) and key in parameters:
            assert parameters[key].default in handling.values, key


@pytest.mark.parametrize(
    ("name", "config_class", "former"),
    [
        ("CLIPTextModel", CLIPTextConfig, config_keys._FORMER_TEXT_KEYS),
        ("CLIPTextModelWithProjection", CLIPTextConfig, config_keys._FORMER_TEXT_KEYS),
        ("CLIPVisionModelWithProjection", CLIPVisionConfig, config_keys._FORMER_VISION_KEYS),
        ("StableDiffusionSafetyChecker", CLIPConfig, config_keys._FORMER_SAFETY_KEYS),
        ("DPTForDepthEstimation", DPTConfig, config_keys._FORMER_DEPTH_KEYS),
        ("BitBackbone", BitConfig, config_keys._FORMER_VISION_KEYS),
    ],
)
def test_the_keys_are_those_of_the_class_in_transformers(name: str, config_class: Any, former: Any) -> None:
    parameters, saved = inspect.signature(config_class.__init__).parameters, config_class().to_dict()
    expected = {key for key in {*parameters, *saved} - {"self"} if not key.startswith("_")}
    assert expected <= {*CONFIG_KEYS[name]}
    assert {*CONFIG_KEYS[name]} - expected == {*former}
    assert list(check_keys("part", name, {key: value for key, value in saved.items() if value is not None})) == []


FIXED = [
    (name, key)
    for name, keys in CONFIG_KEYS.items()
    for key, handling in keys.items()
    if isinstance(handling, Restricted) and name != "CLIPTokenizer"  # whose keys test_tokenizer.py exports
]


@pytest.mark.parametrize(("name", "key"), FIXED)
def test_a_value_that_is_not_supported_is_refused_by_its_key(name: str, key: str) -> None:
    handling = CONFIG_KEYS[name][key]
    assert isinstance(handling, Restricted)
    for value in handling.values:
        assert list(check_keys("part", name, {key: value})) == []
    with pytest.raises(CheckpointError, match=f"part: its configuration has {key} 'another', expected"):
        list(check_keys("part", name, {key: "another"}))


# Another value of each key that has no effect.
OTHERS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"dropout": 0.5, "addition_embed_type_num_heads": 2},
    "AutoencoderKL": {"sample_size": 8, "force_upcast": False},
    "AutoencoderTiny": {
        "latent_magnitude": 5,
        "latent_shift": 0.1,
        "force_upcast": True,
        "block_out_channels": (8,),
    },
    "AsymmetricAutoencoderKL": {"sample_size": 8, "block_out_channels": (8, 8, 8), "force_upcast": True},
    "CLIPTextModel": {
        "projection_dim": 8,
        "attention_dropout": 0.5,
        "initializer_range": 0.1,
        "initializer_factor": 2.0,
        "pad_token_id": 5,
        "bos_token_id": 6,
        "output_hidden_states": True,
        "return_dict": False,
    },
    "CLIPVisionModelWithProjection": {
        "attention_dropout": 0.5,
        "initializer_range": 0.1,
        "initializer_factor": 2.0,
        "output_hidden_states": True,
    },
    "DPTForDepthEstimation": {
        "attention_probs_dropout_prob": 0.5,
        "hidden_dropout_prob": 0.5,
        "initializer_range": 0.1,
        "auxiliary_loss_weight": 0.1,
        "use_auxiliary_head": False,
        "semantic_loss_ignore_index": 1,
        "semantic_classifier_dropout": 0.5,
        "pooler_act": "gelu",
        "pooler_output_size": 8,
        "output_hidden_states": True,
    },
    "StableDiffusionSafetyChecker": {
        "text_config": {"hidden_size": 64, "num_attention_heads": 2},
        "logit_scale_init_value": 1.0,
        "initializer_factor": 2.0,
        "return_dict": False,
    },
}


def module_and_inputs(name: str) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    """Return a module, the configuration that it was made of, and inputs of its own."""
    latents, text = torch.linspace(-2, 2, 4 * 64).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 77 * 32).reshape(1, 77, 32)
    if name == "CLIPTextModel":
        encoder = text_encoder("sd1", {"<|startoftext|>": 98, "<|endoftext|>": 99} | {str(i): i for i in range(98)}, 1)
        return encoder, encoder.config.to_dict(), [torch.arange(77)[None]]
    pixels = torch.linspace(-2, 2, 3 * 224**2).reshape(1, 3, 224, 224)
    if name == "CLIPVisionModelWithProjection":
        vision = image_encoder("sd1")
        return vision, vision.config.to_dict(), [pixels]
    if name == "StableDiffusionSafetyChecker":
        checker = safety_checker(strict=False)
        return checker, checker.config.to_dict(), [pixels]
    if name == "DPTForDepthEstimation":
        estimator = depth_estimator()
        return estimator, estimator.config.to_dict(), [pixels[..., :64, :64]]
    if name == "UNet2DConditionModel":
        model: Any = unet("sd1")
        inputs = [latents, torch.tensor(500.0), text]
    elif name == "AutoencoderKL":
        model, inputs = autoencoder(levels=2), [latents]
    elif name == "AutoencoderTiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        model = diffusers.AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
        inputs = [latents]
    else:
        model, inputs = diffusers.AsymmetricAutoencoderKL(norm_num_groups=8).eval(), [latents]
    return model, {key: value for key, value in model.config.items() if not key.startswith("_")}, inputs


def evaluate(model: Any, inputs: list[torch.Tensor]) -> Any:
    """Return the output that a pipeline uses."""
    with torch.no_grad():
        if hasattr(model, "decode"):
            return model.decode(*inputs, return_dict=False)[0]
        if hasattr(model, "concept_embeds"):
            return model.visual_projection(model.vision_model(*inputs)[1])
        return model(*inputs)[0]


@pytest.mark.parametrize("name", OTHERS)
def test_a_key_without_effect_has_none_in_the_module(name: str) -> None:
    listed = {key for key, handling in CONFIG_KEYS[name].items() if isinstance(handling, NoEffect)}
    if name in DIFFUSERS:  # further ones of others are every model's of transformers
        assert {*OTHERS[name]} == listed
    assert {*OTHERS[name]} <= listed
    torch.manual_seed(0)
    model, config, inputs = module_and_inputs(name)
    move_off_initial_values(model)
    expected = evaluate(model, inputs)
    changed = {**config, **OTHERS[name]}
    if name in DIFFUSERS:
        other = type(model).from_config(changed).eval()
    else:
        other = type(model)(type(model.config).from_dict(changed)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(other, inputs), expected)


def test_a_quantised_component_is_refused() -> None:
    for name in CONFIG_KEYS:
        with pytest.raises(CheckpointError, match="quantization_config"):
            list(check_keys("part", name, {"quantization_config": {"load_in_8bit": True}}))


def test_the_export_checks_every_component_and_names_what_it_ignores(tmp_path: Path) -> None:
    folder = write_skeleton(tmp_path)
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    change_json(folder / "safety_checker" / "config.json", vision_config={"of_no_class": 1})
    for file in (
        "safety_checker/config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ):
        change_json(folder / file, of_no_class=1, _private=2)
    change_json(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=False)  # of another scheduler
    warnings = plan_export(open_checkpoint(folder, pipelines=PIPELINES)).warnings
    assert [warning.partition(":")[0] for warning in warnings] == [
        "unet",
        "text_encoder",
        "safety_checker",
        "safety_checker",
        "vae",
        "tokenizer",
        "scheduler",
    ]
    assert all("'of_no_class'" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer_config.json", "padding_side", "left"),
        ("unet/config.json", "dual_cross_attention", True),
        ("vae/config.json", "shift_factor", 0.1),
        ("text_encoder/config.json", "use_attention_mask", True),
        ("unet/config.json", "num_class_embeds", 10),
        ("text_encoder/config.json", "quantization_config", {}),
        ("safety_checker/config.json", "quantization_config", {}),
        ("safety_checker/config.json", "vision_config", {"num_hidden_layers": 16_000_000}),
        ("unet/config.json", "class_embed_type", "timestep"),
    ],
)
def test_the_export_refuses_an_unsupported_value(tmp_path: Path, file: str, key: str, value: Any) -> None:
    folder = write_skeleton(tmp_path)
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    change_json(folder / file, **{key: value})
    shown = "num_hidden_layers" if key == "vision_config" else key
    with pytest.raises(CheckpointError, match=f"{file.partition('/')[0]}: its configuration has {shown}"):
        plan_export(open_checkpoint(folder, pipelines=PIPELINES))


@pytest.mark.parametrize("task", ["text-to-image", "depth-to-image", "unclip"])
def test_every_component_is_checked_and_saved_ones_get_no_warning(tmp_path: Path, task: Task) -> None:
    folder = make_checkpoint(tmp_path / "folder", task=task)
    tiny = tmp_path / "preview"
    diffusers.AutoencoderTiny().save_pretrained(tiny)
    given = GivenComponents(preview_decoder=tiny)

    def plan() -> ExportPlan:
        return plan_export(open_checkpoint(folder, pipelines=PIPELINES, given=given))

    assert plan().warnings == ()
    weights = open_checkpoint(folder, pipelines=PIPELINES, given=given).weights
    for component in weights:
        path = (tiny if component == "preview_decoder" else folder / component) / "config.json"
        original = path.read_text()
        change_json(path, quantization_config={"load_in_8bit": True})
        with pytest.raises(CheckpointError, match=f"{component}: its configuration has quantization_config"):
            plan()
        path.write_text(original)
        change_json(path, of_no_class=1)
        assert [warning.partition(" has ")[0] for warning in plan().warnings] == [f"{component}: its configuration"]
        path.write_text(original)


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AsymmetricAutoencoderKL"])
def test_a_saved_autoencoder_gets_no_warning(tmp_path: Path, name: str) -> None:
    folder, vae = write_skeleton(tmp_path / "folder"), tmp_path / "vae"
    DIFFUSERS[name]().save_pretrained(vae)
    given = GivenComponents(vae=vae)
    warnings = plan_export(open_checkpoint(folder, pipelines=PIPELINES, given=given)).warnings
    assert not [warning for warning in warnings if "does not have" in warning]


# Far beyond the largest model: layers, levels, widths, words and pixels.
@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("CLIPTextModel", "num_hidden_layers", [129, 16_000_000]),
        ("CLIPTextModel", "hidden_size", [2**16 + 1]),
        ("CLIPTextModel", "vocab_size", [2**24 + 1]),
        ("CLIPVisionModelWithProjection", "num_hidden_layers", [129]),
        ("CLIPVisionModelWithProjection", "image_size", [1025, [224, 1025], [], [224] * 17]),
        ("DPTForDepthEstimation", "image_size", [1025]),
        ("DPTForDepthEstimation", "num_hidden_layers", [129]),
        ("UNet2DConditionModel", "block_out_channels", [[320] * 17, [2**16 + 1], []]),
        ("UNet2DConditionModel", "down_block_types", [["DownBlock2D"] * 17]),
        ("UNet2DConditionModel", "layers_per_block", [129, [129], [1] * 17]),
        ("UNet2DConditionModel", "transformer_layers_per_block", [129, [129], [[129]], [[1] * 17]]),
        ("UNet2DConditionModel", "reverse_transformer_layers_per_block", [[129]]),
        ("UNet2DConditionModel", "addition_time_embed_dim", [0, 2**16 + 1, [256]]),
        ("AutoencoderKL", "latents_mean", [0.5, [], [0.5] * 1025, [float("inf")], [True], ["1"]]),
        ("AutoencoderKL", "latents_std", [2.0, [0.0], [-1.0], [2.0] * 1025]),
        ("AutoencoderTiny", "num_encoder_blocks", [[129], [1] * 17, 10**9]),
        ("AutoencoderTiny", "num_decoder_blocks", [[129]]),
        ("AsymmetricAutoencoderKL", "layers_per_down_block", [129]),
        ("AsymmetricAutoencoderKL", "layers_per_up_block", [129]),
        ("AutoencoderKL", "layers_per_block", [129]),
    ],
)
def test_numbers_of_no_model_are_refused_before_one_is_built(name: str, key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(CheckpointError, match=f"part: its configuration has {key}") as caught:
            list(check_keys("part", name, {key: value}))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [2**70, [2**63], "\ud800", {"a": 2**64}])
def test_a_value_that_no_manifest_holds_is_refused_by_its_key(value: Any) -> None:
    assert not list(check_scheduler_keys("scheduler", {**SCHEDULERS["sd1"], "lambda_min_clipped": -float("inf")}))
    with pytest.raises(CheckpointError, match="scheduler: its configuration has a value of 'steps_offset'"):
        list(check_scheduler_keys("scheduler", {"steps_offset": value}))


def test_a_configuration_of_many_keys_is_parsed_once_and_gets_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(config_keys, "parse_json", parsed.append)
    many = {f"key{index}\x1b" * 99: 0 for index in range(1000)}
    for warnings in (check_scheduler_keys("scheduler", many), check_keys("unet", "UNet2DConditionModel", many)):
        (warning,) = warnings
        assert "and 995 others" in warning
        assert "\x1b" not in warning
        assert len(warning) < 1000
    assert len(parsed) == 1


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("unet/config.json", ("in_channels", "layers_per_block", "up_block_types", "block_out_channels")),
        ("vae/config.json", ("block_out_channels", "latent_channels", "scaling_factor")),
        ("text_encoder/config.json", ("hidden_size", "num_hidden_layers", "hidden_act")),
        ("scheduler/scheduler_config.json", ("_use_default_values",)),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(tmp_path: Path, file: str, keys: tuple[str, ...]) -> None:
    folder = write_skeleton(tmp_path, safety=False)
    original = (folder / file).read_text()
    for key in keys:
        for value in ({"a": 1}, -1, True, [None], float("inf")):
            change_json(folder / file, **{key: value})
            with pytest.raises(CheckpointError, match=f"{file.partition('/')[0]}: its configuration has {key}"):
                plan_export(open_checkpoint(folder, pipelines=PIPELINES))
            (folder / file).write_text(original)


KEYS_OF_FILES = {
    "model_index.json": ("_class_name", "unet", "vae", "text_encoder", "scheduler", "feature_extractor"),
    "unet/config.json": (*CONFIG_KEYS["UNet2DConditionModel"], "_diffusers_version"),
    "vae/config.json": tuple(CONFIG_KEYS["AutoencoderKL"]),
    "text_encoder/config.json": (*CONFIG_KEYS["CLIPTextModel"], "model_type"),
    "safety_checker/config.json": (*CONFIG_KEYS["StableDiffusionSafetyChecker"], "model_type"),
    "feature_extractor/preprocessor_config.json": (
        *("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor"),
        *("image_processor_type", "feature_extractor_type"),
    ),
}


@pytest.mark.parametrize("file", KEYS_OF_FILES)
def test_a_message_does_not_repeat_a_long_value(tmp_path: Path, file: str) -> None:
    folder = write_skeleton(tmp_path)
    original = (folder / file).read_text()
    refusals = 0
    long = "x" * 100_000
    for key in KEYS_OF_FILES[file]:
        for value in ([long], long, ["diffusers", long])[: 3 if file == "model_index.json" else 1]:
            change_json(folder / file, **{key: value})
            try:
                messages: list[str] = list(plan_export(open_checkpoint(folder, pipelines=PIPELINES)).warnings)
            except CheckpointError as error:
                messages, refusals = [str(error)], refusals + 1
            assert all(len(message) < 2000 for message in messages), key
            (folder / file).write_text(original)
    assert refusals >= 5
