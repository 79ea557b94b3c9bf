"""The plan of a Stable Diffusion export, and exports of its tasks from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, UNet2DConditionModel

from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import run
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import LatentSpace
from latentrt.bundle.tensors import sized
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.export import export_checkpoint
from latentrt_export.families import PIPELINES, plan_export
from latentrt_export.families.plan import ExportPlan
from latentrt_export.modules.unet import UNet
from tests.export.skeleton import write_json, write_skeleton
from tests.exported import Silent
from tests.tiny import Task, make_checkpoint, unet

TEXT_TO_IMAGE = ("text-to-image", "image-to-image", "inpainting")


def plan(folder: Path, pipeline: str = "StableDiffusionPipeline", **configs: dict[str, Any]) -> ExportPlan:
    """Plan the export of a skeleton whose configurations have these keys."""
    write_skeleton(folder)
    index = folder / "model_index.json"
    write_json(index, {**json.loads(index.read_text()), "_class_name": pipeline})
    for name, changes in configs.items():
        config = folder / name / "config.json"
        write_json(config, {**json.loads(config.read_text()), **changes})
    return plan_export(open_checkpoint(folder, pipelines=PIPELINES))


def test_everything_follows_from_the_configurations(tmp_path: Path) -> None:
    found = plan(tmp_path, unet={"sample_size": [48, 64]}, vae={"scaling_factor": 0.2})
    assert found.latent_spaces == {"unet": LatentSpace(channels=4, downscale=8, scale=0.2)}
    assert (found.defaults.height, found.defaults.width) == (384, 512)
    assert (found.limits.min_side, found.limits.max_side, found.limits.max_clip_skip) == (64, 2048, 3)
    assert found.deep_cache_branches == 12
    assert [each.name for each in found.components] == [
        "text_encoder",
        "vae_encoder",
        "unet",
        "vae_decoder",
        "safety_checker",
    ]


@pytest.mark.parametrize(
    ("activation", "family"), [("quick_gelu", "stable-diffusion-1"), ("gelu", "stable-diffusion-2")]
)
def test_the_family_follows_from_the_text_encoder(tmp_path: Path, activation: str, family: str) -> None:
    assert plan(tmp_path, text_encoder={"hidden_act": activation}).family == family


@pytest.mark.parametrize(
    ("pipeline", "channels", "tasks"),
    [
        ("StableDiffusionPipeline", 4, TEXT_TO_IMAGE),
        ("StableDiffusionPipeline", 9, ("inpainting",)),
        ("StableDiffusionImg2ImgPipeline", 4, TEXT_TO_IMAGE),
        ("StableDiffusionInpaintPipeline", 4, TEXT_TO_IMAGE),
        ("StableDiffusionInpaintPipeline", 9, ("inpainting",)),
        ("StableDiffusionInstructPix2PixPipeline", 8, ("edit",)),
    ],
)
def test_the_tasks_follow_from_the_channels(
    tmp_path: Path, pipeline: str, channels: int, tasks: tuple[str, ...]
) -> None:
    assert plan(tmp_path, pipeline, unet={"in_channels": channels}).tasks == tasks


@pytest.mark.parametrize(
    ("pipeline", "config", "fragment"),
    [
        ("StableDiffusionPipeline", {"in_channels": 8}, "in_channels 8, expected 4 or 9"),
        ("StableDiffusionInstructPix2PixPipeline", {"in_channels": 4}, "in_channels 4, expected 8"),
        ("StableDiffusionPipeline", {"num_class_embeds": 8}, "num_class_embeds 8, expected none"),
        ("StableDiffusionPipeline", {"class_embed_type": "timestep"}, "class_embed_type 'timestep', expected none"),
        ("StableDiffusionPipeline", {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time', expected"),
        ("StableDiffusionInstructPix2PixPipeline", {"in_channels": 8, "time_cond_proj_dim": 32}, "time_cond_proj_dim"),
        ("LatentConsistencyModelPipeline", {}, "no time_cond_proj_dim"),
        ("StableDiffusionPipeline", {"sample_size": None}, "sample_size None"),
        ("StableDiffusionPipeline", {"sample_size": [8]}, r"sample_size \[8\]"),
        ("StableDiffusionPipeline", {"sample_size": 0}, "sample_size 0"),
    ],
)
def test_configurations_that_contradict_the_pipeline(
    tmp_path: Path, pipeline: str, config: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        plan(tmp_path, pipeline, unet=config)


@pytest.mark.slow  # two exports; tests/parity exports the same tasks without parts
@pytest.mark.parametrize(("task", "channels"), [("inpainting", 9), ("edit", 8)])
def test_a_task_from_end_to_end(tmp_path: Path, task: Task, channels: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", task=task, safety="none")
    export_checkpoint(checkpoint, tmp_path / "bundle", deep_cache=0, progress=Silent())
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.tasks == (task,)
    component = bundle.manifest.components["unet"]
    assert [spec.shape[1:2] for spec in component.inputs[:1]] == [(channels,)]
    assert set(component.parts) == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, channels, 11, 8)).astype(np.float32),
        "timestep": np.array([900, 20], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32)).astype(np.float32),
    }
    model = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    with torch.inference_mode():
        expected = model(*map(torch.from_numpy, feeds.values()), return_dict=False)[0].numpy()
    found = run(open_session(bundle, "unet"), **feeds)["noise_pred"]
    assert found.shape == (2, 4, 11, 8)
    # The gate's bound of a float32 graph.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("settings", "dtype", "shape"),
    [
        ({"num_class_embeds": 10}, "int64", ("evaluations",)),
        ({"class_embed_type": "timestep"}, "int64", ("evaluations",)),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
            "float32",
            ("evaluations", 6),
        ),
    ],
)
def test_class_labels_are_an_input_where_the_model_takes_them(
    settings: dict[str, Any], dtype: str, shape: tuple[int | str, ...]
) -> None:
    config = {key: value for key, value in unet("sd1").config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    module = UNet(UNet2DConditionModel(**{**config, **settings}).eval())
    labels = module.inputs[3]
    assert (labels.name, labels.dtype, labels.shape) == ("class_labels", dtype, shape)
    row = sized(labels, {"evaluations": 1})[1:]
    feeds = {
        "sample": np.ones((2, 4, 8, 8), np.float32),
        "timestep": np.array([500, 500], np.float32),
        "encoder_hidden_states": np.ones((2, 77, 32), np.float32),
        "class_labels": np.stack([np.full(row, number) for number in (1, 7)]).astype(dtype),
    }
    first, second = module.torch_outputs(feeds)["noise_pred"]
    assert not np.allclose(first, second), "the rows differ in their labels alone"


@pytest.mark.parametrize(
    ("pipeline", "tasks", "defaults"),
    [
        ("StableDiffusionPipeline", TEXT_TO_IMAGE, (50, 7.5)),
        ("LatentConsistencyModelPipeline", ("text-to-image",), (4, 8.5)),
    ],
)
def test_distilled_guidance_is_an_input_of_the_denoiser(
    tmp_path: Path, pipeline: str, tasks: tuple[str, ...], defaults: tuple[int, float]
) -> None:
    found = plan(tmp_path, pipeline, unet={"time_cond_proj_dim": 32})
    assert (found.tasks, (found.defaults.num_inference_steps, found.defaults.guidance_scale)) == (tasks, defaults)
    denoiser = next(each for each in found.components if each.name == "unet")
    assert denoiser.module == "unet:GuidanceDistilledUNet"
    assert denoiser.sources["guidance_weight"] == "guidance-weight"


def change_vae(folder: Path, class_name: str, **config: Any) -> ExportPlan:
    """Plan the export of a skeleton whose autoencoder has another class."""
    write_skeleton(folder)
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "vae": ["diffusers", class_name]})
    write_json(folder / "vae" / "config.json", config)
    return plan_export(open_checkpoint(folder, pipelines=PIPELINES))


@pytest.mark.parametrize(
    ("class_name", "config", "space", "modules"),
    [
        ("AutoencoderTiny", {}, (4, 8, 1.0), ["TinyEncoder", "TinyDecoder"]),
        (
            "AutoencoderTiny",
            {
                "encoder_block_out_channels": [8] * 3,
                "decoder_block_out_channels": [8] * 3,
                "block_out_channels": [8] * 6,  # diffusers ignores it
                "scaling_factor": 0.5,
            },
            (4, 4, 0.5),
            ["TinyEncoder", "TinyDecoder"],
        ),
        (
            "AsymmetricAutoencoderKL",
            {"down_block_out_channels": [8] * 4, "up_block_out_channels": [16] * 4},
            (4, 8, 0.18215),
            ["AsymmetricVaeEncoder", "InpaintingVaeDecoder"],
        ),
    ],
)
def test_the_latents_follow_from_the_autoencoders_class(
    tmp_path: Path, class_name: str, config: dict[str, Any], space: tuple[int, int, float], modules: list[str]
) -> None:
    found = change_vae(tmp_path, class_name, **config)
    latents = found.latent_spaces["unet"]
    assert (latents.channels, latents.downscale, latents.scale) == space
    assert found.defaults.height == 8 * space[1]
    assert [each.module.removeprefix("vae:") for each in found.components if each.weights == "vae"] == modules


@pytest.mark.parametrize(
    ("class_name", "config", "fragment"),
    [
        ("ConsistencyDecoderVAE", {}, "class 'ConsistencyDecoderVAE', expected one of AutoencoderKL, .*`vae`"),
        ("AutoencoderTiny", {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor 4, expected 2"),
        ("AutoencoderTiny", {"decoder_block_out_channels": [8]}, "4 encoder_block_out_channels and 1 decoder_block"),
        ("AsymmetricAutoencoderKL", {"up_block_out_channels": [8, 8]}, "1 down_block_out_channels and 2 up_block"),
        ("AutoencoderTiny", {"latent_channels": 16}, "vae has latent_channels 16 and unet has out_channels 4"),
    ],
)
def test_an_autoencoder_that_is_refused(tmp_path: Path, class_name: str, config: dict[str, Any], fragment: str) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        change_vae(tmp_path, class_name, **config)


def asymmetric(*widths: int) -> dict[str, Any]:
    return {"down_block_out_channels": [8] * len(widths), "up_block_out_channels": list(widths)}


@pytest.mark.parametrize("widths", [(64,), (4, 8), (8, 8), (4, 16), (8, 4), (4, 8, 16), (4, 8, 8), (4, 4, 16, 16)])
def test_an_asymmetric_decoder_inpaints_where_diffusers_does(tmp_path: Path, widths: tuple[int, ...]) -> None:
    found = change_vae(tmp_path, "AsymmetricAutoencoderKL", **asymmetric(*widths))
    count = len(widths)
    model = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        norm_num_groups=4,
        **asymmetric(*widths),
    )
    latents, image = torch.ones(1, 4, 16 // 2 ** (count - 1), 16 // 2 ** (count - 1)), torch.ones(1, 3, 16, 16)
    try:
        with torch.inference_mode():
            model.decode(latents, image=image, mask=image[:, :1])
        able = True
    except KeyError:
        able = False
    assert ("inpainting" in found.tasks) == able
    decoder = next(each for each in found.components if each.role == "decoder")
    assert decoder.module == ("vae:InpaintingVaeDecoder" if able else "vae:AsymmetricVaeDecoder")
    assert ["--vae" in text for text in found.warnings] == ([] if able else [True])


def test_an_asymmetric_decoder_that_cannot_inpaint_is_refused_where_nothing_else_is_left(tmp_path: Path) -> None:
    write_skeleton(tmp_path)
    write_json(tmp_path / "unet" / "config.json", {"in_channels": 9, "sample_size": 8})
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AsymmetricAutoencoderKL"]
    write_json(tmp_path / "model_index.json", index)
    write_json(tmp_path / "vae" / "config.json", asymmetric(4, 16))
    with pytest.raises(CheckpointError, match="`vae`"):
        plan_export(open_checkpoint(tmp_path, pipelines=PIPELINES))
