"""The plan of a Stable Diffusion XL export, and exports of its kinds of checkpoint from end to end."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import run
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import LatentSpace, Manifest
from latentrt.bundle.tensors import sized
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer import open_tokenizer
from latentrt_engines.self_check import GateInputs
from latentrt_export.checkpoints.checkpoint import GivenComponents, open_checkpoint
from latentrt_export.export import export_checkpoint
from latentrt_export.families import PIPELINES, plan_export, stable_diffusion_xl
from latentrt_export.families.plan import ExportPlan
from tests.export.skeleton import change_json, write_skeleton, write_xl_skeleton
from tests.exported import Silent, exported_xl, exporting_in_process
from tests.tiny_xl import POOLED_WIDTH, TEXT_WIDTH, TEXT_WIDTH_2, Kind, make_xl_checkpoint
from tests.traced_once import tracing_once

TASKS = ("text-to-image", "image-to-image", "inpainting")
JOINED = "text_encoder.hidden_states+text_encoder_2.hidden_states"


def plan(folder: Path, kind: Kind = "base", **changes: dict[str, Any]) -> ExportPlan:
    """Plan the export of a skeleton whose configurations have these keys."""
    write_xl_skeleton(folder, kind)
    for name, values in changes.items():
        change_json(folder / ("model_index.json" if name == "index" else f"{name}/config.json"), **values)
    return plan_export(open_checkpoint(folder, pipelines=PIPELINES))


def test_everything_follows_from_the_configurations(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert (found.family, found.tasks) == ("stable-diffusion-xl", TASKS)
    assert found.latent_spaces == {"unet": LatentSpace(channels=4, downscale=8, scale=0.13025)}
    assert (found.defaults.height, found.defaults.width) == (1024, 1024)
    assert found.defaults.force_zeros_for_empty_prompt
    # The first encoder has the fewest layers, of which the last is always skipped.
    assert found.limits.max_clip_skip == 11
    assert found.tokenizers == {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    assert found.deep_cache_branches == 9
    assert found.scheduler_changes == ()
    assert [each.name for each in found.components] == [
        "text_encoder",
        "text_encoder_2",
        "vae_encoder",
        "unet",
        "vae_decoder",
    ]
    unet = found.components[3]
    assert unet.module == "unet:XLUNet"
    assert unet.sources == {
        "sample": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": JOINED,
        "text_embeds": "text_encoder_2.pooled",
        "time_ids": "micro-conditioning",
    }
    assert found.warnings == ()
    assert "Stable Diffusion XL" in found.unclassified


def test_a_refiner_has_one_text_encoder_and_no_images_from_noise(tmp_path: Path) -> None:
    found = plan(tmp_path, "refiner")
    assert found.tasks == ("image-to-image", "inpainting")
    assert found.tokenizers == {"text_encoder_2": "tokenizer_2"}
    assert found.limits.max_clip_skip == 31
    assert not found.defaults.force_zeros_for_empty_prompt
    unet = next(each for each in found.components if each.name == "unet")
    assert unet.sources["encoder_hidden_states"] == "text_encoder_2.hidden_states"


@pytest.mark.parametrize(
    ("kind", "pipeline", "channels", "tasks"),
    [
        ("base", "StableDiffusionXLPipeline", 9, ("inpainting",)),
        ("base", "StableDiffusionXLImg2ImgPipeline", 4, TASKS),
        ("base", "StableDiffusionXLInpaintPipeline", 4, TASKS),
        ("base", "StableDiffusionXLInpaintPipeline", 9, ("inpainting",)),
        ("base", "StableDiffusionXLInstructPix2PixPipeline", 8, ("edit",)),
        ("refiner", "StableDiffusionXLInpaintPipeline", 4, ("image-to-image", "inpainting")),
    ],
)
def test_the_tasks_follow_from_the_class_and_the_channels(
    tmp_path: Path, kind: Kind, pipeline: str, channels: int, tasks: tuple[str, ...]
) -> None:
    found = plan(tmp_path, kind, index={"_class_name": pipeline}, unet={"in_channels": channels})
    assert found.tasks == tasks


@pytest.mark.parametrize("name", stable_diffusion_xl.PIPELINES)
def test_the_defaults_are_those_of_diffusers_pipelines(name: str) -> None:
    call = inspect.signature(getattr(diffusers, name).__call__).parameters
    expected = call["num_inference_steps"].default, call["guidance_scale"].default
    assert stable_diffusion_xl._DEFAULTS[name] == expected
    own = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert own["force_zeros_for_empty_prompt"].default is True
    assert ("requires_aesthetics_score" in own) == (name in stable_diffusion_xl._GIVE_SCORES)


@pytest.mark.parametrize("name", stable_diffusion_xl.PIPELINES)
def test_diffusers_pipelines_change_no_configuration(name: str) -> None:
    source = inspect.getsource(inspect.getmodule(getattr(diffusers, name)) or diffusers)
    assert "_internal_dict" not in source


def test_distilled_guidance_is_an_input_of_the_denoiser(tmp_path: Path) -> None:
    unet = plan(tmp_path, unet={"time_cond_proj_dim": 256}).components[3]
    assert unet.module == "unet:GuidanceDistilledXLUNet"
    assert unet.sources["guidance_weight"] == "guidance-weight"


def test_latents_have_the_autoencoders_statistics(tmp_path: Path) -> None:
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    found = plan(tmp_path, vae={"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5})
    assert found.latent_spaces["unet"] == LatentSpace(
        channels=4, downscale=8, scale=0.5, mean=tuple(mean), std=tuple(std)
    )
    decoder = next(each for each in found.components if each.role == "decoder")
    assert decoder.module == "vae:NormalizedVaeDecoder"


def test_a_checkpoint_without_a_middle_block_has_a_branch_less(tmp_path: Path) -> None:
    assert plan(tmp_path, unet={"mid_block_type": None}).deep_cache_branches == 8


@pytest.mark.parametrize(
    ("kind", "changes", "fragment"),
    [
        ("base", {"unet": {"in_channels": 5}}, "in_channels 5, expected 4 or 9"),
        ("edit", {"unet": {"in_channels": 4}}, "in_channels 4, expected 8"),
        ("edit", {"unet": {"time_cond_proj_dim": 256}}, "time_cond_proj_dim 256, expected none"),
        ("edit", {"index": {"is_cosxl_edit": True}}, "is_cosxl_edit True, expected false"),
        ("base", {"unet": {"addition_embed_type": None}}, "no addition_embed_type, expected 'text_time'"),
        ("base", {"unet": {"addition_embed_type": "image"}}, "addition_embed_type 'image'"),
        ("base", {"unet": {"addition_time_embed_dim": None}}, "no addition_time_embed_dim"),
        ("base", {"unet": {"num_class_embeds": 3}}, "num_class_embeds 3, expected none"),
        ("base", {"unet": {"sample_size": None}}, "sample_size None"),
        (
            "base",
            {"unet": {"cross_attention_dim": 1280}},
            r"text_encoder with text_encoder_2 has hidden_size \[768, 1280\] and unet has cross_attention_dim 1280, "
            "expected 2048",
        ),
        ("refiner", {"unet": {"cross_attention_dim": 2048}}, "hidden_size 1280 and unet has .* 2048, expected 1280"),
        (
            "base",
            {"unet": {"projection_class_embeddings_input_dim": 2560}},
            "5 values, and .* gives 6; set requires_aesthetics_score to true and _class_name to .*Img2Img",
        ),
        (
            "refiner",
            {"unet": {"projection_class_embeddings_input_dim": 2816}},
            "6 values, and .* gives 5; set requires_aesthetics_score to false",
        ),
        (
            "base",
            {"unet": {"projection_class_embeddings_input_dim": 3000}},
            "text_encoder_2 has projection_dim 1280 and unet has projection_class_embeddings_input_dim 3000, "
            "expected 2816",
        ),
        ("base", {"text_encoder": {"num_hidden_layers": 1}}, "text_encoder: .*num_hidden_layers 1, expected at least"),
        ("base", {"index": {"force_zeros_for_empty_prompt": 1}}, "force_zeros_for_empty_prompt 1, expected true or"),
        ("refiner", {"index": {"requires_aesthetics_score": "yes"}}, "requires_aesthetics_score 'yes'"),
        ("base", {"vae": {"latents_mean": [0.5] * 4}}, "latents_std None, expected 4 numbers"),
        ("base", {"vae": {"latents_mean": [0.5] * 3, "latents_std": [1.0] * 3}}, "latents_mean .*, expected 4 numbers"),
        ("base", {"index": {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}}, "expected CLIPTextMod"),
        ("base", {"index": {"text_encoder_2": [None, None]}}, "text_encoder_2: .*cannot do without it"),
        ("base", {"text_encoder_2": {"return_dict": False}}, "text_encoder_2: .*return_dict False"),
    ],
)
def test_configurations_that_contradict_the_pipeline(
    tmp_path: Path, kind: Kind, changes: dict[str, dict[str, Any]], fragment: str
) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        plan(tmp_path, kind, **changes)


@pytest.mark.parametrize("name", ["text_encoder_2", "tokenizer_2", "unet"])
def test_keys_of_every_component_are_checked(tmp_path: Path, name: str) -> None:
    write_xl_skeleton(tmp_path)
    file = tmp_path / name / ("tokenizer_config.json" if name == "tokenizer_2" else "config.json")
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        file.write_text("{}")
    change_json(file, of_no_class=1)
    (warning,) = plan_export(open_checkpoint(tmp_path, pipelines=PIPELINES)).warnings
    assert warning.startswith(f"{name}: its configuration has 'of_no_class'")


def test_tokenizers_of_different_lengths_are_refused_before_any_component(tmp_path: Path) -> None:
    """diffusers cannot join such embeddings either."""
    checkpoint = make_xl_checkpoint(tmp_path / "checkpoint")
    change_json(checkpoint / "tokenizer_2" / "tokenizer_config.json", model_max_length=50)
    with pytest.raises(CheckpointError, match="77 and 50 tokens for text_encoder and text_encoder_2"):
        export_checkpoint(checkpoint, tmp_path / "bundle", progress=Silent())


def test_a_safety_checker_may_be_given(tmp_path: Path) -> None:
    write_xl_skeleton(tmp_path / "xl")
    write_skeleton(tmp_path / "other")
    given = GivenComponents(safety_checker=tmp_path / "other")
    found = plan_export(open_checkpoint(tmp_path / "xl", pipelines=PIPELINES, given=given))
    assert found.components[-1].role == "classifier"


def test_gate_inputs_of_the_builder_join_the_outputs_of_both_encoders(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, folder = exported_xl(tmp_path_factory)
    bundle = Bundle.open(folder)
    inputs = GateInputs(bundle, lambda name, precision: open_session(bundle, name, precision=precision))
    sizes = {"evaluations": 3, "height": 9, "width": 12, "tokens": 154}
    shapes = {spec.name: sized(spec, sizes) for spec in bundle.manifest.components["unet"].inputs}
    feeds = inputs.feeds("unet", shapes)
    assert {name: array.shape for name, array in feeds.items()} == shapes
    both = [
        inputs.feeds(name, {"input_ids": (5, 77), "clip_skip": (5,)}) for name in ("text_encoder", "text_encoder_2")
    ]
    states = [
        run(open_session(bundle, name), **each)["hidden_states"]
        for name, each in zip(("text_encoder", "text_encoder_2"), both, strict=True)
    ]
    joined = np.concatenate(states, axis=2)
    np.testing.assert_array_equal(feeds["encoder_hidden_states"][0], joined[:2].reshape(154, -1))
    assert len({*map(tuple, feeds["time_ids"].tolist())}) == 3


def check_gates(manifest: Manifest) -> None:
    assert all(graph.gate for component in manifest.components.values() for graph in component.graphs.values())


def test_a_base_checkpoint_beside_diffusers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The bundle's encoders, joined, and its denoiser are those of the pipeline."""
    checkpoint, folder = exported_xl(tmp_path_factory)
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    check_gates(manifest)
    unet = manifest.components["unet"]
    assert unet.input_from(JOINED) is not None
    assert unet.inputs[2].made_by == (("text_encoder", "hidden_states"), ("text_encoder_2", "hidden_states"))
    time = unet.parts["time_embedding"]
    assert [spec.name for spec in time.inputs] == ["timestep", "text_embeds", "time_ids"]
    assert [spec.name for spec in unet.parts["cross_attention_kv"].inputs] == ["encoder_hidden_states"]
    assert {"timestep", "text_embeds", "time_ids"}.isdisjoint(spec.name for spec in unet.parts["body"].inputs)
    assert [manifest.tokenizers[name].pad for name in ("text_encoder", "text_encoder_2")] == [559, 0]

    pipeline = StableDiffusionXLPipeline.from_pretrained(checkpoint)
    prompt = "a large red circle"
    with torch.inference_mode():
        text, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        states, encoded = [], {}
        for name in ("text_encoder", "text_encoder_2"):
            ids = open_tokenizer(bundle, name).chunks(prompt)
            encoded = run(open_session(bundle, name), input_ids=ids, clip_skip=np.zeros(len(ids), np.int64))
            states.append(encoded["hidden_states"])
        joined = np.concatenate(states, axis=-1)
        assert joined.shape == (1, 77, TEXT_WIDTH + TEXT_WIDTH_2)
        # float32 on either side
        np.testing.assert_allclose(joined, text.numpy(), atol=1e-5 * np.abs(joined).max())
        assert encoded["pooled"].shape == (1, POOLED_WIDTH)
        np.testing.assert_allclose(encoded["pooled"], pooled.numpy(), atol=1e-5 * float(pooled.abs().max()))
        feeds = {
            "sample": np.random.default_rng(0).standard_normal((1, 4, 11, 8)).astype(np.float32),
            "timestep": np.array([700], np.float32),
            "encoder_hidden_states": joined,
            "text_embeds": encoded["pooled"],
            "time_ids": np.array([[88, 64, 3, 0, 1024, 960]], np.float32),
        }
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        added = {name: tensors.pop(name) for name in ("text_embeds", "time_ids")}
        expected = pipeline.unet(**tensors, added_cond_kwargs=added, return_dict=False)[0].numpy()
    found = run(open_session(bundle, "unet"), **feeds)["noise_pred"]
    # The gate's bound of a float32 graph.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("refiner", {"precision": "float16", "deep_cache": 0, "token_merging": 0.5}, True),
        ("distilled", {"precision": "float16", "deep_cache": 7}, True),
        ("inpainting", {"parts": False}, False),
        ("edit", {"token_merging": 0.3}, True),
        ("base", {"precision": "int8", "deep_cache": 1}, True),
    ],
)
def test_a_kind_from_end_to_end(tmp_path: Path, traces: Path, kind: Kind, options: dict[str, Any], parts: bool) -> None:
    checkpoint = make_xl_checkpoint(tmp_path / "checkpoint", kind, statistics=kind == "distilled")
    progress = Silent()
    with exporting_in_process(), tracing_once(traces):
        export_checkpoint(checkpoint, tmp_path / "bundle", progress=progress, **options)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    check_gates(manifest)
    (warning,) = progress.warnings
    assert "Stable Diffusion XL" in warning
    assert "--safety-checker" in warning
    unet = manifest.components["unet"]
    precision = options.get("precision", "float32")
    assert precision in unet.graphs
    expected = {"time_embedding", "cross_attention_kv", "body"} if parts else set()
    assert {*unet.parts} == expected | ({"shallow_body"} if "deep_cache" in options else set())
    assert (unet.token_merging is not None) == ("token_merging" in options)
    if precision == "int8":
        record = unet.graphs["int8"].quantization
        assert record is not None
        # The layers that depend on the pooled text and the sizes were evaluated by calibration too.
        assert {"add_embedding.linear_1", "add_embedding.linear_2"} <= {*record.layers}


@pytest.mark.slow
def test_the_latents_of_a_bundle_with_statistics_decode_to_the_image(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint, folder = exported_xl(tmp_path_factory, "turbo", statistics=True, parts=False)
    bundle = Bundle.open(folder)
    space = bundle.manifest.latent_spaces["unet"]
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    encoded = np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)
    latents = space.normalize(encoded)
    found = run(open_session(bundle, "vae_decoder"), latents=latents)["pixels"]
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(encoded), return_dict=False)[0]
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(np.float32) - expected).max() <= 1
