from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.manifest_checks import named_files
from latentrt.bundle.manifest_json import decode_manifest, encode_manifest
from latentrt.errors import ManifestError
from tests.runtime.small_bundle import FILES, manifest, write_bundle


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    return json.loads(encode_manifest(manifest(write_bundle(tmp_path / "bundle"))))


def refusal(tree: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        decode_manifest(json.dumps(tree).encode())
    assert "expected" in str(caught.value)
    assert "latentrt export" in str(caught.value)
    return str(caught.value)


def test_every_file_has_a_role(tree: Any) -> None:
    roles = dict(named_files(decode_manifest(json.dumps(tree).encode())))
    assert set(roles) == set(FILES)
    assert roles["unet/model.safetensors"] == "the weights of unet"


@pytest.mark.parametrize(
    "path",
    [
        "../elsewhere",
        "unet/../../elsewhere",
        "unet/..",
        "..",
        ".",
        "./LICENSE",
        "unet/./model.onnx",
        "/etc/passwd",
        "//server/share",
        "unet//model.onnx",
        "unet/",
        "unet\\model.onnx",
        "..\\elsewhere",
        "C:/windows",
        "C:windows",
        "LICENSE:stream",
        "bundle.json",
        "Bundle.JSON",
        "a\0b",
        "a\nb",
        "a\x1b[2Jb",
        "a\u202eb",
        "a\ud800b",
    ],
)
def test_a_path_that_no_bundle_may_name(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    message = refusal(tree)
    assert repr(path) in message
    assert message.isprintable()


@pytest.mark.parametrize("path", ["", "a" * 1025])
def test_a_path_of_impossible_length(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    assert "length" in refusal(tree)


@pytest.mark.parametrize("path", ["weights/größe.safetensors", "a b/c d", "...", "..a", ".hidden"])
def test_an_unusual_path_that_is_fine(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    assert path in decode_manifest(json.dumps(tree).encode()).files


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_role_that_is_not_pinned(tree: Any, name: str) -> None:
    del tree["files"][name]
    assert "not pinned" in refusal(tree)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_a_missing_component(tree: Any, name: str) -> None:
    del tree["components"][name]
    assert f"expected {name} among them" in refusal(tree)


def test_a_bundle_without_classifier_is_a_bundle(tree: Any) -> None:
    del tree["components"]["safety_checker"]
    decode_manifest(json.dumps(tree).encode())


def test_no_graph_for_the_precision(tree: Any) -> None:
    assert "float16" in refusal(tree | {"precision": "float16"})


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_name_twice_in_a_signature(tree: Any, kind: str) -> None:
    tree["components"]["unet"][kind] *= 2
    assert "each name once" in refusal(tree)


def test_a_component_without_outputs(tree: Any) -> None:
    tree["components"]["unet"]["outputs"] = []
    assert "at least one" in refusal(tree)


def test_a_gate_that_was_missed(tree: Any) -> None:
    tree["components"]["unet"]["graphs"]["float32"]["gate"][0]["figure"] = 1.0
    assert "missed its gate" in refusal(tree)


STAGE = {"inputs": ["features"], "outputs": ["result"]}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"head": STAGE, "stage.1": STAGE}, r"has the stages ['stage.1'], expected ['stage.0']"),
        ({"stage.0": STAGE}, "has stages behind [], expected head alone, or head, attention and neck"),
        ({"head": STAGE, "neck": STAGE, "stage.0": STAGE}, "has stages behind ['head', 'neck']"),
        ({"head": STAGE, "stage.0": {"inputs": ["rows"], "outputs": ["result"]}}, "stage.0 part is no stage"),
        ({"head": STAGE, "stage.0": {"inputs": ["features"], "outputs": ["a", "b"]}}, "and one output"),
    ],
)
def test_slices_that_cannot_be_run(tree: Any, parts: dict[str, dict[str, list[str]]], words: str) -> None:
    decoder = tree["components"]["vae_decoder"]
    for name, sides in parts.items():
        specs = {
            side: [{"name": each, "dtype": "float32", "shape": ["batch"]} for each in sides[side]] for side in sides
        }
        decoder.setdefault("parts", {})[name] = {**specs, "graphs": decoder["graphs"]}
    assert words in refusal(tree)


@pytest.mark.parametrize("name", ["sliced", "stage.", "stage.01", "stage.100", "Head", "head.0"])
def test_a_part_of_another_name(tree: Any, name: str) -> None:
    decoder = tree["components"]["vae_decoder"]
    decoder["parts"] = {name: {key: decoder[key] for key in ("inputs", "outputs", "graphs")}}
    assert "parts" in refusal(tree)


@pytest.mark.parametrize(
    ("side", "pixels", "words"), [("height", 60, "multiple"), ("width", 8, "within"), ("width", 136, "within")]
)
def test_a_default_size_that_cannot_be_drawn(tree: Any, side: str, pixels: int, words: str) -> None:
    tree["defaults"][side] = pixels
    assert words in refusal(tree)


def test_more_default_steps_than_allowed(tree: Any) -> None:
    tree["defaults"]["num_inference_steps"] = 101
    assert "101 steps" in refusal(tree)
