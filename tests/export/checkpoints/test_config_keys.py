"""The handling of every key of the configuration classes of diffusers and transformers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import config_keys
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, NoEffect, Restricted, check_keys, check_scheduler_keys
from latentrt_export.families import PIPELINES, plan_export
from tests.export.skeleton import change_json, write_json, write_skeleton
from tests.tiny import SCHEDULERS, autoencoder, move_off_initial_values, text_encoder, unet


@pytest.mark.parametrize("name", [name for name in CONFIG_KEYS if hasattr(diffusers, name)])
def test_the_keys_are_those_of_the_class_in_diffusers(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert {*CONFIG_KEYS[name]} == {*parameters} - {"self"}
    for key, handling in CONFIG_KEYS[name].items():
        if isinstance(handling, Restricted):
            assert parameters[key].default in handling.values, key


def test_the_keys_are_those_of_the_text_encoder_in_transformers() -> None:
    parameters, saved = inspect.signature(CLIPTextConfig.__init__).parameters, CLIPTextConfig().to_dict()
    expected = {*parameters, *saved} - {"self", "_name_or_path"}
    assert expected <= {*CONFIG_KEYS["CLIPTextModel"]}
    assert {*CONFIG_KEYS["CLIPTextModel"]} - expected == {*config_keys._FORMER_TEXT_KEYS}


FIXED = [
    (name, key)
    for name, keys in CONFIG_KEYS.items()
    for key, handling in keys.items()
    if isinstance(handling, Restricted)
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
    "UNet2DConditionModel": {"dropout": 0.5, "addition_time_embed_dim": 8, "addition_embed_type_num_heads": 2},
    "AutoencoderKL": {
        "sample_size": 8,
        "latents_mean": [0.5] * 4,
        "latents_std": [2.0] * 4,
        "force_upcast": False,
    },
    "AutoencoderTiny": {"latent_magnitude": 5, "latent_shift": 0.1, "force_upcast": True},
    "AsymmetricAutoencoderKL": {"sample_size": 8},
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
}


def module_and_inputs(name: str) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    """Return a module, the configuration that it was made of, and inputs of its own."""
    latents, text = torch.linspace(-2, 2, 4 * 64).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 77 * 32).reshape(1, 77, 32)
    if name == "CLIPTextModel":
        encoder = text_encoder("sd1", {"<|startoftext|>": 98, "<|endoftext|>": 99} | {str(i): i for i in range(98)}, 1)
        return encoder, encoder.config.to_dict(), [torch.arange(77)[None]]
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
        return model(*inputs)[0]


@pytest.mark.parametrize("name", OTHERS)
def test_a_key_without_effect_has_none_in_the_module(name: str) -> None:
    listed = {key for key, handling in CONFIG_KEYS[name].items() if isinstance(handling, NoEffect)}
    if name != "CLIPTextModel":  # whose further ones are every model's of transformers
        assert {*OTHERS[name]} == listed
    assert {*OTHERS[name]} <= listed
    torch.manual_seed(0)
    model, config, inputs = module_and_inputs(name)
    move_off_initial_values(model)
    expected = evaluate(model, inputs)
    changed = {**config, **OTHERS[name]}
    if name == "CLIPTextModel":
        other = CLIPTextModel(CLIPTextConfig.from_dict(changed)).eval()
    else:
        other = type(model).from_config(changed).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(other, inputs), expected)


def test_a_quantised_component_is_refused() -> None:
    for name in CONFIG_KEYS:
        with pytest.raises(CheckpointError, match="quantization_config"):
            list(check_keys("part", name, {"quantization_config": {"load_in_8bit": True}}))


def test_the_export_checks_every_component_and_names_what_it_ignores(tmp_path: Path) -> None:
    folder = write_skeleton(tmp_path, safety=False)
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    for file in (
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
        "vae",
        "text_encoder",
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
        ("unet/config.json", "class_embed_type", "timestep"),
    ],
)
def test_the_export_refuses_an_unsupported_value(tmp_path: Path, file: str, key: str, value: Any) -> None:
    folder = write_skeleton(tmp_path, safety=False)
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    change_json(folder / file, **{key: value})
    with pytest.raises(CheckpointError, match=f"{file.partition('/')[0]}: its configuration has {key}"):
        plan_export(open_checkpoint(folder, pipelines=PIPELINES))


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
