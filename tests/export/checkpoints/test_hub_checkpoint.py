"""Checkpoints from the hub: which files are downloaded, and which checkpoints are refused before large downloads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Manifest
from latentrt.cli.main import main
from latentrt.errors import CheckpointError, HubError, OutputError
from latentrt.hub import HubPath, locate
from latentrt_export.checkpoints.checkpoint import NONE_GIVEN, WantedComponents
from latentrt_export.checkpoints.hub_checkpoint import fetch_inputs
from latentrt_export.checkpoints.single_file import unpack
from latentrt_export.export import export_checkpoint
from latentrt_export.families import PIPELINES
from tests.export.checkpoints.xl_folders import make_xl_checkpoint
from tests.export.fake_worker import FakeWorker, install, write_described
from tests.export.skeleton import (
    change_json,
    write_json,
    write_shards,
    write_skeleton,
    write_weights,
    write_xl_skeleton,
)
from tests.exported import Silent
from tests.hub_server import HubServer, read_folder
from tests.ldm import write_single_file
from tests.tiny import make_checkpoint
from tests.tiny_xl import Kind

NAME = "owner/name"
CHECKPOINT = Path(__file__).parents[3] / "sample" / "checkpoint"
CONFIGS = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "safety_checker/config.json",
}
WEIGHTS = {
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "safety_checker/model.safetensors",
}
# In nearly every repository of the hub, and of no use here.
IGNORED = (
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "text_encoder/pytorch_model.bin",
    "text_encoder/openvino_model.bin",
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "image_encoder/model.safetensors",
    "assets/sample.png",
    ".gitattributes",
)


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return install(monkeypatch, FakeWorker())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Weights of different content, as the cache stores equal files once."""
    folder = write_described(tmp_path / "model")
    for name in WEIGHTS:
        write_weights(folder / name, f"{name}.weight")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with real weights, and the same as a single file beside it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
    write_single_file(folder, folder.parent / "x.safetensors", "sd1")
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Manifest]:
    def call(name: str = NAME, bundle: str = "bundle", **options: Any) -> Manifest:
        return export_checkpoint(locate(name), tmp_path / bundle, progress=Silent(), **options)

    return call


def publish(hub: HubServer, folder: Path, *more: str) -> None:
    hub.add(NAME, {**read_folder(folder), **dict.fromkeys(more, b"not for us")})


def large(hub: HubServer) -> set[str]:
    return {name for name in hub.downloads if not name.endswith((".json", ".txt", ".md"))}


def test_exactly_the_files_of_an_export_are_downloaded(
    hub: HubServer, model: Path, export: Callable[..., Manifest]
) -> None:
    publish(hub, model, *IGNORED)
    manifest = export()
    tokenizer = {f"tokenizer/{path.name}" for path in (model / "tokenizer").iterdir()}
    assert sorted(hub.downloads) == sorted((CONFIGS | WEIGHTS | tokenizer) & read_folder(model).keys())
    assert hub.downloads[0] == "model_index.json"
    source = manifest.source
    assert (source.repository, source.revision) == (NAME, hub.repositories[NAME].refs["main"])
    assert source.name == f"{NAME}@{source.revision}"
    assert manifest.licence.name == "cc0-1.0"


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_both_tokenizers_of_xl_are_downloaded_where_there_are_two(hub: HubServer, tmp_path: Path, kind: Kind) -> None:
    folder = write_xl_skeleton(tmp_path / "model", kind)
    for name in ("tokenizer", "tokenizer_2"):
        write_json(folder / name / "vocab.json", {"name": name})
    for path in folder.rglob("*.safetensors"):
        write_weights(path, f"{path.parent.name}.weight")  # the cache stores equal files once
    if kind == "refiner":
        shutil.rmtree(folder / "tokenizer")
    publish(hub, folder, *IGNORED, "vae_1_0/diffusion_pytorch_model.safetensors")
    fetch_inputs(
        locate(NAME), WantedComponents(), None, pipelines=PIPELINES, refusals={}, variant=None, downloads=Silent()
    )
    assert sorted(hub.downloads) == sorted(read_folder(folder))
    assert "tokenizer_2/vocab.json" in hub.downloads


def test_same_commit_gives_the_same_digest(
    hub: HubServer, model: Path, export: Callable[..., Manifest], tmp_path: Path
) -> None:
    """From a branch, from the commit, and from the folder in the cache."""
    publish(hub, model)
    commit = hub.repositories[NAME].refs["main"]
    export(bundle="one")
    export(f"{NAME}@{commit}", "two")
    (snapshot,) = tmp_path.glob("hub-home/hub/models--owner--name/snapshots/*")
    export(str(snapshot), "three")
    assert len({Bundle.open(tmp_path / name).digest for name in ("one", "two", "three")}) == 1
    export(str(model), "local")
    source = Bundle.open(tmp_path / "local").manifest.source
    assert (source.repository, source.revision) == (None, None)
    assert b"revision" not in (tmp_path / "local" / "bundle.json").read_bytes()


def test_path_that_exists_is_no_repository(
    hub: HubServer, model: Path, export: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, {})
    (tmp_path / "owner").mkdir()
    model.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert export().source.repository is None
    assert hub.seen == []


def test_variants_and_shards(hub: HubServer, model: Path, export: Callable[..., Manifest]) -> None:
    write_skeleton(model, variant="fp16")
    for path in model.rglob("*.fp16.safetensors"):
        write_weights(path, str(path))
    write_shards(model / "unet", "diffusion_pytorch_model", variant="fp16")
    publish(hub, model)
    export(variant="fp16")
    assert large(hub) == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.fp16.safetensors",
    }
    assert "unet/diffusion_pytorch_model.safetensors.index.fp16.json" in hub.downloads


def _keep_index(model: Path) -> None:
    for path in model.rglob("*"):
        if path.is_file() and path.name != "model_index.json":
            path.unlink()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda model: change_json(model / "model_index.json", _class_name="FluxPipeline"), {}, "FluxPipeline"),
        (lambda model: change_json(model / "model_index.json", unet=["diffusers", "Other"]), {}, "Other"),
        (lambda model: shutil.rmtree(model / "unet"), {}, "owner/name/unet is missing"),
        (lambda model: shutil.rmtree(model / "safety_checker"), {}, "--safety-checker"),
        (lambda model: None, {"variant": "fp8"}, "fp8"),
        (lambda model: write_shards(model / "unet", "diffusion_pytorch_model")[1].unlink(), {}, "00002-of-00002"),
        (lambda model: (model / "model_index.json").unlink(), {}, "no model_index.json"),
        (lambda model: _keep_index(model), {}, "is missing"),
        (lambda model: (model / "tokenizer" / "vocab.json").write_bytes(bytes(65 << 20)), {}, "vocab.json has"),
    ],
)
def test_refusals_come_before_the_weights(
    hub: HubServer,
    model: Path,
    export: Callable[..., Manifest],
    tmp_path: Path,
    change: Callable[[Path], None],
    options: dict[str, Any],
    words: str,
) -> None:
    change(model)
    publish(hub, model)
    with pytest.raises(CheckpointError, match=words):
        export(**options)
    assert large(hub) == set()
    assert not (tmp_path / "bundle").exists()


def test_pickles_are_refused_with_the_commands_that_convert_them(
    hub: HubServer, model: Path, export: Callable[..., Manifest]
) -> None:
    """The commands name the same paths, so that they work one after the other in any folder."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    publish(hub, model)
    with pytest.raises(CheckpointError) as caught:
        export()
    commit = hub.repositories[NAME].refs["main"]
    assert "convert(['owner/name/unet/diffusion_pytorch_model.bin']" in str(caught.value).replace("'\"'\"'", "'")
    assert f"hf download {NAME} --revision {commit} --local-dir {NAME}" in str(caught.value)
    assert large(hub) == set()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x.safetensors": b"", "y.safetensors": b""}, "hf://owner/name/x.safetensors, hf://owner/name/y.safetensors"),
        ({"x.ckpt": b"", "README.md": b""}, "is a pickle"),
        ({"bundle.json": b"{}"}, "latentrt pull owner/name"),
        ({"config.json": b"{}", "README.md": b""}, "it has README.md, config.json"),
        ({}, "it has no files"),
    ],
)
def test_repository_without_a_folder_of_diffusers(
    hub: HubServer, export: Callable[..., Manifest], files: dict[str, bytes], words: str
) -> None:
    hub.add(NAME, files)
    with pytest.raises(CheckpointError, match=words):
        export()


def test_single_file_with_the_repository_s_licence(hub: HubServer, tiny: Path, export: Callable[..., Manifest]) -> None:
    texts = {"LICENSE": b"Do what you like.", "README.md": b"---\nlicense: mit\n---\n"}
    file = (tiny.parent / "x.safetensors").read_bytes()
    hub.add(NAME, {**texts, "x.safetensors": file, "x.ckpt": b"", "other.safetensors": b""})
    manifest = export(f"hf://{NAME}/x.safetensors", config=tiny)
    assert set(hub.downloads) == {"x.safetensors", "LICENSE", "README.md"}
    assert (manifest.source.layout, manifest.source.repository) == ("single-file", NAME)
    assert (manifest.licence.name, manifest.licence.file) == ("mit", "LICENSE")
    assert list(manifest.source.weights) == ["x.safetensors"]
    address = f"{hub.url}/{NAME}/blob/main/x.safetensors"
    assert export(address, "again", config=tiny).source == manifest.source


@pytest.mark.parametrize(
    ("path", "words"),
    [("x.ckpt", "hf download"), ("nowhere.safetensors", "neither a file nor a folder"), ("a/b", "neither")],
)
def test_wrong_files(hub: HubServer, export: Callable[..., Manifest], path: str, words: str) -> None:
    hub.add(NAME, {"x.ckpt": b"\x80\x04."})
    with pytest.raises(CheckpointError, match=words):
        export(f"hf://{NAME}/{path}")
    assert hub.downloads == []


def test_checkpoint_in_a_folder_of_a_repository(
    hub: HubServer, model: Path, export: Callable[..., Manifest], tmp_path: Path
) -> None:
    (model / "README.md").rename(tmp_path / "README.md")
    files = {f"models/one/{name}": data for name, data in read_folder(model).items()}
    hub.add(NAME, {**files, "README.md": (tmp_path / "README.md").read_bytes(), "models/two/x.safetensors": b""})
    manifest = export(f"hf://{NAME}/models/one")
    assert manifest.source.repository == NAME
    assert manifest.licence.name == "cc0-1.0"
    assert large(hub) == {f"models/one/{name}" for name in WEIGHTS}


def test_components_beside_the_checkpoint(
    hub: HubServer, model: Path, export: Callable[..., Manifest], tmp_path: Path
) -> None:
    other = write_skeleton(tmp_path / "other")
    tiny = tmp_path / "preview"
    write_weights(other / "vae" / "diffusion_pytorch_model.safetensors", "another")
    write_json(tiny / "config.json", {"_class_name": "AutoencoderTiny"})
    write_weights(tiny / "diffusion_pytorch_model.safetensors", "a_third")
    publish(hub, model)
    hub.add("other/whole", other)
    hub.add("other/tiny", {**read_folder(tiny), "model.ckpt": b""})
    given = WantedComponents(
        vae=HubPath("other/whole"), safety_checker=HubPath("other/whole"), preview_decoder=HubPath("other/tiny")
    )
    export(given=given)
    places = [each.path for each in hub.seen if each.method == "GET" and "/content/" in each.path]
    found = {(path.split("/")[2], path.split("/", 5)[5]) for path in places}
    assert found == {
        ("other--whole", "vae/diffusion_pytorch_model.safetensors"),
        ("other--whole", "safety_checker/model.safetensors"),
        ("other--tiny", "diffusion_pytorch_model.safetensors"),
        ("owner--name", "text_encoder/model.safetensors"),
        ("owner--name", "unet/diffusion_pytorch_model.safetensors"),
    }


@pytest.mark.parametrize("option", ["vae", "safety_checker", "preview_decoder"])
def test_repository_of_something_else_as_a_component(
    hub: HubServer, model: Path, export: Callable[..., Manifest], option: str
) -> None:
    hub.add("other/lora", {"lora.safetensors": b""})
    with pytest.raises(CheckpointError, match=r"other/lora is not an? .*; it has lora.safetensors"):
        export(str(model), given=WantedComponents(**{option: HubPath("other/lora")}))


def test_configurations_of_a_single_file(hub: HubServer, tiny: Path, export: Callable[..., Manifest]) -> None:
    publish(hub, tiny)
    export(str(tiny.parent / "x.safetensors"), config=HubPath(NAME))
    assert large(hub) == set()
    assert {"unet/config.json", "scheduler/scheduler_config.json"} <= {*hub.downloads}


def test_configurations_of_a_single_file_of_stable_diffusion_xl(hub: HubServer, tmp_path: Path) -> None:
    folder = make_xl_checkpoint(tmp_path / "xl")
    publish(hub, folder)
    file = write_single_file(folder, tmp_path / "x.safetensors", "xl")
    inputs = fetch_inputs(file, NONE_GIVEN, HubPath(NAME), pipelines={}, refusals={}, variant=None, downloads=Silent())
    assert inputs.config is not None
    assert large(hub) == set()
    unpack(file, tmp_path / "unpacked", config=inputs.config)
    assert (tmp_path / "unpacked" / "tokenizer_2" / "merges.txt").is_file()


def test_second_export_works_offline(
    hub: HubServer, model: Path, export: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, model)
    export()
    hub.seen.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    export(bundle="again")
    assert hub.seen == []
    assert Bundle.open(tmp_path / "again").digest == Bundle.open(tmp_path / "bundle").digest
    with pytest.raises(HubError, match="offline"):
        export("other/name", "third")


def test_command_line_with_the_sample_checkpoint(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/shapes", {**read_folder(CHECKPOINT), **dict.fromkeys(IGNORED, b"not for us")})
    given = ["--preview-decoder", "hf://owner/shapes/preview_decoder", "--safety-checker", "owner/shapes@main"]
    with pytest.raises(SystemExit) as end:
        main(["export", "owner/shapes", str(tmp_path / "bundle"), *given])
    assert end.value.code == 0
    assert {*hub.downloads} == {name for name in read_folder(CHECKPOINT) if not name.startswith("tokenizer/.")}
    output = capsys.readouterr()
    assert "owner/shapes, " in output.err
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "bundle")])
    source = Bundle.open(tmp_path / "bundle").manifest.source
    assert f"repository    owner/shapes, commit {source.revision}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["export", "owner/nowhere", str(tmp_path / "other")])
    assert end.value.code == 10
    assert capsys.readouterr().err.startswith("error: owner/nowhere is no local folder or file, and")


def test_text_that_is_neither_says_both_readings(hub: HubServer, export: Callable[..., Manifest]) -> None:
    with pytest.raises(HubError, match=r"no local folder or file.*the hub has no repository"):
        export("owner/nowhere")
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        export("nowhere")
    assert [each.path for each in hub.seen] == ["/api/models/owner/nowhere"]


def test_existing_destination_is_refused_before_a_download(
    hub: HubServer, export: Callable[..., Manifest], tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputError):
        export()
    assert hub.seen == []
