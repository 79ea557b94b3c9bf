"""The changes that diffusers' pipelines make to a checkpoint's configurations, beside diffusers' own constructors."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.configuration_utils import FrozenDict

from latentrt.bundle.manifest import ConfigChange, SchedulerRecord
from latentrt.errors import CheckpointError
from latentrt.sampling import samplers
from latentrt_export.checkpoints.checkpoint import open_checkpoint
from latentrt_export.families import PIPELINES, REFUSALS, plan_export
from latentrt_export.families.plan import ExportPlan
from tests.export.skeleton import change_json, write_json, write_skeleton
from tests.tiny import SCHEDULERS

PIPELINE_OF = {
    "text-to-image": "StableDiffusionPipeline",
    "image-to-image": "StableDiffusionImg2ImgPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
}
OF_CONSISTENCY = {
    "text-to-image": "LatentConsistencyModelPipeline",
    "image-to-image": "LatentConsistencyModelImg2ImgPipeline",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_skeleton(tmp_path / "model", safety=False)


def plan(folder: Path) -> ExportPlan:
    return plan_export(open_checkpoint(folder, pipelines=PIPELINES, refusals=REFUSALS))


def set_scheduler(folder: Path, name: str, config: dict[str, Any]) -> None:
    write_json(folder / "scheduler" / "scheduler_config.json", {**config, "_class_name": name})
    change_json(folder / "model_index.json", scheduler=["diffusers", name])


def make_pipeline(name: str, *, scheduler: Any = None, unet: Any = None) -> Any:
    """Construct a diffusers pipeline of one part."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it changes
        return getattr(diffusers, name)(**parts, scheduler=scheduler, unet=unet, requires_safety_checker=False)


def record_of(folder: Path) -> SchedulerRecord:
    """Return the record of the checkpoint's scheduler in a bundle."""
    checkpoint = open_checkpoint(folder, pipelines=PIPELINES)
    made = plan_export(checkpoint)
    return SchedulerRecord.of(checkpoint.scheduler_class, made.scheduler_config, made.scheduler_changes)


def read_by_us(record: SchedulerRecord, task: str, class_name: str) -> dict[str, Any]:
    """Return the configuration that a sampler of the bundle reads, with its defaults."""
    sampler = samplers.find(class_name).read(record.config_for(task, class_name))
    return {each.name: getattr(sampler, each.name) for each in fields(sampler)}


PLAIN = {key: value for key, value in SCHEDULERS["sd1"].items() if not key.startswith("_")}
OWN = ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
OWN += ["DPMSolverMultistepScheduler", "LCMScheduler"]
# `...`: the key is missing.
SETTINGS: list[dict[str, Any]] = [
    {"clip_sample": True, "steps_offset": 0},
    {"clip_sample": ..., "steps_offset": ...},
    {"clip_sample": False, "steps_offset": 1, "skip_prk_steps": ...},
    {"clip_sample": True, "steps_offset": 2, "skip_prk_steps": False},
    {"clip_sample": True, "steps_offset": 0, "_use_default_values": ["clip_sample", "steps_offset"]},
]


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_sampler_reads_what_diffusers_pipeline_passes_on(
    folder: Path, own: str, settings: dict[str, Any]
) -> None:
    config = {key: value for key, value in {**PLAIN, **settings}.items() if value is not ...}
    set_scheduler(folder, own, config)
    record = record_of(folder)
    for task, pipeline in PIPELINE_OF.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = make_pipeline(pipeline, scheduler=getattr(diffusers, own).from_config(config)).scheduler
            # As documented: `pipeline.scheduler = Other.from_config(pipeline.scheduler.config)`.
            others = [getattr(diffusers, name).from_config(theirs.config) for name in OWN[:2] if name != own]
        for scheduler in (theirs, *others):
            ours = read_by_us(record, task, type(scheduler).__name__)
            expected = {key: scheduler.config[key] for key in ours}
            assert ours == {
                key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()
            }, (task, type(scheduler).__name__)


def test_changes_are_recorded_by_task(folder: Path) -> None:
    set_scheduler(folder, "PNDMScheduler", {**PLAIN, "clip_sample": True, "skip_prk_steps": False, "steps_offset": 0})
    with_clipping = ("text-to-image", "image-to-image")
    assert plan(folder).scheduler_changes == (
        ConfigChange(key="steps_offset", found=0, used=1, tasks=(*with_clipping, "inpainting")),
        ConfigChange(key="clip_sample", found=True, used=False, tasks=with_clipping),
        ConfigChange(key="skip_prk_steps", found=False, used=True, tasks=("inpainting",)),
    )


def test_other_pipelines_change_nothing(folder: Path) -> None:
    set_scheduler(folder, "DDIMScheduler", {**PLAIN, "clip_sample": True, "steps_offset": 0})
    change_json(folder / "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline")
    change_json(folder / "unet" / "config.json", in_channels=8)
    assert plan(folder).scheduler_changes == ()
    for name in OF_CONSISTENCY.values():
        change_json(folder / "model_index.json", _class_name=name)
        change_json(folder / "unet" / "config.json", in_channels=4, time_cond_proj_dim=256)
        assert plan(folder).scheduler_changes == ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = diffusers.DDIMScheduler.from_config({**PLAIN, "clip_sample": True, "steps_offset": 0})
            theirs = make_pipeline(name, scheduler=scheduler).scheduler.config
        assert (theirs["clip_sample"], theirs["steps_offset"]) == (True, 0)


def test_an_unknown_class_of_scheduler_is_changed_where_its_configuration_says_so(folder: Path) -> None:
    set_scheduler(folder, "DDIMParallelScheduler", {"clip_sample": True})
    assert [change.key for change in plan(folder).scheduler_changes] == ["clip_sample"]


# The size of an old UNet


class Denoiser:
    """A part of a pipeline that has nothing but a configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._internal_dict = FrozenDict(config)

    @property
    def config(self) -> Any:
        return self._internal_dict


@pytest.mark.parametrize(
    ("version", "size"),
    [
        ("0.6.0", 32),
        ("0.8.1", 63),
        ("0.8.1", 64),
        ("0.8.0.dev0", 8),
        ("0.9.0.dev0", 32),
        ("0.10.2", 32),
        ("0.42.1", 32),
        ("1.0", 32),
        (..., 32),
        ("0.6.0", [32, 48]),
    ],
)
def test_the_size_of_an_old_denoiser_is_that_of_diffusers_pipeline(folder: Path, version: Any, size: Any) -> None:
    change_json(folder / "unet" / "config.json", _diffusers_version=version, sample_size=size)
    config = {"sample_size": size} | ({} if version is ... else {"_diffusers_version": version})
    used = make_pipeline("StableDiffusionPipeline", unet=Denoiser(config)).unet.config.sample_size
    height, width = used if isinstance(used, list) else (used, used)
    defaults = plan(folder).defaults
    assert (defaults.height, defaults.width) == (8 * height, 8 * width)
    changes = () if used == size else (ConfigChange(key="sample_size", found=size, used=64, tasks=tuple(PIPELINE_OF)),)
    assert defaults.changes == changes


def test_the_size_of_another_old_denoiser_stays(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", _diffusers_version="0.6.0", sample_size=32, in_channels=8)
    change_json(folder / "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline")
    assert plan(folder).defaults.height == 256


@pytest.mark.parametrize("name", ["StableDiffusionDepth2ImgPipeline", "StableDiffusionImageVariationPipeline"])
def test_two_pipelines_change_the_size_alone(name: str) -> None:
    """The constructors of these pipelines change the sample size and nothing else."""
    module = importlib.import_module(getattr(diffusers, name).__module__)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert "unet.config.sample_size < 64" in source
    assert "scheduler._internal_dict" not in source


def test_a_version_that_is_none(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", _diffusers_version="old", sample_size=32)
    with pytest.raises(CheckpointError, match="_diffusers_version 'old'"):
        plan(folder)


# Classes


def test_the_class_of_the_index_wins(folder: Path) -> None:
    change_json(folder / "model_index.json", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    checkpoint = open_checkpoint(folder, pipelines=PIPELINES)
    assert checkpoint.scheduler_class == "EulerAncestralDiscreteScheduler"
    assert "_class_name" not in checkpoint.scheduler_config


def test_a_scheduler_that_no_file_names(folder: Path) -> None:
    change_json(folder / "model_index.json", scheduler=[None, None])
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name=...)
    with pytest.raises(CheckpointError, match="no scheduler"):
        open_checkpoint(folder, pipelines=PIPELINES)


@pytest.mark.parametrize(
    ("component", "entry", "named"),
    [
        ("text_encoder", ["transformers", "BertModel"], "BertModel"),
        ("text_encoder", ["latent_diffusion", "LDMBertModel"], "LDMBertModel"),
        ("text_encoder", ["my_encoder", "CLIPTextModel"], "'my_encoder'"),
        ("unet", ["diffusers", "UNet3DConditionModel"], "UNet3DConditionModel"),
        ("scheduler", ["my_scheduler", "DDIMScheduler"], "'my_scheduler'"),
    ],
)
def test_a_component_of_another_class_is_refused_by_it(
    folder: Path, component: str, entry: list[str], named: str
) -> None:
    change_json(folder / "model_index.json", **{component: entry})
    with pytest.raises(CheckpointError, match=f"has the {component} class .*{named}"):
        open_checkpoint(folder, pipelines=PIPELINES)


def test_a_text_encoder_of_another_type_is_refused_by_it(folder: Path) -> None:
    change_json(folder / "text_encoder" / "config.json", model_type="ldmbert")
    with pytest.raises(CheckpointError, match="model_type 'ldmbert', expected clip or clip_text_model"):
        open_checkpoint(folder, pipelines=PIPELINES)


def test_a_text_encoder_in_the_configuration_of_a_whole_clip(folder: Path) -> None:
    inner = {"num_hidden_layers": 5, "hidden_act": "gelu"}
    write_json(folder / "text_encoder" / "config.json", {"model_type": "clip", "text_config": inner})
    made = plan(folder)
    assert (made.family, made.limits.max_clip_skip) == ("stable-diffusion-2", 5)


def test_a_processor_of_another_class_is_refused_by_it(tmp_path: Path) -> None:
    folder = write_skeleton(tmp_path / "model")
    change_json(folder / "model_index.json", feature_extractor=["transformers", "ViTImageProcessor"])
    with pytest.raises(CheckpointError, match="feature_extractor class 'ViTImageProcessor'"):
        open_checkpoint(folder, pipelines=PIPELINES)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_pipeline_near_a_supported_one_is_refused_with_a_reason(folder: Path, name: str) -> None:
    change_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(CheckpointError) as refusal:
        plan(folder)
    assert f"{name!r}, {REFUSALS[name]}; expected one of" in str(refusal.value)


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipelineLegacy", *OF_CONSISTENCY.values()])
def test_folders_saved_from_other_pipelines_of_the_same_parts(folder: Path, name: str) -> None:
    legacy = name.endswith("Legacy")
    change_json(folder / "model_index.json", _class_name=name)
    change_json(folder / "unet" / "config.json", time_cond_proj_dim=None if legacy else 256)
    made = plan(folder)
    assert made.tasks == (tuple(PIPELINE_OF) if legacy else ("text-to-image",))
    assert (made.defaults.num_inference_steps, made.defaults.guidance_scale) == ((50, 7.5) if legacy else (4, 8.5))
    assert [name in warning for warning in made.warnings] == [True] * legacy


def test_a_latent_consistency_model_without_its_embedding(folder: Path) -> None:
    change_json(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    with pytest.raises(CheckpointError, match="no time_cond_proj_dim"):
        plan(folder)
