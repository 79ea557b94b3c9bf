"""Opening a checkpoint: its description, its documents, and every way in which it cannot be exported."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from latentrt.bundle.sample import bundle_path
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import (
    GivenComponents,
    PipelineClass,
    find_documents,
    find_licence,
    open_checkpoint,
)
from latentrt_export.families import PIPELINES
from tests.export.skeleton import open_skeleton, write_json, write_skeleton, write_weights
from tests.tiny import PREPROCESSOR, SCHEDULERS, model_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_skeleton(tmp_path / "model")


def test_configurations_are_read(folder: Path) -> None:
    checkpoint = open_skeleton(folder)
    assert checkpoint.name == "model"
    assert checkpoint.layout == "diffusers"
    assert checkpoint.pipeline_class == "StableDiffusionPipeline"
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae", "safety_checker"}
    assert checkpoint.scheduler_class == "PNDMScheduler"
    assert checkpoint.scheduler_config["beta_end"] == SCHEDULERS["sd1"]["beta_end"]
    assert not any(key.startswith("_") for key in checkpoint.scheduler_config)
    assert checkpoint.sources["unet/diffusion_pytorch_model.safetensors"].path.is_file()
    assert len(checkpoint.sources) == 4
    assert not checkpoint.other_schedulers


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; expected .*a .safetensors file, or .*OWNER/NAME"):
        open_skeleton(tmp_path / "missing")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_skeleton(tmp_path / "file")


def test_a_bundle_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="is a bundle already; run it: latentrt run "):
        open_skeleton(bundle_path())


def test_no_model_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model_index\.json.*single-file"):
        open_skeleton(folder)


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Pipeline", "StableDiffusionPipelin", None, 7, ["a"]])
def test_an_unsupported_pipeline_class(folder: Path, pipeline: object) -> None:
    write_json(folder / "model_index.json", {**model_index("sd1", with_safety=True), "_class_name": pipeline})
    with pytest.raises(CheckpointError) as refusal:
        open_skeleton(folder)
    assert f"{pipeline!r}, expected one of StableDiffusionPipeline" in str(refusal.value)


# A class whose folders differ, as a family would declare it.
VARIATIONS = {
    **PIPELINES,
    "StableDiffusionImageVariationPipeline": PipelineClass(
        components={"image_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    ),
}


def as_class(folder: Path, pipeline: str, **entries: list[str]) -> None:
    """Give a checkpoint another pipeline class."""
    index = model_index("sd1", with_safety=False)
    write_json(folder / "model_index.json", {**index, "_class_name": pipeline, **entries})


def test_the_class_decides_which_components_are_read(folder: Path) -> None:
    encoder = ["transformers", "CLIPVisionModelWithProjection"]
    as_class(folder, "StableDiffusionImageVariationPipeline", image_encoder=encoder)
    with pytest.raises(CheckpointError, match="image_encoder is missing"):
        open_checkpoint(folder, pipelines=VARIATIONS)
    write_json(folder / "image_encoder" / "config.json", {})
    write_weights(folder / "image_encoder" / "model.safetensors")
    shutil.rmtree(folder / "text_encoder")
    checkpoint = open_checkpoint(folder, pipelines=VARIATIONS)
    assert checkpoint.pipeline_class == "StableDiffusionImageVariationPipeline"
    assert set(checkpoint.weights) == {"image_encoder", "unet", "vae"}


def test_the_class_decides_which_schedulers_are_read(folder: Path) -> None:
    as_class(folder, "StableDiffusionUpscalePipeline", low_res_scheduler=["diffusers", "DDPMScheduler"])
    with pytest.raises(CheckpointError, match=r"low_res_scheduler.*scheduler_config\.json cannot be read"):
        open_skeleton(folder)
    config = {"_diffusers_version": "0.8.0", "beta_schedule": "scaled_linear"}
    write_json(folder / "low_res_scheduler" / "scheduler_config.json", config)
    checkpoint = open_skeleton(folder)
    assert checkpoint.scheduler_class == "PNDMScheduler"
    (name, found), *others = checkpoint.other_schedulers.items()
    assert (name, found.class_name) == ("low_res_scheduler", "DDPMScheduler")
    assert found.config == {"beta_schedule": "scaled_linear"}
    assert not others


JSON_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": ', "is not JSON"),
        (b"", "is not JSON"),
        (b'{"a": "\xff\xfe"}', "is not JSON"),
        (b"[" * 100_000, "is nested deeper than 32 levels"),
        (b"[1, 2]", "holds a list, expected an object"),
        (b'{"a": {"b": [1, NaN]}}', r"has a\.b\[1\]: NaN"),
    ],
    ids=["cut", "empty", "not-text", "deep", "list", "nan"],
)
def test_damaged_json(folder: Path, name: str, content: bytes, expected: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{Path(name).name} {expected}"):
        open_skeleton(folder)


@pytest.mark.parametrize("name", [name for name in JSON_FILES[1:] if not name.startswith("safety")])
def test_missing_json(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(name).name} cannot be read.*incomplete"):
        open_skeleton(folder)


def test_a_missing_component(folder: Path) -> None:
    for file in (folder / "vae").iterdir():
        file.unlink()
    (folder / "vae").rmdir()
    with pytest.raises(CheckpointError, match="vae is missing"):
        open_skeleton(folder)


def test_an_index_that_names_no_class(folder: Path) -> None:
    index = {**model_index("sd1", with_safety=True), "safety_checker": {"library": "diffusers"}}
    write_json(folder / "model_index.json", index)
    with pytest.raises(CheckpointError, match=r"safety_checker: .*expected a library and a class"):
        open_skeleton(folder)


def test_a_scheduler_without_a_class_has_that_of_the_index(folder: Path) -> None:
    config = {key: value for key, value in SCHEDULERS["sd1"].items() if key != "_class_name"}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    assert open_skeleton(folder).scheduler_class == "PNDMScheduler"


# The safety checker


def test_no_safety_checker(tmp_path: Path) -> None:
    assert "safety_checker" not in open_skeleton(write_skeleton(tmp_path, safety=False)).weights


def test_a_safety_checker_that_the_index_disables(folder: Path) -> None:
    write_json(folder / "model_index.json", model_index("sd1", with_safety=False))
    assert "safety_checker" not in open_skeleton(folder).weights


def test_a_component_that_the_index_names_but_the_folder_lacks(folder: Path, tmp_path: Path) -> None:
    """As in diffusers; the images would not be checked."""
    other = write_skeleton(tmp_path / "other")
    shutil.rmtree(folder / "safety_checker")
    with pytest.raises(CheckpointError, match=r"safety_checker is missing, which model_index.json names; .*null, null"):
        open_skeleton(folder)
    found = open_skeleton(folder, given=GivenComponents(safety_checker=other))
    assert found.weights["safety_checker"].root == other


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_component_that_the_index_disables(folder: Path, part: str) -> None:
    index = model_index("sd1", with_safety=True)
    write_json(folder / "model_index.json", {**index, part: [None, None]})
    with pytest.raises(CheckpointError, match=rf"has {part}: \[null, null\], and a StableDiffusionPipeline cannot do"):
        open_skeleton(folder)


def test_another_checkpoints_safety_checker(folder: Path, tmp_path: Path) -> None:
    other = write_skeleton(tmp_path / "other")
    checkpoint = open_skeleton(folder, given=GivenComponents(safety_checker=other))
    assert checkpoint.weights["safety_checker"].root == other
    assert checkpoint.sources["safety_checker/model.safetensors"].path == other / "safety_checker" / "model.safetensors"
    assert len(checkpoint.sources) == 4, "of the other checkpoint, only the classifier"


def test_a_classifiers_own_folder(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "classifier"
    write_json(alone / "config.json", {})
    write_json(alone / "preprocessor_config.json", PREPROCESSOR)
    write_weights(alone / "model.fp16.safetensors")
    found = open_skeleton(folder, given=GivenComponents(safety_checker=alone)).weights["safety_checker"]
    assert (found.root, found.variant) == (alone, "fp16")


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"resample": 2}, r"preprocessor_config\.json: .*resample 2, expected 3"),
        ({"size": 336, "crop_size": 336}, r"crops to \(336, 336\), expected \(224, 224\)"),
    ],
)
def test_preprocessing_is_checked_before_anything_is_exported(
    folder: Path, tmp_path: Path, preprocessor: dict[str, int], message: str
) -> None:
    place = tmp_path / "classifier"
    write_json(place / "config.json", {"vision_config": {}})
    write_json(place / "preprocessor_config.json", preprocessor)
    write_weights(place / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_skeleton(folder, given=GivenComponents(safety_checker=place))


@pytest.mark.parametrize("kind", ["missing", "empty", "without preprocessor", "pickle"])
def test_an_invalid_safety_checker_is_rejected_before_anything_is_exported(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "classifier"
    if kind != "missing":
        place.mkdir()
    if kind in ("without preprocessor", "pickle"):
        write_json(place / "config.json", {})
    if kind == "pickle":
        write_json(place / "preprocessor_config.json", PREPROCESSOR)
        (place / "pytorch_model.bin").write_bytes(b"")
    expected = {"without preprocessor": "preprocessor_config.json cannot be read", "pickle": "is a pickle"}
    with pytest.raises(CheckpointError, match=expected.get(kind, "is not a safety checker; expected its folder")):
        open_skeleton(folder, given=GivenComponents(safety_checker=place))


# Names


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """Move a folder into the hub's cache layout: links to content-addressed files."""
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob = file.rename(repository / "blobs" / f"{number:040x}")
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (len(link.relative_to(repository).parts) - 1)) / "blobs" / blob.name)
    return snapshot


def test_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_skeleton(in_hub_cache(folder, tmp_path / "hub"))
    assert checkpoint.name == "some/model@0123abc"
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae", "safety_checker"}
    assert checkpoint.licence == "cc0-1.0"


def test_a_hub_cache_whose_download_was_interrupted(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is missing.*link"):
        open_skeleton(snapshot)


# Documents


@pytest.mark.parametrize(
    ("front_matter", "licence"),
    [
        ("license: creativeml-openrail-m", "creativeml-openrail-m"),
        ('license: "openrail++"\ntags: [art]', "openrail++"),
        ("tags:\n- art\nlicense: mit   # as agreed", "mit"),
        ("licence: 'apache-2.0'", "apache-2.0"),
        ("license: other\nlicense_name: our-own-1.0", "our-own-1.0"),
        ("license: other", "other"),
        ("license: mit\r\ntags: x", "mit"),
    ],
)
def test_the_model_card_names_the_licence(tmp_path: Path, front_matter: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(f"---\n{front_matter}\n---\n# A model\nlicense: not this\n".encode())
    (tmp_path / "LICENSE").write_text("Text")
    documents = find_documents(tmp_path)
    assert find_licence(documents) == licence
    assert set(documents) == {"LICENSE", "MODEL_CARD.md"}


@pytest.mark.parametrize(
    "card", [None, "# No front matter\nlicense: mit\n", "---\ntags: [a]\n---\n", "---\nlicense:\n"]
)
@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.md", "license.txt", "LICENCE"])
def test_a_licence_text_without_a_name(tmp_path: Path, card: str | None, name: str) -> None:
    (tmp_path / name).write_text("Text")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    documents = find_documents(tmp_path)
    assert find_licence(documents) == "see LICENSE"
    assert documents["LICENSE"].name == name


def test_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe not even text")
    assert find_licence(find_documents(tmp_path)) == "unknown"


def test_a_folder_is_not_a_document(tmp_path: Path) -> None:
    (tmp_path / "license").mkdir()
    assert find_documents(tmp_path) == {}


def test_another_class_of_safety_checker_is_refused(folder: Path) -> None:
    index = model_index("sd1", with_safety=True)
    write_json(folder / "model_index.json", {**index, "safety_checker": ["deepfloyd_if", "IFSafetyChecker"]})
    with pytest.raises(CheckpointError, match=r"IFSafetyChecker.*--safety-checker"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    "card",
    [
        b"---" + b" " * 100_000 + b"\nlicense: mit\n---\n",
        b"---\nlicense:" + b" " * 100_000 + b"'\n---\n",
        b"---\n" + b"license: mit\n" * 1_000_000,
        b"---\n" + b"\r\n" * 1_000_000 + b"---\n",
        b"---\nlicense: " + b"x" * 10_000 + b"\n---\n",
        b"",
        b"\xff\xfe" * 1000,
    ],
    ids=["spaces", "spaces in an entry", "no end", "empty lines", "a long name", "empty", "no text"],
)
def test_a_model_card_of_any_content_is_read_at_once(tmp_path: Path, card: bytes) -> None:
    """A regular expression took hours for some of these."""
    (tmp_path / "README.md").write_bytes(card)
    began = time.monotonic()
    assert find_licence(find_documents(tmp_path)) == "unknown"
    assert time.monotonic() - began < 2


def test_a_model_card_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8-sig")
    assert find_licence(find_documents(tmp_path)) == "mit"
