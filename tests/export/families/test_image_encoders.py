"""The plans of checkpoints with an image encoder: image variation and stable unCLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import CLIPVisionConfig

from latentrt.errors import CheckpointError
from latentrt_export.families import plan_export
from latentrt_export.families.plan import ExportPlan
from tests.export.skeleton import change_json, open_skeleton, write_json, write_skeleton, write_weights
from tests.tiny import NOISING_SCHEDULER, PREPROCESSOR

VARIATION, UNCLIP = "StableDiffusionImageVariationPipeline", "StableUnCLIPImg2ImgPipeline"
UNET: dict[str, dict[str, Any]] = {
    VARIATION: {"cross_attention_dim": 48},
    UNCLIP: {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 96},
}


def plan(
    folder: Path,
    pipeline: str,
    *,
    unet: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    normalizer: dict[str, Any] | None = None,
    noising: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
) -> ExportPlan:
    """Plan the export of a skeleton whose configurations have these keys."""
    write_skeleton(folder)
    classes = {"safety_checker": [None, None], "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    change_json(folder / "model_index.json", _class_name=pipeline, **classes)
    if pipeline == VARIATION:
        shutil.rmtree(folder / "text_encoder")
    config = folder / "unet" / "config.json"
    write_json(config, {**json.loads(config.read_text()), **UNET[pipeline], **(unet or {})})
    write_json(folder / "image_encoder" / "config.json", {"projection_dim": 48})
    change_json(folder / "image_encoder" / "config.json", **(encoder or {}))
    write_weights(folder / "image_encoder" / "model.safetensors")
    write_json(folder / "feature_extractor" / "preprocessor_config.json", {**PREPROCESSOR, **(preprocessor or {})})
    if pipeline == UNCLIP:
        write_json(folder / "image_normalizer" / "config.json", {"embedding_dim": 48, **(normalizer or {})})
        write_weights(folder / "image_normalizer" / "diffusion_pytorch_model.safetensors")
        write_json(
            folder / "image_noising_scheduler" / "scheduler_config.json", {**NOISING_SCHEDULER, **(noising or {})}
        )
    return plan_export(open_skeleton(folder))


def test_image_variation_has_no_text_encoder(tmp_path: Path) -> None:
    found = plan(tmp_path, VARIATION)
    assert (found.family, found.tasks, found.tokenizers) == ("stable-diffusion-1", ("image-variation",), {})
    assert (found.limits.max_clip_skip, found.limits.max_noise_level) == (0, 0)
    components = {each.name: each for each in found.components}
    assert [*components] == ["image_encoder", "vae_encoder", "unet", "vae_decoder"]
    assert components["image_encoder"].sources == {"pixels": "image"}
    assert components["unet"].sources["encoder_hidden_states"] == "image_encoder.image_embeds"


def test_its_version_follows_from_the_denoiser(tmp_path: Path) -> None:
    assert plan(tmp_path, VARIATION, unet={"use_linear_projection": True}).family == "stable-diffusion-2"


def test_unclip_has_both_encoders(tmp_path: Path) -> None:
    found = plan(tmp_path, UNCLIP, noising={"num_train_timesteps": 500})
    assert (found.tasks, [*found.tokenizers]) == (("unclip",), ["text_encoder"])
    assert found.limits.max_noise_level == 499
    components = {each.name: each for each in found.components}
    assert [*components] == ["image_encoder", "text_encoder", "vae_encoder", "unet", "vae_decoder"]
    assert components["image_encoder"].sources == {"pixels": "image", "noise_level": "noise-level"}
    assert components["unet"].sources["class_labels"] == "image_encoder.class_labels"


@pytest.mark.parametrize(
    ("pipeline", "unet"),
    [(VARIATION, {"cross_attention_dim": 512}), (UNCLIP, {"projection_class_embeddings_input_dim": 1024})],
)
def test_an_encoders_width_is_that_of_transformers_by_default(
    tmp_path: Path, pipeline: str, unet: dict[str, Any]
) -> None:
    assert CLIPVisionConfig().projection_dim == 512
    configs = {"encoder": {"projection_dim": ...}, "unet": unet, "normalizer": {"embedding_dim": 512}}
    assert plan(tmp_path / "default", pipeline, **configs).components
    with pytest.raises(CheckpointError, match="image_encoder has projection_dim 512 and unet has"):
        plan(tmp_path / "another", pipeline, encoder={"projection_dim": ...})


@pytest.mark.parametrize(
    ("pipeline", "configs", "fragment"),
    [
        (
            VARIATION,
            {"unet": {"cross_attention_dim": 64}},
            "image_encoder has projection_dim 48 and unet has cross_attention_dim 64, expected 48",
        ),
        (VARIATION, {"encoder": {"image_size": 336}}, r"crops to \(224, 224\), expected \(336, 336\)"),
        (VARIATION, {"preprocessor": {"resample": 2}}, "resample 2"),
        (VARIATION, {"unet": {"in_channels": 8}}, "in_channels 8, expected 4"),
        (UNCLIP, {"unet": {"class_embed_type": "timestep"}}, "class_embed_type 'timestep', expected 'projection'"),
        (
            UNCLIP,
            {"normalizer": {"embedding_dim": 64}},
            "image_encoder has projection_dim 48 and image_normalizer has embedding_dim 64, expected 48",
        ),
        (UNCLIP, {"normalizer": {"embedding_dim": "48"}}, "image_normalizer: its configuration has embedding_dim '48'"),
        (UNCLIP, {"encoder": {"projection_dim": 64}}, "projection_class_embeddings_input_dim 96, expected 128"),
        *(
            (pipeline, {"encoder": {"projection_dim": value}}, "image_encoder: its configuration has projection_dim")
            for pipeline in (VARIATION, UNCLIP)
            for value in (None, 0, -48, 48.0, True, [48], "48", 2**70)
        ),
        (VARIATION, {"encoder": {"image_size": "224"}}, "image_encoder: its configuration has image_size '224'"),
        (UNCLIP, {"encoder": {"image_size": None}}, "image_encoder: its configuration has image_size None"),
        (VARIATION, {"preprocessor": {"feature_extractor_type": "ViTFeatureExtractor"}}, "image processor 'ViTFeature"),
        (UNCLIP, {"noising": {"beta_schedule": "unknown"}}, "image_noising_scheduler"),
    ],
)
def test_configurations_that_contradict_one_another(
    tmp_path: Path, pipeline: str, configs: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        plan(tmp_path, pipeline, **configs)


def test_a_normalizers_width_is_that_of_diffusers_by_default(tmp_path: Path) -> None:
    width = StableUnCLIPImageNormalizer().config["embedding_dim"]
    configs = {
        "encoder": {"projection_dim": width},
        "unet": {"projection_class_embeddings_input_dim": 2 * width},
    }
    folder = tmp_path / "default"
    assert plan(folder, UNCLIP, **configs, normalizer={"embedding_dim": width}).components
    write_json(folder / "image_normalizer" / "config.json", {})
    assert plan_export(open_skeleton(folder)).components


def test_an_encoder_in_the_configuration_of_a_whole_clip(tmp_path: Path) -> None:
    plan(tmp_path, VARIATION)
    path = tmp_path / "image_encoder" / "config.json"
    write_json(path, {"model_type": "clip", "vision_config": {"projection_dim": 48}})
    assert plan_export(open_skeleton(tmp_path)).components
    change_json(path, quantization_config={"load_in_8bit": True})
    with pytest.raises(CheckpointError, match="image_encoder: its configuration has quantization_config"):
        plan_export(open_skeleton(tmp_path))
