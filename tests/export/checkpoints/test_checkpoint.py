"""What a checkpoint says of itself, and every way in which it cannot be exported."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints import checkpoint as checkpoints
from latentrt_export.families import PIPELINES
from tests.export.skeleton import write_json, write_skeleton, write_weights
from tests.tiny import PREPROCESSOR, SCHEDULERS, model_index

open_checkpoint = functools.partial(checkpoints.open_checkpoint, pipelines=PIPELINES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_skeleton(tmp_path / "model")


def test_what_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == "model"
    assert checkpoint.layout == "diffusers"
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae", "safety_checker"}
    assert checkpoint.scheduler_class == "PNDMScheduler"
    assert checkpoint.scheduler_config["beta_end"] == SCHEDULERS["sd1"]["beta_end"]
    assert not any(key.startswith("_") for key in checkpoint.scheduler_config)
    assert checkpoint.sources["unet/diffusion_pytorch_model.safetensors"].is_file()
    assert len(checkpoint.sources) == 4


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder; expected a diffusers checkpoint .* or a .safetensors"):
        open_checkpoint(tmp_path / "missing")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "file")


def test_no_model_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model_index\.json.*single-file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", "StableDiffusionUpscalePipeline", None, 7])
def test_another_pipeline_names_those_that_are_supported(folder: Path, pipeline: object) -> None:
    write_json(folder / "model_index.json", {**model_index("sd1", with_safety=True), "_class_name": pipeline})
    with pytest.raises(CheckpointError, match=f"holds a {pipeline}; supported are: {', '.join(PIPELINES)}"):
        open_checkpoint(folder)


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
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "holds a list, expected an object"),
    ],
    ids=["cut", "empty", "not-text", "deep", "list"],
)
def test_damaged_json(folder: Path, name: str, content: bytes, expected: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{Path(name).name} {expected}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [name for name in JSON_FILES[1:] if not name.startswith("safety")])
def test_missing_json(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(name).name} cannot be read.*incomplete"):
        open_checkpoint(folder)


def test_a_missing_submodule(folder: Path) -> None:
    for file in (folder / "vae").iterdir():
        file.unlink()
    (folder / "vae").rmdir()
    with pytest.raises(CheckpointError, match="vae is missing"):
        open_checkpoint(folder)


def test_an_index_that_names_no_class(folder: Path) -> None:
    index = {**model_index("sd1", with_safety=True), "safety_checker": {"library": "diffusers"}}
    write_json(folder / "model_index.json", index)
    with pytest.raises(CheckpointError, match=r"says safety_checker: .*expected a library and a class"):
        open_checkpoint(folder)


def test_a_scheduler_without_its_class_is_the_indexs(folder: Path) -> None:
    config = {key: value for key, value in SCHEDULERS["sd1"].items() if key != "_class_name"}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    assert open_checkpoint(folder).scheduler_class == "PNDMScheduler"


# The safety checker


def test_no_safety_checker(tmp_path: Path) -> None:
    assert "safety_checker" not in open_checkpoint(write_skeleton(tmp_path, safety=False)).weights


def test_a_safety_checker_that_the_index_switches_off(folder: Path) -> None:
    write_json(folder / "model_index.json", model_index("sd1", with_safety=False))
    assert "safety_checker" not in open_checkpoint(folder).weights


def test_another_checkpoints_safety_checker(folder: Path, tmp_path: Path) -> None:
    other = write_skeleton(tmp_path / "other")
    checkpoint = open_checkpoint(folder, safety_checker=other)
    assert checkpoint.weights["safety_checker"].root == other
    assert checkpoint.sources["safety_checker/model.safetensors"] == other / "safety_checker" / "model.safetensors"
    assert len(checkpoint.sources) == 4, "of the other checkpoint only its classifier counts"


def test_a_classifiers_own_folder(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "classifier"
    write_json(alone / "config.json", {})
    write_json(alone / "preprocessor_config.json", PREPROCESSOR)
    write_weights(alone / "model.fp16.safetensors")
    found = open_checkpoint(folder, safety_checker=alone).weights["safety_checker"]
    assert (found.root, found.variant) == (alone, "fp16")


@pytest.mark.parametrize(
    ("preprocessor", "words"),
    [
        ({"resample": 2}, r"preprocessor_config\.json: found resample 2, expected 3"),
        ({"size": 336, "crop_size": 336}, r"crops to \(336, 336\), the classifier looks at 224 × 224; the two are not"),
    ],
)
def test_how_a_classifier_sees_is_asked_before_anything_is_exported(
    folder: Path, tmp_path: Path, preprocessor: dict[str, int], words: str
) -> None:
    place = tmp_path / "classifier"
    write_json(place / "config.json", {"vision_config": {}})
    write_json(place / "preprocessor_config.json", preprocessor)
    write_weights(place / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder, safety_checker=place)


@pytest.mark.parametrize("kind", ["missing", "empty", "without preprocessor", "pickle"])
def test_what_is_no_safety_checker_is_refused_before_anything_is_exported(
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
    with pytest.raises(CheckpointError, match=expected.get(kind, "is no safety checker; expected its folder")):
        open_checkpoint(folder, safety_checker=place)


# Names


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache keeps it: links to content-addressed files."""
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
    checkpoint = open_checkpoint(in_hub_cache(folder, tmp_path / "hub"))
    assert checkpoint.name == "some/model@0123abc"
    assert set(checkpoint.weights) == {"text_encoder", "unet", "vae", "safety_checker"}
    assert checkpoint.licence == "cc0-1.0"


def test_a_hub_cache_whose_download_was_interrupted(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is missing.*link"):
        open_checkpoint(snapshot)
